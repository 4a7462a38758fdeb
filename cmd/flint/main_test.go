package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/config"
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
		"a directory":        {[]string{"config", "check", "-c", dir}, 3, []string{"[config.unreadable]", dir, "but a directory"}},
		"unknown key":        {[]string{"config", "check", "-c", bad}, 3, []string{`line 1, column 1: unknown key "log_levle"; did you mean "log_level"?`}},
		"everything at once": {[]string{"config", "check", "-c", garbage}, 3, []string{"no key in PEM form", "runner.dir: it has no program to start", "pools[0].image"}},
		"level":              {[]string{"demo", "--log-level", "loud"}, 2, []string{`"loud" is none of debug`}},
		"size":               {[]string{"run", "--memory", "512", "--", "true"}, 125, []string{"[usage]", "--memory", "is not a number with a unit", "fix: see flint run --help"}},
		"no flag of run":     {[]string{"run", "--bogus", "--", "true"}, 125, []string{"[usage]", "unknown flag: --bogus"}},
		"nothing to run":     {[]string{"run"}, 125, []string{"[usage]", "no command to run"}},
		"no variable":        {[]string{"run", "-e", "=x", "--", "true"}, 125, []string{"[usage]", `--env "=x" is neither KEY=value nor KEY`}},
		"no checkout":        {[]string{"run", "--", "true"}, 125, []string{"[image.missing]", "stat images/demo", "name an image with --image"}},
		"no subnet":          {[]string{"run", "--ipv4", "x", "--", "true"}, 125, []string{"[usage]", "--ipv4"}},
		"no subnet of demo":  {[]string{"demo", "--ipv4", "x"}, 2, []string{"[usage]", "--ipv4", "fix: see flint demo --help"}},
		"small subnet":       {[]string{"demo", "--ipv4", "10.0.0.0/31", "--accel", "warp"}, 2, []string{"--ipv4: 10.0.0.0/31 is not an IPv4 prefix", `--accel: "warp" is none of`}},
		"values of run": {
			[]string{"run", "--timeout", "-1s", "--root", "x", "--cpus", "0", "--memory", "1MiB", "--disk", "1KiB", "--filesystem", "fat", "--image", "", "--ipv4", "10.0.0.0/31", "--", "true"},
			125,
			[]string{
				"[usage]", "--timeout: -1s is not above zero", `--root: "x" is none of`, "--cpus: 0 is", "--memory: 1MiB is", "--disk: 1KiB is", `--filesystem: "fat" is none of`,
				"--image: is missing", "--ipv4: 10.0.0.0/31 is", "fix: see flint run --help",
			},
		},
		"everything in a launch line": {
			[]string{"--kernel=/nowhere/k", "--jailer=" + key, "--firecracker=" + dir, "--privateKey=MIIhunter2", "--webhookSecret=/hunter2", "--appID=-1", "--organization=a/b", "--interactive"},
			3,
			[]string{
				"[config.invalid]", "--filesystem is missing", "--kernel: /nowhere/k: no such file", "--jailer: " + key + " is not executable", "--firecracker: " + dir + " is no file",
				"--privateKey: it names no file", "--webhookSecret: it begins with /", "--appID: -1", `--organization: "a/b"`,
			},
		},
		"no such image":     {[]string{"--filesystem=rootfs.ext4", "--interactive"}, 3, []string{"--filesystem: rootfs.ext4: no such file"}},
		"empty launch line": {[]string{"--filesystem=", "--webhookSecret="}, 3, []string{"--filesystem is missing"}},
		"one dash":          {[]string{"-webhookSecret=hunter2"}, 2, []string{"it has two dashes: --webhookSecret"}},
		"one dash, unknown": {[]string{"-webSecret=hunter2"}, 2, []string{"unknown flag: -webSecret"}},
		"a secret astray":   {[]string{"--filesystem=" + key, "--webhookSecret=", "hunter2"}, 2, []string{"belongs to no flag"}},
		"webhooks":          {[]string{"--filesystem=" + key, "--webhookSecret=hunter2"}, 3, []string{"[config.invalid]", "github.organization", "github.app_id", "the secret --webhookSecret is in the command line", "chmod 600"}},
		"a key in the line": {[]string{"--filesystem=" + key, "--privateKey=-----BEGIN hunter2"}, 3, []string{"[config.invalid]", "github.webhook_secret_file: is missing", "the secret --privateKey is in the command line"}},
		"no terminal":       {[]string{"--filesystem=" + key, "--interactive"}, 2, []string{"--interactive needs a terminal"}},
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

