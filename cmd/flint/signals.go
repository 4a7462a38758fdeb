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

type signalsKey struct{}

// withSignals returns a context that ends with the first signal to end, and that signalsOf knows. stop gives the signals back.
func withSignals(parent context.Context) (_ context.Context, stop func()) {
	s := &signals{reload: make(chan struct{}, 1), hurry: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.WithValue(parent, signalsKey{}, s))
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

// signalsOf returns the signals of a command's context. From then on SIGHUP does not end the program.
func signalsOf(ctx context.Context) *signals {
	s, ok := ctx.Value(signalsKey{}).(*signals)
	if !ok {
		return &signals{} // nobody sends any
	}
	s.reloads.Store(true)
	return s
}

func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
