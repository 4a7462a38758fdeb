package config

import (
	"encoding"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"flint"
)

// Take returns c with what a running flint can take over from next: the log level, what the host gives, and its pools with
// their image, shape, max and limits. All else stays as it is in c, because something was made of it at the start. Pools come
// and go where no account uses webhooks: the ledger of jobs is opened for certain pools.
func (c Config) Take(next Config) Config {
	out := c
	out.LogLevel = next.LogLevel
	out.Host = next.Host
	out.Host.Name = c.Host.Name
	out.Pools = slices.Clone(c.Pools)
	for i, have := range out.Pools {
		if p := next.pool(have.Name); p != nil && (!p.Public || c.Firecracker.Jail) {
			taken := *p
			taken.Account, taken.Group, taken.Labels = have.Account, have.Group, have.Labels
			out.Pools[i] = taken
		}
	}
	if c.Webhooks() {
		return out
	}
	moved := out
	moved.Pools = slices.DeleteFunc(slices.Clone(out.Pools), func(p Pool) bool { return next.pool(p.Name) == nil })
	for _, p := range next.Pools {
		a, b := c.account(p.Account), next.account(p.Account)
		if c.pool(p.Name) == nil && a != nil && b != nil && *a == *b && (!p.Public || c.Firecracker.Jail) {
			moved.Pools = append(moved.Pools, p)
		}
	}
	// What is valid in next need not be so beside what stays: a new pool may have the label an old one is to lose.
	if len(moved.Pools) == 0 || len(moved.validateServing()) > 0 {
		return out
	}
	return moved
}

// pool returns the pool of a name; nil where there is none.
func (c *Config) pool(name string) *Pool {
	if i := slices.IndexFunc(c.Pools, func(p Pool) bool { return p.Name == name }); i >= 0 {
		return &c.Pools[i]
	}
	return nil
}

// Change is one key that has another value. A pool or account as a whole is one, where it is only on one side.
type Change struct {
	Key      string // pools[flint].max
	From, To string // empty where there is none; a secret is never shown
}

// Changes lists what differs, in the order of the file format.
func Changes(from, to Config) []Change {
	a, b := facts{at: map[string]string{}}, facts{at: map[string]string{}}
	a.add("", reflect.ValueOf(from))
	b.add("", reflect.ValueOf(to))
	var out []Change
	for _, key := range merge(a.keys, b.keys) {
		old, had := a.at[key]
		now, has := b.at[key]
		switch {
		case had && has && old == now:
		case covered(key, a.whole, b.whole):
		default:
			out = append(out, Change{Key: key, From: show(key, old), To: show(key, now)})
		}
	}
	return out
}

// facts are a configuration as keys and values.
type facts struct {
	keys  []string
	at    map[string]string
	whole []string // those that stand for something with a name
}

func (f *facts) set(key, value string) {
	f.keys = append(f.keys, key)
	f.at[key] = value
}

func (f *facts) add(key string, v reflect.Value) {
	_, text := reflect.New(v.Type()).Interface().(encoding.TextUnmarshaler)
	switch {
	case v.Type() == reflect.TypeFor[flint.Secret]():
		f.set(key, v.String())
	case v.Type() == reflect.TypeFor[Duration]():
		f.set(key, time.Duration(v.Int()).String())
	case v.Kind() == reflect.Struct && !text:
		for field, value := range v.Fields() {
			f.add(strings.TrimPrefix(key+"."+keyOf(field), "."), value)
		}
	case v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Struct:
		for i := range v.Len() {
			item := v.Index(i)
			named := fmt.Sprintf("%s[%s]", key, item.FieldByName("Name"))
			f.whole = append(f.whole, named)
			f.set(named, "given")
			f.add(named, item)
		}
	default:
		f.set(key, fmt.Sprint(v.Interface()))
	}
}

// keyOf names a field. Secrets have no key of their own: they are called as systemd's credentials are.
func keyOf(field reflect.StructField) string {
	if tag := field.Tag.Get("yaml"); tag != "-" {
		return tag
	}
	var b strings.Builder
	for i, c := range field.Name {
		if c >= 'A' && c <= 'Z' && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(c)
	}
	return strings.ToLower(b.String())
}

// covered reports whether key is a part of something that is on one side only.
func covered(key string, a, b []string) bool {
	for _, side := range [][2][]string{{a, b}, {b, a}} {
		for _, whole := range side[0] {
			if strings.HasPrefix(key, whole+".") && !slices.Contains(side[1], whole) {
				return true
			}
		}
	}
	return false
}

// merge puts what only b has behind what came before it there.
func merge(a, b []string) []string {
	out := slices.Clone(a)
	at := 0
	for _, key := range b {
		if i := slices.Index(out, key); i >= 0 {
			at = i + 1
			continue
		}
		out = slices.Insert(out, at, key)
		at++
	}
	return out
}

func show(key, value string) string {
	for _, secret := range []string{".private_key", ".token", ".webhook_secret"} {
		if strings.HasSuffix(key, secret) && value != "" {
			return flint.Secret(value).String()
		}
	}
	return value
}
