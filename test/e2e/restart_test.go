package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint/internal/githubsim"
	"flint/internal/vm"
)

// internet is a network namespace behind the rig's, with the simulated GitHub in it.
type internet struct {
	r    *rig
	sim  *githubsim.Server
	addr string
	cert []byte

	mu    sync.Mutex
	lines []string // of the jobs' logs
	more  chan struct{}
}

func (r *rig) internet() *internet {
	r.t.Helper()
	hub := r.netns + "-hub"
	r.command("ip", "netns", "add", hub)
	r.t.Cleanup(func() { r.command("ip", "netns", "del", hub) })
	r.command("ip", "-n", r.netns, "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", hub)
	for _, c := range []string{
		"-n " + hub + " addr add 203.0.113.1/24 dev up0", "-n " + hub + " link set up0 up", "-n " + hub + " link set lo up",
		"-n " + r.netns + " addr add 203.0.113.2/24 dev up0", "-n " + r.netns + " link set up0 up",
		"-n " + r.netns + " route add default via 203.0.113.1",
	} {
		r.command("ip", strings.Fields(c)...)
	}
	i := &internet{r: r, more: make(chan struct{}, 1)}
	l := listenIn(r.t, hub, "203.0.113.1:0")
	i.addr = "https://" + l.Addr().String()
	cert, err := selfSigned(net.IPv4(203, 0, 113, 1))
	if err != nil {
		r.t.Fatal(err)
	}
	i.cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	if i.sim, err = githubsim.New(githubsim.Config{URL: i.addr, Owner: "acme", Repo: "hello", Observe: i.see}); err != nil {
		r.t.Fatal(err)
	}
	server := &http.Server{
		Handler: i.sim.Handler(), ReadHeaderTimeout: time.Minute, TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}},
		ErrorLog: log.New(io.Discard, "", 0),
	}
	go server.ServeTLS(l, "", "")
	r.t.Cleanup(func() {
		i.sim.Close()
		_ = server.Close()
	})
	return i
}

