package githubsim

import (
	"fmt"
	"strconv"
)

// githubContext is the github context of a job.
func (h *hub) githubContext(j *job) *object {
	r := j.run
	repo, ref := h.cfg.Owner+"/"+r.repo.name, "refs/heads/"+r.branch
	event := newObject("ref", ref, "repository", newObject(
		"name", r.repo.name, "full_name", repo, "private", !r.repo.public, "owner", newObject("login", h.cfg.Owner), "default_branch", "main",
	))
	if r.event == "workflow_dispatch" {
		event.set("inputs", r.inputs)
	}
	return newObject(
		"event_name", r.event, "event", event, "workflow", r.wf.Name, "workflow_ref", repo+"/"+r.wf.Path+"@"+ref,
		"repository", repo, "repository_owner", h.cfg.Owner, "ref", ref, "ref_name", r.branch, "ref_type", "branch",
		"sha", r.wf.sha, "actor", h.cfg.Owner, "triggering_actor", h.cfg.Owner, "job", j.spec.id,
		"run_id", strconv.FormatInt(r.id, 10), "run_number", strconv.FormatInt(r.number, 10), "run_attempt", strconv.Itoa(max(j.attempt, 1)),
		"server_url", h.cfg.URL, "api_url", h.cfg.URL+"/api/v3", "graphql_url", h.cfg.URL+"/api/graphql",
		"base_ref", "", "head_ref", "",
	)
}

// jobRequest renders the message a runner gets when it acquires its job. token gives access to this job only. The
// caller holds the lock.
func (h *hub) jobRequest(j *job, token string) (map[string]any, error) {
	steps := []any{}
	for _, st := range j.steps {
		if st.spec == nil {
			continue // one the runner added
		}
		v, err := stepRequest(st)
		if err != nil {
			return nil, fmt.Errorf("render step %q: %w", st.name, err)
		}
		steps = append(steps, v)
	}
	env := []any{}
	for _, level := range [][]pair{j.run.env, j.spec.env} {
		if len(level) == 0 {
			continue
		}
		t, err := mappingToken(level)
		if err != nil {
			return nil, fmt.Errorf("render env: %w", err)
		}
		env = append(env, t)
	}
	github := h.githubContext(j)
	github.set("token", token)
	out := map[string]any{
		"messageType": "RunnerJobRequest", "jobId": j.id, "jobDisplayName": j.name, "jobName": "__default", "requestId": j.number,
		"plan":        map[string]any{"planId": j.plan, "planType": "actions", "scopeIdentifier": j.plan, "version": 12},
		"timeline":    map[string]any{"id": j.plan, "changeId": 1},
		"lockedUntil": timestamp(j.lockedUntil),
		"resources": map[string]any{"endpoints": []any{map[string]any{
			"name": "SystemVssConnection", "url": h.cfg.URL + "/run/",
			"authorization": map[string]any{"scheme": "OAuth", "parameters": map[string]any{"AccessToken": token}},
			"data": map[string]any{
				"ServerId": j.plan, "ServerName": "githubsim", "ResultsServiceUrl": h.cfg.URL + "/results/", "FeedStreamUrl": h.cfg.URL + "/feed",
			},
		}}},
		"contextData": map[string]any{
			"github": contextData(github), "needs": contextData(j.needsContext()), "inputs": contextData(j.run.inputs),
			"strategy": contextData(j.strategyContext()), "matrix": nil,
		},
		"variables": map[string]any{
			"system.github.job":              map[string]any{"value": j.spec.id},
			"system.github.results_endpoint": map[string]any{"value": h.cfg.URL + "/results/"},
			"system.github.token":            map[string]any{"value": token, "isSecret": true},
		},
		"mask": []any{}, "environmentVariables": env, "defaults": []any{}, "steps": steps,
		"fileTable": []string{j.run.wf.Path}, "workspace": map[string]any{},
	}
	if j.matrix != nil {
		out["contextData"].(map[string]any)["matrix"] = contextData(j.matrix)
	}
	if len(j.spec.outputs) > 0 {
		t, err := mappingToken(j.spec.outputs)
		if err != nil {
			return nil, fmt.Errorf("render outputs: %w", err)
		}
		out["jobOutputs"] = t
	}
	return out, nil
}

// stepRequest renders one step. Defaults for shell and working directory are already in it.
func stepRequest(st *step) (map[string]any, error) {
	spec := st.spec
	inputs := []pair{{"script", spec.script}}
	if spec.shell != "" {
		inputs = append(inputs, pair{"shell", spec.shell})
	}
	if spec.workingDirectory != "" {
		inputs = append(inputs, pair{"workingDirectory", spec.workingDirectory})
	}
	in, err := mappingToken(inputs)
	if err != nil {
		return nil, err
	}
	name, err := templateToken(spec.name)
	if err != nil {
		return nil, err
	}
	out := map[string]any{
		"id": st.id, "type": "action", "reference": map[string]any{"type": "script"}, "displayNameToken": name,
		"contextName": spec.contextName, "condition": spec.condition, "inputs": in,
	}
	if len(spec.env) > 0 {
		if out["environment"], err = mappingToken(spec.env); err != nil {
			return nil, err
		}
	}
	if spec.continueOnError != "" {
		if b, err := strconv.ParseBool(spec.continueOnError); err == nil {
			out["continueOnError"] = b
		} else if out["continueOnError"], err = templateToken(spec.continueOnError); err != nil {
			return nil, err
		}
	}
	if spec.timeoutMinutes != "" {
		if n, err := strconv.ParseFloat(spec.timeoutMinutes, 64); err == nil {
			out["timeoutInMinutes"] = n
		} else if out["timeoutInMinutes"], err = templateToken(spec.timeoutMinutes); err != nil {
			return nil, err
		}
	}
	return out, nil
}
