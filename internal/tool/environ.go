package tool

import (
	"slices"
	"strings"
)

// Environ keeps of an environment what builders, compilers and package managers need: where programs, homes and
// temporary files are, the language, certificates and proxies, and the settings of the tools themselves. Ours may hold
// secrets that are none of their business.
func Environ(environ []string) []string {
	exact := []string{
		"PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR",
		"REGISTRY_AUTH_FILE", "APT_CONFIG",
		"GOPATH", "GOMODCACHE", "GOCACHE", "GOPROXY", "GOSUMDB", "GOTOOLCHAIN", "GONOSUMDB", "GONOPROXY", "GOPRIVATE", "GOROOT",
	}
	prefixes := []string{"LC_", "XDG_", "DOCKER_", "BUILDAH_", "BUILDKIT_", "CONTAINERS_", "STORAGE_"}
	var env []string
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		// Proxies are spelled in lower case, in upper case, or both; programs differ in which they read.
		if slices.Contains(exact, name) || strings.HasSuffix(strings.ToLower(name), "_proxy") ||
			slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p) }) {
			env = append(env, kv)
		}
	}
	return env
}
