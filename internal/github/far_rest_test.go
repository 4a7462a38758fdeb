package github

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// farREST is the REST side of the far end, as strict as the rest of it.
type farREST struct {
	f             *far
	rest          *http.ServeMux
	installations map[string]int // by path of the scope
	life          time.Duration  // of an installation token
	tokens        map[string]time.Time
	minted        int
	deaf          bool // the filter by name is not known
	group         map[string]any
	jobs          []map[string]any // with "repository"
	repos         []map[string]any
	deliveries    []map[string]any // newest first
	again         []int64          // redelivered
	reruns        []int64
	limit         http.Header // of every answer
	release       map[string]any
}

func newFarREST(f *far) farREST {
	r := farREST{
		f: f, rest: http.NewServeMux(), installations: map[string]int{"/orgs/acme": 99, "/repos/acme/app": 99}, life: time.Hour,
		tokens: map[string]time.Time{secretPAT: {}, secretInst: {}},
		group:  map[string]any{"id": 3, "name": "big & fast", "allows_public_repositories": true},
		repos:  []map[string]any{{"id": 1, "full_name": "acme/app", "private": false, "visibility": "public"}},
	}
	for _, s := range []string{"/orgs/{org}", "/repos/{org}/{repo}", "/enterprises/{org}"} {
		r.rest.HandleFunc("GET /api/v3"+s+"/actions/runners", f.listRunners)
		r.rest.HandleFunc("GET /api/v3"+s+"/actions/runners/{id}", f.getRunner)
		r.rest.HandleFunc("DELETE /api/v3"+s+"/actions/runners/{id}", f.deleteRunner)
		r.rest.HandleFunc("POST /api/v3"+s+"/actions/runners/generate-jitconfig", f.mintRunner)
		r.rest.HandleFunc("GET /api/v3"+s+"/actions/runner-groups", f.listGroups)
	}
	r.rest.HandleFunc("GET /api/v3/installation/repositories", f.listRepositories)
	r.rest.HandleFunc("GET /api/v3/orgs/{org}/repos", f.listRepositories)
	r.rest.HandleFunc("GET /api/v3/repos/{org}/{repo}", f.getRepository)
	r.rest.HandleFunc("GET /api/v3/repos/{org}/{repo}/actions/jobs/{id}", f.getJob)
	r.rest.HandleFunc("POST /api/v3/repos/{org}/{repo}/actions/jobs/{id}/rerun", f.rerunJob)
	r.rest.HandleFunc("GET /api/v3/repos/{org}/{repo}/actions/runs", f.listRuns)
	r.rest.HandleFunc("GET /api/v3/repos/{org}/{repo}/actions/runs/{id}/jobs", f.listJobs)
	r.rest.HandleFunc("GET /api/v3/repos/{org}/{repo}/actions/runs/{id}/attempts/{attempt}/jobs", f.listJobs)
	r.rest.HandleFunc("GET /api/v3/repos/actions/runner/releases/latest", f.latest)
	r.rest.HandleFunc("GET /api/v3/app/hook/deliveries", f.listDeliveries)
	r.rest.HandleFunc("POST /api/v3/app/hook/deliveries/{id}/attempts", f.redeliver)
	r.rest.HandleFunc("GET /api/v3/orgs/{org}/hooks/7/deliveries", f.listDeliveries)
	r.rest.HandleFunc("POST /api/v3/orgs/{org}/hooks/7/deliveries/{id}/attempts", f.redeliver)
	return r
}

// restRoute names a request of the REST API: the two that the scale set side has as well by a word, others by their pattern.
func (f *far) restRoute(r *http.Request) (route, rest string) {
	for _, name := range []string{"installation", "registration-token"} {
		if strings.HasSuffix(r.URL.Path, "/"+name) {
			return r.Method + " " + name, ""
		}
	}
	_, pattern := f.rest.Handler(r)
	if pattern == "" {
		return r.Method + " " + r.URL.Path, ""
	}
	return strings.Replace(pattern, "/api/v3", "", 1), pattern
}

func (f *far) installation(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/api/v3"), "/installation")
	id, ok := f.installations[path]
	if !ok {
		f.reply(w, 404, map[string]string{"message": "Not Found"})
		return
	}
	f.reply(w, 200, map[string]any{"id": id})
}

func (f *far) accessToken(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	known := false
	for _, id := range f.installations {
		known = known || strings.HasSuffix(r.URL.Path, fmt.Sprintf("/%d/access_tokens", id))
	}
	if !known {
		f.reply(w, 404, map[string]string{"message": "Not Found"})
		return
	}
	token := secretInst
	if f.life != time.Hour {
		f.minted++
		token += strconv.Itoa(f.minted)
	}
	f.tokens[token] = time.Now().Add(f.life)
	f.reply(w, 201, map[string]any{"token": token, "expires_at": time.Now().Add(f.life)})
}

