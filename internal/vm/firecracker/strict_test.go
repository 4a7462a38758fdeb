package firecracker

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"flint"
	"flint/internal/vm"
	"flint/internal/vm/firecracker/fctest"
	"flint/internal/vm/firecracker/fctest/double"
)

// The tests in this file hold the doubles to what the real programs do: else passing with them would mean nothing.

// idle starts Firecracker's double without a jail, and configures nothing.
func idle(t *testing.T, o fctest.Options) *api {
	t.Helper()
	r := newBareRig(t, o)
	cmd := exec.Command(r.config.Firecracker, "--id", "strict", "--api-sock", "api.sock")
	cmd.Dir = r.dir
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	m := newMachine("strict", r.driver().log, true)
	if err := m.open(r.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.undo.Run(context.Background()) })
	if err := m.retry(patiently(t), func() error { _, err := m.api.version(t.Context()); return err }); err != nil {
		t.Fatal(err)
	}
	return m.api
}

type raw map[string]any

func TestDoubleIsStrict(t *testing.T) {
	a := idle(t, fctest.Options{Version: "1.13.0"})
	refuse := func(path string, body any, words string) {
		t.Helper()
		err := a.put(t.Context(), path, body)
		var refused *apiError
		if !errors.As(err, &refused) || refused.Status != 400 || !strings.Contains(refused.Message, words) {
			t.Errorf("PUT %s %v: %v; want %q", path, body, err, words)
		}
	}
	accept := func(path string, body any) {
		t.Helper()
		if err := a.put(t.Context(), path, body); err != nil {
			t.Errorf("PUT %s %v: %v", path, body, err)
		}
	}
	machine := raw{"vcpu_count": 1, "mem_size_mib": 128}
	with := func(m raw, name string, value any) raw {
		out := raw{name: value}
		for k, v := range m {
			if k != name {
				out[k] = v
			}
		}
		return out
	}
	refuse("/nowhere", raw{}, "Invalid request method and/or path: PUT nowhere.")
	refuse("/drives", raw{}, "Invalid request method and/or path")
	refuse("/machine-config", with(machine, "ht_enabled", false), "unknown field `ht_enabled`, expected one of `cpu_template`, `huge_pages`")
	refuse("/machine-config", raw{"vcpu_count": 1}, "missing field `mem_size_mib` at line 1 column")
	refuse("/machine-config", with(machine, "vcpu_count", 33), "The vCPU number is invalid!")
	refuse("/machine-config", with(machine, "vcpu_count", "two"), "invalid type: string, expected int")
	refuse("/balloon", raw{"amount_mib": 0, "deflate_on_oom": true, "free_page_reporting": true}, "unknown field `free_page_reporting`")
	refuse("/network-interfaces/eth0", raw{"iface_id": "eth0", "host_dev_name": "tap0", "mtu": 1500}, "unknown field `mtu`")
	refuse("/drives/a-b", raw{"drive_id": "a-b", "is_root_device": false}, "alphanumeric characters and underscores")
	refuse("/drives/a", raw{"drive_id": "b", "is_root_device": false, "path_on_host": "base"}, "The id from the path does not match")
	refuse("/drives/a", raw{"drive_id": "a", "is_root_device": false, "path_on_host": "absent"}, "Error manipulating the backing file")
	refuse("/drives/a", raw{"drive_id": "a", "is_root_device": false, "path_on_host": "base", "io_engine": "Fast"}, "unknown variant `Fast`")
	refuse("/drives/a", raw{"drive_id": "a", "is_root_device": false, "path_on_host": "base", "rate_limiter": raw{"bandwidth": raw{"rate": 1}}}, "unknown field `rate`")
	refuse("/boot-source", raw{"kernel_image_path": "absent"}, "The kernel file cannot be opened")
	refuse("/vsock", raw{"guest_cid": 2, "uds_path": "v.sock"}, "guest_cid")
	refuse("/actions", raw{"action_type": "Dance"}, "unknown variant `Dance`")
	refuse("/actions", raw{"action_type": "InstanceStart"}, "Cannot start microvm without kernel configuration.")
	refuse("/actions", raw{"action_type": "FlushMetrics"}, "not supported before starting the microVM.")
	accept("/machine-config", machine)
	accept("/boot-source", raw{"kernel_image_path": "base", "initrd_path": "initrd"})
	refuse("/actions", raw{"action_type": "InstanceStart"}, "Cannot load kernel")
	accept("/boot-source", raw{"kernel_image_path": "kernel", "initrd_path": "initrd"})
	accept("/actions", raw{"action_type": "InstanceStart"})
	for path, body := range map[string]raw{
		"/machine-config": machine, "/boot-source": {"kernel_image_path": "kernel"}, "/entropy": {}, "/actions": {"action_type": "InstanceStart"},
		"/vsock": {"guest_cid": 3, "uds_path": "v2.sock"}, "/logger": {"log_path": "x"}, "/metrics": {"metrics_path": "x"},
	} {
		refuse(path, body, "The requested operation is not supported after starting the microVM.")
	}
	accept("/actions", raw{"action_type": "FlushMetrics"})
}

