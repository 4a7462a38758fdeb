package image

import (
	"bufio"
	"context"
	"errors"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"flint/internal/regular"
)

// reachWithin bounds how long a registry may take to answer before it counts as out of reach.
const reachWithin = 5 * time.Second

// BaseReachable reports whether the registry of the image that ref's Dockerfile builds on by default (ARG BASE=…)
// answers at all, be it with a refusal. It is true where there is nothing to reach: ref is no Dockerfile, or names no BASE.
func (s *Store) BaseReachable(ctx context.Context, ref string) bool {
	src, err := locate(ref)
	if err != nil || src.kind != dockerfile {
		return true
	}
	base, err := defaultBase(src.path)
	if err != nil || base == "" {
		return true
	}
	image, err := name.ParseReference(base)
	if err != nil {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, reachWithin)
	defer cancel()
	_, err = remote.Head(image, remote.WithContext(ctx))
	var refused *transport.Error
	return err == nil || errors.As(err, &refused)
}

// defaultBase finds the default of the build argument BASE.
func defaultBase(path string) (string, error) {
	f, err := regular.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || !strings.EqualFold(fields[0], "ARG") {
			continue
		}
		if value, ok := strings.CutPrefix(fields[1], "BASE="); ok {
			return strings.Trim(value, `"'`), nil
		}
	}
	return "", lines.Err()
}
