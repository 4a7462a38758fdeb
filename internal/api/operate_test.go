package api_test

import (
	"context"
	"errors"
	"reflect"
	"testing"

	"flint"
	"flint/internal/api"
)

// operator drains h1 and knows no other host.
type operator struct {
	api.Explainer
	host api.Host
}

func (o *operator) Hosts(context.Context) ([]api.Host, error) { return []api.Host{o.host}, nil }

func (o *operator) Drain(_ context.Context, name string) (api.Host, error) {
	if name != "" && name != o.host.Name {
		return api.Host{}, &flint.Fault{Code: "host.unknown", What: "drain " + name, Kind: flint.ErrNotFound, Fix: "look"}
	}
	o.host.State, o.host.Reasons = api.HostDraining, []flint.Reason{flint.Because("host.draining", "a person")}
	return o.host, nil
}

func (o *operator) Uncordon(context.Context, string) (api.Host, error) {
	o.host.State, o.host.Reasons = api.HostReady, nil
	return o.host, nil
}

func (o *operator) Reload(context.Context) (api.Reloaded, error) {
	return api.Reloaded{Applied: []api.Change{{Key: "log_level", From: "info", To: "debug"}}}, nil
}

func TestOperator(t *testing.T) {
	o := &operator{host: api.Host{
		Name: "h1", State: api.HostReady, CPUs: api.Room{Free: 1, Of: 2}, Memory: api.Room{Free: 3, Of: 4},
		Runners: []flint.Runner{{ID: "flint-1", Pool: "a", Phase: flint.Running}},
	}}
	path, _ := serveBackend(t, o)
	c := api.Connect(path)
	if list, err := c.Hosts(t.Context()); err != nil || !reflect.DeepEqual(list, []api.Host{o.host}) {
		t.Errorf("hosts: %+v, %v; want %+v", list, err, o.host)
	}
	if h, err := c.Drain(t.Context(), ""); err != nil || h.State != api.HostDraining || len(h.Reasons) != 1 || h.Reasons[0].Code != "host.draining" {
		t.Errorf("drain: %+v, %v", h, err)
	}
	if _, err := c.Drain(t.Context(), "other host"); !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("drain of another host: %v", err)
	}
	if h, err := c.Uncordon(t.Context(), "h1"); err != nil || h.State != api.HostReady || len(h.Reasons) != 0 {
		t.Errorf("uncordon: %+v, %v", h, err)
	}
	r, err := c.Reload(t.Context())
	if err != nil || len(r.Applied) != 1 || r.Applied[0] != (api.Change{Key: "log_level", From: "info", To: "debug"}) || len(r.Restart) != 0 {
		t.Errorf("reload: %+v, %v", r, err)
	}
}
