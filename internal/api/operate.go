package api

import (
	"context"
	"net/http"
	"net/url"

	"flint"
)

// Operator does what a person asks of a running flint. host is a host's name; empty: the one that answers. Its errors are
// faults.
type Operator interface {
	// Hosts lists the hosts and what is on them.
	Hosts(ctx context.Context) ([]Host, error)
	// Drain lets a host take no new runner, until Uncordon; those it has finish. It holds over restarts.
	Drain(ctx context.Context, host string) (Host, error)
	// Uncordon ends Drain.
	Uncordon(ctx context.Context, host string) (Host, error)
	// Reload reads the configuration again and applies what can change. An invalid one changes nothing: an error of kind
	// flint.ErrConfig.
	Reload(ctx context.Context) (Reloaded, error)
}

// Host is a machine as a person sees it.
type Host struct {
	Name    string         `json:"name"`
	State   string         `json:"state"` // one of the Host… below
	Reasons []flint.Reason `json:"reasons"`
	Runners []flint.Runner `json:"runners"` // all that are not gone
	CPUs    Room           `json:"cpus"`    // virtual ones
	Memory  Room           `json:"memory"`  // in bytes
}

// States of a host.
const (
	HostReady    = "ready"
	HostDraining = "draining" // it takes no new runner, and has some
	HostDrained  = "drained"  // it takes no new runner, and has none
	HostRefuses  = "refuses"  // it takes no new runner for now, by itself
)

// Room is how much of something is free, and how much there is for VMs in all.
type Room struct {
	Free int64 `json:"free"`
	Of   int64 `json:"of"`
}

// Reloaded says what a reload of the configuration came to.
type Reloaded struct {
	Applied []Change `json:"applied"`
	Restart []Change `json:"restart"` // what needs a restart; it is as it was
}

// Change is one key of the configuration that is not as it was.
type Change struct {
	Key  string `json:"key"`
	From string `json:"from"` // empty: it was not there
	To   string `json:"to"`   // empty: it is not there any more
	Note string `json:"note,omitempty"`
}

type hosts struct {
	Hosts []Host `json:"hosts"`
}

// Hosts asks Operator.Hosts.
func (c *Client) Hosts(ctx context.Context) ([]Host, error) {
	out, err := ask[hosts](ctx, c, http.MethodGet, "/v1/hosts", nil)
	return out.Hosts, err
}

// Drain asks Operator.Drain.
func (c *Client) Drain(ctx context.Context, host string) (Host, error) {
	return ask[Host](ctx, c, http.MethodPost, "/v1/host/drain", url.Values{"host": {host}})
}

// Uncordon asks Operator.Uncordon.
func (c *Client) Uncordon(ctx context.Context, host string) (Host, error) {
	return ask[Host](ctx, c, http.MethodPost, "/v1/host/uncordon", url.Values{"host": {host}})
}

// Reload asks Operator.Reload.
func (c *Client) Reload(ctx context.Context) (Reloaded, error) {
	return ask[Reloaded](ctx, c, http.MethodPost, "/v1/config/reload", nil)
}
