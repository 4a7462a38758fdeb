package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"flint"
)

// What an image may ask of each of its VMs' commands: with what else these have it has to fit into one request to the guest, of 64 KiB
// and 1024 variables.
const (
	maxEnvironment = 32 * flint.KiB // as JSON
	maxVariables   = 512
	maxDirectory   = 2048 // bytes
)

// settings takes from an image's configuration what reaches its VMs. As docker does, it leaves out variables without a value,
// and takes a working directory from the root.
func settings(c v1.Config) (b Base, err error) {
	b = Base{User: c.User, Dir: c.WorkingDir, Cmd: append(append([]string(nil), c.Entrypoint...), c.Cmd...)}
	for _, variable := range c.Env {
		if name, _, ok := strings.Cut(variable, "="); ok && name != "" {
			b.Env = append(b.Env, variable)
		}
	}
	size, err := json.Marshal(b.Env)
	switch {
	case err != nil:
		return Base{}, fmt.Errorf("read environment: %w", err)
	case len(b.Env) > maxVariables:
		return Base{}, fmt.Errorf("environment of %d variables, at most %d", len(b.Env), maxVariables)
	case flint.Bytes(len(size)) > maxEnvironment:
		return Base{}, fmt.Errorf("environment of %d bytes, at most %s", len(size), maxEnvironment)
	case strings.ContainsRune(strings.Join(b.Env, "")+b.Dir, 0):
		return Base{}, errors.New("zero byte in the environment or the working directory")
	case len(b.Dir) > maxDirectory:
		return Base{}, fmt.Errorf("working directory of %d bytes, at most %d", len(b.Dir), maxDirectory)
	}
	if b.Dir != "" {
		b.Dir = path.Join("/", b.Dir)
	}
	return b, nil
}