func TestTheEnvironmentNamesTheFile(t *testing.T) {
	dir := t.TempDir()
	bad, missing := filepath.Join(dir, "bad.yaml"), filepath.Join(dir, "none.yaml")
	if err := os.WriteFile(bad, []byte("log_levle: info\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"serve"}, {"config", "check"}, {"image", "ls"}, {"host", "ls"}, {"doctor"}, {"explain"}, {"run", "--", "true"}} {
		invalid, absent := exitConfig, exitNotFound
		if args[0] == "run" {
			invalid, absent = exitRunFailed, exitRunFailed
		}
		t.Setenv(config.FileVariable, bad)
		if code, _, stderr := flintCommand(args...); code != invalid || !strings.Contains(stderr, bad) {
			t.Errorf("%s: exit %d\n%s", args, code, stderr)
		}
		t.Setenv(config.FileVariable, missing) // it was named, so the defaults are not meant
		if code, _, stderr := flintCommand(args...); code != absent || !strings.Contains(stderr, missing) {
			t.Errorf("%s: exit %d\n%s", args, code, stderr)
		}
	}
	if code, _, stderr := flintCommand("config", "check", "--config", bad); code != exitConfig || !strings.Contains(stderr, bad) {
		t.Errorf("the flag goes before it: exit %d\n%s", code, stderr)
	}
}

func TestHelpSaysWhatIsTrue(t *testing.T) {
	if _, stdout, _ := flintCommand("explain", "--help"); !strings.Contains(stdout, "flint explain [URL | OWNER/REPO RUN] [flags]\n") || !strings.Contains(stdout, "flint explain acme/app 1234\n") {
		t.Errorf("of its arguments one learns\n%s", stdout)
	}
	if _, stdout, _ := flintCommand("serve", "--help"); !strings.Contains(stdout, "such as 10m; told again, stop at once (default: do not wait)") {
		t.Errorf("of --drain-timeout one learns\n%s", stdout)
	}
}

func TestWhatFlagsDidNotSayIsOfTheConfiguration(t *testing.T) {
	t.Setenv("FLINT_HOST_MEMORY", "256MiB")
	for name, tt := range map[string]struct {
		args []string
		code int
		want []string
	}{
		"a default":     {[]string{"run", "--", "true"}, 125, []string{"[usage]", "--memory: 512MiB is more than host.memory"}},
		"no flag":       {[]string{"demo"}, 3, []string{"[config.invalid]", "pools[0].vm.memory: 512MiB is more than host.memory"}},
		"some of each":  {[]string{"demo", "--ipv4", "10.0.0.0/31"}, 2, []string{"[usage]", "--ipv4: 10.0.0.0/31", "[config.invalid]", "pools[0].vm.memory"}},
		"none any more": {[]string{"run", "--memory", "128MiB", "--root", "x", "--", "true"}, 125, []string{`--root: "x"`}},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := flintCommand(tt.args...)
			for _, want := range tt.want {
				if code != tt.code || !strings.Contains(stderr, want) {
					t.Errorf("exit %d, want %d; %q should be in\n%s", code, tt.code, want, stderr)
				}
			}
		})
	}
}

func TestGroupsRefuseWhatIsNoCommandOfTheirs(t *testing.T) {
	root := newRoot(newSignals())
	root.InitDefaultCompletionCmd()
	tried := 0
	var try func(c *cobra.Command)
	try = func(c *cobra.Command) {
		for _, below := range c.Commands() {
			try(below)
		}
		if !c.HasSubCommands() {
			return
		}
		tried++
		path := strings.Fields(c.CommandPath())[1:]
		if code, stdout, stderr := flintCommand(append(path, "bogus")...); code != 2 || stdout != "" || !strings.Contains(stderr, `"bogus"`) || !strings.Contains(stderr, "[usage]") {
			t.Errorf("%s bogus: exit %d, %q, %q", c.CommandPath(), code, stdout, stderr)
		}
		if code, stdout, stderr := flintCommand(append(path, "bogus", "--help")...); code != 2 || stdout != "" || !strings.Contains(stderr, `"bogus"`) {
			t.Errorf("%s bogus --help: exit %d, %q, %q", c.CommandPath(), code, stdout, stderr)
		}
		help := append([]string{"help"}, path...)
		if code, stdout, stderr := flintCommand(help...); code != 0 || !strings.Contains(stdout, "Available Commands:") || stderr != "" {
			t.Errorf("help of %s: exit %d, %q, %q", c.CommandPath(), code, stdout, stderr)
		}
		if code, stdout, stderr := flintCommand(append(help, "bogus")...); code != 2 || stdout != "" || !strings.Contains(stderr, `"bogus"`) {
			t.Errorf("help of %s bogus: exit %d, %q, %q", c.CommandPath(), code, stdout, stderr)
		}
		if c.Runnable() && c.HasParent() {
			return // it does something by itself
		}
		if code, stdout, stderr := flintCommand(path...); code != 0 || !strings.Contains(stdout, "Available Commands:") || stderr != "" {
			t.Errorf("%s: exit %d, %q, %q", c.CommandPath(), code, stdout, stderr)
		}
	}
	try(root)
	if tried < 9 {
		t.Errorf("only %d groups of commands were found", tried)
	}
	if _, _, stderr := flintCommand("config", "chekc"); !strings.Contains(stderr, `unknown command "chekc"; did you mean "check"?`) {
		t.Errorf("a slip of the pen gives\n%s", stderr)
	}
	if code, stdout, stderr := flintCommand("help", "version", "bogus"); code != 2 || stdout != "" || !strings.Contains(stderr, `"bogus"`) {
		t.Errorf("help of what is below a command that has none below it: exit %d, %q, %q", code, stdout, stderr)
	}
}

