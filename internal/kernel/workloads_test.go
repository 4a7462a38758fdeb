package kernel

import (
	"slices"
	"strings"
	"testing"
)

// everyOption is a configuration with all that any workload asks for, as modules; of alternatives the last, which is enough.
func everyOption() string {
	config := ""
	for _, a := range workloads() {
		for option := range strings.FieldsSeq(a.needs + a.likes) {
			names := strings.Split(option, "|")
			name, _, _ := strings.Cut(names[len(names)-1], ":")
			if line := "CONFIG_" + name + "=m\n"; !strings.Contains(config, line) {
				config += line
			}
		}
	}
	return config
}

// everyModule names all modules that any workload asks for.
func everyModule() map[string]bool {
	set := map[string]bool{}
	for _, a := range workloads() {
		for option := range strings.FieldsSeq(strings.ReplaceAll(a.needs+a.likes, "|", " ")) {
			if _, module, ok := strings.Cut(option, ":"); ok {
				set[module] = true
			}
		}
	}
	return set
}

func verdicts(report []Workload) map[string]string {
	all := map[string]string{}
	for _, w := range report {
		all[w.Name] = w.Verdict
	}
	return all
}

func find(t *testing.T, report []Workload, name string) Workload {
	t.Helper()
	i := slices.IndexFunc(report, func(w Workload) bool { return w.Name == name })
	if i < 0 {
		t.Fatalf("no workload %s in %v", name, report)
	}
	return report[i]
}

func TestReportByConfiguration(t *testing.T) {
	whole := facts{config: readConfig([]byte(everyOption()))}
	for name, verdict := range verdicts(whole.report()) {
		if verdict != Works {
			t.Errorf("of a kernel that has all: %s %s", name, verdict)
		}
	}
	config := everyOption()
	for option, instead := range map[string]string{
		"NF_TABLES_INET": "# CONFIG_NF_TABLES_INET is not set\n", "VETH": "CONFIG_VETH=n\n", "OF": "", "WIREGUARD": "",
	} {
		config = strings.Replace(config, "CONFIG_"+option+"=m\n", instead, 1)
	}
	report := facts{config: readConfig([]byte(config))}.report()
	want := map[string]string{
		"boot": Fails, "docker": Fails, "k3s": Fails, "kind": Fails, "nftables": Fails, "wireguard": Fails, "bpf": Works,
	}
	for name, verdict := range verdicts(report) {
		if verdict != want[name] {
			t.Errorf("%s: %s, want %s", name, verdict, want[name])
		}
	}
	if got, want := lacked(report), []string{"ACPI", "VIRTIO_MMIO_CMDLINE_DEVICES", "VETH", "NF_TABLES_INET", "WIREGUARD"}; !slices.Equal(got, want) {
		t.Errorf("lacks %q, want %q", got, want)
	}
	if w := find(t, report, "k3s"); !slices.Equal(w.Lacks, []string{"VETH"}) || !slices.Equal(w.Without, []string{"WIREGUARD"}) {
		t.Errorf("got %+v", w)
	}
}

// TestReportByModules: an option that the configuration has as a module is of no use where the module is in a package that
// was not installed, as with Ubuntu's linux-modules-extra.
func TestReportByModules(t *testing.T) {
	f := facts{config: readConfig([]byte(everyOption())), modules: everyModule()}
	delete(f.modules, "wireguard")
	delete(f.modules, "cls_bpf")
	delete(f.modules, "nft_queue")
	report := f.report()
	for name, want := range map[string]string{"docker": Works, "wireguard": Fails, "bpf": Fails, "nftables": Partly} {
		if w := find(t, report, name); w.Verdict != want {
			t.Errorf("%s: %+v, want %s", name, w, want)
		}
	}
}

func TestReportWithoutConfiguration(t *testing.T) {
	f := facts{modules: everyModule()}
	if w := find(t, f.report(), "wireguard"); w.Verdict != Unknown || !slices.Equal(w.Unknown, []string{"IP_MULTIPLE_TABLES", "IPV6_MULTIPLE_TABLES"}) {
		t.Errorf("got %+v", w)
	}
	delete(f.modules, "wireguard")
	if w := find(t, f.report(), "wireguard"); w.Verdict != Fails || !slices.Equal(w.Lacks, []string{"WIREGUARD"}) {
		t.Errorf("got %+v", w)
	}
	monolithic := facts{monolithic: true, absent: []string{"VIRTIO_BLK"}}
	if w := find(t, monolithic.report(), "boot"); w.Verdict != Fails || !slices.Equal(w.Lacks, []string{"VIRTIO_BLK"}) {
		t.Errorf("got %+v", w)
	}
	if w := find(t, monolithic.report(), "bpf"); w.Verdict != Unknown {
		t.Errorf("got %+v", w)
	}
}

// TestMonolithicKernelHasNoModules: what its configuration calls a module was never built.
func TestMonolithicKernelHasNoModules(t *testing.T) {
	f := facts{config: readConfig([]byte("CONFIG_WIREGUARD=m\nCONFIG_IP_MULTIPLE_TABLES=y\nCONFIG_IPV6_MULTIPLE_TABLES=y\n")), monolithic: true}
	if w := find(t, f.report(), "wireguard"); w.Verdict != Fails {
		t.Errorf("got %+v", w)
	}
	f.config["WIREGUARD"] = "y"
	if w := find(t, f.report(), "wireguard"); w.Verdict != Partly {
		t.Errorf("got %+v", w)
	}
}
