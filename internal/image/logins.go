package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// logins are the credentials that docker login and podman login leave, credential helpers included. The library looks for
// podman's only where there are none of docker's, and not where root's are when it is no session's.
func logins() authn.Keychain { return authn.NewMultiKeychain(dockerLogins{}, podmanLogins{}) }

// loginError says that a login that is kept here cannot be had: no registry was asked yet.
type loginError struct{ err error }

// Error implements error.
func (e *loginError) Error() string { return e.err.Error() }

// Unwrap implements errors.Unwrap.
func (e *loginError) Unwrap() error { return e.err }

// dockerLogins are those that the library finds.
type dockerLogins struct{}

// Resolve implements authn.Keychain.
func (dockerLogins) Resolve(of authn.Resource) (authn.Authenticator, error) {
	login, err := authn.DefaultKeychain.Resolve(of)
	if err != nil {
		return nil, &loginError{fmt.Errorf("read docker's logins (config.json, or auth.json where there is none): %w", err)}
	}
	return login, nil
}

// helperTime is what a credential helper has to answer.
const helperTime = time.Minute

// podmanLogins are those in the file that podman login writes: containers-auth.json(5).
type podmanLogins struct{}

// Resolve implements authn.Keychain.
func (l podmanLogins) Resolve(of authn.Resource) (authn.Authenticator, error) {
	return l.ResolveContext(context.Background(), of)
}

// ResolveContext implements authn.ContextKeychain.
func (podmanLogins) ResolveContext(ctx context.Context, of authn.Resource) (authn.Authenticator, error) {
	file := os.Getenv("REGISTRY_AUTH_FILE")
	if dir := os.Getenv("XDG_RUNTIME_DIR"); file == "" && dir != "" {
		file = filepath.Join(dir, "containers", "auth.json")
	}
	if file == "" {
		file = filepath.Join("/run/containers", strconv.Itoa(os.Geteuid()), "auth.json")
	}
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return authn.Anonymous, nil
	}
	if err != nil {
		return nil, &loginError{fmt.Errorf("read logins: %w", err)}
	}
	defer f.Close()
	var have struct {
		Auths   map[string]authn.AuthConfig `json:"auths"`
		Helpers map[string]string           `json:"credHelpers"` // by registry
	}
	const most = 1 << 20
	err = json.NewDecoder(io.LimitReader(f, most)).Decode(&have)
	if err != nil && !errors.Is(err, io.EOF) { // an empty file has none
		return nil, &loginError{fmt.Errorf("read logins of %s: %w", file, err)}
	}
	// A login may be for a registry, or for a part of it; the closest counts.
	key := of.String()
	if rest, ok := strings.CutPrefix(key, name.DefaultRegistry); ok {
		key = "docker.io" + rest
	}
	host, _, _ := strings.Cut(key, "/")
	if helper := have.Helpers[host]; helper != "" {
		return askHelper(ctx, helper, host)
	}
	for {
		if login, ok := have.Auths[key]; ok {
			return authn.FromConfig(login), nil
		}
		i := strings.LastIndexByte(key, '/')
		if i < 0 {
			return authn.Anonymous, nil
		}
		key = key[:i]
	}
}

// askHelper asks a credential helper, docker-credential-NAME, for the login of a registry.
func askHelper(ctx context.Context, helper, host string) (authn.Authenticator, error) {
	ctx, cancel := context.WithTimeout(ctx, helperTime)
	defer cancel()
	name := "docker-credential-" + helper
	got, err := client.Get(func(args ...string) client.Program {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.WaitDelay = time.Second // what it started may hold its output open
		return helperProgram{cmd}
	}, host)
	switch {
	case credentials.IsErrCredentialsNotFound(err):
		return authn.Anonymous, nil
	case err != nil:
		return nil, &loginError{fmt.Errorf("ask %s for the login of %s: %w", name, host, err)}
	case got.Username == "<token>": // what the helpers' protocol has for it
		return authn.FromConfig(authn.AuthConfig{IdentityToken: got.Secret}), nil
	}
	return authn.FromConfig(authn.AuthConfig{Username: got.Username, Password: got.Secret}), nil
}

// helperProgram is a command as the client of credential helpers wants one.
type helperProgram struct{ *exec.Cmd }

// Input implements client.Program.
func (p helperProgram) Input(in io.Reader) { p.Stdin = in }
