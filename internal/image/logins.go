package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// logins are the credentials that docker login and podman login leave, credential helpers included. The library looks for
// podman's only where there are none of docker's, and not where root's are when it is no session's.
func logins() authn.Keychain { return authn.NewMultiKeychain(authn.DefaultKeychain, podmanLogins{}) }

// podmanLogins are those in the file that podman login writes: containers-auth.json(5).
type podmanLogins struct{}

// Resolve implements authn.Keychain.
func (podmanLogins) Resolve(of authn.Resource) (authn.Authenticator, error) {
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
		return nil, fmt.Errorf("read logins: %w", err)
	}
	defer f.Close()
	var have struct {
		Auths map[string]authn.AuthConfig `json:"auths"`
	}
	const most = 1 << 20
	if err := json.NewDecoder(io.LimitReader(f, most)).Decode(&have); err != nil {
		return nil, fmt.Errorf("read logins of %s: %w", file, err)
	}
	// A login may be for a registry, or for a part of it; the closest counts.
	key := of.String()
	if rest, ok := strings.CutPrefix(key, name.DefaultRegistry); ok {
		key = "docker.io" + rest
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
