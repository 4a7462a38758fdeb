package githubsim

import (
	"net/http"
	"time"
)

// The run service: a runner acquires its job, keeps its lease, and completes it.

const (
	// jobTokenLife covers the longest job and a little more. What the token may touch is one job.
	jobTokenLife = maxTimeout*time.Minute + time.Hour
)

func (s *Server) routeRunService(mux *http.ServeMux) {
	mux.HandleFunc("POST /run/acquirejob", s.asRunner(s.serveAcquireJob))
	mux.HandleFunc("POST /run/renewjob", s.asJob(s.serveRenewJob))
	mux.HandleFunc("POST /run/completejob", s.asJob(s.serveCompleteJob))
}

// asJob lets a request through that carries a job's token, and says which job's.
func (s *Server) asJob(next func(w http.ResponseWriter, r *http.Request, jobID string)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		jobID, ok := s.creds.check(credJob, bearer(r, "Bearer"))
		if !ok {
			writeError(w, errUnauthorized())
			return
		}
		next(w, r, jobID)
	}
}

func (s *Server) serveAcquireJob(w http.ResponseWriter, r *http.Request, clientID string) {
	var in struct {
		JobMessageID string `json:"jobMessageId"`
	}
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	j, err := s.hub.begin(clientID, in.JobMessageID)
	if err != nil {
		writeError(w, err)
		return
	}
	var out map[string]any
	s.hub.read(func() { out, err = s.hub.jobRequest(j, s.creds.issue(credJob, j.id, jobTokenLife)) })
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, out)
}

func (s *Server) serveRenewJob(w http.ResponseWriter, r *http.Request, jobID string) {
	var in struct {
		JobID string `json:"jobId"`
	}
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	if in.JobID != jobID {
		writeError(w, errForbidden("the token is another job's"))
		return
	}
	until, err := s.hub.renew(jobID)
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"lockedUntil": until.UTC().Format(time.RFC3339Nano)})
}

func (s *Server) serveCompleteJob(w http.ResponseWriter, r *http.Request, jobID string) {
	var in struct {
		JobID      string `json:"jobId"`
		Conclusion string `json:"conclusion"`
		Outputs    map[string]struct {
			Value string `json:"value"`
		} `json:"outputs"`
	}
	err := readJSON(w, r, &in)
	if err == nil && in.JobID != jobID {
		err = errForbidden("the token is another job's")
	}
	conclusion, badConclusion := conclusionOf(in.Conclusion)
	if err == nil {
		err = badConclusion
	}
	if err != nil {
		writeError(w, err)
		return
	}
	outputs, size := map[string]string{}, 0
	for k, v := range in.Outputs {
		if size += len(k) + len(v.Value); size <= maxOutputBytes {
			outputs[k] = v.Value
		}
	}
	s.hub.drain(r.Context(), jobID)
	if err := s.hub.complete(jobID, conclusion, outputs); err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{})
}
