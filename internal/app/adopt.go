package app

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"

	"flint"
	"flint/internal/config"
	"flint/internal/host"
	"flint/internal/network"
	"flint/internal/vm"
)

// adopted is what goes on with the VMs of an earlier process.
type adopted struct {
	stop context.CancelFunc
	over chan struct{} // closed when none is left
}

// survivors are the runners of an earlier process to go on with.
func (a *App) survivors() ([]string, error) {
	if !a.opt.Outlive {
		return nil, nil
	}
	return host.Survivors(filepath.Join(a.dir, "runners"))
}

// detaches reports whether VMs go on when this flint stops.
func (a *App) detaches() bool { return a.opt.Outlive && a.current().Host.OnStop != config.EndOnStop }

// closeNetwork closes the network, or leaves it to the VMs that go on: those that were let go, and, where the start failed, those
// that were not even adopted. Where host.on_stop has VMs end, they have by now.
func (a *App) closeNetwork(n *network.Network) func(context.Context) error {
	return func(ctx context.Context) error {
		if a.leaves() {
			return n.Leave(ctx)
		}
		return n.Close(ctx)
	}
}

// leaves reports whether VMs go on. The disk is asked for those this process does not know of, and one that fails ends none.
func (a *App) leaves() bool {
	left, err := a.survivors()
	return len(left) > 0 || err != nil || a.host != nil && a.host.LetGo()
}

// adopt goes on with the VMs of an earlier process, undoes what else is left, and keeps at it in the background: their jobs do
// not wait for images to be made. On error, such as the end of ctx, VMs may live that were not adopted: only Close may follow.
func (a *App) adopt(ctx context.Context) error {
	if !a.opt.Outlive {
		a.undoFirst(ctx)
		return nil
	}
	err := a.host.Adopt(ctx)
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	over := make(chan struct{})
	a.adopted = &adopted{cancel, over}
	go func() { // ends with stopAdopted
		defer close(over)
		a.host.Resume(run, a.ended)
	}()
	a.undo.Push("let go of VMs", func(context.Context) error {
		a.stopAdopted()
		<-over
		return nil
	})
	if err == nil {
		a.undoFirst(ctx) // now: GitHub may be away, and jobs do not wait for it
	}
	return err
}

// stopAdopted ends the VMs of an earlier process, or lets go of them again.
func (a *App) stopAdopted() {
	if a.detaches() {
		a.host.Detach()
	}
	if a.adopted != nil {
		a.adopted.stop()
	}
	a.host.Stop()
}

// awaitAdopted returns when no VM of an earlier process is left, or each was let go.
func (a *App) awaitAdopted() {
	if a.adopted != nil {
		<-a.adopted.over
	}
}

// reattachTo finds the ports that earlier processes attached.
func reattachTo(n *network.Network) func(context.Context, string) (host.Port, error) {
	return func(ctx context.Context, id string) (host.Port, error) {
		p, err := n.Adopt(ctx, id)
		if err != nil {
			return host.Port{}, err
		}
		return portOf(ctx, p)
	}
}

func portOf(ctx context.Context, p *network.Port) (host.Port, error) {
	addr := p.Address()
	mac, err := net.ParseMAC(addr.MAC)
	if err != nil {
		return host.Port{}, errors.Join(fmt.Errorf("attach to network: %w", err), p.Close(ctx))
	}
	return host.Port{
		NIC:     &vm.NIC{Tap: p.Tap(), Name: p.TapName(), Namespace: p.Namespace(), MAC: mac, MTU: addr.MTU},
		Address: addr, Probe: network.ProbeName, Close: p.Close,
	}, nil
}

// wentOn reports whether a runner's end is only this process's, and says so.
func (a *App) wentOn(res flint.Result, err error) bool {
	if !errors.Is(err, host.ErrDetached) {
		return false
	}
	a.log.Info("VM goes on without flint", "runner", res.Runner.ID, "pool", res.Runner.Pool, "phase", res.Runner.Phase)
	return true
}
