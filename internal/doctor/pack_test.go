package doctor

import (
	"context"
	"strings"
	"testing"
)

func TestKernelPack(t *testing.T) {
	docker := func(lacks ...string) Work { return Work{Name: "docker", Lacks: lacks} }
	for name, tt := range map[string]struct {
		kernel  Kernel
		verdict Verdict
		text    string
	}{
		"none yet":  {Kernel{}, Skip, "flint kernel pull"},
		"has all":   {Kernel{"6.1", []Work{{Name: "boot"}, docker(), {Name: "bpf"}}}, Pass, "6.1, with all for docker, bpf"},
		"some":      {Kernel{"6.1", []Work{docker(), {Name: "bpf", Partly: true}}}, Pass, "all but rare things for bpf"},
		"lacks":     {Kernel{"6.1", []Work{{Name: "boot"}, docker("VETH", "BRIDGE"), {Name: "bpf", Unknown: true}}}, Warn, "docker (VETH, BRIDGE)"},
		"no boot":   {Kernel{"6.1", []Work{{Name: "boot", Lacks: []string{"VIRTIO_BLK"}}, docker()}}, Fail, "boot (VIRTIO_BLK)"},
		"not known": {Kernel{"6.1", []Work{docker(), {Name: "bpf", Unknown: true}}}, Skip, "cannot be told"},
	} {
		t.Run(name, func(t *testing.T) {
			e := &exam{Config: Config{Kernel: tt.kernel}}
			f := e.kernelPack(context.Background())
			if f.Verdict != tt.verdict || !strings.Contains(f.Text, tt.text) || (f.Fix == "") != (tt.verdict == Pass || tt.verdict == Skip) {
				t.Errorf("got %+v", f)
			}
		})
	}
}

func days(n int) *int { return &n }

func fresh() Software { return Software{Version: "2.335.0", Age: days(10), Left: days(20)} }

func TestRunnerAge(t *testing.T) {
	for name, tt := range map[string]struct {
		runners []Software
		verdict Verdict
		text    string
	}{
		"none":      {nil, Skip, "no runner software"},
		"fresh":     {[]Software{fresh()}, Pass, "2.335.0, 10 days old, 20 left"},
		"not known": {[]Software{{Version: "2.335.0"}}, Skip, "not known: 2.335.0"},
		"soon":      {[]Software{fresh(), {Version: "2.334.0", Pool: "a", Age: days(26), Left: days(4), Soon: true}}, Warn, "2.334.0 of pool a is 26 days old; in 4 days"},
		"over":      {[]Software{{Version: "2.334.0", Age: days(40), Left: days(0)}, fresh()}, Warn, "40 days old; GitHub gives it no job"},
		"refused":   {[]Software{{Version: "2.300.0", Refused: true}, {Version: "2.334.0", Age: days(40), Left: days(0)}}, Fail, "2.300.0 is older"},
	} {
		t.Run(name, func(t *testing.T) {
			e := &exam{Config: Config{Runners: tt.runners}}
			f := e.runnerAge(context.Background())
			if f.Verdict != tt.verdict || !strings.Contains(f.Text, tt.text) || (f.Fix == "") != (tt.verdict == Pass || tt.verdict == Skip) {
				t.Errorf("got %+v", f)
			}
		})
	}
}
