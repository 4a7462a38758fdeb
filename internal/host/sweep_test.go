package host_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"flint"
	"flint/internal/guest"
	"flint/internal/host"
	"flint/internal/vm/vmtest"
)

func TestRegistrationThatGitHubKeepsStaysOnRecord(t *testing.T) {
	synctest.Test(t, registrationThatStays) // in fake time: GitHub is asked again for 10 s
}

func registrationThatStays(t *testing.T) {
	w := newWorld(t, runner(t, func(context.Context, io.Writer) guest.Exit { return guest.Exit{} }))
	h := w.host()
	w.github.setBusy(true)
	if _, err := h.Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"}); !errors.Is(err, flint.ErrConflict) {
		t.Fatalf("the registration that stayed is not reported: %v", err)
	}
	if left, err := h.Leftovers(); err != nil || len(left) != 1 {
		t.Fatalf("its record is not kept: %v, %v", left, err)
	}
	w.github.setBusy(false)
	w.host() // the next start sweeps
	w.nothingLeft()
}

func TestSweepUndoesADeadDaemonsRunners(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	vmm := exec.Command("sleep", "1000")
	if err := vmm.Start(); err != nil {
		t.Fatal(err)
	}
	stat, err := os.ReadFile(filepath.Join("/proc", itoa(vmm.Process.Pid), "stat"))
	if err != nil {
		t.Fatal(err)
	}
	started := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))[19]
	w.github.registered["flint-a"], w.github.registered["flint-torn"] = 5, 6
	// A VMM whose daemon died before it wrote the pid down: only its command line names it.
	nameless := exec.Command("sh", "-c", "read line", "sh", "-name", "flint-nameless")
	stdin, err := nameless.StdinPipe() // never written to
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if err := nameless.Start(); err != nil {
		t.Fatal(err)
	}
	record := func(id, content string) {
		if err := os.MkdirAll(filepath.Join(w.dir, id), 0o700); err != nil {
			t.Fatal(err)
		}
		if content == "" {
			return
		}
		if err := os.WriteFile(filepath.Join(w.dir, id, "runner.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	record("flint-a", `{"version":1,"runner":{"id":"flint-a","pool":"p","phase":"registered"},"pid":`+itoa(vmm.Process.Pid)+`,"start":`+started+`,"github_id":5,"register":true}`)
	// The pid of this test with another start time: a process that came after the VMM's end. It must live.
	record("flint-b", `{"version":1,"runner":{"id":"flint-b","phase":"booting"},"pid":`+itoa(os.Getpid())+`,"start":1}`)
	record("flint-torn", `{"version":1,"runner":{"id":"fl`)
	record("flint-future", `{"version":2,"runner":{"id":"flint-future"}}`)
	record("flint-early", "")
	record("flint-nameless", `{"version":1,"runner":{"id":"flint-nameless","phase":"preparing"}}`)
	w.host()
	if err := vmm.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the VMM ended with %v", err)
	}
	if err := nameless.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the VMM that no record names ended with %v", err)
	}
	w.nothingLeft()
	aside, err := os.ReadDir(filepath.Join(filepath.Dir(w.dir), "damaged"))
	if err != nil || len(aside) != 2 {
		t.Errorf("set aside: %v, %v; want the torn and the future record", aside, err)
	}
}

func itoa(n int) string {
	b, _ := json.Marshal(n)
	return string(b)
}
