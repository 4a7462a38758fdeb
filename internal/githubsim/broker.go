package githubsim

import (
	"errors"
	"net/http"
)

// The runner's sessions: the old front door (V1), which sends every runner on to the broker, and the broker (V2).

func (s *Server) routeBroker(mux *http.ServeMux) {
	mux.HandleFunc("GET /tenant/_apis/connectionData", s.serveConnectionData)
	mux.HandleFunc("POST /tenant/_apis/distributedtask/pools/{pool}/sessions", s.asRunner(s.serveOldSession))
	mux.HandleFunc("DELETE /tenant/_apis/distributedtask/pools/{pool}/sessions/{session}", s.asRunner(
		func(w http.ResponseWriter, _ *http.Request, _ string) { w.WriteHeader(http.StatusNoContent) }))
	mux.HandleFunc("POST /broker/session", s.asRunner(s.serveRunnerSession))
	mux.HandleFunc("DELETE /broker/session", s.asRunner(s.serveEndRunnerSession))
	mux.HandleFunc("GET /broker/message", s.asRunner(s.serveRunnerMessage))
	mux.HandleFunc("POST /broker/acknowledge", s.asRunner(s.serveAcknowledge))
}

// services are the routes runners look up in the connection data, by their fixed ids.
func services() []any {
	var list []any
	for _, d := range []struct{ id, name, path string }{
		{"134e239e-2df3-4794-a6f6-24f1f19ec8dc", "sessions", "/_apis/{area}/pools/{poolId}/{resource}/{sessionId}"},
		{"e298ef32-5878-4cab-993c-043836571f42", "agents", "/_apis/{area}/pools/{poolId}/{resource}/{agentId}"},
		{"a8c47e17-4d56-4a56-92bb-de7ea7dc65be", "pools", "/_apis/{area}/{resource}/{poolId}"},
	} {
		list = append(list, map[string]any{
			"serviceType": "distributedtask", "identifier": d.id, "displayName": d.name, "relativeToSetting": "fullyQualified",
			"relativePath": d.path, "minVersion": "1.0", "maxVersion": "12.0", "resourceVersion": 1, "releasedVersion": "0.0",
		})
	}
	return list
}

// serveConnectionData tells runners, and those that are about to register themselves, where things are.
func (s *Server) serveConnectionData(w http.ResponseWriter, r *http.Request) {
	token := bearer(r, "Bearer")
	clientID, runs := s.creds.check(credRunner, token)
	if _, registers := s.adminDomainOf(token); !registers && (!runs || s.hub.clientKey(clientID) == nil) {
		writeError(w, errUnauthorized())
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{
		"instanceId": newUUID(), "locationServiceData": map[string]any{"serviceDefinitions": services()},
	})
}

// serveOldSession answers a V1 session with the order to go to the broker.
func (s *Server) serveOldSession(w http.ResponseWriter, _ *http.Request, _ string) {
	writeJSON(w, http.StatusOK, map[string]any{
		"sessionId": newUUID(), "brokerMigrationMessage": map[string]any{"brokerBaseUrl": s.cfg.URL + "/broker/"},
	})
}

// serveRunnerSession opens the runner's session. It has no encryption key: messages go as they are.
func (s *Server) serveRunnerSession(w http.ResponseWriter, r *http.Request, clientID string) {
	var ignored struct{}
	if err := readJSON(w, r, &ignored); err != nil {
		writeError(w, err)
		return
	}
	session, x, err := s.hub.openRunnerSession(clientID)
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{
		"sessionId": session, "ownerName": "RUNNER", "agent": map[string]any{"id": x.id, "name": x.name}, "useFipsEncryption": false,
	})
}

func (s *Server) serveEndRunnerSession(w http.ResponseWriter, _ *http.Request, clientID string) {
	s.hub.closeRunnerSession(clientID)
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) serveRunnerMessage(w http.ResponseWriter, r *http.Request, clientID string) {
	msg, err := s.hub.nextRunnerMessage(r.Context(), clientID, r.URL.Query().Get("sessionId"))
	switch {
	case errors.Is(err, errVersion):
		writeVersionError(w)
	case err != nil:
		writeError(w, err)
	case msg == nil:
		w.WriteHeader(http.StatusAccepted)
	default:
		writeJSON(w, http.StatusOK, msg)
	}
}

func (s *Server) serveAcknowledge(w http.ResponseWriter, r *http.Request, clientID string) {
	var in struct {
		RunnerRequestID string `json:"runnerRequestId"`
	}
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	s.hub.acknowledge(clientID, in.RunnerRequestID)
	writeJSON(w, http.StatusOK, map[string]any{})
}
