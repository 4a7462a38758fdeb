package image

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestSettings(t *testing.T) {
	got, err := settings(v1.Config{
		Env: []string{"A=b c", "NONE", "=x", "", "B=", "A=d"}, WorkingDir: "rel/../dir/", User: "1:2", Entrypoint: []string{"/e"}, Cmd: []string{"c"},
	})
	want := Base{Env: []string{"A=b c", "B=", "A=d"}, Dir: "/dir", User: "1:2", Cmd: []string{"/e", "c"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	var many []string
	for i := range 2000 {
		many = append(many, fmt.Sprintf("A%d=", i))
	}
	for why, c := range map[string]v1.Config{
		"2000 variables": {Env: many},
		"32KiB":          {Env: []string{"A=" + strings.Repeat("x", 40000)}},
		"at most 32KiB":  {Env: []string{"A=" + strings.Repeat("\x01", 10000)}}, // six times as long in JSON
		"zero byte":      {Env: []string{"A=\x00"}},
		"or the working": {WorkingDir: "/a\x00"},
		"9001 bytes":     {WorkingDir: "/" + strings.Repeat("x", 9000)},
	} {
		if _, err := settings(c); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", why, err)
		}
	}
	if b, err := settings(v1.Config{}); err != nil || b.Env != nil || b.Dir != "" {
		t.Errorf("of nothing comes %+v, %v", b, err)
	}
}
