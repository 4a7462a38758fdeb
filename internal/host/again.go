package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"flint"
	"flint/internal/guest"
)

// againTime is how long an agent whose session broke off is called again. An agent gives up a host that is silent for as long.
const againTime = 15 * time.Second

// persist stays with the runner program by run, and over sessions that break off. An agent hangs up on a flint that was stopped for a while,
// and the agent of a VM that was is silent as long. Their job goes on meanwhile, and flint goes on with it as after a restart.
func (l *life) persist(ctx context.Context, run func(context.Context) (guest.Exit, error)) (guest.Exit, error) {
	for {
		exit, err := run(ctx)
		if err == nil || ctx.Err() != nil || l.output == nil || !brokeOff(err) || l.h.isDetached(l) {
			return exit, err
		}
		agent, p, aerr := l.callAgain(ctx)
		if aerr != nil {
			l.log.Debug("the agent's channel cannot be taken up again", "err", aerr)
			return exit, err
		}
		l.log.Warn("the agent's channel broke off, and was taken up again", "err", err)
		run = func(ctx context.Context) (guest.Exit, error) { return agent.Resume(ctx, p, l.io(p)) }
	}
}

// brokeOff reports whether a session with an agent ended by what may pass, other than a breach of the protocol.
func brokeOff(err error) bool {
	var fault *flint.Fault
	return errors.As(err, &fault) && (fault.Code == "guest.silent" || fault.Code == "guest.gone")
}

// callAgain begins another session with an agent, if its VM still runs, and finds the runner program there.
func (l *life) callAgain(ctx context.Context) (_ *guest.Session, p guest.Running, err error) {
	ctx, cancel := context.WithTimeout(ctx, verdictTime+againTime)
	defer cancel()
	if !l.h.onDetach(l, cancel) {
		return nil, p, ErrDetached
	}
	if err := l.outlasts(ctx); err != nil {
		return nil, p, err
	}
	var agent *guest.Session
	err = patiently(ctx, func() error {
		conn, err := l.machine.Dial(ctx, guest.Port)
		if err == nil {
			agent, err = guest.Attach(ctx, conn, guest.Options{Log: l.log})
		}
		return err
	})
	if err != nil {
		return nil, p, err
	}
	l.talk(agent)
	if !l.h.onDetach(l, func() { _ = agent.Close() }) { // never an error
		return nil, p, ErrDetached
	}
	there := agent.Hello().Processes
	i := slices.IndexFunc(there, func(p guest.Running) bool { return p.Name == runnerName })
	if i < 0 || !there[i].Closed {
		return nil, p, fmt.Errorf("find the runner program: %w", flint.ErrNotFound)
	}
	return agent, there[i], nil
}

// outlasts returns an error if the VM ends within verdictTime, or ctx does.
func (l *life) outlasts(ctx context.Context) error {
	wait, cancel := context.WithTimeout(ctx, verdictTime)
	defer cancel()
	err := l.machine.Wait(wait)
	if wait.Err() == nil {
		return errors.Join(errors.New("its VM has ended"), err)
	}
	return ctx.Err()
}

// onDetach registers another way by which detach lets go of l. It reports false if that has happened already.
func (h *Host) onDetach(l *life, letGo func()) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	l.letGo = letGo
	return !l.detached
}
