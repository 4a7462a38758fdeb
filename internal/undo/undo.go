// Package undo is the named last-in-first-out stack that releases what was acquired.
//
// The rule of the house: the line after a resource is acquired pushes its release. Failed set-up and orderly shutdown
// are then the same code. It must not know what it releases, and must never skip a step because another failed.
package undo

import (
	"context"
	"errors"
	"fmt"
)

// Stack is a list of releases, run in reverse order. The zero value is ready. It is not safe for concurrent use.
type Stack struct {
	steps []step
}

type step struct {
	name    string
	release func(context.Context) error
}

// Push registers the release of what was just acquired. The name is a verb phrase: "close network port".
func (s *Stack) Push(name string, release func(context.Context) error) {
	s.steps = append(s.steps, step{name, release})
}

// Run releases everything, last first, and empties the stack. Each step runs whatever the ones before it returned;
// the errors come back joined, each with its step's name. Release outlives the work it ends, so the caller hands in a
// context without that work's cancellation (context.WithoutCancel) and with a bound of its own.
func (s *Stack) Run(ctx context.Context) error {
	var errs []error
	for i := len(s.steps) - 1; i >= 0; i-- {
		if err := s.steps[i].release(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.steps[i].name, err))
		}
	}
	s.steps = nil
	return errors.Join(errs...)
}

// Take moves the steps into a new stack, whose owner releases them. The old one is empty: its Run does nothing.
func (s *Stack) Take() *Stack {
	t := &Stack{steps: s.steps}
	s.steps = nil
	return t
}
