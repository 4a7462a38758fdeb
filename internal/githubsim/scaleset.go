package githubsim

import (
	"fmt"
	"net/http"
	"strings"
)

// The scale set API: what a coordinator talks to once runner-registration has let it in.

const scaleSetsPath = "/tenant/_apis/runtime/runnerscalesets"

func (s *Server) routeScaleSets(mux *http.ServeMux) {
	mux.HandleFunc("GET /tenant/_apis/runtime/runnergroups/", s.asAdmin(s.serveGroups))
	mux.HandleFunc("GET /tenant/_apis/runtime/runnergroups", s.asAdmin(s.serveGroups))
	mux.HandleFunc("GET "+scaleSetsPath, s.asAdmin(s.serveFindSets))
	mux.HandleFunc("POST "+scaleSetsPath, s.asAdmin(s.serveCreateSet))
	mux.HandleFunc("GET "+scaleSetsPath+"/{id}", s.asAdmin(s.serveSet))
	mux.HandleFunc("PATCH "+scaleSetsPath+"/{id}", s.asAdmin(s.serveUpdateSet))
	mux.HandleFunc("DELETE "+scaleSetsPath+"/{id}", s.asAdmin(s.serveDeleteSet))
	mux.HandleFunc("POST "+scaleSetsPath+"/{id}/sessions", s.asAdmin(s.serveOpenSession))
	mux.HandleFunc("PATCH "+scaleSetsPath+"/{id}/sessions/{session}", s.asAdmin(s.serveRefreshSession))
	mux.HandleFunc("DELETE "+scaleSetsPath+"/{id}/sessions/{session}", s.asAdmin(s.serveCloseSession))
	mux.HandleFunc("POST "+scaleSetsPath+"/{id}/generatejitconfig", s.asAdmin(s.serveJIT))
	mux.HandleFunc("POST "+scaleSetsPath+"/{id}/acquirejobs", s.serveAcquire)
	mux.HandleFunc("GET /queue/{id}/{session}", s.asSession(s.serveMessage))
	mux.HandleFunc("DELETE /queue/{id}/{session}/{message}", s.asSession(s.serveDeleteMessage))
	mux.HandleFunc("GET /tenant/_apis/distributedtask/pools", s.asAdmin(s.servePools))
	mux.HandleFunc("POST /tenant/_apis/distributedtask/pools/{pool}/agents", s.asAdmin(s.serveAddAgent))
	mux.HandleFunc("GET /tenant/_apis/distributedtask/pools/{pool}/agents", s.asAdmin(s.serveFindAgents))
	mux.HandleFunc("GET /tenant/_apis/distributedtask/pools/{pool}/agents/{id}", s.asAdmin(s.serveAgent))
	mux.HandleFunc("DELETE /tenant/_apis/distributedtask/pools/{pool}/agents/{id}", s.asAdmin(s.serveDeleteRunner))
}

func (s *Server) serveGroups(w http.ResponseWriter, r *http.Request) {
	groups, name := []any{}, r.URL.Query().Get("groupName")
	s.hub.read(func() {
		for _, g := range s.hub.groupsOf(domainIn(r)) {
			if name == "" || strings.EqualFold(name, g.name) {
				groups = append(groups, map[string]any{"id": g.id, "name": g.name, "isDefaultGroup": g.id == groupID})
			}
		}
	})
	writeJSON(w, http.StatusOK, map[string]any{"count": len(groups), "value": groups})
}

type scaleSetBody struct {
	Name    string `json:"name"`
	GroupID int64  `json:"runnerGroupId"`
	Labels  []struct {
		Name string `json:"name"`
	} `json:"labels"`
	Setting struct {
		DisableUpdate bool `json:"disableUpdate"`
	} `json:"RunnerSetting"`
}

func pathID(r *http.Request) int64 { return int64(atoi(r.PathValue("id"), 0)) }

