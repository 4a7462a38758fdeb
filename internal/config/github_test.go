package config_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"flint"
	"flint/internal/config"
)

func testKey(t *testing.T) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
}

const twoAccounts = `
github: {organization: acme, app_id: 1, private_key_file: a.pem}
accounts:
  - {name: widgets, organization: widgets, app_id: 1, private_key_file: a.pem, mode: webhooks, webhook_secret_file: w}
  - {name: big, enterprise: big, url: https://big.ghe.com, token_file: t}
runner: {in_image: auto}
pools:
  - {name: linux, image: i}
  - {name: linux-widgets, image: i, account: widgets, labels: [linux, gpu]}
  - {name: linux-big, image: i, account: big, labels: [linux]}
`

func TestSeveralAccounts(t *testing.T) {
	c, err := config.Parse("/etc/flint/flint.yaml", []byte(twoAccounts), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ValidateServe(); err != nil {
		t.Fatal(err)
	}
	pools := c.FlintPools()
	for i, want := range []struct{ scope, labels string }{
		{"https://github.com/acme", "linux"},
		{"https://github.com/widgets", "linux gpu self-hosted " + map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]},
		{"https://big.ghe.com/enterprises/big", "linux"},
	} {
		if got := strings.Join(pools[i].Labels, " "); pools[i].Scope != want.scope || got != want.labels {
			t.Errorf("pool %s: scope %s, labels %s; want %s, %s", pools[i].Name, pools[i].Scope, got, want.scope, want.labels)
		}
	}
	if missing := pools[1].Misses([]string{"self-hosted", "GPU", "big"}); len(missing) != 1 || missing[0] != "big" {
		t.Errorf("a webhook pool misses %v", missing)
	}
	if !c.Webhooks() {
		t.Error("nobody would listen for webhooks")
	}
}

func TestAccountsThatCannotServe(t *testing.T) {
	const pools = "\nrunner: {dir: /r}\npools: [{name: a, image: i}]\n"
	for name, tt := range map[string]struct{ src, want string }{
		"no scope":          {"github: {app_id: 1, private_key_file: k}" + pools, "github.organization: give exactly one"},
		"two scopes":        {"github: {organization: a, enterprise: b, token_file: t}" + pools, "give exactly one of"},
		"repository":        {"github: {repository: a/b/c, token_file: t}" + pools, "is not owner/name"},
		"no app":            {"github: {organization: a}" + pools, "github.app_id: is missing"},
		"no key":            {"github: {organization: a, app_id: 1}" + pools, "github.private_key_file: is missing"},
		"both":              {"github: {organization: a, app_id: 1, private_key_file: k, token_file: t}" + pools, "and not both"},
		"enterprise by App": {"github: {enterprise: a, app_id: 1, private_key_file: k}" + pools, "cannot serve a whole enterprise"},
		"mode":              {"github: {organization: a, token_file: t, mode: polling}" + pools, `"polling" is neither scale_sets nor webhooks`},
		"no secret":         {"github: {organization: a, token_file: t, mode: webhooks}" + pools, "anybody could start VMs"},
		"token for sets":    {"github: {organization: a, token_file: t, registration: token}" + pools, "scale sets register every runner"},
		"unnamed twice":     {"github: {organization: a, token_file: t}\naccounts: [{organization: b, token_file: t}]" + pools, `accounts[0].name: "" is used twice`},
		"bad account name":  {"accounts: [{name: ../x, organization: b, token_file: t}]" + pools, "accounts[0].name"},
		"no such account":   {"github: {organization: a, token_file: t}\nrunner: {dir: /r}\npools: [{name: a, image: i, account: b}]\n", `pools[0].account: no account is named "b"`},
		"same scale set": {
			"github: {organization: a, token_file: t}\nrunner: {dir: /r}\npools: [{name: a, image: i}, {name: b, image: i, labels: [A]}]\n",
			`pools[1].labels: "A" is the scale set of pool a already`,
		},
		"two labels":      {"github: {organization: a, token_file: t}\nrunner: {dir: /r}\npools: [{name: a, image: i, labels: [a, b]}]\n", "a scale set has one label"},
		"two runners":     {"github: {organization: a, token_file: t}\nrunner: {dir: /r, in_image: auto}\npools: [{name: a, image: i}]\n", "and not both"},
		"secret for sets": {"github: {organization: a, token_file: t, webhook_secret_file: s}" + pools, "github.webhook_secret_file: is for mode: webhooks"},
		"hook for sets":   {"github: {organization: a, token_file: t, webhook_hook_id: 7}" + pools, "github.webhook_hook_id: is for mode: webhooks"},
		"hook of an App": {
			"github: {organization: a, app_id: 1, private_key_file: k, mode: webhooks, webhook_secret_file: s, webhook_hook_id: 7}" + pools,
			"github.webhook_hook_id: is for a token",
		},
		"same labels": {
			"github: {organization: a, token_file: t, mode: webhooks, webhook_secret_file: s}\nrunner: {dir: /r}\n" +
				"pools: [{name: a, image: i, labels: [gpu, big]}, {name: b, image: i, labels: [Big, GPU, self-hosted]}, {name: gpu, image: i}]\n",
			"pools[1].labels: they are those of pool a",
		},
		"listen":           {"github: {organization: a, token_file: t, mode: webhooks, webhook_secret_file: s}\nwebhook: {listen: nowhere}" + pools, `webhook.listen: "nowhere" is not host:port`},
		"path":             {"github: {organization: a, token_file: t, mode: webhooks, webhook_secret_file: s}\nwebhook: {path: hook}" + pools, "webhook.path"},
		"strangers re-run": {"github: {organization: a, token_file: t}\nrunner: {dir: /r}\npools: [{name: a, image: i, public: true, rerun_lost: true}]\n", "pools[0].rerun_lost"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := config.Parse("flint.yaml", []byte(tt.src), nil)
			if err == nil {
				err = c.ValidateServe()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error is\n%v\nand should contain\n%s", err, tt.want)
			}
		})
	}
}

