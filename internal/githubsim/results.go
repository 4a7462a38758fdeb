package githubsim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// The results service: Twirp calls in JSON, and PUTs of logs to the addresses it signs.

const (
	uploadTokenLife = 10 * time.Minute
	maxUpload       = 64 << 20 // bytes of one PUT
)

func (s *Server) routeResults(mux *http.ServeMux) {
	const receiver = "POST /results/twirp/results.services.receiver.Receiver/"
	for method, kind := range map[string]blobKind{"GetJobLogsSignedBlobURL": jobLog, "GetStepLogsSignedBlobURL": stepLog, "GetStepSummarySignedBlobURL": stepSummary} {
		mux.HandleFunc(receiver+method, s.asJob(func(w http.ResponseWriter, r *http.Request, jobID string) { s.serveSignedURL(w, r, jobID, kind) }))
	}
	for _, method := range []string{"CreateJobLogsMetadata", "CreateStepLogsMetadata", "CreateStepSummaryMetadata"} {
		mux.HandleFunc(receiver+method, s.asJob(s.serveMetadata))
	}
	mux.HandleFunc("POST /results/twirp/github.actions.results.api.v1.WorkflowStepUpdateService/WorkflowStepsUpdate", s.asJob(s.serveStepsUpdate))
	mux.HandleFunc("PUT /blobs/{id}", s.serveUpload)
}

// backendIDs are how a runner names its job and step in every call.
type backendIDs struct {
	Job  string `json:"workflow_job_run_backend_id"`
	Step string `json:"step_backend_id"`
}

func (b backendIDs) check(jobID string) error {
	if b.Job != jobID {
		return errForbidden("the token is another job's")
	}
	return nil
}

func (s *Server) serveSignedURL(w http.ResponseWriter, r *http.Request, jobID string, kind blobKind) {
	var in backendIDs
	err := readJSON(w, r, &in)
	if err == nil {
		err = in.check(jobID)
	}
	if kind == jobLog {
		in.Step = ""
	}
	var id string
	if err == nil {
		id, err = s.hub.openBlob(jobID, kind, in.Step)
	}
	if err != nil {
		writeError(w, err)
		return
	}
	url := fmt.Sprintf("%s/blobs/%s?sig=%s", s.cfg.URL, id, s.creds.issue(credUpload, id, uploadTokenLife))
	field := "logs_url"
	if kind == stepSummary {
		field = "summary_url"
	}
	writeJSON(w, http.StatusOK, map[string]any{field: url, "soft_size_limit": fmt.Sprint(maxBlobKept), "blob_storage_type": "BLOB_STORAGE_TYPE_UNSPECIFIED"})
}

func (s *Server) serveMetadata(w http.ResponseWriter, r *http.Request, jobID string) {
	var in backendIDs
	err := readJSON(w, r, &in)
	if err == nil {
		err = in.check(jobID)
	}
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"ok": true})
}

// enum is a protocol buffer enum in JSON: its number, or its name.
type enum string

func (e *enum) UnmarshalJSON(b []byte) error {
	*e = enum(strings.ToUpper(strings.Trim(string(b), `"`)))
	return nil
}

func (e enum) status() string {
	switch e {
	case "1", "STATUS_IN_PROGRESS", "IN_PROGRESS":
		return "in_progress"
	case "3", "STATUS_COMPLETED", "COMPLETED":
		return "completed"
	}
	return "pending"
}

func (e enum) conclusion() Conclusion {
	switch e {
	case "2", "CONCLUSION_SUCCESS", "SUCCESS":
		return Success
	case "3", "CONCLUSION_FAILURE", "FAILURE":
		return Failure
	case "4", "CONCLUSION_CANCELLED", "CANCELLED":
		return Cancelled
	case "7", "CONCLUSION_SKIPPED", "SKIPPED":
		return Skipped
	}
	return ""
}

func (s *Server) serveStepsUpdate(w http.ResponseWriter, r *http.Request, jobID string) {
	var in struct {
		backendIDs
		Steps []struct {
			ExternalID string      `json:"external_id"`
			Number     json.Number `json:"number"`
			Name       string      `json:"name"`
			Status     enum        `json:"status"`
			Conclusion enum        `json:"conclusion"`
		} `json:"steps"`
	}
	err := readJSON(w, r, &in)
	if err == nil {
		err = in.check(jobID)
	}
	if err != nil {
		writeError(w, err)
		return
	}
	in.Steps = in.Steps[:min(len(in.Steps), maxStepsPerJob+maxAddedSteps)]
	updates := make([]stepUpdate, len(in.Steps))
	for i, st := range in.Steps {
		updates[i] = stepUpdate{st.ExternalID, st.Name, atoi(st.Number.String(), 0), st.Status.status(), st.Conclusion.conclusion()}
	}
	if err := s.hub.updateSteps(jobID, updates); err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{})
}

// serveUpload takes a log. With comp=appendblock the body is added; without it, a body that is not empty is the whole.
func (s *Server) serveUpload(w http.ResponseWriter, r *http.Request) {
	id, ok := s.creds.check(credUpload, r.URL.Query().Get("sig"))
	if !ok || id != r.PathValue("id") {
		writeError(w, errForbidden("the signature is not valid, or no more"))
		return
	}
	body := http.MaxBytesReader(w, r.Body, maxUpload)
	replace := r.URL.Query().Get("comp") != "appendblock"
	buf := make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(body, buf)
		if n > 0 {
			s.hub.appendBlob(id, buf[:n], replace)
			replace = false
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			writeError(w, &apiError{http.StatusRequestEntityTooLarge, "ArgumentException", "read log: " + err.Error()})
			return
		}
	}
	w.WriteHeader(http.StatusCreated)
}
