package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
)

// maxRead bounds what is read of one file or one program's output, in bytes.
const maxRead = 1 << 20

// System is the machine as the checks see it. Here returns the real one; tests make their own.
type System struct {
	Files    fs.FS // everything below /
	Arch     string
	User     int                                                       // that runs the checks
	Real     func(path string) (string, error)                         // follows symbolic links
	Space    func(path string) (free, total flint.Bytes, err error)    // of the file system that holds path
	LookPath func(name string) (string, error)                         // finds a program
	Version  func(ctx context.Context, program string) (string, error) // what program --version says
	KVM      func(ctx context.Context) vm.KVMStatus
}

// Here returns the machine this process runs on.
func Here() System {
	return System{
		Files: os.DirFS("/"), Arch: runtime.GOARCH, User: os.Geteuid(), Real: filepath.EvalSymlinks, Space: space, LookPath: lookPath,
		Version: version, KVM: vm.ProbeKVM,
	}
}

func space(path string) (free, total flint.Bytes, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, fmt.Errorf("ask for free space: %w", err)
	}
	return flint.Bytes(st.Bavail) * flint.Bytes(st.Bsize), flint.Bytes(st.Blocks) * flint.Bytes(st.Bsize), nil
}

// lookPath finds a program, also where only root's PATH looks.
func lookPath(name string) (string, error) {
	found, err := exec.LookPath(name)
	if err == nil || strings.Contains(name, "/") {
		return found, err
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return found, nil
		}
	}
	return "", err
}

// head keeps the first bytes written to it and drops the rest.
type head struct{ bytes.Buffer }

func (h *head) Write(p []byte) (int, error) {
	h.Buffer.Write(p[:min(len(p), maxRead-h.Len())])
	return len(p), nil
}

func version(ctx context.Context, program string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var out head
	cmd := exec.CommandContext(ctx, program, "--version")
	cmd.Env, cmd.Dir = []string{}, "/"
	cmd.Stdout = &out
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", program, err)
	}
	return out.String(), nil
}

// open opens a file by its absolute path.
func (s System) open(name string) (fs.File, error) { return s.Files.Open(below(name)) }

func (s System) stat(name string) (fs.FileInfo, error) { return fs.Stat(s.Files, below(name)) }

// below turns an absolute path into one of an fs.FS.
func below(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if name == "" {
		return "."
	}
	return name
}

// read returns a file's text without the white space around it, at most maxRead bytes of it.
func (s System) read(name string) (string, error) {
	f, err := s.open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRead))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// lines returns a file's lines, split into fields; none if it cannot be read.
func (s System) lines(name string) [][]string {
	text, err := s.read(name)
	if err != nil {
		return nil
	}
	var all [][]string
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) > 0 {
			all = append(all, f)
		}
	}
	return all
}

// exists reports whether a file is there, as far as one may look.
func (s System) exists(name string) bool {
	_, err := s.stat(name)
	return err == nil
}

// absent reports whether a path is known not to exist.
func (s System) absent(name string) bool {
	_, err := s.stat(name)
	return errors.Is(err, fs.ErrNotExist)
}

// nearest returns the real path of what exists of path: itself, or the closest directory above it.
func (s System) nearest(name string) string {
	for name = path.Clean("/" + name); name != "/" && !s.exists(name); {
		name = path.Dir(name)
	}
	if resolved, err := s.Real(name); err == nil {
		return resolved
	}
	return name
}

// mount is what /proc/self/mountinfo says of the mount a path is in.
type mount struct {
	id      string
	point   string
	kind    string // file system type
	options map[string]bool
}

// mountOf finds the mount that holds a path: of those whose mount point is above it the deepest, and of several there the
// last. The columns are in proc_pid_mountinfo(5).
func (s System) mountOf(name string) (mount, error) {
	name = s.nearest(name)
	var best mount
	for _, f := range s.lines("/proc/self/mountinfo") {
		dash := -1
		for i, field := range f {
			if field == "-" {
				dash = i
				break
			}
		}
		if dash < 6 || len(f) < dash+4 {
			continue
		}
		point := unescape(f[4])
		if !within(name, point) || len(point) < len(best.point) {
			continue
		}
		best = mount{id: f[0], point: point, kind: f[dash+1], options: map[string]bool{}}
		for _, o := range strings.Split(f[5]+","+f[dash+3], ",") {
			best.options[o] = true
		}
	}
	if best.id == "" {
		return mount{}, errors.New("/proc/self/mountinfo does not show what holds " + name)
	}
	return best, nil
}

// within reports whether an absolute clean path is dir or below it.
func within(name, dir string) bool {
	return dir == "/" || name == dir || strings.HasPrefix(name, dir+"/")
}

// unescape undoes the octal escapes that the kernel writes for white space and backslashes.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