// view renders a scale set. The caller holds the hub's lock.
func (s *Server) view(set *scaleSet) map[string]any {
	labels := []any{}
	for _, l := range set.labels {
		labels = append(labels, map[string]any{"name": l, "type": "System"})
	}
	return map[string]any{
		"id": set.id, "name": set.name, "runnerGroupId": set.group.id, "runnerGroupName": set.group.name, "labels": labels,
		"RunnerSetting": map[string]any{"disableUpdate": set.disableUpdate}, "createdOn": timestamp(set.created),
		"runnerJitConfigUrl": fmt.Sprintf("%s%s/%d/generatejitconfig", s.cfg.URL, scaleSetsPath, set.id),
		"statistics":         s.hub.told(set),
	}
}

func (s *Server) serveFindSets(w http.ResponseWriter, r *http.Request) {
	name, found := r.URL.Query().Get("name"), []any{}
	group := int64(atoi(r.URL.Query().Get("runnerGroupId"), 0))
	s.hub.read(func() {
		for _, set := range s.hub.sets {
			if set.domain == domainIn(r) && (group == 0 || group == set.group.id) && (name == "" || strings.EqualFold(set.name, name)) {
				found = append(found, s.view(set))
			}
		}
	})
	writeJSON(w, http.StatusOK, map[string]any{"count": len(found), "value": found})
}

// answerSet answers with one scale set as it is now.
func (s *Server) answerSet(w http.ResponseWriter, id int64) {
	var v any
	var err error
	s.hub.read(func() {
		var set *scaleSet
		if set, err = s.hub.set(id); err == nil {
			v = s.view(set)
		}
	})
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, v)
}

func (s *Server) serveSet(w http.ResponseWriter, r *http.Request) { s.answerSet(w, pathID(r)) }

func (s *Server) serveCreateSet(w http.ResponseWriter, r *http.Request) {
	var in scaleSetBody
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	if in.GroupID == 0 {
		in.GroupID = groupID
	}
	var labels []string
	for _, l := range in.Labels {
		labels = append(labels, l.Name)
	}
	set, err := s.hub.createSet(domainIn(r), in.GroupID, in.Name, labels, in.Setting.DisableUpdate)
	if err != nil {
		writeError(w, err)
		return
	}
	s.answerSet(w, set.id)
}

// serveUpdateSet changes name and settings. Labels stay: they are settable at creation only.
func (s *Server) serveUpdateSet(w http.ResponseWriter, r *http.Request) {
	var in scaleSetBody
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	s.hub.change(func() {
		if set, err := s.hub.set(pathID(r)); err == nil {
			if in.Name != "" {
				set.name = in.Name
			}
			set.disableUpdate = in.Setting.DisableUpdate
		}
	})
	s.answerSet(w, pathID(r))
}