func TestDoubleArguments(t *testing.T) {
	r := newBareRig(t, fctest.Options{})
	for _, args := range [][]string{{"--daemonize"}, {"--id"}} {
		out, err := exec.Command(r.config.Firecracker, args...).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 153 {
			t.Errorf("%q: %v: %s", args, err, out)
		}
	}
	socket := filepath.Join(r.dir, "used")
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(r.config.Firecracker, "--api-sock", socket).CombinedOutput(); err == nil || !strings.Contains(string(out), "not already used") {
		t.Errorf("a socket that is there: %v: %s", err, out)
	}
}

func TestJailerDoubleIsStrict(t *testing.T) {
	r := newRig(t, fctest.Options{})
	if err := os.MkdirAll(r.config.ChrootBase, 0o755); err != nil {
		t.Fatal(err)
	}
	good := map[string]string{
		"--id": "strict", "--exec-file": r.config.Firecracker, "--uid": "1900002999", "--gid": "1900002999", "--chroot-base-dir": r.config.ChrootBase,
	}
	for name, c := range map[string]struct {
		set   map[string]string
		extra []string
		say   string
	}{
		"no id":           {map[string]string{"--id": "-"}, nil, `"id" required`},
		"bad id":          {map[string]string{"--id": "a_b"}, nil, "invalid char (_) at position 1"},
		"long id":         {map[string]string{"--id": strings.Repeat("a", 65)}, nil, "invalid len"},
		"no program":      {map[string]string{"--exec-file": "/absent/firecracker"}, nil, "canonicalize path"},
		"other program":   {map[string]string{"--exec-file": "/bin/true"}, nil, "must contain firecracker"},
		"no base":         {map[string]string{"--chroot-base-dir": "/absent"}, nil, "canonicalize path"},
		"bad uid":         {map[string]string{"--uid": "me"}, nil, "invalid uid"},
		"unknown":         {nil, []string{"--seccomp-level", "2"}, "not expected"},
		"io.max":          {nil, []string{"--cgroup-version", "2", "--cgroup", "io.max=8:0 rbps=1"}, "invalid format for cgroups"},
		"absolute parent": {nil, []string{"--parent-cgroup", "/flint"}, "parent cgroup path is invalid"},
		"no controller":   {nil, []string{"--cgroup-version", "2", "--cgroup", "absent.max=1"}, "controller absent is unavailable"},
		"bad version":     {nil, []string{"--cgroup-version", "3"}, "invalid cgroup version"},
		"bad limit":       {nil, []string{"--resource-limit", "cpu=1"}, "resources limits"},
		"no namespace":    {nil, []string{"--netns", "/absent"}, "open file /absent"},
	} {
		t.Run(name, func(t *testing.T) {
			var args []string
			for key, value := range good {
				if set, ok := c.set[key]; ok {
					value = set
				}
				if value != "-" {
					args = append(args, key, value)
				}
			}
			out, err := exec.Command(r.config.Jailer, append(args, c.extra...)...).CombinedOutput()
			if err == nil || !strings.Contains(strings.ReplaceAll(string(out), "which was not expected", "not expected"), c.say) {
				t.Errorf("%v: %s; want %q", err, out, c.say)
			}
		})
	}
	// A jail that was used before is refused, at its device nodes; a link where the program goes is refused too.
	root := filepath.Join(r.config.ChrootBase, "firecracker", "strict", "root")
	for name, spoil := range map[string]func() error{
		"device": func() error {
			return errors.Join(os.MkdirAll(filepath.Join(root, "dev/net"), 0o755), os.WriteFile(filepath.Join(root, "dev/net/tun"), nil, 0o600))
		},
		"symlink": func() error {
			return errors.Join(os.MkdirAll(root, 0o755), os.Symlink("/etc/hostname", filepath.Join(root, "firecracker")))
		},
		"hard link": func() error {
			return errors.Join(os.MkdirAll(root, 0o755), os.Link(filepath.Join(r.dir, "base"), filepath.Join(root, "firecracker")))
		},
	} {
		if err := os.RemoveAll(filepath.Dir(root)); err != nil {
			t.Fatal(err)
		}
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		var args []string
		for key, value := range good {
			args = append(args, key, value)
		}
		if out, err := exec.Command(r.config.Jailer, args...).CombinedOutput(); err == nil {
			t.Errorf("%s: it was taken: %s", name, out)
		}
	}
}

