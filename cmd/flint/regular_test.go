package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPathsOfNoOrdinaryFile gives pipes where files are wanted. A pipe that is opened in the usual way is waited for, and the test
// never ends.
func TestPathsOfNoOrdinaryFile(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	pipe := at("pipe")
	err := errors.Join(os.Mkdir(at("built"), 0o755), os.Mkdir(at("runner"), 0o755), os.Symlink("loop", at("loop")),
		unix.Mkfifo(pipe, 0o600), unix.Mkfifo(at("built/.dockerignore"), 0o600), unix.Mkfifo(at("runner/start"), 0o700),
		os.WriteFile(at("built/Dockerfile"), []byte("FROM scratch\n"), 0o600),
		os.WriteFile(at("pipes.yaml"), []byte(`
github: {app_id: 1, organization: acme, mode: webhooks, private_key_file: pipe, webhook_secret_file: pipe}
runner: {dir: runner}
kernel: {vmlinuz: pipe}
pools: [{name: a, image: ./pipe, tool_cache: pipe}]
`), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("FLINT_STATE_DIR", at("state"))
	t.Setenv("FLINT_VM_AGENT", writeKernel(t, "of the agent", "")) // any static program
	const isPipe = "it is no ordinary file but a pipe"
	for name, tt := range map[string]struct {
		args []string
		code int
		want []string
	}{
		"configuration":           {[]string{"config", "check", "-c", pipe}, 3, []string{"[config.unreadable]", pipe, isPipe}},
		"configuration of serve":  {[]string{"serve", "-c", pipe}, 3, []string{"[config.unreadable]", isPipe}},
		"configuration of a host": {[]string{"host", "ls", "-c", pipe}, 3, []string{"[config.unreadable]", isPipe}},
		"endless configuration":   {[]string{"config", "check", "-c", "/dev/zero"}, 3, []string{"[config.unreadable]", "but a device"}},
		"loop":                    {[]string{"config", "check", "-c", at("loop")}, 3, []string{"[config.unreadable]", at("loop"), "too many levels of symbolic links"}},
		"what it names": {[]string{"config", "check", "-c", at("pipes.yaml")}, 3, []string{
			"read the App's private key " + pipe + ": " + isPipe, "read the webhook secret " + pipe + ": " + isPipe,
			"runner.dir: it has no program to start: " + at("runner/start") + ": " + isPipe,
			"kernel.vmlinuz: " + pipe + ": " + isPipe, "pools[0].image: " + pipe + ": " + isPipe, "pools[0].tool_cache: " + pipe + ": " + isPipe,
		}},
		"launch line":       {[]string{"--filesystem=" + pipe, "--privateKey=" + pipe, "--appID=1", "--organization=a", "--webhookSecret=" + pipe}, 3, []string{"private key", "webhook secret", "pools[0].image", isPipe}},
		"kernel package":    {[]string{"kernel", "import", pipe}, 3, []string{"[kernel.unpack]", isPipe}},
		"no kernel package": {[]string{"kernel", "import", at("none")}, 5, []string{"[kernel.unpack]", "why: no such file"}},
		"kernel":            {[]string{"kernel", "import", "--vmlinuz", pipe}, 3, []string{"[kernel.unpack]", isPipe}},
		"runner software":   {[]string{"runner-software", "import", dir, "--version", "2.335.0"}, 3, []string{"[runner.archive]", "but a directory"}},
		"image":             {[]string{"image", "pull", pipe}, 5, []string{"[image.missing]", "nor an ordinary file"}},
		"archive":           {[]string{"image", "pull", "docker-archive:" + pipe}, 5, []string{"[image.missing]", isPipe}},
		"patterns":          {[]string{"image", "build", at("built")}, 3, []string{"[image.context]", ".dockerignore: not a list of patterns: " + isPipe}},
		"scenario":          {[]string{"dev", "github", "--scenario", pipe}, 5, []string{"[dev.file]", isPipe}},
		"webhook secret":    {[]string{"dev", "github", "--webhook", "http://127.0.0.1:1", "--webhook-secret-file", pipe}, 5, []string{"[dev.file]", isPipe}},
		"key":               {[]string{"dev", "github", "--listen", "127.0.0.1:0", "--key-file", pipe}, 8, []string{"[dev.key]", isPipe}},
		"submitted":         {[]string{"dev", "github", "submit", pipe}, 5, []string{"[dev.file]", isPipe}},
		"workflow":          {[]string{"demo", "--workflow", pipe}, 5, []string{"[workflow.missing]", isPipe}},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := flintCommand(tt.args...)
			if code != tt.code {
				t.Errorf("exit %d, want %d\n%s", code, tt.code, stderr)
			}
			for _, want := range tt.want {
				if !strings.Contains(stderr, want) {
					t.Errorf("%q is not in\n%s", want, stderr)
				}
			}
		})
	}
}
