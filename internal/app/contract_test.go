package app

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"flint/internal/config"
	"flint/internal/runnersoft"
)

// program stands for the program of either flavour of runner software. It notes below the working directory how it was called and
// what it was given, and reads what is left of its input; it exits as the file `code` there says.
const program = `#!/bin/sh
work=$CONTRACT_WORK
printf '%s\n' "$*" >>"$work/calls"
printf '%s\n' "$ACTIONS_RUNNER_INPUT_JITCONFIG$ACTIONS_RUNNER_INPUT_TOKEN" >>"$work/secrets"
cat >>"$work/input"
tr '\0' '\n' </proc/$$/cmdline >>"$work/cmdline"
[ "$1" = run ] || exit 0
exit "$(cat "$work/code")"
`

// flavours are directories of runner software as VMs get them, with another program in them.
func flavours(t *testing.T) map[string]string {
	t.Helper()
	cfg := config.Default()
	cfg.StateDir = t.TempDir()
	tarball := filepath.Join(t.TempDir(), "x.tar.gz")
	if err := os.WriteFile(tarball, runnerArchive(t, program), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := RunnerSoftware(cfg, slog.New(slog.DiscardHandler)).Import(t.Context(), RunnerFile{Path: tarball, Version: "2.335.0", Released: time.Date(2026, 11, 3, 0, 0, 0, 0, time.UTC)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	demo := t.TempDir()
	start, err := os.ReadFile("../../images/demo-runner/start")
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"start": string(start), "github-act-runner": program, "version": "github.com/ChristopherHX/github-act-runner v0.13.0\n"} {
		if err := os.WriteFile(filepath.Join(demo, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return map[string]string{"GitHub's": got.Dir, "the demo's": demo}
}

// TestRunnerSoftwareContract holds both flavours of runner software to what docs/reference.md says a runner.dir has.
func TestRunnerSoftwareContract(t *testing.T) {
	const registration = `{"url":"https://github.com/acme","token":"SECRET","name":"flint-1","labels":["self-hosted","a"],"group":"big","ephemeral":true}`
	for name, dir := range flavours(t) {
		t.Run(name, func(t *testing.T) {
			before := tree(t, dir)
			for _, line := range []string{"SECRETjit", registration} {
				for _, code := range []int{0, 1, 7} {
					work := t.TempDir()
					if err := os.WriteFile(filepath.Join(work, "code"), []byte(strconv.Itoa(code)), 0o600); err != nil {
						t.Fatal(err)
					}
					cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "start"))
					cmd.Dir, cmd.Env = work, []string{"PATH=" + os.Getenv("PATH"), "CONTRACT_WORK=" + work}
					cmd.Stdin = strings.NewReader(line + "\nwhat follows is not for the job\n")
					out, err := cmd.CombinedOutput()
					var exit *exec.ExitError
					if err != nil && !errors.As(err, &exit) || cmd.ProcessState.ExitCode() != code {
						t.Fatalf("%v, want exit code %d: %s", err, code, out)
					}
					checkContract(t, work, line == registration)
				}
			}
			if after := tree(t, dir); !slices.Equal(before, after) {
				t.Errorf("it is to be read-only, and has changed: %q", after)
			}
			if _, err := runnersoft.Read(dir); err != nil {
				t.Error(err)
			}
		})
	}
}

// checkContract looks at what the program was given.
func checkContract(t *testing.T, work string, registers bool) {
	t.Helper()
	said := map[string]string{}
	for _, file := range []string{"calls", "secrets", "input", "cmdline"} {
		b, err := os.ReadFile(filepath.Join(work, file))
		if err != nil {
			t.Fatal(err)
		}
		said[file] = string(b)
	}
	calls, secrets := strings.Split(strings.TrimSpace(said["calls"]), "\n"), strings.Fields(said["secrets"])
	last := calls[len(calls)-1]
	if first, _, _ := strings.Cut(last, " "); first != "run" {
		t.Errorf("it was not run at last: %q", calls)
	}
	switch {
	case !registers && (len(calls) != 1 || !slices.Equal(secrets, []string{"SECRETjit"})):
		t.Errorf("it was called as %q with %q", calls, secrets)
	case registers && (len(calls) != 2 || !slices.Equal(secrets, []string{"SECRET"}) || !strings.Contains(calls[0], "--ephemeral") ||
		!strings.Contains(calls[0], "--url https://github.com/acme --name flint-1 --labels self-hosted,a --runnergroup big")):
		t.Errorf("it was called as %q with %q", calls, secrets)
	}
	if said["input"] != "" {
		t.Errorf("the job could have read %q", said["input"])
	}
	if strings.Contains(said["cmdline"], "SECRET") {
		t.Errorf("a secret is on a command line: %q", said["cmdline"])
	}
}

func tree(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		list = append(list, path+" "+info.ModTime().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}
