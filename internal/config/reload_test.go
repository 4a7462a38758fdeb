package config_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"flint/internal/config"
)

func parse(t *testing.T, src string) config.Config {
	t.Helper()
	c, err := config.Parse("/etc/flint/flint.yaml", []byte("schema_version: 1\n"+src), nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func lines(changes []config.Change) string {
	out := make([]string, len(changes))
	for i, c := range changes {
		out[i] = fmt.Sprintf("%s: %s → %s", c.Key, c.From, c.To)
	}
	return strings.Join(out, "\n")
}

func TestTakeLeavesWhatNeedsARestart(t *testing.T) {
	const account = "github: {organization: acme, app_id: 1}\n"
	const hooks = "github: {organization: acme, app_id: 1, mode: webhooks}\n"
	for name, tt := range map[string]struct {
		old, next        string
		applied, restart string
	}{
		"nothing": {account + "pools: [{name: a, image: x}]", account + "pools: [{name: a, image: x}]", "", ""},
		"what can change": {
			account + "pools: [{name: a, image: x}]",
			account + "log_level: debug\nhost: {cpus: 3, memory: 9GiB, min_free: 1GiB, on_stop: end}\n" +
				"pools: [{name: a, image: y, max: 7, rerun_lost: true, vm: {memory: 1GiB}, limits: {disk_ops: 5}, build_args: {K: v}}]",
			"log_level: info → debug\n" +
				"pools[a].image: x → y\npools[a].build_args: map[] → map[K:v]\npools[a].vm.memory: 4GiB → 1GiB\npools[a].max: 1 → 7\n" +
				"pools[a].limits.disk_ops: 0 → 5\npools[a].rerun_lost: false → true\n" +
				"host.cpus: 0 → 3\nhost.memory: 0B → 9GiB\nhost.min_free: 5% → 1GiB\nhost.on_stop: keep → end",
			"",
		},
		"what cannot": {
			account + "pools: [{name: a, image: x}]",
			"github: {organization: acme, app_id: 2}\nstate_dir: /elsewhere\nvm: {boot_timeout: 3m}\napi: {socket: /run/s}\n" +
				"pools: [{name: a, image: x, labels: [l], group: g}]",
			"",
			"state_dir: /var/lib/flint → /elsewhere\ngithub.app_id: 1 → 2\napi.socket: /var/lib/flint/serve/api.sock → /run/s\n" +
				"pools[a].group:  → g\npools[a].labels: [] → [l]\nvm.boot_timeout: 1m0s → 3m0s",
		},
		"pools come and go": {
			account + "pools: [{name: a, image: x}, {name: b, image: x}]",
			account + "pools: [{name: b, image: x, max: 2}, {name: c, image: z}]",
			"pools[a]: given → \npools[b].max: 1 → 2\npools[c]:  → given", "",
		},
		"but not with webhooks": {
			hooks + "pools: [{name: a, image: x}, {name: b, image: x}]",
			hooks + "pools: [{name: b, image: x, max: 2}, {name: c, image: z}]",
			"pools[b].max: 1 → 2", "pools[a]: given → \npools[c]:  → given",
		},
		"nor one of a new account": {
			account + "pools: [{name: a, image: x}]",
			account + "accounts: [{name: n, organization: o, app_id: 1}]\npools: [{name: a, image: x}, {name: b, image: x, account: n}]",
			"", "accounts[n]:  → given\npools[b]:  → given",
		},
		"nor a label that another one has until the restart": {
			account + "pools: [{name: a, image: x}]",
			account + "pools: [{name: a, image: x, labels: [z]}, {name: b, image: x, labels: [a]}]",
			"", "pools[a].labels: [] → [z]\npools[b]:  → given",
		},
		"nor strangers without the jail": {
			account + "firecracker: {jail: false}\npools: [{name: a, image: x}]",
			account + "pools: [{name: a, image: x, public: true, max: 9}, {name: b, image: x, public: true}]",
			"", "pools[a].max: 1 → 9\npools[a].public: false → true\npools[b]:  → given\nfirecracker.jail: false → true",
		},
	} {
		t.Run(name, func(t *testing.T) {
			old, next := parse(t, tt.old), parse(t, tt.next)
			before := slices.Clone(old.Pools)
			taken := old.Take(next)
			if got := lines(config.Changes(old, taken)); got != tt.applied {
				t.Errorf("applied\n%s\nwant\n%s", got, tt.applied)
			}
			if got := lines(config.Changes(taken, next)); got != tt.restart {
				t.Errorf("restart\n%s\nwant\n%s", got, tt.restart)
			}
			if got := config.Changes(old, config.Config{Pools: before}); len(got) == 0 || strings.Contains(lines(got), "pools[") {
				t.Errorf("the old one was changed: %s", lines(got))
			}
		})
	}
}

func TestChangesShowNoSecret(t *testing.T) {
	a, b := config.Default(), config.Default()
	a.GitHub.PrivateKey, b.GitHub.PrivateKey, b.GitHub.WebhookSecret = "hunter1", "hunter2", "hunter3"
	got := lines(config.Changes(a, b))
	if want := "github.private_key: [secret] → [secret]\ngithub.webhook_secret:  → [secret]"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
