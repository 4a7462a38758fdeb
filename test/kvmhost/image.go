package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed image.sh
var imageScript []byte

// image is what the host boots from.
type image struct{ kernel, root string }

// buildTime bounds how long the image is made, of which a mirror may be the cause.
const buildTime = 30 * time.Minute

// ensureImage returns the cached image of the script, making it if there is none. Several processes may call it.
func ensureImage(ctx context.Context, cache string, log io.Writer, say func(string, ...any)) (image, error) {
	for _, tool := range []string{"qemu-system-x86_64", "mke2fs", "mmdebstrap"} {
		if _, err := lookPath(tool); err != nil {
			return image{}, fmt.Errorf("%w (sudo apt-get install qemu-system-x86 e2fsprogs mmdebstrap)", err)
		}
	}
	const keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
	if _, err := os.Stat(keys); err != nil {
		return image{}, fmt.Errorf("verify Debian's packages: %w (sudo apt-get install debian-archive-keyring)", err)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return image{}, err
	}
	sum := sha256.Sum256(imageScript)
	dir := filepath.Join(cache, "image-"+hex.EncodeToString(sum[:6]))
	img := image{kernel: filepath.Join(dir, "vmlinuz"), root: filepath.Join(dir, "root.ext4")}
	unlock, err := lock(ctx, dir+".lock", say)
	if err != nil {
		return image{}, err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return img, nil
	}
	start := time.Now()
	say("making a Debian host in %s from Debian's packages: once, about a minute and half a gigabyte", dir)
	ctx, cancel := context.WithTimeout(ctx, buildTime)
	defer cancel()
	if err := buildImage(ctx, dir, log); err != nil {
		return image{}, fmt.Errorf("make the host's image: %w", err)
	}
	say("made it in %.0f s", time.Since(start).Seconds())
	return img, nil
}

func buildImage(ctx context.Context, dir string, log io.Writer) (err error) {
	part := dir + ".part"
	elevate := func(name string, args ...string) *exec.Cmd {
		if os.Geteuid() != 0 {
			name, args = "sudo", append([]string{name}, args...)
		}
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
		cmd.WaitDelay = 20 * time.Second
		cmd.Stdout, cmd.Stderr = log, log
		return cmd
	}
	if err := os.RemoveAll(part); err != nil { // left by one that died
		return err
	}
	if err := os.Mkdir(part, 0o755); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(part))
		}
	}()
	script := filepath.Join(part, "image.sh")
	if err := os.WriteFile(script, imageScript, 0o644); err != nil {
		return err
	}
	if err := elevate("sh", script, part).Run(); err != nil {
		return err
	}
	return os.Rename(part, dir)
}

// lock takes an exclusive lock on a file and returns its release.
func lock(ctx context.Context, path string, say func(string, ...any)) (func(), error) {
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o644) // another user may have made it
	if err != nil {
		return nil, err
	}
	try := time.NewTicker(200 * time.Millisecond)
	defer try.Stop()
	for told := false; ; told = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil // closing releases it
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		if !told {
			say("waiting for another that makes the host")
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), f.Close())
		case <-try.C:
		}
	}
}

// lookPath finds a program, also where only root's PATH looks.
func lookPath(name string) (string, error) {
	found, err := exec.LookPath(name)
	if err == nil {
		return found, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return found, nil
		}
	}
	return "", err
}
