package github

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
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
		f.Fix = fmt.Sprintf("check that this machine reaches %s and that GitHub is well; flint goes on trying", s.host())
	case e.status == http.StatusTooManyRequests || e.status == http.StatusForbidden && e.retry > 0:
		f.Code, f.Fix = "github.rate", "wait; GitHub limits requests per installation, so use an App that nothing else uses"
	case strings.HasSuffix(e.path, "/access_tokens"), strings.HasSuffix(e.path, "/installation"):
		s.appFault(f, e)
	case strings.HasSuffix(e.path, "/registration-token"), strings.HasSuffix(e.path, "/actions/runner-registration"):
		s.permissionFault(f, e)
	}
	if f.Code == "" {
		return e
	}
	return f
}

// appFault explains why GitHub did not take us for the App, or the App for installed.
func (s *scope) appFault(f *flint.Fault, e *callError) {
	switch {
	case e.status == http.StatusUnauthorized, strings.Contains(e.message, "Integration not found"):
		f.Code, f.Kind = "github.app", flint.ErrConfig
		f.Fix = "check that github.app_id and github.private_key_file belong together: GitHub shows both on the App's settings page"
		if skew := e.skew.Abs(); skew > time.Minute {
			f.Fix = fmt.Sprintf("set this machine's clock: it differs from GitHub's by %s, and GitHub refuses the signature of "+
				"a wrong time", skew.Round(time.Second))
		}
	case e.status == http.StatusNotFound:
		f.Code, f.Kind = "github.installation", flint.ErrConfig
		f.Fix = fmt.Sprintf("install the GitHub App %s on %s (its settings page, Install App)", s.cfg.AppID, s.name)
		if s.cfg.InstallationID != 0 {
			f.Fix += ", or correct github.installation_id, or leave that out"
		}
	case e.status == http.StatusForbidden && strings.Contains(e.message, "suspended"):
		f.Code, f.Kind = "github.suspended", flint.ErrPermission
		f.Fix = "have an owner of " + s.name + " unsuspend the GitHub App (Settings, GitHub Apps, Configure)"
	case e.status == http.StatusForbidden:
		f.Code, f.Kind = "github.permission", flint.ErrPermission
		f.Fix = s.permissionFix()
	}
}

// permissionFault explains why we may not register runners.
func (s *scope) permissionFault(f *flint.Fault, e *callError) {
	switch e.status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound:
	default:
		return
	}
	if e.status == http.StatusUnauthorized && s.cfg.Token != "" {
		f.Code, f.Kind = "github.token", flint.ErrConfig
		f.Fix = "make a new personal access token: GitHub does not know this one, or it has expired"
		return
	}
	f.Code, f.Kind, f.Fix = "github.permission", flint.ErrPermission, s.permissionFix()
}

func (s *scope) permissionFix() string {
	if s.cfg.Token != "" {
		return "check the URL " + s.url + ", and that the personal access token may administer its runners"
	}
	permission := "organisation permission \"Self-hosted runners: read and write\""
	if strings.HasPrefix(s.path, "/repos/") {
		permission = "repository permission \"Administration: read and write\""
	}
	return fmt.Sprintf("check the URL %s, and give the GitHub App the %s; an owner must then accept it", s.url, permission)
}

func (s *scope) host() string {
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
