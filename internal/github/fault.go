package github

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"flint"
)

// fault turns what a person has to mend into a fault that names the setting. Refusals that the program itself deals with stay
// a *callError, which the faults wrap as well.
func (s *scope) fault(e *callError) error {
	f := &flint.Fault{What: "talk to GitHub for " + s.name, Err: e}
	switch {
	case e.status == 0 || e.status >= http.StatusInternalServerError:
		f.Code = "github.unreachable"
		f.Fix = fmt.Sprintf("check that this machine reaches %s and that GitHub is well; flint goes on trying", s.server())
	case e.status == http.StatusTooManyRequests || e.status == http.StatusForbidden && e.retry > 0:
		f.Code, f.Fix = "github.rate", "wait; GitHub limits requests per installation, so use an App that nothing else uses"
		if e.retry > 0 {
			f.Fix = "wait until " + time.Now().Add(e.retry).Format(time.TimeOnly) + f.Fix[len("wait"):]
		}
	case strings.Contains(e.message, "reached max limit of"):
		f.Code, f.Kind = "github.group-full", flint.ErrConflict
		f.Fix = "remove runners that are offline from the group on GitHub's page of self-hosted runners, or use another group; " +
			"GitHub removes them by itself after a day"
	case strings.HasSuffix(e.path, "/access_tokens"), strings.HasSuffix(e.path, "/installation"), strings.Contains(e.path, "/app/hook/"):
		s.appFault(f, e)
	case e.rest:
		s.permissionFault(f, e)
	}
	if f.Code == "" {
		return e
	}
	return f
}

// appFault explains why GitHub did not take us for the App, or the App for installed.
func (s *scope) appFault(f *flint.Fault, e *callError) {
	a := s.account
	switch {
	case e.status == http.StatusUnauthorized, strings.Contains(e.message, "Integration not found"):
		f.Code, f.Kind = "github.app", flint.ErrConfig
		f.Fix = fmt.Sprintf("check that %s and %s belong together: GitHub shows both on the App's settings page",
			a.setting("app_id"), a.setting("private_key_file"))
		if skew := e.skew.Abs(); skew > clockSlack {
			f.Fix = fmt.Sprintf("set this machine's clock: it differs from GitHub's by %s, and GitHub refuses the signature of "+
				"a wrong time", skew.Round(time.Second))
		}
	case e.status == http.StatusNotFound && !strings.Contains(e.path, "/app/hook/"):
		f.Code, f.Kind = "github.installation", flint.ErrConfig
		f.Fix = fmt.Sprintf("check that there is a %s and install the GitHub App %s on it (the App's settings page, Install App)",
			s.url, a.AppID)
		if a.InstallationID != 0 {
			f.Fix += ", or correct " + a.setting("installation_id") + ", or leave that out"
		}
	case e.status == http.StatusForbidden && strings.Contains(e.message, "suspended"):
		f.Code, f.Kind = "github.suspended", flint.ErrPermission
		f.Fix = "have an owner of " + s.name + " unsuspend the GitHub App (Settings, GitHub Apps, Configure)"
	case e.status == http.StatusForbidden:
		f.Code, f.Kind = "github.permission", flint.ErrPermission
		f.Fix = s.permissionFix(e)
	}
}

// permissionFault explains a refusal of a call that was signed with a token. That something does not exist is a matter of
// permission only where what was asked for always exists: GitHub hides what may not be seen.
func (s *scope) permissionFault(f *flint.Fault, e *callError) {
	suspended := strings.Contains(e.message, "suspended")
	switch {
	case e.status == http.StatusUnauthorized && s.account.Token != "":
		f.Code, f.Kind = "github.token", flint.ErrConfig
		f.Fix = "make a new personal access token: GitHub does not know this one, or it has expired"
	case e.status == http.StatusForbidden && suspended && s.account.Token == "":
		s.appFault(f, e)
	case e.status == http.StatusForbidden && strings.Contains(e.message, "already running"): // a re-run that is too early
	case e.status == http.StatusUnauthorized, e.status == http.StatusForbidden, e.status == http.StatusNotFound && alwaysThere(e):
		f.Code, f.Kind, f.Fix = "github.permission", flint.ErrPermission, s.permissionFix(e)
	}
}

