package githubsim

import (
	"net/http"
	"slices"
	"strings"
)

// Runner groups. A repository's own runners are in none that could be changed.

func (s *Server) routeGroups(route router) {
	route("GET", inRepo+"/actions/runner-groups", s.may(runnerPermission, "read", s.serveListGroups)) // runners that register themselves ask
	for _, scope := range []string{inOrg, inEnterprise} {
		groups := scope + "/actions/runner-groups"
		route("GET", groups, s.may(runnerPermission, "read", s.serveListGroups))
		route("POST", groups, s.may(runnerPermission, "write", s.serveCreateGroup))
		route("GET", groups+"/{id}", s.may(runnerPermission, "read", s.serveGroup))
		route("PATCH", groups+"/{id}", s.may(runnerPermission, "write", s.serveUpdateGroup))
		route("DELETE", groups+"/{id}", s.may(runnerPermission, "write", s.serveDeleteGroup))
		route("GET", groups+"/{id}/runners", s.may(runnerPermission, "read", s.serveGroupRunners))
	}
}

func (s *Server) serveListGroups(w http.ResponseWriter, r *http.Request) {
	var all []map[string]any
	s.hub.read(func() {
		for _, g := range s.hub.groupsOf(domainIn(r)) {
			all = append(all, s.hub.groupView(g))
		}
	})
	s.page(w, r, "runner_groups", all)
}

type groupBody struct {
	Name       string  `json:"name"`
	Visibility string  `json:"visibility"`
	Public     *bool   `json:"allows_public_repositories"`
	Selected   []int64 `json:"selected_repository_ids"`
}

// apply changes a group as asked for. The caller holds the lock.
func (in groupBody) apply(h *hub, g *group) error {
	if in.Name != "" {
		if in.Name != clip(in.Name, maxName) {
			return errUnprocessable("Validation Failed: name")
		}
		if slices.ContainsFunc(h.groupsOf(g.domain), func(o *group) bool { return o != g && strings.EqualFold(o.name, in.Name) }) {
			return &apiError{http.StatusConflict, "RunnerGroupExistsException", "Already exists - a runner group named " + in.Name}
		}
		g.name = in.Name
	}
	switch in.Visibility {
	case "":
	case "all", "selected", "private":
		g.visibility = in.Visibility
	default:
		return errUnprocessable("Validation Failed: visibility: want all, selected or private")
	}
	if in.Public != nil {
		g.public = *in.Public
	}
	if in.Selected != nil {
		g.selected = in.Selected
	}
	return nil
}

func (s *Server) serveCreateGroup(w http.ResponseWriter, r *http.Request) {
	var in groupBody
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	if in.Name == "" {
		writeError(w, errUnprocessable("Validation Failed: name is missing"))
		return
	}
	g := &group{domain: domainIn(r), visibility: "all"}
	var v any
	var err error
	s.hub.change(func() {
		if len(s.hub.groups) >= maxGroups {
			err = errForbidden("too many runner groups")
			return
		}
		if err = in.apply(s.hub, g); err == nil {
			g.id = s.hub.id() + groupID // never the default group's
			s.hub.groups = append(s.hub.groups, g)
			v = s.hub.groupView(g)
		}
	})
	answer(w, http.StatusCreated, v, err)
}

// onGroup runs f on the group a request names, under the lock, and answers with the group as it is then unless status is
// 204.
func (s *Server) onGroup(w http.ResponseWriter, r *http.Request, status int, f func(g *group) error) {
	var v any
	var err error
	s.hub.change(func() {
		var g *group
		if g, err = s.hub.group(domainIn(r), pathID(r)); err != nil {
			return
		}
		if err = f(g); err == nil && status != http.StatusNoContent {
			v = s.hub.groupView(g)
		}
		s.hub.place()
	})
	answer(w, status, v, err)
}

func (s *Server) serveGroup(w http.ResponseWriter, r *http.Request) {
	s.onGroup(w, r, http.StatusOK, func(*group) error { return nil })
}

func (s *Server) serveUpdateGroup(w http.ResponseWriter, r *http.Request) {
	var in groupBody
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	s.onGroup(w, r, http.StatusOK, func(g *group) error { return in.apply(s.hub, g) })
}

// serveDeleteGroup moves what the group held to the default group, as GitHub does.
func (s *Server) serveDeleteGroup(w http.ResponseWriter, r *http.Request) {
	s.onGroup(w, r, http.StatusNoContent, func(g *group) error {
		if g.id == groupID {
			return errUnprocessable("Validation Failed: the default group cannot be deleted")
		}
		def, err := s.hub.group(g.domain, groupID)
		if err != nil {
			return err
		}
		for _, x := range s.hub.runners {
			if x.group == g {
				x.group = def
			}
		}
		for _, set := range s.hub.sets {
			if set.group == g {
				set.group = def
			}
		}
		s.hub.groups = slices.DeleteFunc(s.hub.groups, func(o *group) bool { return o == g })
		return nil
	})
}

func (s *Server) serveGroupRunners(w http.ResponseWriter, r *http.Request) {
	var all []map[string]any
	var err error
	s.hub.read(func() {
		var g *group
		if g, err = s.hub.group(domainIn(r), pathID(r)); err != nil {
			return
		}
		for _, x := range s.hub.runners {
			if x.group == g {
				all = append(all, x.view())
			}
		}
	})
	if err != nil {
		writeError(w, err)
		return
	}
	s.page(w, r, "runners", all)
}
