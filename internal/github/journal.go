package github

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"

	"flint/internal/durable"
)

const (
	// maxJournal bounds the file, maxPending the jobs it holds.
	maxJournal = 1 << 20
	maxPending = 10_000
)

// journal is what a pool must not forget between handling a message and acknowledging it, nor over a restart. It is one small
// file, replaced as a whole.
type journal struct {
	path string
	at   position
}

type position struct {
	Set     int     `json:"scale_set"`         // what follows is about this scale set
	Message int     `json:"message"`           // the last one handled
	Digest  string  `json:"digest"`            // of that message: ids may begin anew with a session
	Pending []int64 `json:"pending,omitempty"` // jobs to acquire as soon as there is room
}

// openJournal reads a pool's journal. A damaged one is set aside: losing it costs at most a message handled twice.
func openJournal(dir, pool string, log *slog.Logger) (*journal, error) {
	j := &journal{path: filepath.Join(dir, url.PathEscape(pool)+".json")}
	if err := durable.Clear(j.path); err != nil {
		log.Warn("what a crash left beside a journal stays", "pool", pool, "error", err)
	}
	b, err := readBounded(j.path, maxJournal)
	if errors.Is(err, fs.ErrNotExist) {
		return j, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &j.at)
	}
	if err == nil {
		return j, nil
	}
	j.at = position{}
	aside := j.path + ".damaged"
	log.Warn("journal is damaged; set it aside", "pool", pool, "file", aside, "error", err)
	if err := os.Rename(j.path, aside); err != nil {
		return nil, fmt.Errorf("set damaged journal aside: %w", err)
	}
	return j, nil
}

func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("file is longer than %d bytes", limit)
	}
	return b, err
}

// save replaces the file. When it returns nil, the new position survives a power cut; otherwise the old one stands.
func (j *journal) save(p position) error {
	b, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("encode journal: %w", err)
	}
	if err := durable.Replace(j.path, b); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	j.at = p
	return nil
}
