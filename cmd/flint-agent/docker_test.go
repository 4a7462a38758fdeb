package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// keeping returns what keepDocker keeps if dockerd is the script, and the file with the daemon's output.
func keeping(t *testing.T, script string) (d *docker, log string) {
	t.Helper()
	dir := t.TempDir()
	daemon := filepath.Join(dir, "dockerd")
	if err := os.WriteFile(daemon, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "docker.sock")
	write(t, dir, "docker.sock", "left behind in the image")
	socket, err := listenUnix(path, 4321)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode() != os.ModeSocket|0o660 || st.Sys().(*syscall.Stat_t).Gid != 4321 {
		t.Errorf("socket is %v, %v", st, err)
	}
	return &docker{shell: "/bin/sh", daemon: daemon, socket: socket, log: f, pause: time.Millisecond}, f.Name()
}

// dockerd starts after the configuration, gets the socket its clients wait at, and is not started for ever.
func TestDockerIsStartedAFewTimes(t *testing.T) {
	s := startable(t)
	d, log := keeping(t, `echo "$* $LISTEN_FDS $(test $LISTEN_PID = $$ && echo mine) $(readlink /proc/$$/fd/3 | cut -d: -f1)"; exit 1`)
	client, err := net.Dial("unix", d.socket.Name()) // before the daemon is there
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	var keeper sync.WaitGroup
	keeper.Go(func() { s.keepDocker(d, nil) })
	if b, _ := os.ReadFile(log); len(b) > 0 {
		t.Errorf("it was started before the guest was configured: %s", b)
	}
	close(s.configured)
	keeper.Wait()
	b, err := os.ReadFile(log)
	if want := strings.Repeat("-H fd:// 1 mine socket\n", dockerStarts); err != nil || string(b) != want {
		t.Errorf("the daemon saw\n%s, %v", b, err)
	}
	if _, err := net.Dial("unix", filepath.Join(filepath.Dir(log), "docker.sock")); err == nil {
		t.Error("the socket is there without a daemon to come")
	}
}

// Containers have their limits where the agent has made some, unless the image says itself where they are.
func TestDockerIsToldWhereContainersAre(t *testing.T) {
	s := startable(t)
	s.cgroups = &cgroups{}
	close(s.configured)
	for config, want := range map[string]string{
		"":                           "-H fd:// --cgroup-parent /flint/docker\n",
		`{"log-level": "warn"}`:      "-H fd:// --cgroup-parent /flint/docker\n",
		`{"cgroup-parent": "/mine"}`: "-H fd://\n",
	} {
		d, log := keeping(t, `echo "$*"; exit 1`)
		write(t, filepath.Dir(log), "daemon.json", config)
		d.config = filepath.Join(filepath.Dir(log), "daemon.json")
		s.keepDocker(d, nil)
		if b, err := os.ReadFile(log); err != nil || string(b) != strings.Repeat(want, dockerStarts) {
			t.Errorf("with %q the daemon saw\n%s, %v", config, b, err)
		}
	}
}

// A daemon that ends because the guest reboots is not started again.
func TestDockerEndsWithTheGuest(t *testing.T) {
	s := startable(t)
	d, log := keeping(t, "echo $$; exec sleep 1000")
	close(s.configured)
	var keeper sync.WaitGroup
	keeper.Go(func() { s.keepDocker(d, nil) })
	var pid string
	if err := retry(t.Context(), func() error {
		b, err := os.ReadFile(log)
		if pid = strings.TrimSpace(string(b)); pid == "" && err == nil {
			err = os.ErrNotExist
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	s.end.Do(func() { close(s.ending) })
	n, _, _ := parseIDs(pid)
	if err := s.reaper.signal(int(n), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	keeper.Wait()
	if b, _ := os.ReadFile(log); string(b) != pid+"\n" {
		t.Errorf("it was started again: %s", b)
	}
}

// A group of one's own has every controller the root has, and may be there already.
func TestMakeGroup(t *testing.T) {
	root := t.TempDir()
	write(t, root, "cgroup.controllers", "cpu memory pids\n")
	for range 2 {
		f, err := makeGroup(root, "dockerd")
		if err != nil {
			t.Fatal(err)
		}
		if f.Name() != filepath.Join(root, "dockerd") {
			t.Errorf("the group is %s", f.Name())
		}
		f.Close()
	}
	if b, err := os.ReadFile(filepath.Join(root, "cgroup.subtree_control")); err != nil || string(b) != "+pids" { // the last one asked for
		t.Errorf("the root hands down %q, %v", b, err)
	}
	if _, err := makeGroup(filepath.Join(root, "nowhere"), "dockerd"); err == nil {
		t.Error("there is a group where no control groups are")
	}
}
