package githubsim

import (
	"net/http"
	"slices"
)

// Runs and jobs: looked at, run again, cancelled.

func (s *Server) routeRuns(route router) {
	actions := inRepo + "/actions"
	route("GET", actions+"/jobs/{id}", s.may("actions", "read", s.serveJob))
	route("POST", actions+"/jobs/{id}/rerun", s.may("actions", "write", s.serveRerunJob))
	route("GET", actions+"/runs", s.may("actions", "read", s.serveRuns))
	route("GET", actions+"/runs/{id}", s.may("actions", "read", s.serveRun))
	route("GET", actions+"/runs/{id}/jobs", s.may("actions", "read", s.serveRunJobs))
	route("GET", actions+"/runs/{id}/attempts/{attempt}/jobs", s.may("actions", "read", s.serveRunJobs))
	route("POST", actions+"/runs/{id}/cancel", s.may("actions", "write", s.serveCancelRun((*hub).cancelRun)))
	route("POST", actions+"/runs/{id}/force-cancel", s.may("actions", "write", s.serveCancelRun((*hub).forceCancelRun)))
}

// runIn returns the run a request names, of its repository. The caller holds the lock.
func (s *Server) runIn(r *http.Request) (*Run, error) {
	repo := s.hub.repository(r.PathValue("repo"))
	for _, run := range s.hub.runs {
		if run.id == pathID(r) && run.repo == repo {
			return run, nil
		}
	}
	return nil, errNotFound("Not Found")
}

// jobIn returns the job a request names, of any attempt of a run of its repository. A job that waits for others does not
// exist yet. The caller holds the lock.
func (s *Server) jobIn(r *http.Request) (*job, error) {
	repo := s.hub.repository(r.PathValue("repo"))
	for _, j := range s.hub.jobs {
		if j.number == pathID(r) && j.run.repo == repo && j.state != jobWaiting {
			return j, nil
		}
	}
	return nil, errNotFound("Not Found")
}

func (s *Server) serveJob(w http.ResponseWriter, r *http.Request) {
	var v any
	var err error
	s.hub.read(func() {
		var j *job
		if j, err = s.jobIn(r); err == nil {
			v = s.hub.jobView(j)
		}
	})
	answer(w, http.StatusOK, v, err)
}

func (s *Server) serveRuns(w http.ResponseWriter, r *http.Request) {
	q, repo := r.URL.Query(), s.hub.repository(r.PathValue("repo"))
	var all []map[string]any
	s.hub.read(func() {
		for _, run := range slices.Backward(s.hub.runs) {
			status := q.Get("status")
			is := status == "" || status == run.restStatus() || (run.over && status == string(run.conclusion))
			if event := q.Get("event"); run.repo == repo && is && (event == "" || event == run.event) {
				all = append(all, s.hub.runView(run))
			}
		}
	})
	s.page(w, r, "workflow_runs", all)
}

func (s *Server) serveRun(w http.ResponseWriter, r *http.Request) {
	var v any
	var err error
	s.hub.read(func() {
		var run *Run
		if run, err = s.runIn(r); err == nil {
			v = s.hub.runView(run)
		}
	})
	answer(w, http.StatusOK, v, err)
}

// serveRunJobs lists the jobs of a run's newest attempt, of all with filter=all, or of the one in the path.
func (s *Server) serveRunJobs(w http.ResponseWriter, r *http.Request) {
	attempt := atoi(r.PathValue("attempt"), 0)
	var all []map[string]any
	var err error
	s.hub.read(func() {
		var run *Run
		if run, err = s.runIn(r); err != nil {
			return
		}
		jobs := run.jobs
		if attempt > 0 || r.URL.Query().Get("filter") == "all" {
			jobs = slices.Concat(run.earlier, run.jobs)
		}
		if attempt > run.attempt {
			err = errNotFound("Not Found")
		}
		for _, j := range jobs {
			if j.state != jobWaiting && (attempt == 0 || j.attempt == attempt) {
				all = append(all, s.hub.jobView(j))
			}
		}
	})
	if err != nil {
		writeError(w, err)
		return
	}
	s.page(w, r, "jobs", all)
}

func (s *Server) serveRerunJob(w http.ResponseWriter, r *http.Request) {
	var err error
	s.hub.change(func() {
		var j *job
		if j, err = s.jobIn(r); err == nil {
			err = s.hub.rerun(j)
		}
	})
	answer(w, http.StatusCreated, map[string]any{}, err)
}

func (s *Server) serveCancelRun(cancel func(*hub, *Run)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var err error
		s.hub.change(func() {
			var run *Run
			if run, err = s.runIn(r); err != nil {
				return
			}
			if run.over {
				err = &apiError{http.StatusConflict, "ConflictException", "Cannot cancel a workflow run that is completed."}
				return
			}
			cancel(s.hub, run)
		})
		answer(w, http.StatusAccepted, map[string]any{}, err)
	}
}
