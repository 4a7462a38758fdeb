package webhook

import (
	"fmt"
	"net/url"
	"slices"
	"strings"

	"flint"
)

// scope is what a GitHub URL stands for, in lower case.
type scope struct {
	host       string
	owner      string // empty: an enterprise, or no limit
	repo       string // empty: all of owner
	enterprise string
}

// parseScope reads the URL of an organisation, repository or enterprise. An empty one sets no limit.
func parseScope(raw string) (scope, error) {
	if raw == "" {
		return scope{}, nil
	}
	u, err := url.Parse(raw)
	if err != nil {
		return scope{}, fmt.Errorf("read scope: %w", err)
	}
	parts := strings.Split(strings.ToLower(strings.Trim(u.Path, "/")), "/")
	s := scope{host: strings.ToLower(u.Host)}
	switch {
	case u.Host == "" || parts[0] == "" || len(parts) > 2 || parts[len(parts)-1] == "":
		return scope{}, fmt.Errorf("read scope: %q is no organisation, repository or enterprise", raw)
	case len(parts) == 2 && parts[0] == "enterprises":
		s.enterprise = parts[1]
	case len(parts) == 2:
		s.owner, s.repo = parts[0], parts[1]
	default:
		s.owner = parts[0]
	}
	return s, nil
}

// covers reports whether a repository (owner/name) is inside. enterprise is the one that GitHub named, if any.
func (s scope) covers(repository, enterprise string) bool {
	owner, name, _ := strings.Cut(strings.ToLower(repository), "/")
	switch {
	case s.enterprise != "":
		return enterprise == "" || strings.EqualFold(enterprise, s.enterprise)
	case s.owner == "":
		return true
	}
	return s.owner == owner && (s.repo == "" || s.repo == name)
}

// place returns the part of a jobKey that says where the job is.
func (s scope) place(repository string) string { return strings.ToLower(s.host + "/" + repository) }

// served is one pool with what matching needs of it.
type served struct {
	account *account
	pool    flint.Pool
	scope   scope
}

// matcher finds the pool of a job.
type matcher struct {
	pools     []served // in the order of the configuration
	elsewhere []served // pools that no webhook feeds
}

// concerns reports whether a job is for a pool, or for nobody we know of.
func (m *matcher) concerns(j *job) bool {
	if i, _ := m.find(j); i >= 0 {
		return true
	}
	host, _, _ := strings.Cut(j.Place, "/")
	return !hosted(j.Labels) && !slices.ContainsFunc(m.elsewhere, func(p served) bool {
		return p.scope.host == host && p.scope.covers(j.Repository, "") && len(j.Labels) > 0 && len(p.pool.Misses(j.Labels)) == 0
	})
}

// find returns the index of the pool that serves a job: the one that covers all labels with the fewest of its own, in the
// order of the configuration. -1 comes with the reason. A pool serves what its own scope covers, whichever account told us of
// the job: where two accounts see the same repository the job is still one job.
func (m *matcher) find(j *job) (int, flint.Reason) {
	best, nearest := -1, -1
	var misses []string
	host, _, _ := strings.Cut(j.Place, "/")
	for i, p := range m.pools {
		if p.scope.host != host || !p.scope.covers(j.Repository, "") {
			continue
		}
		missing := p.pool.Misses(j.Labels)
		switch {
		case len(missing) > 0 || len(j.Labels) == 0:
			if nearest < 0 || len(missing) < len(misses) {
				nearest, misses = i, missing
			}
		case best < 0 || len(p.pool.Labels) < len(m.pools[best].pool.Labels):
			best = i
		}
	}
	switch {
	case best >= 0:
		return best, flint.Reason{}
	case nearest < 0:
		return -1, flint.Because("job.unmatched", "no pool serves the repository %s", j.Repository)
	case len(j.Labels) == 0:
		return -1, flint.Because("job.unmatched", "the job names a runner group and no label, and a webhook does not say which group")
	}
	return -1, flint.Because("job.unmatched", "no pool has the %s: the nearest, %s, lacks %s", labelList(j.Labels),
		m.pools[nearest].pool.Name, strings.Join(misses, ", "))
}

func labelList(labels []string) string {
	if len(labels) == 1 {
		return "label " + labels[0]
	}
	return "labels " + strings.Join(labels, ", ")
}

// hosted reports whether labels ask for a machine of GitHub's own. Such jobs are nobody's concern here, and an organisation
// may have a great many.
func hosted(labels []string) bool {
	if len(labels) != 1 {
		return false
	}
	l := strings.ToLower(labels[0])
	return strings.HasPrefix(l, "ubuntu-") || strings.HasPrefix(l, "windows-") || strings.HasPrefix(l, "macos-")
}
