// Package double is what the doubles of Firecracker and its jailer have in common: how a test tells them what to do.
//
// The instructions are appended to the program's own file, because nothing else gets through a jailer: it clears the
// environment, hands on no argument of its own making, and copies one file into the new root. The package must not be
// imported by what is tested.
package double

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// mark separates the program from the instructions.
const mark = "\n#flint-double-instructions\n"

// Options are a test's instructions. The zero value behaves as the real programs do.
type Options struct {
	Version string // of both programs: 1.16.1 when empty
	// Answers has Firecracker refuse calls: "PUT /vsock" → the fault_message.
	Answers map[string]string
	// DieAt has Firecracker end with this code at the call "PUT /vsock", in which it is.
	DieAt    string
	DieCode  int
	HangAt   string // has Firecracker never answer this call
	Mute     bool   // nobody in the guest ever listens
	Deaf     bool   // Firecracker takes vsock connections and says nothing
	Root     string // of cgroup v2, where the jailer is to find it; empty: in /proc/mounts
	JailerIs string // has the jailer end at once with this message
	JailHang bool   // has the jailer do nothing, for ever
}

// Install writes a copy of a program with the instructions to path.
func (o Options) Install(program, path string) error {
	b, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	instructions, err := json.Marshal(o)
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(append(b, mark...), instructions...), 0o755)
}

// Read returns the instructions of the running program, whose file is os.Args[0] or /proc/self/exe.
func Read() (Options, error) {
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		b, err = os.ReadFile(os.Args[0]) // in a jail there is no /proc, and the name is absolute
	}
	if err != nil {
		return Options{}, fmt.Errorf("read own file: %w", err)
	}
	o := Options{Version: "1.16.1"}
	if i := bytes.LastIndex(b, []byte(mark)); i >= 0 {
		if err := json.Unmarshal(b[i+len(mark):], &o); err != nil {
			return Options{}, fmt.Errorf("read instructions: %w", err)
		}
	}
	if o.Version == "" {
		o.Version = "1.16.1"
	}
	return o, nil
}

// AtLeast reports whether the version played is 1.minor or newer.
func (o Options) AtLeast(minor int) bool {
	parts := strings.Split(o.Version, ".")
	if len(parts) < 2 || parts[0] != "1" {
		return true
	}
	have, _ := strconv.Atoi(parts[1])
	return have >= minor
}