func (s *Server) serveDeleteSet(w http.ResponseWriter, r *http.Request) {
	if err := s.hub.deleteSet(pathID(r)); err != nil {
		writeError(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) serveOpenSession(w http.ResponseWriter, r *http.Request) {
	var in struct {
		OwnerName string `json:"ownerName"`
	}
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	session, err := s.hub.openSession(pathID(r), clip(in.OwnerName, maxName))
	if err != nil {
		writeError(w, err)
		return
	}
	s.answerSession(w, pathID(r), session)
}

func (s *Server) serveRefreshSession(w http.ResponseWriter, r *http.Request) {
	s.answerSession(w, pathID(r), r.PathValue("session"))
}

// answerSession answers with a session and a fresh token for its queue.
func (s *Server) answerSession(w http.ResponseWriter, id int64, session string) {
	var out map[string]any
	var err error
	s.hub.read(func() {
		var set *scaleSet
		if set, err = s.hub.checkSession(id, session); err == nil {
			out = map[string]any{
				"sessionId": session, "ownerName": set.owner, "runnerScaleSet": s.view(set), "statistics": s.hub.told(set),
				"messageQueueUrl": fmt.Sprintf("%s/queue/%d/%s", s.cfg.URL, id, session),
			}
		}
	})
	if err != nil {
		writeError(w, err)
		return
	}
	out["messageQueueAccessToken"] = s.creds.issue(credQueue, session, s.cfg.QueueToken)
	writeJSON(w, http.StatusOK, out)
}

func (s *Server) serveCloseSession(w http.ResponseWriter, r *http.Request) {
	if err := s.hub.closeSession(pathID(r), r.PathValue("session")); err != nil {
		writeError(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// asSession lets a request through that carries the queue token of the session in its path.
func (s *Server) asSession(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if session, ok := s.creds.check(credQueue, bearer(r, "Bearer")); !ok || session != r.PathValue("session") {
			writeError(w, &apiError{http.StatusUnauthorized, "MessageQueueTokenExpiredException", "the message queue token is not valid, or no more"})
			return
		}
		next(w, r)
	}
}

// headerMaxCapacity says how many jobs the poller could hold at the same time.
const headerMaxCapacity = "X-ScaleSetMaxCapacity"

func (s *Server) serveMessage(w http.ResponseWriter, r *http.Request) {
	capacity := atoi(r.Header.Get(headerMaxCapacity), 1<<30)
	msg, err := s.hub.nextMessage(r.Context(), pathID(r), r.PathValue("session"), capacity)
	switch {
	case err != nil:
		writeError(w, err)
	case msg == nil:
		w.WriteHeader(http.StatusAccepted)
	default:
		writeJSON(w, http.StatusOK, msg)
	}
}

func (s *Server) serveDeleteMessage(w http.ResponseWriter, r *http.Request) {
	if err := s.hub.deleteMessage(pathID(r), r.PathValue("session"), atoi(r.PathValue("message"), 0)); err != nil {
		writeError(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) serveAcquire(w http.ResponseWriter, r *http.Request) {
	session, ok := s.creds.check(credQueue, bearer(r, "Bearer"))
	if !ok {
		writeError(w, &apiError{http.StatusUnauthorized, "MessageQueueTokenExpiredException", "the message queue token is not valid, or no more"})
		return
	}
	var ids []int64
	if err := readJSON(w, r, &ids); err != nil {
		writeError(w, err)
		return
	}
	got, err := s.hub.acquire(pathID(r), session, ids)
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"count": len(got), "value": got})
}

// serveJIT registers an ephemeral runner and hands out its credentials, the private key among them.
func (s *Server) serveJIT(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Name       string `json:"name"`
		WorkFolder string `json:"workFolder"`
	}
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	key, err := s.keys.key()
	if err != nil {
		writeError(w, err)
		return
	}
	x, err := s.hub.register(registration{set: pathID(r), name: in.Name, key: &key.PublicKey, ephemeral: true})
	if err != nil {
		writeError(w, err)
		return
	}
	jit, err := s.encodeJIT(x, key, in.WorkFolder)
	if err != nil {
		_ = s.hub.removeRunner(x.domain, x.id) // it was made a moment ago and has no job
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"runner": agentView(x.id, x.name, x.setID()), "encodedJITConfig": jit})
}

func agentView(id int64, name string, set int64) map[string]any {
	return map[string]any{"id": id, "name": name, "runnerScaleSetId": set}
}

func (s *Server) serveFindAgents(w http.ResponseWriter, r *http.Request) {
	name, found := r.URL.Query().Get("agentName"), []any{}
	s.hub.read(func() {
		for _, x := range s.hub.runners {
			if x.domain == domainIn(r) && (name == "" || strings.EqualFold(x.name, name)) {
				found = append(found, agentView(x.id, x.name, x.setID()))
			}
		}
	})
	writeJSON(w, http.StatusOK, map[string]any{"count": len(found), "value": found})
}

func (s *Server) serveAgent(w http.ResponseWriter, r *http.Request) {
	id := pathID(r)
	var found map[string]any
	s.hub.read(func() {
		if x := s.hub.findRunner(func(x *runner) bool { return x.id == id && x.domain == domainIn(r) }); x != nil {
			found = agentView(x.id, x.name, x.setID())
		}
	})
	if found == nil {
		writeError(w, &apiError{http.StatusNotFound, "AgentNotFoundException", "no such runner"})
		return
	}
	writeJSON(w, http.StatusOK, found)
}