func selfSigned(ip net.IP) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{ip}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// listenIn listens in a network namespace.
func listenIn(t *testing.T, netns, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	err := vm.Apart(func() error {
		f, err := os.Open("/run/netns/" + netns)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (i *internet) see(ev githubsim.Event) {
	if ev.Line == "" {
		return
	}
	i.mu.Lock()
	i.lines = append(i.lines, ev.Line)
	i.mu.Unlock()
	select {
	case i.more <- struct{}{}:
	default:
	}
}

func (i *internet) log() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return strings.Join(i.lines, "\n")
}

// until waits for a line of the jobs' logs.
func (i *internet) until(out *watched, line string) {
	i.r.t.Helper()
	deadline := time.After(5 * time.Minute)
	for !strings.Contains(i.log()+"\n", line+"\n") {
		select {
		case <-i.more:
		case <-deadline:
			i.r.t.Fatalf("no %q in the job's log\n%s\n%s", line, i.log(), out)
		}
	}
}

// software copies the demo's runner to dir, with another start, which finds the old one as start.real, and the certificate of the
// simulated GitHub beside it.
func (i *internet) software(dir, start string) string {
	i.r.t.Helper()
	software := filepath.Join(dir, "software")
	i.r.command("cp", "-r", filepath.Join(i.r.state, "demo-runner")+"/.", software)
	if err := os.Rename(filepath.Join(software, "start"), filepath.Join(software, "start.real")); err != nil {
		i.r.t.Fatal(err)
	}
	for name, content := range map[string]string{"start": start, "cert.pem": string(i.cert)} {
		if err := os.WriteFile(filepath.Join(software, name), []byte(content), 0o755); err != nil {
			i.r.t.Fatal(err)
		}
	}
	return software
}

// configure writes a configuration that ends with pools for this GitHub, and returns its path.
func (i *internet) configure(dir, software, pools string) string {
	i.r.t.Helper()
	file := filepath.Join(dir, "flint.yaml")
	for path, content := range map[string]string{
		filepath.Join(dir, "app.pem"): string(i.sim.App().PrivateKeyPEM),
		file: fmt.Sprintf(`schema_version: 1
log_level: debug
github: {url: %q, app_id: %d, installation_id: %d, repository: acme/hello, private_key_file: app.pem}
runner: {dir: %s}
network: {ipv4: 10.97.0.0/24}
%s`, i.addr, i.sim.App().ID, i.sim.App().InstallationID, software, pools),
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			i.r.t.Fatal(err)
		}
	}
	return file
}

// counting is runner software that counts on both its outputs while its job runs, and ends with code 3.
const counting = `#!/bin/sh
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
SSL_CERT_FILE=$here/cert.pem
export SSL_CERT_FILE
n=0
while [ ! -e /tmp/over ]; do n=$((n+1)); echo "out $n"; echo "err $n" >&2; sleep 0.1; done </dev/null &
"$here/start.real" >/tmp/runner.log 2>&1
touch /tmp/over
wait
exit 3
`

// counted checks that a text counts from 1 on without a gap or a repetition, and returns how far.
func counted(t *testing.T, text, word string) int {
	t.Helper()
	n := 0
	for _, m := range regexp.MustCompile(`\b`+word+` (\d+)\b`).FindAllStringSubmatch(text, -1) {
		if n++; m[1] != fmt.Sprint(n) {
			t.Errorf("%s %s where %d is due", word, m[1], n)
			return n
		}
	}
	return n
}

// TestJobsOutliveTheCoordinator stops the coordinator three times in the middle of a job, once with kill -9.
func TestJobsOutliveTheCoordinator(t *testing.T) {
	r := newRig(t)
	i := r.internet()
	dir := t.TempDir()
	software := i.software(dir, counting)
	file := i.configure(dir, software, fmt.Sprintf("pools:\n  - {name: flint, image: %s, vm: {cpus: 1, memory: 512MiB, disk: 1GiB}, max: 1}\n",
		filepath.Join(r.assets, "base.ext4")))
	wf, err := githubsim.ParseWorkflow("ci.yml", []byte("on: push\njobs:\n  count:\n    runs-on: flint\n    steps:\n"+
		"      - run: for n in $(seq 1 260); do echo \"line $n\"; sleep 0.1; done\n"))
	if err != nil {
		t.Fatal(err)
	}
	run, err := i.sim.Submit(wf, githubsim.Trigger{})
	if err != nil {
		t.Fatal(err)
	}
	start := func() (*exec.Cmd, *watched) {
		cmd, out := r.flint(context.Background(), []string{"SSL_CERT_FILE=" + filepath.Join(software, "cert.pem")}, "serve", "--config", file), newWatched()
		cmd.Stdout, cmd.Stderr = out, out
		cmd.Cancel = nil
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, out
	}
	cmd, out := start()
	id, pid := "", 0
	for n, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGTERM} {
		i.until(out, fmt.Sprintf("line %d", 20+80*n))
		if n == 0 {
			id, pid = r.running("serve")
		}
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		if code := exitCode(t, cmd.Wait()); signal == syscall.SIGTERM && code != 0 {
			t.Errorf("exit %d\n%s", code, out)
		}
		if now := vmm(t, id); now != fmt.Sprint(pid) {
			t.Fatalf("the VM has process %q, had %d\n%s", now, pid, out)
		}
		i.until(out, fmt.Sprintf("line %d", 50+80*n)) // without flint
		began := time.Now()
		cmd, out = start()
		out.until(t, "goes on with the VM of an earlier flint")
		t.Logf("adopted after %s", time.Since(began).Round(time.Millisecond))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if conclusion, err := run.Wait(ctx); err != nil || conclusion != githubsim.Success {
		t.Errorf("the run ended as %q, %v\n%s", conclusion, err, out)
	}
	ended := out.until(t, `msg="runner ended".*exit=3 output=.*`)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(t, cmd.Wait()); code != 0 {
		t.Errorf("exit %d\n%s", code, out)
	}
	if n := counted(t, i.log(), "line"); n != 260 {
		t.Errorf("the job's log has %d lines", n)
	}
	ended = strings.ReplaceAll(ended, `\n`, "\n")
	if o, e := counted(t, ended, "out"), counted(t, ended, "err"); o < 200 || o != e {
		t.Errorf("the runner's output has %d and %d lines\n%s", o, e, ended)
	}
	if left := i.sim.Inventory(); len(left.Runners) != 0 || left.OpenJobs != 0 {
		t.Errorf("left at GitHub: %+v", left)
	}
	r.command("ip", "-n", r.netns, "link", "del", "up0")
	r.nothingLeft("serve")
}
