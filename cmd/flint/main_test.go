package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"flint"
	"flint/internal/vm"
)

// flintCommand runs the program in this process.
func flintCommand(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

func TestExitCodesAndErrors(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("log_levle: info\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, "key.pem")
	if err := os.WriteFile(key, []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}
	garbage := filepath.Join(dir, "garbage.yaml")
	content := "github: {app_id: 1, organization: acme, private_key_file: key.pem}\nrunner: {dir: nowhere}\npools: [{name: a, image: ./nowhere}]\n"
	if err := os.WriteFile(garbage, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		args []string
		code int
		want []string
	}{
		"no such command":    {[]string{"bogus"}, 2, []string{`unknown command "bogus"`, "fix: see flint --help"}},
		"no such flag":       {[]string{"demo", "--bogus"}, 2, []string{"unknown flag: --bogus"}},
		"no such file":       {[]string{"config", "check", "-c", filepath.Join(dir, "none.yaml")}, 5, []string{"[config.missing]"}},
		"a directory":        {[]string{"config", "check", "-c", dir}, 3, []string{"it is a directory"}},
		"unknown key":        {[]string{"config", "check", "-c", bad}, 3, []string{`line 1, column 1: unknown key "log_levle"; did you mean "log_level"?`}},
		"everything at once": {[]string{"config", "check", "-c", garbage}, 3, []string{"no key in PEM form", "runner.dir: it has no program to start", "pools[0].image"}},
		"level":              {[]string{"demo", "--log-level", "loud"}, 2, []string{`"loud" is none of debug`}},
		"size":               {[]string{"run", "--memory", "512", "--", "true"}, 125, []string{"--memory", "is not a number with a unit"}},
		"no image":           {[]string{"--kernel=/k", "--interactive"}, 3, []string{"--filesystem is missing"}},
		"webhooks":           {[]string{"--filesystem=/f.ext4", "--webhookSecret=hunter2"}, 2, []string{"[seed.webhooks]", "flint serve"}},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := flintCommand(tt.args...)
			if code != tt.code {
				t.Errorf("exit %d, want %d", code, tt.code)
			}
			for _, want := range tt.want {
				if !strings.Contains(stderr, want) {
					t.Errorf("%q is not in\n%s", want, stderr)
				}
			}
			if strings.Contains(stderr, "hunter2") {
				t.Errorf("the secret is shown:\n%s", stderr)
			}
		})
	}
	if code, stdout, _ := flintCommand("config", "example"); code != 0 || !strings.HasPrefix(stdout, "schema_version: 1\n") {
		t.Errorf("config example: exit %d, %q", code, stdout)
	}
}

func TestSeedLineMapsOntoTheConfiguration(t *testing.T) {
	f := seedFlags{
		jailer: "/opt/jailer", firecracker: "/opt/firecracker", kernel: "/opt/vmlinux", filesystem: "/opt/rootfs.ext4",
		privateKey: "/etc/app.pem", webhookSecret: "hunter2", organization: "acme", appID: 7,
	}
	cfg, err := f.config(nil)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.VM.Driver != "firecracker" || cfg.Firecracker.Binary != "/opt/firecracker" || cfg.Firecracker.Jailer != "/opt/jailer" ||
		cfg.Kernel.Vmlinuz != "/opt/vmlinux" || cfg.GitHub.Organization != "acme" || cfg.GitHub.AppID != 7 ||
		cfg.GitHub.PrivateKeyFile != "/etc/app.pem" || len(cfg.Pools) != 1 || cfg.Pools[0].Image != "/opt/rootfs.ext4" || cfg.Pools[0].Name != "self-hosted" {
		t.Errorf("the line became %+v", cfg)
	}
}

func TestComplainShowsEveryErrorAndNothingThatMovesTheCursor(t *testing.T) {
	var out bytes.Buffer
	fault := &flint.Fault{
		Code: "vm.boot", What: "greet the agent", Kind: flint.ErrGuest, Fix: "look",
		Err: &vm.BootError{Err: errors.New("first line\nsecond \x1b[2Jline"), Console: []byte("one\r\n\x1b]0;title\x07two\n")},
	}
	complain(&out, errors.Join(fmt.Errorf("outside: %w", fault), errors.New("and another")))
	want := `flint: cannot greet the agent [vm.boot]
  why: outside: guest did not come up: first line
       second [2Jline
  fix: look
  end of the guest's console:
    | one
    | ]0;titletwo
flint: and another
`
	if out.String() != want {
		t.Errorf("shown:\n%s\nwant:\n%s", out.String(), want)
	}
}

func TestStoppedKeepsWhatElseWentWrong(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	broken := errors.New("tap is stuck")
	err := errors.Join(fmt.Errorf("work: %w", flint.ErrStopped), errors.Join(context.Canceled, broken))
	if got := stopped(ctx, err); got != err {
		t.Errorf("nobody stopped it, and %v became %v", err, got)
	}
	cancel()
	if got := stopped(ctx, err); !errors.Is(got, broken) || errors.Is(got, flint.ErrStopped) || errors.Is(got, context.Canceled) {
		t.Errorf("%v became %v", err, got)
	}
}

func TestTableAligns(t *testing.T) {
	var out bytes.Buffer
	table(&out, style{}, []string{"job", "ms"}, [][]string{{"übersetzen", "7"}, {"a", "12345"}})
	if want := "  job            ms\n  übersetzen      7\n  a           12345\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
	if got := fit("übersetzen", 5); got != "über…" {
		t.Errorf("cut to %q", got)
	}
}
