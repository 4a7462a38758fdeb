package tool

import (
	"errors"
	"io/fs"
	"syscall"
	"testing"
)

func TestOutOfSpace(t *testing.T) {
	for script, want := range map[string]error{
		"echo copying >&2; echo 'write /x: No space left on device' >&2; echo bye >&2; exit 1": syscall.ENOSPC,
		"echo 'write /x: disk quota exceeded' >&2; exit 1":                                     syscall.EDQUOT,
		"echo 'no such file' >&2; exit 1":                                                      nil,
	} {
		err := Tool{Path: "/bin/sh", Args: []string{"-c", script}}.Run(t.Context())
		got := OutOfSpace(err)
		var failed *Error
		if !errors.As(got, &failed) {
			t.Fatalf("%q: %v", script, got)
		}
		if want != nil && !errors.Is(got, want) || want == nil && got != err {
			t.Errorf("%q: %v, want %v", script, got, want)
		}
	}
	if err := OutOfSpace(fs.ErrNotExist); err != fs.ErrNotExist {
		t.Errorf("another error became %v", err)
	}
	if err := OutOfSpace(nil); err != nil {
		t.Errorf("no error became %v", err)
	}
}
