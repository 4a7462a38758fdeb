package runnersoft

import (
	"errors"
	"fmt"
	"runtime"

	"flint"
)

// Guest is what an image has of what GitHub's runner needs.
type Guest struct {
	Shell bool   // /bin/sh
	Arch  string // that /bin/sh is made for, as GOARCH names it; empty: it is not known
	Libc  string // glibc, or another's name
}

// Fits returns a fault where GitHub's runner cannot run; what says for whom it was to.
func (g Guest) Fits(what string) error {
	f := &flint.Fault{What: what, Kind: flint.ErrConfig}
	switch {
	case !g.Shell:
		f.Code, f.Err, f.Fix = "image.shell", errors.New("it has no /bin/sh"), "take an image with a shell, or install one in its Dockerfile"
	case g.Arch != "" && g.Arch != runtime.GOARCH:
		f.Code, f.Err, f.Fix = "image.platform", fmt.Errorf("its /bin/sh is made for %s, and this machine is %s", g.Arch, runtime.GOARCH), "take an image that is made for this machine; a Dockerfile's base may have others (FROM --platform)"
	case g.Libc != "glibc":
		f.Code, f.Err, f.Fix = "image.libc", fmt.Errorf("the runner needs glibc, and the image's C library is %s", g.Libc), "build the image on Debian, Ubuntu, Fedora or another with glibc; Alpine has musl"
	default:
		return nil
	}
	return f
}
