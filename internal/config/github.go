package config

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"gopkg.in/yaml.v3"

	"flint"
	"flint/internal/regular"
)

// The two ways to learn of jobs.
const (
	ScaleSets = "scale_sets" // flint asks GitHub; no port is open
	Webhooks  = "webhooks"   // GitHub tells flint
)

// GitHub says whose jobs are run, how flint learns of them, and how it proves who it is: one account. An App that is
// installed in several organisations is as many accounts.
type GitHub struct {
	Name         string `yaml:"name"`         // what pools call it; only among accounts
	URL          string `yaml:"url"`          // of the server; https://github.com unless it is GHES or *.ghe.com
	Organization string `yaml:"organization"` // exactly one of organization, repository and enterprise
	Repository   string `yaml:"repository"`   // owner/name
	Enterprise   string `yaml:"enterprise"`   // with a token only
	Mode         string `yaml:"mode"`         // scale_sets or webhooks

	AppID          int64  `yaml:"app_id"`          // of the GitHub App
	InstallationID int64  `yaml:"installation_id"` // looked up when 0
	PrivateKeyFile string `yaml:"private_key_file"`
	TokenFile      string `yaml:"token_file"` // holds a personal access token, instead of the App

	WebhookSecretFile string `yaml:"webhook_secret_file"`
	// WebhookHookID is the hook whose deliveries are looked at where a token is used; with an App, it is the App's own.
	WebhookHookID int64 `yaml:"webhook_hook_id"`
	// Registration is how runners of webhook pools are made known: jit, or token for servers without that.
	Registration string `yaml:"registration"`

	// Secrets are read from their files or from systemd's credentials; the file format has no keys for them, so they cannot
	// end in a file that others read.
	PrivateKey    flint.Secret `yaml:"-"`
	Token         flint.Secret `yaml:"-"`
	WebhookSecret flint.Secret `yaml:"-"`
}

// NewGitHub returns an account with the defaults of whatever a file does not say.
func NewGitHub() GitHub {
	return GitHub{URL: "https://github.com", Mode: ScaleSets, Registration: "jit"}
}

// UnmarshalYAML implements yaml.Unmarshaler: it decodes above the defaults.
func (g *GitHub) UnmarshalYAML(n *yaml.Node) error {
	type plain GitHub
	*g = NewGitHub()
	return n.Decode((*plain)(g))
}

// Scope is the URL GitHub knows the organisation, repository or enterprise by.
func (g GitHub) Scope() string {
	path := g.Organization
	switch {
	case g.Repository != "":
		path = g.Repository
	case g.Enterprise != "":
		path = "enterprises/" + g.Enterprise
	}
	return strings.TrimSuffix(g.URL, "/") + "/" + path
}

// given reports whether the account says whose jobs are run.
func (g GitHub) given() bool { return g.Organization != "" || g.Repository != "" || g.Enterprise != "" }

// All returns every account: the one under github, unless it is left out, and those under accounts.
func (c *Config) All() []*GitHub {
	var all []*GitHub
	if c.GitHub.given() || len(c.Accounts) == 0 {
		all = append(all, &c.GitHub)
	}
	for i := range c.Accounts {
		all = append(all, &c.Accounts[i])
	}
	return all
}

// account returns the account a pool names; nil when there is none.
func (c *Config) account(name string) *GitHub {
	all := c.All()
	if i := slices.IndexFunc(all, func(g *GitHub) bool { return g.Name == name }); i >= 0 {
		return all[i]
	}
	return nil
}

// Webhooks reports whether any account learns of jobs by webhooks.
func (c *Config) Webhooks() bool {
	return slices.ContainsFunc(c.All(), func(g *GitHub) bool { return g.Mode == Webhooks })
}

// key names a field of account i of All in messages.
func (c *Config) key(g *GitHub, field string) string {
	if g == &c.GitHub {
		return "github." + field
	}
	for i := range c.Accounts {
		if g == &c.Accounts[i] {
			return fmt.Sprintf("accounts[%d].%s", i, field)
		}
	}
	return field
}

