package undo_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"flint/internal/undo"
)

func TestRunReleasesAllInReverseOrder(t *testing.T) {
	var s undo.Stack
	var order []string
	broken := errors.New("broken")
	for _, name := range []string{"a", "b", "c"} {
		s.Push("release "+name, func(context.Context) error {
			order = append(order, name)
			if name == "b" {
				return broken
			}
			return nil
		})
	}
	err := s.Run(t.Context())
	if !slices.Equal(order, []string{"c", "b", "a"}) {
		t.Fatalf("released %v", order)
	}
	if !errors.Is(err, broken) || err.Error() != "release b: broken" {
		t.Fatalf("error is %v", err)
	}
	if err := s.Run(t.Context()); err != nil || len(order) != 3 {
		t.Fatalf("a second Run released again: %v, %v", order, err)
	}
}

func TestTakeHandsOver(t *testing.T) {
	var s undo.Stack
	released := 0
	s.Push("release", func(context.Context) error { released++; return nil })
	taken := s.Take()
	if err := s.Run(t.Context()); err != nil || released != 0 {
		t.Fatalf("the old stack still released: %d, %v", released, err)
	}
	if err := taken.Run(t.Context()); err != nil || released != 1 {
		t.Fatalf("the new stack released %d, %v", released, err)
	}
}
