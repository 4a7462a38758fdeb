package main

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
)

// signals are what a person or the service manager tells a program that runs on.
type signals struct {
	reload  chan struct{} // SIGHUP, of a command that takes it
	hurry   chan struct{} // to end, once more
	reloads atomic.Bool   // SIGHUP does not end the program
}

func newSignals() *signals {
	return &signals{reload: make(chan struct{}, 1), hurry: make(chan struct{}, 1)}
}

// takeReloads lets SIGHUP ask for a reload from now on, instead of ending the program.
func (s *signals) takeReloads() <-chan struct{} {
	s.reloads.Store(true)
	return s.reload
}

// watch returns a context that ends with the first signal to end. stop gives the signals back.
func (s *signals) watch(parent context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancel(parent)
	got, over := make(chan os.Signal, 4), make(chan struct{})
	signal.Notify(got, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case sig := <-got:
				switch {
				case sig == syscall.SIGHUP && s.reloads.Load():
					nudge(s.reload)
				case ctx.Err() == nil:
					cancel()
				default:
					nudge(s.hurry)
				}
			case <-over:
				return
			}
		}
	})
	return ctx, func() {
		signal.Stop(got)
		close(over)
		watching.Wait()
		cancel()
	}
}

func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
