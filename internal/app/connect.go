package app

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"flint"
	"flint/internal/config"
	"flint/internal/durable"
	"flint/internal/github"
	"flint/internal/github/webhook"
	"flint/internal/runnersoft"
	"flint/internal/sched"
)

// Connect makes the coordinator's side of GitHub, without talking to it yet, and goes on with the VMs an earlier process left, or
// undoes them, their registrations and records. What cannot be undone now is tried again while Serve runs. Where an account's mode is webhooks it
// listens for them.
func (a *App) Connect(ctx context.Context) error {
	state := filepath.Join(a.dir, "github")
	if err := os.MkdirAll(state, 0o700); err != nil {
		return fmt.Errorf("make directory of what GitHub said: %w", err)
	}
	err := a.drain.Open(a.dir)
	if err != nil {
		return err
	}
	if a.prefix, err = namePrefix(filepath.Join(a.dir, "coordinator")); err != nil {
		return err
	}
	if a.cfg.Runner.Dir != "" {
		if a.software.Software, err = runnersoft.Read(a.cfg.Runner.Dir); err != nil {
			return err
		}
	}
	if a.reruns, err = github.OpenReruns(filepath.Join(a.dir, "reruns.json"), a.log); err != nil {
		return err
	}
	if a.github, err = github.New(github.Config{
		Accounts: a.accounts(), Owner: "flint-" + a.cfg.Host.Name, Prefix: a.prefix, StateDir: state, Pools: a.cfg.FlintPools(),
		Log: a.log, Events: a.note, Transport: a.transport,
	}); err != nil {
		return err
	}
	a.host = a.newHost(a.github)
	a.demand = newSources()
	a.reloading.open(a.cfg)
	a.demand.add(sched.Alive(a.github, a.host.Abandoned), a.poolsOf(config.ScaleSets)) // the ledger of webhooks sees to that itself
	if a.cfg.Webhooks() {
		if err := a.openHooks(ctx, state); err != nil {
			return err
		}
	}
	return a.adopt(ctx)
}

// accounts are the configured accounts as the GitHub room knows them.
func (a *App) accounts() []github.Account {
	var list []github.Account
	for _, g := range a.cfg.All() {
		account := github.Account{
			Name: g.Name, URL: g.Scope(), InstallationID: g.InstallationID, PrivateKey: g.PrivateKey, Token: g.Token,
			SelfRegister: g.Registration == "token", HookID: g.WebhookHookID,
		}
		if g.AppID != 0 {
			account.AppID = strconv.FormatInt(g.AppID, 10)
		}
		if g.Mode == config.Webhooks {
			account.Mode = github.Webhooks
		}
		list = append(list, account)
	}
	return list
}

// poolsOf returns the pools whose account is of a mode.
func (a *App) poolsOf(mode string) []flint.Pool {
	var pools []flint.Pool
	for _, p := range a.cfg.FlintPools() {
		for _, g := range a.cfg.All() {
			if g.Name == p.Account && g.Mode == mode {
				pools = append(pools, p)
			}
		}
	}
	return pools
}

// openHooks opens the ledger of jobs and the port for webhooks.
func (a *App) openHooks(ctx context.Context, dir string) error {
	c := webhook.Config{
		Dir: dir, Log: a.log, Events: a.note, Runner: a.poolOf, Over: a.over, Elsewhere: a.poolsOf(config.ScaleSets),
	}
	for _, g := range a.cfg.All() {
		if g.Mode != config.Webhooks {
			continue
		}
		account := webhook.Account{Name: g.Name, Secret: g.WebhookSecret, API: a.github.API(g.Name)}
		for _, p := range a.cfg.FlintPools() {
			if p.Account == g.Name {
				account.Pools = append(account.Pools, p)
			}
		}
		c.Accounts = append(c.Accounts, account)
	}
	var err error
	if a.hooks, err = webhook.Open(c); err != nil {
		return err
	}
	a.undo.Push("close the ledger of jobs", func(context.Context) error { return a.hooks.Close() })
	listen := a.listen
	if listen == nil {
		listen = new(net.ListenConfig).Listen
	}
	if a.listener, err = listen(ctx, "tcp", a.cfg.Webhook.Listen); err != nil {
		return &flint.Fault{
			Code: "webhook.listen", What: "listen for webhooks on " + a.cfg.Webhook.Listen, Kind: flint.ErrConflict, Err: err,
			Fix: "stop what listens there, or set webhook.listen",
		}
	}
	a.undo.Push("close the port for webhooks", func(context.Context) error {
		if err := a.listener.Close(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
	a.demand.add(a.hooks, a.poolsOf(config.Webhooks))
	return nil
}

// note records what GitHub says of a job of one of our runners.
func (a *App) note(ctx context.Context, ev flint.JobEvent) error { return a.host.Note(ctx, ev) }

// poolOf says whose runner a name is. One of ours that does not live any more has no pool: no demand stands for it.
func (a *App) poolOf(runner string) (pool string, ours bool) {
	if r, ok := a.host.Runner(runner); ok {
		return r.Pool, true
	}
	return "", strings.HasPrefix(runner, a.prefix)
}

// over says that a runner's work is done: its VM goes down.
func (a *App) over(runner string) bool {
	r, ok := a.host.Runner(runner)
	return ok && r.Phase >= flint.Finishing
}

// WebhookAddr is where webhooks are listened for; nil where nothing does.
func (a *App) WebhookAddr() net.Addr {
	if a.listener == nil {
		return nil
	}
	return a.listener.Addr()
}

// namePrefix returns what the names of all our runners begin with: flint- and a number of our own, which the file keeps. By
// it a sweep knows our registrations from another coordinator's.
func namePrefix(file string) (string, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		id := make([]byte, 3)
		_, _ = rand.Read(id) // never fails: crypto/rand ends the program instead
		b = []byte(hex.EncodeToString(id) + "\n")
		if err := durable.Replace(file, b); err != nil {
			return "", fmt.Errorf("write this coordinator's id: %w", err)
		}
	} else if err != nil {
		return "", fmt.Errorf("read this coordinator's id: %w", err)
	}
	id := strings.TrimSpace(string(b))
	if !regexp.MustCompile(`^[0-9a-f]{6}$`).MatchString(id) {
		return "", &flint.Fault{
			Code: "state.coordinator", What: "read " + file, Kind: flint.ErrConfig, Err: fmt.Errorf("%.20q is not six hexadecimal digits", id),
			Fix: "put the old content back; or remove the file, and remove the offline runners that begin with flint- on GitHub",
		}
	}
	return "flint-" + id + "-", nil
}