// seedFiles makes files for all flags that name one.
func seedFiles(t *testing.T) (dir string, f seedFlags) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"jailer", "firecracker", "vmlinux", "rootfs.ext4", "app.pem", "secret"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dir, seedFlags{
		jailer: dir + "/jailer", firecracker: dir + "/firecracker", kernel: dir + "/vmlinux", filesystem: dir + "/rootfs.ext4",
		privateKey: dir + "/app.pem", webhookSecret: dir + "/secret", organization: "acme", appID: 7,
	}
}

func TestSeedLineMapsOntoTheConfiguration(t *testing.T) {
	dir, f := seedFiles(t)
	// What the line does not say, the environment may; what it says goes before.
	environ := []string{"FLINT_KERNEL_PACKAGE=linux-image-other", "FLINT_GITHUB_REPOSITORY=a/b", "FLINT_GITHUB_URL=https://ghes.example", "FLINT_VM_DRIVER=qemu"}
	cfg, err := f.config(environ)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.VM.Driver != "firecracker" || cfg.Firecracker.Binary != dir+"/firecracker" || cfg.Firecracker.Jailer != dir+"/jailer" || !cfg.Firecracker.Jail ||
		cfg.Kernel != (config.Kernel{Vmlinuz: dir + "/vmlinux"}) || cfg.GitHub.Scope() != "https://ghes.example/acme" || cfg.GitHub.AppID != 7 ||
		cfg.GitHub.PrivateKeyFile != dir+"/app.pem" || len(cfg.Pools) != 1 || cfg.Pools[0].Image != dir+"/rootfs.ext4" || cfg.Pools[0].Name != "self-hosted" {
		t.Errorf("the line became %+v", cfg)
	}
	if cfg.GitHub.Mode != config.Webhooks || cfg.GitHub.WebhookSecretFile != dir+"/secret" || cfg.GitHub.WebhookSecret != "" || cfg.Runner.InImage != "auto" {
		t.Errorf("the line became %+v", cfg)
	}
	if err := cfg.ValidateServe(); err != nil {
		t.Errorf("it is not what serve takes: %v", err)
	}
	if labels := cfg.FlintPools()[0].Labels; labels[0] != "self-hosted" {
		t.Errorf("the pool serves %v", labels)
	}
	cfg, err = (&seedFlags{filesystem: f.filesystem}).config([]string{"FLINT_KERNEL_VMLINUZ=/k", "FLINT_FIRECRACKER_JAILER=/j", "FLINT_GITHUB_APP_ID=8", "FLINT_GITHUB_PRIVATE_KEY_FILE=/p"})
	if err != nil || cfg.Kernel.Vmlinuz != "/k" || cfg.Firecracker.Jailer != "/j" || cfg.GitHub.AppID != 8 || cfg.GitHub.PrivateKeyFile != "/p" || cfg.VM.Driver != "auto" {
		t.Errorf("the environment became %+v, %v", cfg, err)
	}
}

