package app

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"flint"
	"flint/internal/api"
	"flint/internal/config"
	"flint/internal/vm/qemu"
)

const (
	// retireLook is how often is looked whether the runners of a removed pool are gone; retireAfter is the least time a pool
	// is kept, in which the scheduler has surely looked.
	retireLook  = time.Second
	retireAfter = 15 * time.Second
)

// reloading is what a reload of the configuration has changed.
type reloading struct {
	asked sync.Mutex                    // one reload at a time
	cfg   atomic.Pointer[config.Config] // nil: as at the start
	todo  chan struct{}                 // signalled when images are to be prepared or pools retire

	mu       sync.Mutex
	made     map[string]madeOf       // by pool: what its supply was made of; guarded by mu
	held     map[string]flint.Reason // pools that wait for their first image; guarded by mu
	retiring []retiring              // guarded by mu
}

// retiring is a pool that is not configured any more, until its runners are gone.
type retiring struct {
	flint.Pool
	since time.Time
}

// madeOf is what a pool's drives are made of.
type madeOf struct {
	image, format string
	args          map[string]string
	tools         string
	runner        string // version of the runner software that it pins
}

func madeFrom(p config.Pool) madeOf {
	return madeOf{image: p.Image, format: p.Format, args: p.Args, tools: p.Tools, runner: p.RunnerVersion}
}

func (m madeOf) equal(o madeOf) bool {
	return m.image == o.image && m.format == o.format && maps.Equal(m.args, o.args) && m.tools == o.tools && m.runner == o.runner
}

// current is the configuration as it is now: that of the start, with what was reloaded.
func (a *App) current() config.Config {
	if c := a.reloading.cfg.Load(); c != nil {
		return *c
	}
	return a.cfg
}

// Reload reads the configuration again and applies what can change, see api.Operator. Nothing has changed when it fails. Its
// errors are faults.
func (a *App) Reload(ctx context.Context) (api.Reloaded, error) {
	a.reloading.asked.Lock()
	defer a.reloading.asked.Unlock()
	a.notifyReloading()
	defer a.notifyReady()
	out, err := a.reload(ctx)
	if err != nil {
		a.log.Error("configuration is not reloaded, nothing has changed", "err", err)
		return out, err
	}
	for _, c := range out.Applied {
		a.log.Info("configuration changed", "key", c.Key, "from", c.From, "to", c.To, "note", c.Note)
	}
	for _, c := range out.Restart {
		a.log.Warn("configuration changes at the next start", "key", c.Key, "from", c.From, "to", c.To)
	}
	a.log.Info("configuration reloaded", "applied", len(out.Applied), "restart", len(out.Restart))
	return out, nil
}

func (a *App) reload(ctx context.Context) (out api.Reloaded, err error) {
	if a.opt.Reload == nil {
		return out, &flint.Fault{
			Code: "config.fixed", What: "reload the configuration", Kind: flint.ErrConflict,
			Err: errors.New("it was made of the command line"), Fix: "restart flint with other flags, or write a file for flint serve",
		}
	}
	next, err := a.opt.Reload()
	if err != nil {
		return out, err
	}
	if err := ctx.Err(); err != nil {
		return out, err // whoever asked has gone
	}
	old := a.current()
	taken := old.Take(next)
	if err := a.takePools(old, taken); err != nil {
		return out, err
	}
	a.host.SetLimits(limits(taken.Host))
	levelFixed := a.opt.SetLevel == nil || !a.opt.SetLevel(taken.LogLevel)
	a.reloading.cfg.Store(&taken)
	a.reshape(taken)
	a.reloading.signal()
	a.demand.signal()
	for _, c := range config.Changes(old, taken) {
		out.Applied = append(out.Applied, api.Change{Key: c.Key, From: c.From, To: c.To, Note: note(c, levelFixed)})
	}
	for _, c := range config.Changes(taken, next) {
		out.Restart = append(out.Restart, api.Change{Key: c.Key, From: c.From, To: c.To})
	}
	return out, nil
}

// note says what is not at once as the table says.
func note(c config.Change, levelFixed bool) string {
	field, whole := strings.CutPrefix(c.Key, "pools[")
	_, field, _ = strings.Cut(field, "]")
	switch {
	case c.Key == "log_level" && levelFixed:
		return "--log-level goes before it"
	case whole && slices.Contains([]string{".image", ".build_args", ".filesystem", ".tool_cache", ".runner_version"}, field):
		return "the old one is used until the new one is ready"
	case whole && field == "" && c.From == "":
		return "starts when its image is ready"
	case whole && field == "" && c.To == "":
		return "its runners finish"
	}
	return ""
}

