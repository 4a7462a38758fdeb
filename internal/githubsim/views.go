package githubsim

import (
	"encoding/base64"
	"fmt"
	"strings"
	"time"
)

// How things look in the REST API and in webhooks, which share their shapes.

// stamp renders a time as the REST API does; null when it has not come.
func stamp(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t.UTC().Format(time.RFC3339)
}

func nodeID(kind string, id int64) string {
	return base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "%s:%d", kind, id))
}

// orNull is s, or null when it is empty.
func orNull[T comparable](v T) any {
	var zero T
	if v == zero {
		return nil
	}
	return v
}

func (h *hub) ownerView() map[string]any {
	return map[string]any{"login": h.cfg.Owner, "id": ownerID, "type": "Organization", "html_url": h.cfg.URL + "/" + h.cfg.Owner}
}

func (h *hub) repositoryView(r *repository) map[string]any {
	full, visibility := h.cfg.Owner+"/"+r.name, "private"
	if r.public {
		visibility = "public"
	}
	return map[string]any{
		"id": r.id, "node_id": nodeID("R", r.id), "name": r.name, "full_name": full, "private": !r.public, "visibility": visibility,
		"owner": h.ownerView(), "default_branch": "main", "created_at": stamp(r.made), "archived": false, "disabled": false,
		"html_url": h.cfg.URL + "/" + full, "url": h.api("/repos/%s", full),
	}
}

// api returns the address of something in the REST API.
func (h *hub) api(format string, args ...any) string {
	return h.cfg.URL + apiPath + fmt.Sprintf(format, args...)
}

// restStatus is a job's status in the words of the REST API.
func (j *job) restStatus() string {
	switch j.state {
	case jobWaiting, jobHeld:
		return "waiting"
	case jobRunning:
		return "in_progress"
	case jobDone:
		return "completed"
	}
	return "queued"
}

// jobView renders a job. The caller holds the lock.
func (h *hub) jobView(j *job) map[string]any {
	repo := h.cfg.Owner + "/" + j.run.repo.name
	v := map[string]any{
		"id": j.number, "node_id": nodeID("J", j.number), "run_id": j.run.id, "run_attempt": j.attempt,
		"run_url": h.api("/repos/%s/actions/runs/%d", repo, j.run.id), "url": h.api("/repos/%s/actions/jobs/%d", repo, j.number),
		"check_run_url": h.api("/repos/%s/check-runs/%d", repo, j.number),
		"html_url":      fmt.Sprintf("%s/%s/actions/runs/%d/job/%d", h.cfg.URL, repo, j.run.id, j.number),
		"head_sha":      j.run.wf.sha, "head_branch": j.run.branch, "name": j.name, "workflow_name": j.run.wf.Name, "labels": append([]string{}, j.labels...),
		"status": j.restStatus(), "conclusion": orNull(string(j.conclusion)),
		"created_at": stamp(j.created), "started_at": stamp(j.started), "completed_at": stamp(j.finished),
		"runner_id": orNull(j.runnerID), "runner_name": orNull(j.runnerName), "runner_group_id": orNull(j.groupID), "runner_group_name": orNull(j.groupName),
	}
	if j.started.IsZero() {
		v["started_at"] = stamp(j.created) // as GitHub has it: the field is never null
	}
	steps := []any{}
	if j.state == jobRunning || j.state == jobDone {
		for _, st := range j.steps {
			status := st.status
			if status == "pending" {
				status = "queued"
			}
			steps = append(steps, map[string]any{
				"name": st.name, "status": status, "conclusion": orNull(string(st.conclusion)), "number": st.number,
				"started_at": stamp(st.started), "completed_at": stamp(st.completed),
			})
		}
	}
	v["steps"] = steps
	return v
}

// restStatus is a run's status in the words of the REST API. The caller holds the lock.
func (r *Run) restStatus() string {
	if r.over {
		return "completed"
	}
	status := "queued"
	for _, j := range r.jobs {
		switch j.state {
		case jobRunning, jobDone:
			return "in_progress"
		case jobHeld:
			status = "waiting"
		}
	}
	return status
}

// runView renders a run. The caller holds the lock.
func (h *hub) runView(r *Run) map[string]any {
	repo := h.cfg.Owner + "/" + r.repo.name
	updated := r.created
	for _, j := range r.jobs {
		for _, t := range []time.Time{j.created, j.started, j.finished} {
			if t.After(updated) {
				updated = t
			}
		}
	}
	conclusion := Conclusion("")
	if r.over {
		conclusion = r.conclusion
	}
	url := h.api("/repos/%s/actions/runs/%d", repo, r.id)
	return map[string]any{
		"id": r.id, "node_id": nodeID("W", r.id), "name": r.wf.Name, "display_title": r.wf.Name, "path": r.wf.Path, "workflow_id": 1,
		"run_number": r.number, "run_attempt": r.attempt, "event": r.event, "status": r.restStatus(), "conclusion": orNull(string(conclusion)),
		"head_branch": r.branch, "head_sha": r.wf.sha, "created_at": stamp(r.created), "run_started_at": stamp(r.began), "updated_at": stamp(updated),
		"html_url": fmt.Sprintf("%s/%s/actions/runs/%d", h.cfg.URL, repo, r.id),
		"url":      url, "jobs_url": url + "/jobs", "cancel_url": url + "/cancel", "rerun_url": url + "/rerun", "repository": h.repositoryView(r.repo),
	}
}

// view renders a registration. The caller holds the lock.
func (x *runner) view() map[string]any {
	status := "offline"
	if x.session != "" {
		status = "online"
	}
	labels := []any{}
	for i, l := range x.labels {
		kind := "custom"
		if isSystemLabel(l) {
			kind = "read-only"
		}
		labels = append(labels, map[string]any{"id": i + 1, "name": l, "type": kind})
	}
	return map[string]any{
		"id": x.id, "name": x.name, "os": "linux", "status": status, "busy": x.busy(), "ephemeral": x.ephemeral, "runner_group_id": x.group.id, "labels": labels,
	}
}

func isSystemLabel(l string) bool {
	switch strings.ToLower(l) {
	case "self-hosted", "linux", "x64", "arm64":
		return true
	}
	return false
}

// groupView renders a runner group.
func (h *hub) groupView(g *group) map[string]any {
	return map[string]any{
		"id": g.id, "name": g.name, "visibility": g.visibility, "default": g.id == groupID, "inherited": false,
		"allows_public_repositories": g.public, "restricted_to_workflows": false, "selected_workflows": []string{},
		"runners_url": h.api("/orgs/%s/actions/runner-groups/%d/runners", h.cfg.Owner, g.id),
	}
}
