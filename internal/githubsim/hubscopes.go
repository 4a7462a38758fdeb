package githubsim

import (
	"net/http"
	"slices"
	"strings"
	"time"
)

// Where things are registered: the organisation, one of its repositories, or its enterprise. A domain is that place's path:
// "acme", "acme/widget" or "enterprises/anvils".

// Repository is one repository of the organisation. The zero Public makes it private.
type Repository struct {
	Name   string
	Public bool // runs of it get no runner of a group that does not serve public repositories
}

// Numbers that never change; those of repositories follow firstRepository.
const (
	appID           = 1001
	installationID  = 2002
	ownerID         = 3003
	firstRepository = 4001
)

const enterprisePrefix = "enterprises/"

type repository struct {
	id     int64
	name   string
	public bool
	made   time.Time
}

// group is a runner group. Its members are looked up by (domain, id): ids repeat between domains, as default groups have
// the id 1 everywhere.
type group struct {
	id           int64
	domain       string
	name         string
	visibility   string // all, selected, private
	public       bool   // serves public repositories
	selected     []int64
	isRepository bool // the one a repository's own runners are in: it has no policy
}

// The default group of every domain. An organisation's serves no public repositories until that is allowed.
const (
	groupID   = 1
	groupName = "Default"
)

const maxGroups = 1000

// inDomain reports whether a repository's jobs may go to runners of a domain.
func (h *hub) inDomain(r *repository, domain string) bool {
	_, name, repo := strings.Cut(domain, "/")
	return !repo || strings.HasPrefix(domain, enterprisePrefix) || strings.EqualFold(name, r.name)
}

// admits reports whether the group's policy lets a repository's jobs in.
func (g *group) admits(r *repository) bool {
	switch {
	case g.isRepository:
		return true
	case g.visibility == "private" && r.public:
		return false
	case g.visibility == "selected" && !slices.Contains(g.selected, r.id):
		return false
	}
	return g.public || !r.public
}

// reaches reports whether a job may go to the runners of a domain's group.
func (h *hub) reaches(j *job, domain string, g *group) bool {
	return h.inDomain(j.run.repo, domain) && g.admits(j.run.repo)
}

func (h *hub) groupsOf(domain string) []*group {
	var list []*group
	for _, g := range h.groups {
		if g.domain == domain {
			list = append(list, g)
		}
	}
	return list
}

// group returns a domain's runner group. The caller holds the lock.
func (h *hub) group(domain string, id int64) (*group, error) {
	for _, g := range h.groups {
		if g.domain == domain && g.id == id {
			return g, nil
		}
	}
	return nil, &apiError{http.StatusNotFound, "RunnerGroupNotFoundException", "Not Found: no such runner group"}
}

// repository returns the one with a name; nil when there is none.
func (h *hub) repository(name string) *repository {
	i := slices.IndexFunc(h.repos, func(r *repository) bool { return strings.EqualFold(r.name, name) })
	if i < 0 {
		return nil
	}
	return h.repos[i]
}

// makeScopes makes the repositories, the domains and the default group of each.
func (h *hub) makeScopes() {
	add := func(g group) {
		g.id, g.name, g.visibility = groupID, groupName, "all"
		h.groups, h.domains = append(h.groups, &g), append(h.domains, g.domain)
	}
	add(group{domain: h.cfg.Owner})
	if h.cfg.Enterprise != "" {
		add(group{domain: enterprisePrefix + h.cfg.Enterprise})
	}
	for i, r := range h.cfg.Repos {
		h.repos = append(h.repos, &repository{id: firstRepository + int64(i), name: r.Name, public: r.Public, made: h.now()})
		add(group{domain: h.cfg.Owner + "/" + r.Name, public: true, isRepository: true})
	}
}

// domain returns the domain with a path, spelt as configured.
func (h *hub) domain(path string) (domain string, ok bool) {
	for _, d := range h.domains {
		if strings.EqualFold(d, path) {
			return d, true
		}
	}
	return "", false
}
