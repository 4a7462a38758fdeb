package vm

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"testing"
)

func TestProcessStart(t *testing.T) {
	mine, err := ProcessStart(os.Getpid())
	if err != nil || mine == 0 {
		t.Errorf("of this process: %d, %v", mine, err)
	}
	if first, err := ProcessStart(1); err != nil || first > mine {
		t.Errorf("process 1 began at %d, this one at %d; %v", first, mine, err)
	}
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^$")
	if err := child.Run(); err != nil {
		t.Fatal(err)
	}
	if s, err := ProcessStart(child.Process.Pid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a process that is gone: %d, %v", s, err)
	}
}

func TestParseStart(t *testing.T) {
	const rest = " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21\n"
	for line, want := range map[string]uint64{
		"7 (sh)" + rest: 4711,
		"7 (a b) S 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 (x)" + rest: 4711,
		"7 ())))" + rest: 4711,
		"7 (sh) S 1 2":   0,
		"":               0,
		"7 (sh) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 -1 20": 0,
	} {
		if got, err := parseStart([]byte(line)); got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %d, %v", line, got, err)
		}
	}
}
