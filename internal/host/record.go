package host

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"flint"
	"flint/internal/durable"
	"flint/internal/guest"
)

// recordVersion is raised when a record's meaning changes; a record of another version is set aside, not guessed at.
const recordVersion = 1

// recordFile is the name of the record in a runner's directory.
const recordFile = "runner.json"

// maxRecord bounds what is read back. A record is about 1 KiB.
const maxRecord = 1 << 20

// record is what start-up must know to go on with a runner whose daemon died, or to undo it. It holds no secret.
type record struct {
	Version int          `json:"version"`
	Runner  flint.Runner `json:"runner"`
	PID     int          `json:"pid,omitempty"`   // of the VMM
	Start   uint64       `json:"start,omitempty"` // its start time in clock ticks: tells it from another process with this pid
	// Boot is the boot of the machine (boot_id of random(4)) that PID and Start are of; empty in records of before it was kept.
	Boot string `json:"boot,omitempty"`
	// Began says when phases began, in time since that boot; see life.began.
	Began    map[flint.Phase]time.Duration `json:"began,omitempty"`
	GitHubID int64                         `json:"github_id,omitempty"` // of the registration; 0 where none was made, or its answer never came
	Register bool                          `json:"register,omitempty"`  // a registration under the runner's id may exist
	// Concluded says that GitHub has said how its job ended: as Conclusion.
	Concluded  bool   `json:"concluded,omitempty"`
	Conclusion string `json:"conclusion,omitempty"`
	// Shape is what its VM was given; the configuration may say otherwise by now. Zero in records of before it was kept.
	Shape flint.Shape `json:"shape,omitzero"`
	// Exit is how its program ended.
	Exit *guest.Exit `json:"exit,omitempty"`
	// Ending says that it is being undone, other than after the end of its program: nobody goes on with it.
	Ending bool `json:"ending,omitempty"`
}

// vmm returns the VMM that the record names: the zero process where it names none, or one of before the machine's last boot. Its pid
// and its start time may be another's by now: every boot counts both anew.
func (r record) vmm() process {
	if r.Boot != "" && r.Boot != bootID() {
		return process{}
	}
	return process{r.PID, r.Start}
}

// bootID tells this boot of the machine from all others; empty where the kernel does not say.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// write replaces the record atomically. With durably set it is on stable storage, and so is its directory's entry,
// when write returns; otherwise it survives this process but not a crash of the machine, which ends all VMs anyway.
func (r record) write(dir string, durably bool) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	path := filepath.Join(dir, recordFile)
	if !durably {
		err = durable.Swap(path, b)
	} else if err = durable.Replace(path, b); err == nil {
		err = durable.SyncDir(filepath.Dir(dir))
	}
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// readRecord reads a runner's record. fs.ErrNotExist means that there is none.
func readRecord(dir string) (record, error) {
	path := filepath.Join(dir, recordFile)
	info, err := os.Stat(path)
	if err != nil {
		return record{}, err
	}
	if !info.Mode().IsRegular() { // a pipe would be waited for
		return record{}, fmt.Errorf("read record: it is no file: %s", info.Mode())
	}
	if info.Size() > maxRecord {
		return record{}, fmt.Errorf("read record: it has %d bytes", info.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return record{}, fmt.Errorf("read record: %w", err)
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("decode record: %w", err)
	}
	if r.Version != recordVersion {
		return record{}, fmt.Errorf("record has version %d, this flint reads %d", r.Version, recordVersion)
	}
	if r.Runner.ID != filepath.Base(dir) {
		return record{}, fmt.Errorf("record is of runner %q, not of its directory's", r.Runner.ID)
	}
	return r, nil
}

// save writes a record.
func (h *Host) save(r record, dir string, durably bool) error {
	h.step("write record: " + r.Runner.Phase.String())
	defer h.step("record written: " + r.Runner.Phase.String())
	return r.write(dir, durably)
}

// erase removes a record and everything beside it.
func (h *Host) erase(dir string) error {
	h.step("erase record")
	defer h.step("record erased")
	return os.RemoveAll(dir)
}

func (h *Host) step(what string) {
	if h.c.Step != nil {
		h.c.Step(what)
	}
}
