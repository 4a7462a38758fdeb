package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

//go:embed guest.sh
var guestScript []byte

//go:embed job.sh
var jobScript string

// privateDir is the part of /job that belongs to this program; guest.sh and job.sh know it too.
const privateDir = ".kvmhost"

// freeSpace is what the script may write to /job, in bytes.
const freeSpace = 1 << 30

// makeJob writes the drive that is /job in the host, below dir, and returns its path.
func makeJob(ctx context.Context, o options, dir string) (string, error) {
	tree := filepath.Join(dir, "job")
	own := filepath.Join(tree, privateDir)
	if err := os.MkdirAll(own, 0o755); err != nil {
		return "", err
	}
	err := errors.Join(
		os.WriteFile(filepath.Join(own, "init"), guestScript, 0o644),
		os.WriteFile(filepath.Join(own, "job"), []byte("set -- "+quote(o.args)+"\n"+jobScript), 0o644),
		copyFile(o.script, filepath.Join(own, "script"), 0o755),
	)
	if o.systemd {
		err = errors.Join(err, os.WriteFile(filepath.Join(own, "systemd"), nil, 0o644))
	}
	if err != nil {
		return "", err
	}
	for _, a := range o.add {
		if err := stage(a.from, filepath.Join(tree, a.to)); err != nil {
			return "", fmt.Errorf("add %s: %w", a.from, err)
		}
	}
	bytes, files, err := measure(tree)
	if err != nil {
		return "", err
	}
	mke2fs, err := lookPath("mke2fs")
	if err != nil {
		return "", err
	}
	drive := filepath.Join(dir, "job.ext4")
	size := bytes + bytes/16 + files*4096 + freeSpace
	cmd := exec.CommandContext(
		ctx, mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard,root_owner=0:0",
		"-d", tree, drive, strconv.FormatInt(size>>10, 10)+"k",
	)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make the job's drive: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return drive, os.RemoveAll(tree)
}

// quote makes shell words of the arguments.
func quote(args []string) string {
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	return strings.Join(words, " ")
}

// stage puts a file or a directory at a place of the tree: as hard links where it can, because images are large.
func stage(from, to string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		place := filepath.Join(to, rel)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			return os.MkdirAll(place, 0o755)
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			return os.Symlink(target, place)
		case !d.Type().IsRegular():
			return nil // sockets and the like have no meaning elsewhere
		}
		if os.Link(p, place) == nil {
			return nil
		}
		return copyFile(p, place, info.Mode().Perm())
	})
}

func copyFile(from, to string, mode fs.FileMode) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// measure returns how much a tree holds.
func measure(tree string) (bytes, files int64, err error) {
	err = filepath.WalkDir(tree, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		files++
		if info.Mode().IsRegular() {
			bytes += info.Size()
		}
		return nil
	})
	return bytes, files, err
}
