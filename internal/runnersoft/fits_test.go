package runnersoft

import (
	"runtime"
	"strings"
	"testing"
)

func TestWhereTheRunnerCanRun(t *testing.T) {
	for name, tt := range map[string]struct {
		Guest
		code, says string
	}{
		"all is there":         {Guest{Shell: true, Arch: runtime.GOARCH, Libc: "glibc"}, "", ""},
		"of unknown machine":   {Guest{Shell: true, Libc: "glibc"}, "", ""},
		"nothing":              {Guest{}, "image.shell", "run it in a: it has no /bin/sh"},
		"for another machine":  {Guest{Shell: true, Arch: "s390x", Libc: "musl"}, "image.platform", "made for s390x, and this machine is " + runtime.GOARCH},
		"with another library": {Guest{Shell: true, Arch: runtime.GOARCH, Libc: "musl"}, "image.libc", "C library is musl"},
	} {
		err := tt.Fits("run it in a")
		if tt.code == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if faultCode(err) != tt.code || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