// signedIn answers 401 to a token that is not good any more. An unknown one is an error of the test.
func (f *far) signedIn(w http.ResponseWriter, r *http.Request) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for k, v := range f.limit {
		w.Header()[k] = v
	}
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	ends, ok := f.tokens[token]
	if !ok {
		f.t.Errorf("%s %s: signed with %q", r.Method, r.URL, token)
	}
	if ok && (ends.IsZero() || time.Now().Before(ends)) {
		return true
	}
	f.reply(w, 401, map[string]string{"message": "Bad credentials"})
	return false
}

// open checks what every REST call must have and locks the far end; the caller unlocks it unless it returns false.
func (f *far) open(w http.ResponseWriter, r *http.Request, query ...string) bool {
	if !f.signedIn(w, r) {
		return false
	}
	if r.Header.Get("X-Github-Api-Version") == "" || r.Header.Get("User-Agent") != "flint" {
		f.t.Errorf("%s %s: headers %v", r.Method, r.URL, r.Header)
	}
	for k, v := range r.URL.Query() {
		if !slices.Contains(query, k) && k != "page" && k != "per_page" || len(v) != 1 {
			f.t.Errorf("%s %s: unexpected %s", r.Method, r.URL, k)
		}
	}
	f.mu.Lock()
	return true
}

// page answers with one page of a list under a key; without a key it is the list itself.
func (f *far) page(w http.ResponseWriter, r *http.Request, key string, all []map[string]any) {
	n, _ := strconv.Atoi(r.URL.Query().Get("page"))
	per, _ := strconv.Atoi(r.URL.Query().Get("per_page"))
	if n < 1 || per < 1 || per > 100 {
		f.t.Errorf("page %d of %d", n, per)
		n, per = 1, 100
	}
	from, to := min((n-1)*per, len(all)), min(n*per, len(all))
	if to < len(all) {
		q := r.URL.Query()
		q.Set("page", strconv.Itoa(n+1))
		w.Header().Set("Link", fmt.Sprintf(`<%s%s?%s>; rel="next"`, f.base, r.URL.Path, q.Encode()))
	}
	part := append([]map[string]any{}, all[from:to]...)
	if key == "" {
		f.reply(w, 200, part)
		return
	}
	f.reply(w, 200, map[string]any{"total_count": len(all), key: part})
}

func home(r *http.Request) string {
	path, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/api/v3"), "/actions/")
	return path
}

func shown(id int, a agent) map[string]any {
	status := "offline"
	if a.online {
		status = "online"
	}
	return map[string]any{"id": id, "name": a.name, "os": "linux", "status": status, "busy": a.busy, "labels": []any{}}
}

// here returns the ids of the runners of the scope a request is about. The caller holds mu.
func (f *far) here(r *http.Request) []int {
	var ids []int
	for id, a := range f.agents {
		if a.home == "" || a.home == home(r) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

func (f *far) listRunners(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r, "name") {
		return
	}
	defer f.mu.Unlock()
	var all []map[string]any
	for _, id := range f.here(r) {
		if name := r.URL.Query().Get("name"); f.deaf || name == "" || strings.HasPrefix(f.agents[id].name, name) {
			all = append(all, shown(id, f.agents[id]))
		}
	}
	f.page(w, r, "runners", all)
}

func (f *far) getRunner(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r) {
		return
	}
	defer f.mu.Unlock()
	id, _ := strconv.Atoi(r.PathValue("id"))
	if !slices.Contains(f.here(r), id) {
		f.reply(w, 404, map[string]string{"message": "Not Found"})
		return
	}
	f.reply(w, 200, shown(id, f.agents[id]))
}

func (f *far) deleteRunner(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r) {
		return
	}
	defer f.mu.Unlock()
	id, _ := strconv.Atoi(r.PathValue("id"))
	switch {
	case !slices.Contains(f.here(r), id):
		f.reply(w, 404, map[string]string{"message": "Not Found"})
	case f.agents[id].busy:
		f.reply(w, 422, map[string]string{"message": "Bad request - Runner is currently running a job and cannot be deleted."})
	default:
		delete(f.agents, id)
		w.WriteHeader(204)
	}
}

func (f *far) mintRunner(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r) {
		return
	}
	defer f.mu.Unlock()
	var in struct {
		Name   string   `json:"name"`
		Group  int      `json:"runner_group_id"`
		Labels []string `json:"labels"`
		Folder string   `json:"work_folder"`
	}
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil || len(in.Labels) < 1 || len(in.Labels) > 100 || in.Folder != "_work" {
		f.t.Errorf("JIT configuration of %+v: %v", in, err)
	}
	if in.Group != 1 && in.Group != f.group["id"] {
		f.reply(w, 404, map[string]string{"message": "Not Found"})
		return
	}
	for _, a := range f.agents {
		if a.name == in.Name {
			f.reply(w, 409, map[string]string{"message": "Already exists - A runner with the name " + in.Name + " already exists."})
			return
		}
	}
	f.nextRun++
	f.agents[f.nextRun] = agent{name: in.Name, labels: in.Labels, home: home(r)}
	f.reply(w, 201, map[string]any{"runner": shown(f.nextRun, f.agents[f.nextRun]), "encoded_jit_config": secretJIT})
}