func TestSeedLineTakesTheKeyItself(t *testing.T) {
	_, f := seedFiles(t)
	f.privateKey = "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----\n"
	cfg, err := f.config([]string{"FLINT_GITHUB_PRIVATE_KEY_FILE=/elsewhere.pem"})
	if err != nil || string(cfg.GitHub.PrivateKey) != f.privateKey || cfg.GitHub.PrivateKeyFile != "" {
		t.Errorf("the key became %q in %q, %v", string(cfg.GitHub.PrivateKey), cfg.GitHub.PrivateKeyFile, err)
	}
	f.webhookSecret = "hunter3"
	if cfg, err := f.config(nil); err != nil || string(cfg.GitHub.WebhookSecret) != "hunter3" || cfg.GitHub.WebhookSecretFile != "" {
		t.Errorf("the webhook secret became %q in %q, %v", string(cfg.GitHub.WebhookSecret), cfg.GitHub.WebhookSecretFile, err)
	}
	f.webhookSecret = ""
	if shown := fmt.Sprintf("%+v", cfg); strings.Contains(shown, "hunter2") {
		t.Errorf("the configuration shows the key: %s", shown)
	}
	var log strings.Builder
	f.warn(slog.New(slog.NewTextHandler(&log, nil)))
	if strings.Count(log.String(), "level=WARN") != 1 || !strings.Contains(log.String(), "--privateKey") || strings.Contains(log.String(), "hunter2") {
		t.Errorf("one warning should name --privateKey:\n%s", log.String())
	}
}

func TestSeedLineFindsAnImageBesideIt(t *testing.T) {
	dir, _ := seedFiles(t)
	t.Chdir(dir)
	cfg, err := (&seedFlags{filesystem: "rootfs.ext4"}).config(nil)
	if err != nil || cfg.Pools[0].Image != dir+"/rootfs.ext4" {
		t.Errorf("the image is %+v, %v; a registry would be asked for anything but a path", cfg.Pools, err)
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

// TestInterrupted asks a command that waits to end.
func TestInterrupted(t *testing.T) {
	bin, dir := t.TempDir(), t.TempDir()
	started := filepath.Join(dir, "started")
	script := "#!/bin/sh\ncase \"$*\" in *\" build \"*) echo $$ >" + started + "; exec sleep 600;; esac\n"
	if err := errors.Join(os.WriteFile(filepath.Join(bin, "buildah"), []byte(script), 0o755),
		os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\n"), 0o644), unix.Mkfifo(started, 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":/usr/bin:/bin")
	pipe, err := os.OpenFile(started, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan error)
	go func() {
		_, err := pipe.Read(make([]byte, 1))
		asked <- errors.Join(err, syscall.Kill(syscall.Getpid(), syscall.SIGINT))
	}()
	code, _, stderr := flintCommand("image", "build", "--state-dir", t.TempDir(), dir)
	if err := errors.Join(pipe.Close(), <-asked); err != nil {
		t.Fatalf("the build did not start: %v\n%s", err, stderr)
	}
	if code != exitInterrupted || strings.Contains(stderr, "flint:") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestRunEnvironment(t *testing.T) {
	t.Setenv("SECRET", "s=1")
	f := runFlags{env: []string{"A=b c", "SECRET", "NOT_SET_HERE", "B="}}
	env, err := f.environment(&cobra.Command{})
	if want := []string{"A=b c", "SECRET=s=1", "B="}; err != nil || !slices.Equal(env, want) {
		t.Errorf("got %q, %v", env, err)
	}
}

// TestBriefSteps leaves a terminal to the command that comes after them.
func TestBriefSteps(t *testing.T) {
	var out bytes.Buffer
	term := style{w: &out, tty: true, width: 80}
	s := &steps{style: term, brief: true}
	done := flint.Progress(s.report).Step("build image")
	if err := (notices{style: term}).Handle(t.Context(), slog.Record{Message: "slow"}); err != nil {
		t.Fatal(err)
	}
	done("with buildah", nil)
	if want := "  … build image\r\x1b[K  ! slow\n\r\x1b[K"; out.String() != want {
		t.Errorf("%q, want %q", &out, want)
	}
	out.Reset()
	s.style.tty = false
	flint.Progress(s.report).Step("build image")("with buildah", nil)
	if out.Len() > 0 {
		t.Errorf("no terminal, and %q is shown", &out)
	}
}

func TestTableAligns(t *testing.T) {
	var out bytes.Buffer
	table(&out, style{}, []string{"job", "#ms", "address"}, [][]string{{"übersetzen", "7", "10.0.0.1"}, {"a", "12345", "–"}})
	if want := "  job            ms  address\n  übersetzen      7  10.0.0.1\n  a           12345  –\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
	if got := fit("übersetzen", 5); got != "über…" {
		t.Errorf("cut to %q", got)
	}
}

func TestStepsShowPathsAsTheyAreTyped(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	var out strings.Builder
	newSteps(&out).report(flint.Milestone{Step: "build image " + filepath.Join(dir, "images", "demo"), Done: true})
	if got := out.String(); !strings.Contains(got, " build image images/demo ") {
		t.Errorf("said %q", got)
	}
	if got := fromHere("look at /srv" + dir + "/images"); got != "look at /srv"+dir+"/images" {
		t.Errorf("another path became %q", got)
	}
}