func TestInstructions(t *testing.T) {
	if o := (double.Options{Version: "1.15.3"}); !o.AtLeast(15) || o.AtLeast(16) {
		t.Error("1.15.3 is not between 1.15 and 1.16")
	}
}

// TestHostileSocket has a VMM put something else where its sockets should be.
func TestHostileSocket(t *testing.T) {
	dir := t.TempDir()
	m := newMachine("x", newBareRig(t, fctest.Options{}).driver().log, false)
	if err := m.open(dir); err != nil {
		t.Fatal(err)
	}
	defer m.undo.Run(context.Background())
	elsewhere := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Symlink(elsewhere, filepath.Join(dir, vsockSocket)); err != nil {
		t.Fatal(err)
	}
	if conn, err := m.connect(t.Context(), vsockSocket); err == nil {
		conn.Close()
		t.Error("a link was followed")
	}
	if err := os.WriteFile(filepath.Join(dir, apiSocket), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.connect(t.Context(), apiSocket); err == nil {
		t.Error("a file was taken for a socket")
	}
	for _, name := range []string{"file", "link"} {
		if err := errors.Join(os.WriteFile(filepath.Join(dir, "file"), nil, 0o600), os.RemoveAll(filepath.Join(dir, "link")), os.Symlink("file", filepath.Join(dir, "link"))); err != nil {
			t.Fatal(err)
		}
		if p, err := openPipe(&m.dir, name); err == nil {
			p.close()
			t.Errorf("a %s was taken for a pipe", name)
		}
	}
	if err := os.Remove(filepath.Join(dir, vsockSocket)); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(elsewhere, filepath.Join(dir, vsockSocket)); err != nil {
		t.Fatal(err)
	}
	m.uid = int(testUIDs.First) // and this process listens there
	if conn, err := m.connect(t.Context(), vsockSocket); err == nil {
		conn.Close()
		t.Error("another user's socket was taken for the VM's")
	}
}

// TestSealFollowsNothing has a VMM put links where its directories should be.
func TestSealFollowsNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: files of others")
	}
	elsewhere := t.TempDir()
	for name, spoil := range map[string]func(dir string) error{
		"dev": func(dir string) error { return os.Symlink(elsewhere, filepath.Join(dir, "dev")) },
		"dev/net": func(dir string) error {
			return errors.Join(os.Mkdir(filepath.Join(dir, "dev"), 0o700), os.Symlink(elsewhere, filepath.Join(dir, "dev/net")))
		},
	} {
		dir := t.TempDir()
		if err := errors.Join(spoil(dir), os.Chown(elsewhere, 12345, 12345), os.Chmod(elsewhere, 0o700)); err != nil {
			t.Fatal(err)
		}
		var p place
		if err := p.open(dir); err != nil {
			t.Fatal(err)
		}
		if err := p.seal("dev", "dev/net"); err == nil {
			t.Errorf("a link for %s was taken for a directory", name)
		}
		if got := owner(t, elsewhere); got != 12345 {
			t.Errorf("a link for %s was followed", name)
		}
		if err := p.close(); err != nil {
			t.Error(err)
		}
	}
}