// validateAccounts returns what is wrong for the coordinator.
func (c *Config) validateAccounts() (found problems) {
	seen := map[string]bool{}
	for _, g := range c.All() {
		bad := func(field, format string, args ...any) { found.add(c.key(g, field), format, args...) }
		if g.Name != "" && !poolName.MatchString(g.Name) {
			bad("name", notName, g.Name)
		}
		if seen[g.Name] {
			bad("name", "%q is used twice; pools say by it which account they serve", g.Name)
		}
		seen[g.Name] = true
		g.validate(bad)
	}
	return found
}

func (g *GitHub) validate(bad func(field, format string, args ...any)) {
	scopes := 0
	for _, s := range []string{g.Organization, g.Repository, g.Enterprise} {
		if s != "" {
			scopes++
		}
	}
	if scopes != 1 {
		bad("organization", "give exactly one of organization, repository and enterprise")
	}
	if g.Repository != "" && strings.Count(strings.Trim(g.Repository, "/"), "/") != 1 {
		bad("repository", "%q is not owner/name", g.Repository)
	}
	if u, err := url.Parse(g.URL); err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") {
		bad("url", "%q is not an http(s) URL", g.URL)
	}
	if g.Mode != ScaleSets && g.Mode != Webhooks {
		bad("mode", "%q is neither %s nor %s", g.Mode, ScaleSets, Webhooks)
	}
	if g.Registration != "jit" && g.Registration != "token" {
		bad("registration", "%q is neither jit nor token", g.Registration)
	}
	if g.Registration == "token" && g.Mode == ScaleSets {
		bad("registration", "token is for webhooks: scale sets register every runner by a JIT configuration")
	}
	switch token := g.Token != "" || g.TokenFile != ""; {
	case token && g.AppID != 0:
		bad("token_file", "give a GitHub App or a token, and not both")
	case token:
	case g.Enterprise != "":
		bad("token_file", "is missing: a GitHub App cannot serve a whole enterprise")
	case g.AppID == 0:
		bad("app_id", "is missing; it stands on the App's settings page (or give token_file)")
	case g.PrivateKey == "" && g.PrivateKeyFile == "":
		bad("private_key_file", "is missing; generate a key on the App's settings page")
	}
	g.validateHooks(bad)
}

// validateHooks returns what is wrong with the webhooks of an account: what is missing, and what would do nothing.
func (g *GitHub) validateHooks(bad func(field, format string, args ...any)) {
	secret := g.WebhookSecret != "" || g.WebhookSecretFile != ""
	switch {
	case g.Mode == Webhooks && !secret:
		bad("webhook_secret_file", "is missing: without a secret anybody could start VMs here")
	case g.Mode == ScaleSets && secret:
		bad("webhook_secret_file", "is for mode: webhooks; with scale sets no webhook is listened for")
	}
	switch {
	case g.WebhookHookID == 0:
	case g.Mode == ScaleSets:
		bad("webhook_hook_id", "is for mode: webhooks")
	case g.AppID != 0:
		bad("webhook_hook_id", "is for a token; a GitHub App has its own hook")
	}
}

// secret is one secret of an account: where it may come from and where it goes.
type secret struct {
	value *flint.Secret
	file  *string
	field string // its key in the file
	what  string
	fix   string
}

func (g *GitHub) secrets() []secret {
	return []secret{
		{
			&g.PrivateKey, &g.PrivateKeyFile, "private_key", "the App's private key",
			"name the .pem file downloaded from the App's settings page",
		},
		{&g.Token, &g.TokenFile, "token", "the personal access token", "name a file that holds the token and nothing else"},
		{
			&g.WebhookSecret, &g.WebhookSecretFile, "webhook_secret", "the webhook secret",
			"name a file that holds the secret given on the App's settings page, and nothing else",
		},
	}
}

// findCredentials names the files of secrets that the configuration leaves out and systemd has: credential
// github.private_key, github.token or github.webhook_secret; of a named account <name>.private_key and so on. dir is
// $CREDENTIALS_DIRECTORY, see systemd.exec(5).
func (c *Config) findCredentials(dir string) {
	if dir == "" {
		return
	}
	for _, g := range c.All() {
		prefix := g.Name
		if !poolName.MatchString(prefix) {
			prefix = "github"
		}
		for _, s := range g.secrets() {
			if *s.value != "" || *s.file != "" || s.field == "webhook_secret" && g.Mode != Webhooks {
				continue
			}
			path := filepath.Join(dir, prefix+"."+s.field)
			if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
				*s.file = path
			}
		}
	}
}