func (f *far) listGroups(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r) {
		return
	}
	defer f.mu.Unlock()
	f.page(w, r, "runner_groups", []map[string]any{{"id": 1, "name": "Default", "default": true, "allows_public_repositories": false}, f.group})
}

func (f *far) listRepositories(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r) {
		return
	}
	defer f.mu.Unlock()
	key := "repositories"
	if strings.HasSuffix(r.URL.Path, "/repos") {
		key = ""
	}
	f.page(w, r, key, f.repos)
}

// repository returns the repository a path names, answering 404 when there is none. The caller holds mu.
func (f *far) repository(w http.ResponseWriter, r *http.Request) map[string]any {
	for _, repo := range f.repos {
		if repo["full_name"] == r.PathValue("org")+"/"+r.PathValue("repo") {
			return repo
		}
	}
	f.reply(w, 404, map[string]string{"message": "Not Found"})
	return nil
}

func (f *far) getRepository(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r) {
		return
	}
	defer f.mu.Unlock()
	if repo := f.repository(w, r); repo != nil {
		f.reply(w, 200, repo)
	}
}

// jobsOf returns the jobs that are. The caller holds mu.
func (f *far) jobsOf(is func(map[string]any) bool) []map[string]any {
	var found []map[string]any
	for _, j := range f.jobs {
		if is(j) {
			found = append(found, j)
		}
	}
	return found
}

func (f *far) getJob(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r) {
		return
	}
	defer f.mu.Unlock()
	if f.repository(w, r) == nil {
		return
	}
	found := f.jobsOf(func(j map[string]any) bool { return fmt.Sprint(j["id"]) == r.PathValue("id") })
	if len(found) == 0 {
		f.reply(w, 404, map[string]string{"message": "Not Found"})
		return
	}
	f.reply(w, 200, found[0])
}

func (f *far) rerunJob(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r) {
		return
	}
	defer f.mu.Unlock()
	id, _ := strconv.ParseInt(r.PathValue("id"), 10, 64)
	f.reruns = append(f.reruns, id)
	f.reply(w, 201, map[string]any{})
}

func (f *far) listRuns(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r, "status") {
		return
	}
	defer f.mu.Unlock()
	repo := f.repository(w, r)
	if repo == nil {
		return
	}
	runs, seen := []map[string]any{}, map[any]bool{}
	for _, j := range f.jobs {
		if j["repository"] == repo["full_name"] && j["run_status"] == r.URL.Query().Get("status") && !seen[j["run_id"]] {
			seen[j["run_id"]] = true
			runs = append(runs, map[string]any{"id": j["run_id"], "status": j["run_status"], "repository": repo})
		}
	}
	f.page(w, r, "workflow_runs", runs)
}

func (f *far) listJobs(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r, "filter") {
		return
	}
	defer f.mu.Unlock()
	if f.repository(w, r) == nil {
		return
	}
	found := f.jobsOf(func(j map[string]any) bool {
		attempt := r.PathValue("attempt")
		return fmt.Sprint(j["run_id"]) == r.PathValue("id") && (attempt == "" || attempt == fmt.Sprint(j["run_attempt"]))
	})
	if len(found) == 0 {
		f.reply(w, 404, map[string]string{"message": "Not Found"})
		return
	}
	f.page(w, r, "jobs", found)
}

func (f *far) latest(w http.ResponseWriter, r *http.Request) {
	if !f.open(w, r) {
		return
	}
	defer f.mu.Unlock()
	if f.release == nil {
		f.reply(w, 404, map[string]string{"message": "Not Found"})
		return
	}
	f.reply(w, 200, f.release)
}

// hooked is open for the App's own calls.
func (f *far) hooked(w http.ResponseWriter, r *http.Request) bool {
	if !strings.HasPrefix(r.URL.Path, "/api/v3/app/") {
		return f.open(w, r, "cursor")
	}
	if !f.checkJWT(w, r) {
		return false
	}
	f.mu.Lock()
	return true
}

func (f *far) listDeliveries(w http.ResponseWriter, r *http.Request) {
	if !f.hooked(w, r) {
		return
	}
	defer f.mu.Unlock()
	from, _ := strconv.Atoi(strings.TrimPrefix(r.URL.Query().Get("cursor"), "v1_"))
	to := min(from+100, len(f.deliveries))
	if to < len(f.deliveries) {
		w.Header().Set("Link", fmt.Sprintf(`<%s%s?per_page=100&cursor=v1_%d>; rel="next"`, f.base, r.URL.Path, to))
	}
	f.reply(w, 200, append([]map[string]any{}, f.deliveries[from:to]...))
}

func (f *far) redeliver(w http.ResponseWriter, r *http.Request) {
	if !f.hooked(w, r) {
		return
	}
	defer f.mu.Unlock()
	id, _ := strconv.ParseInt(r.PathValue("id"), 10, 64)
	if !slices.ContainsFunc(f.deliveries, func(d map[string]any) bool { return fmt.Sprint(d["id"]) == r.PathValue("id") }) {
		f.reply(w, 404, map[string]string{"message": "Not Found"})
		return
	}
	f.again = append(f.again, id)
	f.reply(w, 202, map[string]any{})
}
