package image

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestBaseReachable(t *testing.T) {
	refuses := httptest.NewServer(http.NotFoundHandler())
	defer refuses.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	s := testStore(t)
	on := func(url string) string {
		return dockerfileDir(t, "# a comment\narg BASE=\""+strings.TrimPrefix(url, "http://")+"/debian:12\"\nFROM ${BASE}\n")
	}
	for name, c := range map[string]struct {
		ref  string
		want bool
	}{
		"a registry that answers, if only no": {on(refuses.URL), true},
		"a registry that is not there":        {on(gone.URL), false},
		"no BASE to reach":                    {dockerfileDir(t, "ARG OTHER=x\nFROM scratch\n"), true},
		"no default":                          {dockerfileDir(t, "ARG BASE\nFROM ${BASE}\n"), true},
		"no Dockerfile":                       {t.TempDir(), true},
	} {
		if got := s.BaseReachable(t.Context(), c.ref); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