func alwaysThere(e *callError) bool {
	for _, end := range []string{
		"/registration-token", "/actions/runner-registration", "/actions/runners", "/actions/runner-groups", "/installation/repositories",
	} {
		if strings.HasSuffix(e.path, end) {
			return true
		}
	}
	return false
}

// permissionFix names the permission that a call needs.
func (s *scope) permissionFix(e *callError) string {
	if s.account.Token != "" {
		return fmt.Sprintf("check the URL %s, and that the personal access token may %s", s.url, s.deed(e))
	}
	return fmt.Sprintf("check the URL %s, and give the GitHub App the %s; an owner must then accept it", s.url, s.permission(e))
}

// repositoryPath is the path of a repository itself.
var repositoryPath = regexp.MustCompile(`/repos/[^/]+/[^/]+$`)

// permission is what GitHub's page of the App's permissions calls it.
func (s *scope) permission(e *callError) string {
	switch {
	case strings.HasSuffix(e.path, "/rerun"):
		return `repository permission "Actions: read and write"`
	case strings.Contains(e.path, "/actions/runs"), strings.Contains(e.path, "/actions/jobs"):
		return `repository permission "Actions: read"`
	case strings.HasSuffix(e.path, "/repositories"), repositoryPath.MatchString(e.path), strings.Contains(e.path, "/releases/"):
		return `repository permission "Metadata: read"`
	case s.organisation():
		return `organisation permission "Self-hosted runners: read and write"`
	}
	return `repository permission "Administration: read and write"`
}

// deed is what a personal access token must be allowed to do, and the scope that allows a classic one to.
func (s *scope) deed(e *callError) string {
	switch {
	case strings.HasSuffix(e.path, "/rerun"):
		return "start jobs again (scope repo)"
	case strings.Contains(e.path, "/actions/runs"), strings.Contains(e.path, "/actions/jobs"):
		return "read Actions (scope repo)"
	case strings.Contains(e.path, "/hooks/"):
		return "manage webhooks (scope admin:org_hook or admin:repo_hook)"
	case strings.HasPrefix(s.path, "/enterprises/"):
		return "administer its runners (scope manage_runners:enterprise)"
	case s.organisation():
		return "administer its runners (scope admin:org)"
	}
	return "administer its runners (scope repo)"
}

// groupFault says that there is no such runner group.
func (s *scope) groupFault(name string, err error) error {
	return &flint.Fault{
		Code: "github.group", What: fmt.Sprintf("use runner group %q of %s", name, s.name), Kind: flint.ErrConfig, Err: err,
		Fix: "make the group in the organisation's settings (Actions, Runner groups), or correct the pool's group",
	}
}

// server is the host of the API.
func (s *scope) server() string {
	u, err := url.Parse(s.api)
	if err != nil {
		return s.api
	}
	return u.Host
}

// reason says for a person why pool hears nothing from GitHub, and since when.
func reason(pool string, err error, since time.Time) flint.Reason {
	at := since.Format(time.TimeOnly)
	var f *flint.Fault
	var e *callError
	switch {
	case errors.As(err, &f) && f.Code == "github.unreachable":
		return flint.Because(f.Code, "pool %s: GitHub unreachable since %s: %v; %s", pool, at, f.Err, f.Fix)
	case errors.As(err, &f):
		return flint.Because(f.Code, "pool %s: no demand since %s: %v; %s", pool, at, f, f.Fix)
	case errors.As(err, &e):
		return flint.Because("github.answer", "pool %s: no demand since %s: %v", pool, at, e)
	default:
		return flint.Because("github.events", "pool %s: messages are not acknowledged since %s: %v", pool, at, err)
	}
}