func TestSecretsFromSystemdCredentials(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"github.private_key": testKey(t), "github.webhook_secret": "s3cret\n", "widgets.token": " ghp_x\n",
		"sets.token": "ghp_y", "sets.webhook_secret": "of no use here",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o400); err != nil {
			t.Fatal(err)
		}
	}
	src := "github: {organization: acme, app_id: 1, mode: webhooks}\naccounts: [{name: widgets, organization: widgets}, {name: sets, organization: c}]\n" +
		"runner: {dir: /r}\npools: [{name: a, image: i}]\n"
	c, err := config.Parse("flint.yaml", []byte(src), []string{"CREDENTIALS_DIRECTORY=" + dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ValidateServe(); err != nil {
		t.Fatal(err)
	}
	if err := c.ReadSecrets(); err != nil {
		t.Fatal(err)
	}
	if c.GitHub.WebhookSecret != "s3cret" || c.Accounts[0].Token != "ghp_x" || c.GitHub.PrivateKey == "" || c.Accounts[0].WebhookSecret != flint.Secret("") {
		t.Error("the credentials did not arrive")
	}
}

func TestSecretFilesThatAreNone(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, []byte(" \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "none"): "no such file", empty: "it is empty", dir: "",
	} {
		c := config.Default()
		c.GitHub.Organization, c.GitHub.TokenFile = "acme", path
		if err := c.ReadSecrets(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("token_file %s gives %v, want %q", path, err, want)
		}
	}
	key := filepath.Join(dir, "key")
	if err := os.WriteFile(key, []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := config.Default()
	c.GitHub.Organization, c.GitHub.PrivateKeyFile = "acme", key
	if err := c.ReadSecrets(); err == nil || !strings.Contains(err.Error(), "github.private_key_file: the file holds no key") {
		t.Errorf("a key that is none gives %v", err)
	}
}
