package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"flint"
	"flint/internal/durable"
)

// drainNote is the file that says that a person drains the host.
const drainNote = "drained.json"

// Drain is why this host takes no new runner although it could. What a person asked for survives a restart. The zero value is of a host
// that is not drained; a person can ask for it after Open.
type Drain struct {
	mu     sync.Mutex
	path   string
	person time.Time // since when a person wants it; zero: nobody does
	stop   time.Time // since when flint is to stop
}

type drainNoted struct {
	Since time.Time `json:"since"`
}

// Open reads what an earlier process was told. A note that cannot be understood is still one: somebody wanted the host drained.
func (d *Drain) Open(dir string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.path = filepath.Join(dir, drainNote)
	_ = durable.Clear(d.path) // it only tidies, and a disk that refuses that is read all the same
	info, err := os.Stat(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look whether the host is drained: %w", err)
	}
	var noted drainNoted
	if b, err := os.ReadFile(d.path); err != nil || json.Unmarshal(b, &noted) != nil || noted.Since.IsZero() {
		noted.Since = info.ModTime()
	}
	d.person = noted.Since
	return nil
}

// Ask notes that a person drains the host, or no longer does. It returns when that is on disk.
func (d *Drain) Ask(want bool, now time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if want == !d.person.IsZero() {
		return nil
	}
	if !want {
		if err := durable.Remove(d.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the note that the host is drained: %w", err)
		}
		d.person = time.Time{}
		return nil
	}
	b, err := json.Marshal(drainNoted{now})
	if err != nil {
		return fmt.Errorf("encode the note that the host is drained: %w", err)
	}
	if err := durable.Replace(d.path, b); err != nil {
		return fmt.Errorf("note that the host is drained: %w", err)
	}
	d.person = now
	return nil
}

// Stop notes that flint is to stop when the last runner is gone.
func (d *Drain) Stop(now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stop = now
}

// Stopping reports whether flint drains because it is to stop.
func (d *Drain) Stopping() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.stop.IsZero()
}

// Reason is why the host takes no new runner; zero when it may.
func (d *Drain) Reason(now time.Time) flint.Reason {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case !d.person.IsZero():
		return flint.Because("host.draining", "it drains since %s, by a person; `flint host uncordon` ends that", clock(d.person, now))
	case !d.stop.IsZero():
		return flint.Because("host.draining", "it drains since %s, because flint is to stop", clock(d.stop, now))
	}
	return flint.Reason{}
}

// clock is a time of today, or one with its day.
func clock(t, now time.Time) string {
	if t, now = t.Local(), now.Local(); t.YearDay() == now.YearDay() && t.Year() == now.Year() {
		return t.Format("15:04")
	}
	return t.Local().Format("2006-01-02 15:04")
}
