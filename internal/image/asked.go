package image

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"time"
)

// Pull says when what a reference gave before is not enough.
type Pull string

// The kinds of Pull. Files are looked at every time: a Dockerfile of which a file or an argument changed is built, whatever
// is said here, and so is a changed archive.
const (
	Missing Pull = "missing" // when it gave nothing yet: what it gave stays, by digest. So does the zero value
	Daily   Pull = "daily"   // when that is a day ago
	Always  Pull = "always"  // every time
)

// day is how long what was asked for holds with Daily.
const day = 24 * time.Hour

// suffices reports whether an answer of that time will do. One from the future does not: the clock was put back.
func (p Pull) suffices(asked time.Time) bool {
	age := time.Since(asked)
	return !p.renews() || p == Daily && age >= 0 && age < day
}

// renews reports whether what is here is not enough for ever.
func (p Pull) renews() bool { return p == Daily || p == Always }

// Failure is why what a reference gave could not be had anew.
type Failure struct {
	Ref string    `json:"ref"`
	At  time.Time `json:"at"`
	Why string    `json:"why"`
}

// question is what is asked outside the store: a registry, a daemon, a builder.
type question struct {
	step string // as progress has it
	key  string // of the record of the answer
}

// answered is a record of what a question gave, and when.
type answered struct {
	Base
	Asked time.Time `json:"asked"`
}

// answer uses what a question gave last, if that is not too old for w, or asks.
func (s *Store) answer(ctx context.Context, q question, w Want, ask func() (Base, error)) (Base, error) {
	if b, ok := s.fresh(q.key, w.Pull.suffices); ok {
		w.Progress.Step(q.step)("cached", nil)
		return b, nil
	}
	b, err := ask()
	if err != nil {
		return Base{}, err
	}
	s.note(q.key, answered{b, time.Now()})
	return b, nil
}

// fresh recalls an answer of a time that will do.
func (s *Store) fresh(key string, suffices func(asked time.Time) bool) (Base, bool) {
	var a answered
	if !s.recall(key, &a) || !suffices(a.Asked) {
		return Base{}, false
	}
	return s.recallBase(key)
}

// failurePrefix is what the keys of failures begin with.
const failurePrefix = "failed-"

func failureKey(ref string) string { return failurePrefix + keyOf(ref) }

// Failed returns why a reference could not be had when that was tried last; nil where it could, or was not tried.
func (s *Store) Failed(ref string) *Failure {
	var f Failure
	if !s.recall(failureKey(ref), &f) {
		return nil
	}
	return &f
}

// forgive forgets that a reference could not be had.
func (s *Store) forgive(ref string) {
	if err := os.Remove(s.path(recordDir, failureKey(ref)+".json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("forget a failure", "err", err)
	}
}

// Describe returns what is remembered of a base image that is here.
func (s *Store) Describe(digest string) (Base, bool) {
	entries, err := os.ReadDir(s.path(recordDir))
	if err != nil {
		return Base{}, false
	}
	for _, e := range entries {
		key, isRecord := strings.CutSuffix(e.Name(), ".json")
		if !isRecord || strings.Contains(key, "-") { // those are no records of images
			continue
		}
		content, err := os.ReadFile(s.path(recordDir, e.Name()))
		if err != nil || !bytes.Contains(content, []byte(digest)) || content[0] != '{' {
			continue
		}
		if b, ok := s.recallBase(key); ok && b.Digest == digest {
			return b, true
		}
	}
	return Base{}, false
}