// ReadSecrets reads the keys, tokens and webhook secrets of all accounts. It refuses files that others may read.
func (c *Config) ReadSecrets() error { return c.readSecrets().join() }

func (c *Config) readSecrets() (found problems) {
	for _, g := range c.All() {
		for _, s := range g.secrets() {
			key := c.key(g, s.field+"_file")
			if err := s.read(key); err != nil {
				found = append(found, &problem{key, err})
			}
		}
		if g.PrivateKey == "" {
			continue
		}
		if err := checkKey(g.PrivateKey); err != nil {
			found.add(c.key(g, "private_key_file"), "%w", err)
		}
	}
	return found
}

func (s *secret) read(key string) error {
	path := *s.file
	if *s.value != "" || path == "" {
		return nil
	}
	fault := func(err error, fix string) error {
		return &flint.Fault{Code: "config.secret", What: "read " + s.what + " " + path, Kind: flint.ErrConfig, Err: err, Fix: fix}
	}
	info, err := os.Stat(path)
	if err != nil {
		return fault(regular.Cause(err), "set "+key+": "+s.fix)
	}
	if info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
		return fault(fmt.Errorf("mode is %#o, so other users can read it", info.Mode().Perm()), "chmod 600 "+path)
	}
	b, err := regular.Read(path, maxFile)
	if errors.Is(err, fs.ErrPermission) {
		return fault(err, "let the user flint runs as read it")
	}
	if err != nil {
		return fault(err, s.fix)
	}
	text := strings.TrimSpace(string(b))
	if text == "" {
		return fault(errors.New("it is empty"), s.fix)
	}
	*s.value = flint.Secret(text)
	return nil
}

// checkKey reports whether the key is an RSA private key in PEM form, as GitHub hands them out.
func checkKey(key flint.Secret) error {
	block, _ := pem.Decode([]byte(key))
	if block == nil {
		return errors.New("the file holds no key in PEM form")
	}
	if _, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return nil
	}
	if k, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
		if _, ok := k.(*rsa.PrivateKey); ok {
			return nil
		}
	}
	return errors.New("the file holds no RSA private key")
}

// systemLabels are what GitHub's own registration gives every self-hosted runner of this machine's kind.
func systemLabels() []string {
	arch := map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]
	return []string{"self-hosted", "linux", arch}
}

// labels are what runs-on: may ask of a pool.
func (c *Config) labels(p Pool) []string {
	labels := p.Labels
	if len(labels) == 0 {
		labels = []string{p.Name}
	}
	if g := c.account(p.Account); g == nil || g.Mode == ScaleSets {
		return labels
	}
	labels = slices.Clone(labels)
	for _, l := range systemLabels() {
		if !slices.ContainsFunc(labels, func(have string) bool { return strings.EqualFold(have, l) }) {
			labels = append(labels, l)
		}
	}
	return labels
}

// validateServing returns what is wrong between pools and accounts.
func (c *Config) validateServing() (found problems) {
	sets, covers := map[string]string{}, map[string]string{}
	for i, p := range c.Pools {
		bad := func(key, format string, args ...any) { found.add(fmt.Sprintf("pools[%d].%s", i, key), format, args...) }
		g := c.account(p.Account)
		if g == nil {
			bad("account", "no account is named %q", p.Account)
			continue
		}
		if g.Mode == ScaleSets && len(p.Labels) > 1 {
			bad("labels", "a scale set has one label, its name; several work with mode: webhooks")
		}
		set := g.Scope() + " " + strings.ToLower(c.labels(p)[0])
		if other, taken := sets[set]; taken && g.Mode == ScaleSets {
			bad("labels", "%q is the scale set of pool %s already", c.labels(p)[0], other)
		}
		sets[set] = p.Name
		if g.Mode == Webhooks {
			all := strings.Fields(strings.ToLower(strings.Join(c.labels(p), " ")))
			slices.Sort(all)
			same := g.Scope() + " " + strings.Join(all, " ")
			if other, taken := covers[same]; taken {
				bad("labels", "they are those of pool %s, which would get all jobs: %s", other, strings.Join(c.labels(p), ", "))
			}
			covers[same] = p.Name
		}
		if p.RerunLost && p.Public {
			bad("rerun_lost", "a public pool re-runs nothing by itself: a stranger's job that kills its VM would do it for ever")
		}
	}
	return found
}
