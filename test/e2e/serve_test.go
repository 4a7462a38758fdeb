package e2e

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestServeSaysThatGitHubIsAwayAndStopsWhenTold runs the coordinator from a file, with nobody at GitHub's address.
func TestServeSaysThatGitHubIsAwayAndStopsWhenTold(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	if err := os.WriteFile(filepath.Join(dir, "app.pem"), block, 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "flint.yaml")
	content := fmt.Sprintf(`schema_version: 1
github: {url: "http://127.0.0.1:9", app_id: 1, installation_id: 2, organization: acme, private_key_file: app.pem}
runner: {dir: %s}
pools:
  - {name: flint, image: %s, vm: {cpus: 1, memory: 512MiB, disk: 1GiB}, max: 1}
`, filepath.Join(r.state, "demo-runner"), filepath.Join(r.assets, "base.ext4"))
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := r.flint(t.Context(), nil, "config", "check", "-c", file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd, out := r.flint(t.Context(), nil, "serve", "--config", file), newWatched()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out.until(t, "msg=serving")
	out.until(t, "github.unreachable")
	if links := r.command("ip", "-n", r.netns, "-br", "link"); !strings.Contains(links, "flint0") {
		t.Errorf("no bridge while it serves: looking for what is left would find nothing\n%s", links)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(t, cmd.Wait()); code != 0 {
		t.Errorf("exit %d\n%s", code, out)
	}
	if strings.Contains(out.String(), "PRIVATE KEY") {
		t.Error("the key is in the log")
	}
	r.nothingLeft("serve")
}