func TestHandshake(t *testing.T) {
	for answer, fine := range map[string]bool{
		"OK 1073741824\nhello": true, "OK\n": false, "OK x\n": false, "NO 5\n": false, "OK 99999999999\n": false, "": false, "OK 1": false,
		strings.Repeat("O", 40) + "\n": false, "\n": false,
	} {
		line, err := readLine(iotest.OneByteReader(strings.NewReader(answer)))
		got := err == nil && strings.HasPrefix(line, "OK ")
		if fine && (!got || line != "OK 1073741824") {
			t.Errorf("%q: %q, %v", answer, line, err)
		}
		dir := t.TempDir()
		l, lerr := net.Listen("unix", filepath.Join(dir, vsockSocket))
		if lerr != nil {
			t.Fatal(lerr)
		}
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			_, _ = conn.Read(make([]byte, 64))
			_, _ = conn.Write([]byte(answer))
		}()
		m := newMachine("x", newBareRig(t, fctest.Options{}).driver().log, false)
		if err := m.open(dir); err != nil {
			t.Fatal(err)
		}
		conn, err := m.shake(patiently(t), vm.AgentPort)
		if (err == nil) != fine {
			t.Errorf("%q: %v, %v", answer, conn, err)
		}
		if err == nil {
			rest := make([]byte, 16)
			if n, _ := conn.Read(rest); string(rest[:n]) != "hello" {
				t.Errorf("after the handshake came %q", rest[:n])
			}
			conn.Close()
		}
		l.Close()
		_ = m.undo.Run(context.Background())
	}
}

// FuzzMeter feeds the metrics pipe, which belongs to the VMM, with anything, in pieces.
func FuzzMeter(f *testing.F) {
	f.Add([]byte(`{"net":{"rx_bytes_count":1,"tx_bytes_count":2},"block":{"read_bytes":3,"write_bytes":4}}`+"\n"), 7)
	f.Add([]byte(`{"net":{"rx_bytes_count":18446744073709551615}}`+"\n"+`{"net":{"rx_bytes_count":18446744073709551615}}`+"\n"), 1)
	f.Add([]byte("{\n}\n[]\nnull\n\x00"), 3)
	f.Fuzz(func(t *testing.T, data []byte, piece int) {
		whole, pieces := &meter{}, &meter{}
		_, _ = whole.Write(data)
		for rest := data; len(rest) > 0; {
			n := min(len(rest), max(1, piece))
			if w, err := pieces.Write(rest[:n]); w != n || err != nil {
				t.Fatalf("write: %d, %v", w, err)
			}
			rest = rest[n:]
		}
		a, b := whole.counters(), pieces.counters()
		if a != b {
			t.Fatalf("%+v at once, %+v in pieces", a, b)
		}
		for _, c := range []flint.Bytes{a.NetRx, a.NetTx, a.BlockRead, a.BlockWrite} {
			if c < 0 {
				t.Fatalf("negative counter in %+v", a)
			}
		}
		if len(pieces.line) > maxReport {
			t.Fatalf("keeps %d bytes", len(pieces.line))
		}
	})
}

func TestMeterBounds(t *testing.T) {
	m := &meter{}
	line := []byte(`{"net":{"rx_bytes_count":5}}`)
	_, _ = m.Write(append(append([]byte{}, line...), '\n'))
	_, _ = m.Write(bytes.Repeat([]byte(" "), maxReport))
	_, _ = m.Write(append(append([]byte{}, line...), '\n')) // the end of a line that is too long
	if m.counters().NetRx != 5 || len(m.line) != 0 {
		t.Errorf("%+v, %d bytes kept", m.counters(), len(m.line))
	}
	_, _ = m.Write(append(append([]byte{}, line...), '\n'))
	if m.counters().NetRx != 10 {
		t.Errorf("%+v after a line that was too long", m.counters())
	}
}

// FuzzFaultMessage reads answers of a VMM.
func FuzzFaultMessage(f *testing.F) {
	f.Add([]byte(`{"fault_message": "no \u001b[31m"}`))
	f.Add([]byte("\x00\xff"))
	f.Fuzz(func(t *testing.T, answer []byte) {
		text := faultMessage(answer)
		if len(text) > 1000 || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Fatalf("%q", text)
		}
	})
}