// takePools makes GitHub's side serve the pools of taken. Those that are gone are served until their runners are gone, too.
func (a *App) takePools(old, taken config.Config) error {
	now := time.Now()
	r := &a.reloading
	r.mu.Lock()
	defer r.mu.Unlock()
	retire := slices.DeleteFunc(slices.Clone(r.retiring), func(p retiring) bool { return named(taken, p.Name) })
	for _, p := range old.FlintPools() {
		if !named(taken, p.Name) {
			p.Max = 0
			p.Held = flint.Because("pool.removed", "pool %s is not in the configuration any more", p.Name)
			retire = append(retire, retiring{p, now})
		}
	}
	if err := a.servePools(taken, retire); err != nil {
		return err
	}
	r.retiring = retire
	for _, p := range taken.Pools {
		if _, made := r.made[p.Name]; !made && !named(old, p.Name) {
			r.held[p.Name] = preparing(p.Name)
		}
	}
	return nil
}

// servePools tells GitHub's side and the sources of demand which pools there are.
func (a *App) servePools(cfg config.Config, retire []retiring) error {
	if cfg.Webhooks() {
		return nil // pools do not come and go
	}
	pools := cfg.FlintPools()
	for _, p := range retire {
		pools = append(pools, p.Pool)
	}
	if err := a.github.SetPools(pools); err != nil {
		return err
	}
	a.demand.assign(pools)
	return nil
}

func named(cfg config.Config, pool string) bool {
	_, ok := poolNamed(cfg, pool)
	return ok
}

// poolNamed finds a pool of a configuration.
func poolNamed(cfg config.Config, name string) (p config.Pool, ok bool) {
	if i := slices.IndexFunc(cfg.Pools, func(p config.Pool) bool { return p.Name == name }); i >= 0 {
		return cfg.Pools[i], true
	}
	return config.Pool{}, false
}

// reshape gives the next VMs of each pool their new shape and limits.
func (a *App) reshape(cfg config.Config) {
	_, unlimited := a.driver.(*qemu.Driver)
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range cfg.Pools {
		s, ok := a.supply[p.Name]
		if !ok {
			continue
		}
		next := s
		next.Shape, next.Limits, next.InMemory = flint.Shape(p.VM), rates(p.Limits), p.Root == config.MemoryRoot
		if unlimited && next.Limits != s.Limits {
			a.log.Warn("QEMU does not hold VMs to limits; Firecracker does", "pool", p.Name)
		}
		a.supply[p.Name] = next
	}
}

// pools are the pools as a reload left them: the configured ones, those without an image held, and those that retire.
func (r *reloading) pools(cfg config.Config) []flint.Pool {
	pools := cfg.FlintPools()
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range pools {
		pools[i].Held = r.held[pools[i].Name]
	}
	for _, p := range r.retiring {
		pools = append(pools, p.Pool)
	}
	return pools
}

func (r *reloading) signal() {
	select {
	case r.todo <- struct{}{}:
	default:
	}
}

// hold notes that a pool waits for its first image, and why.
func (r *reloading) hold(pool string, why error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.made, pool)
	r.held[pool] = flint.Because("pool.image", "the image of pool %s cannot be prepared: %v; it is tried again every minute", pool, why)
}

// await notes that a pool of the start has no image yet.
func (r *reloading) await(pool string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.made, pool)
	r.held[pool] = preparing(pool)
}

func preparing(pool string) flint.Reason {
	return flint.Because("pool.preparing", "the image of pool %s is being prepared", pool)
}

// isMade reports whether the next VMs of a pool are made of what is configured.
func (r *reloading) isMade(p config.Pool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	have, made := r.made[p.Name]
	return made && have.equal(madeFrom(p))
}

// open notes what the supplies of the start are made of.
func (r *reloading) open(cfg config.Config) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.todo = make(chan struct{}, 1)
	r.held, r.made = map[string]flint.Reason{}, map[string]madeOf{}
	for _, p := range cfg.Pools {
		r.made[p.Name] = madeFrom(p)
	}
}

// hearReloads reloads whenever Options.Reloads says so, until ctx ends. Reload says what came of it.
func (a *App) hearReloads(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.opt.Reloads:
			_, _ = a.Reload(ctx)
		}
	}
}

// retire lets go of the removed pools whose runners are gone.
func (a *App) retire(ctx context.Context, now time.Time) {
	r := &a.reloading
	r.asked.Lock() // no reload brings one back meanwhile
	defer r.asked.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.retiring) == 0 {
		return
	}
	busy := map[string]bool{}
	for _, runner := range a.host.State().Runners {
		busy[runner.Pool] = true
	}
	var keep, gone []retiring
	for _, p := range r.retiring {
		if busy[p.Name] || now.Sub(p.since) < retireAfter {
			keep = append(keep, p)
		} else {
			gone = append(gone, p)
		}
	}
	if len(gone) == 0 {
		return
	}
	if err := a.servePools(a.current(), keep); err != nil {
		a.log.Error("removed pools are still served", "err", err)
		return
	}
	r.retiring = keep
	for _, p := range gone {
		delete(r.made, p.Name)
		delete(r.held, p.Name)
		a.log.Info("pool is removed", "pool", p.Name)
	}
	a.mu.Lock()
	for _, p := range gone {
		delete(a.supply, p.Name)
		delete(a.stale, p.Name)
	}
	a.mu.Unlock()
	a.letGo(ctx)
}
