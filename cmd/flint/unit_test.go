package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"flint/internal/config"
)

const unitFile = "../../packaging/flint.service"

func readUnit(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(unitFile)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestUnitsCommandsExist(t *testing.T) {
	unit := readUnit(t)
	for key, want := range map[string]string{"ExecStart": "flint serve", "ExecReload": "flint config reload"} {
		line := regexp.MustCompile(`(?m)^` + key + `=(.*)$`).FindStringSubmatch(unit)
		if line == nil {
			t.Errorf("the unit has no %s", key)
			continue
		}
		words := strings.Fields(line[1])
		c, rest, err := newRoot(newSignals()).Find(words[1:])
		if err != nil || c.CommandPath() != want {
			t.Errorf("%s is %q, of %v, %v; want %s", key, c.CommandPath(), words, err, want)
			continue
		}
		if err := c.ParseFlags(rest); err != nil || len(c.Flags().Args()) != 0 {
			t.Errorf("%s: flags %v: %v, arguments %v", key, rest, err, c.Flags().Args())
		}
		if f := c.Flags().Lookup("config"); f == nil || f.Value.String() != defaultConfig {
			t.Errorf("%s does not name %s", key, defaultConfig)
		}
	}
	if c, _, err := newRoot(newSignals()).Find([]string{"serve"}); err != nil || c.Flags().Lookup("drain-timeout") == nil {
		t.Error("the unit speaks of --drain-timeout, and serve has none")
	}
	for _, verb := range []string{"drain", "ls", "uncordon"} {
		if c, _, err := newRoot(newSignals()).Find([]string{"host", verb}); err != nil || c.CommandPath() != "flint host "+verb {
			t.Errorf("the unit and the docs speak of flint host %s: %v", verb, err)
		}
	}
}

func TestUnitsCredentialsAreRead(t *testing.T) {
	names := regexp.MustCompile(`(?m)^#LoadCredential(?:Encrypted)?=([^:]+):`).FindAllStringSubmatch(readUnit(t), -1)
	if len(names) != 3 {
		t.Fatalf("credentials in comments: %v", names)
	}
	dir := t.TempDir()
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name[1]), []byte("hunter2"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "flint.yaml")
	if err := os.WriteFile(file, []byte("github: {organization: acme, mode: webhooks}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(file, []string{"CREDENTIALS_DIRECTORY=" + dir})
	if err != nil {
		t.Fatal(err)
	}
	for _, found := range []string{cfg.GitHub.PrivateKeyFile, cfg.GitHub.TokenFile, cfg.GitHub.WebhookSecretFile} {
		names = slices.DeleteFunc(names, func(n []string) bool { return found == filepath.Join(dir, n[1]) })
	}
	if len(names) > 0 {
		t.Errorf("flint does not look for %v", names)
	}
}

func TestSystemdTakesTheUnit(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("needs systemd: there is no systemd-analyze")
	}
	unit := strings.ReplaceAll(readUnit(t), "/usr/local/bin/flint", "/bin/true") // which exists everywhere
	file := filepath.Join(t.TempDir(), "flint.service")
	if err := os.WriteFile(file, []byte(unit), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", file).CombinedOutput()
	if err != nil || strings.Contains(string(out), file) {
		t.Errorf("%v\n%s", err, out)
	}
}
