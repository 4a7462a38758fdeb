package kernel

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// staticAgent builds a stand-in for the agent.
func staticAgent(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	src := filepath.Join(dir, "main.go")
	if err := os.WriteFile(src, []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "agent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, src)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build agent: %v\n%s", err, b)
	}
	return out
}

func TestRealPackage(t *testing.T) {
	for _, tool := range []string{"apt-get", "apt-cache", "depmod"} {
		if _, err := lookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	if out, err := exec.Command("apt-cache", "show", "linux-image-cloud-amd64").Output(); err != nil || len(out) == 0 {
		t.Skip("needs apt's lists of a Debian with cloud kernels: run apt-get update")
	}
	dir := t.TempDir()
	if d := os.Getenv("KDIR"); d != "" {
		dir = d
	}
	c := Config{Dir: dir, Agent: staticAgent(t)}
	p, err := Prepare(context.Background(), c, Source{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", p)
	b, _ := exec.Command("sh", "-c", "ls -la "+dir+"/*; cat "+dir+"/*/boot/order "+dir+"/*.json "+dir+"/*/pack.json; e2fsck -fn "+p.Modules).CombinedOutput()
	t.Log(strings.TrimSpace(string(b)))
}
