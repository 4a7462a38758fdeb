package config_test

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"flint"
	"flint/internal/config"
)

func TestExampleIsValid(t *testing.T) {
	c, err := config.Parse("/etc/flint/flint.yaml", []byte(config.Example), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ValidateServe(); err != nil {
		t.Fatal(err)
	}
	if err := c.CheckFiles(); err == nil || !strings.Contains(err.Error(), "images/runner") || !strings.Contains(err.Error(), "app.pem") {
		t.Fatalf("files that are not there: %v", err)
	}
	want := flint.Pool{
		Name: "flint", Image: "/etc/flint/images/runner", Max: 4, Labels: []string{"flint"}, Scope: "https://github.com/acme",
		Shape: flint.Shape{CPUs: 4, Memory: 8 * flint.GiB, Disk: 40 * flint.GiB},
	}
	if got := c.FlintPools(); len(got) != 1 || !reflect.DeepEqual(got[0], want) {
		t.Fatalf("pools are %+v, want %+v", got, want)
	}
}

func TestBadFilesSayWhereAndWhat(t *testing.T) {
	for name, tt := range map[string]struct{ src, want string }{
		"unknown key":         {"schema_version: 1\npools:\n  - name: a\n    imag: x\n", `line 4, column 5: unknown key "imag" in pools[0]; did you mean "image"?`},
		"unknown top key":     {"schema_version: 1\nstatedir: x\n", `line 2, column 1: unknown key "statedir"; did you mean "state_dir"?`},
		"two unknown keys":    {"aaaaaaaaaa: 1\nlog_levle: x\n", `line 1, column 1: unknown key "aaaaaaaaaa"` + "\n" + `line 2, column 1: unknown key "log_levle"; did you mean "log_level"?`},
		"empty":               {"", "it is empty"},
		"two documents":       {"log_level: info\n---\nlog_level: warn\n", "more than one YAML document"},
		"size without a unit": {"pools:\n  - {name: a, image: b, vm: {memory: 512}}\n", `line 2, column 38: pools[0].vm.memory: size "512" is not a number with a unit`},
		"bad duration":        {"vm: {boot_timeout: soon}\n", "is not a number with a unit, such as 90s or 6h"},
		"not a number":        {"github: {app_id: twelve}\n", "line 1, column 18: github.app_id: cannot unmarshal"},
		"max zero":            {"pools: [{name: a, image: b, max: 0}]\n", "pools[0].max: 0 is less than 1"},
		"list for a map":      {"github: [1]\n", "line 1, column 9: github: cannot unmarshal"},
		"strangers unjailed":  {"firecracker: {jail: false}\npools: [{name: a, image: b, public: true}]\n", "strangers' jobs need the jail"},
		"unknown driver":      {"vm: {driver: xen}\n", `vm.driver: "xen" is none of auto, firecracker, qemu`},
		"system users":        {"firecracker: {uid_first: 0}\n", "name no range of users above 999"},
		"future version":      {"schema_version: 2\n", "schema_version: 2 is not a version this flint reads"},
		"pool twice":          {"pools: [{name: a, image: b}, {name: A, image: c}]\n", `pools[1].name: "A" is used twice`},
		"no image":            {"pools: [{name: a}]\n", "pools[0].image: is missing"},
		"bad name":            {"pools: [{name: a b, image: c}]\n", "pools[0].name"},
		"bad filesystem":      {"pools: [{name: a, image: c, filesystem: fat}]\n", `pools[0].filesystem: "fat" is none of ext4, erofs`},
		"bad root":            {"pools: [{name: a, image: c, root: tape}]\n", `pools[0].root: "tape" is none of disk, memory`},
		"bad pull":            {"pools: [{name: a, image: c, pull: weekly}]\n", `pools[0].pull: "weekly" is none of missing, daily, always`},
		"max below one":       {"pools: [{name: a, image: c, max: -1}]\n", "pools[0].max: -1 is less than 1"},
		"two kernels":         {"kernel: {pack: 6.1.0, package: linux-image-6.1.0}\n", "kernel: package, vmlinuz and pack exclude"},
		"a third":             {"kernel: {vmlinuz: /v, package: linux-image-6.1.0}\n", "kernel: package, vmlinuz and pack exclude"},
		"half a kernel":       {"kernel: {modules: /lib/modules/6.1}\n", "kernel.modules: modules need their kernel"},
		"wide subnet":         {"network: {ipv4: 10.0.0.0/31}\n", "between /8 and /29"},
		"not yaml":            {"a: [", "yaml:"},
		"half a second one":   {"log_level: info\n---\na: [", "more than one YAML document"},
		"comments only":       {"# log_level: info\n", "it is empty"},
		"a list":              {"- log_level\n", "not made of keys"},
		"twice":               {"pools:\n  - {name: a, image: b, max: 1, max: 2}\n", "line 2, column 33: pools[0].max is given twice; it is in line 2 already"},
		"list of arguments":   {"pools: [{name: a, image: b, build_args: [K]}]\n", "line 1, column 41: pools[0].build_args: cannot unmarshal"},
		"argument of lists":   {"pools: [{name: a, image: b, build_args: {K: [v]}}]\n", "line 1, column 45: pools[0].build_args.K: cannot unmarshal"},
		"no time":             {"vm: {boot_timeout: 0s}\n", "vm.boot_timeout: 0s is not above zero"},
		"no CPUs":             {"host: {cpus: -3}\n", "host.cpus: -3 is below zero"},
		"more than all CPUs":  {"host: {cpus: 1}\npools: [{name: a, image: b, vm: {cpus: 8}}]\n", "pools[0].vm.cpus: 8 are more than host.cpus gives all VMs, which is 1"},
		"more than all of it": {"host: {memory: 2GiB}\npools: [{name: a, image: b}]\n", "pools[0].vm.memory: 4GiB is more than host.memory gives all VMs, which is 2GiB"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := config.Parse("flint.yaml", []byte(tt.src), nil)
			if !errors.Is(err, flint.ErrConfig) {
				t.Fatalf("error %v is not flint.ErrConfig", err)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error is\n%v\nand should contain\n%s", err, tt.want)
			}
			var fault *flint.Fault
			if !errors.As(err, &fault) || fault.Fix == "" {
				t.Fatalf("error %v has no fix", err)
			}
		})
	}
}

// TestEverythingAtOnce holds what each stage of the checks finds: keys, values, the environment, the coordinator's needs, files.
func TestEverythingAtOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "flint.yaml")
	src := `log_levle: info
github: {app_id: twelve, private_key_file: none.pem}
host: {cpus: -3}
pools:
  - {name: a, imag: x, max: lots, labels: [[b], c]}
  - {name: a, image: "not a Ref!!", vm: {cpus: 0}, tool_cache: nowhere}
  - {name: d, image: ./nowhere}
  - 7
`
	if err := os.WriteFile(file, []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := config.LoadServe(file, []string{"FLINT_VM_DRIVR=qemu", "FLINT_VM_ACCEL=warp"})
	var fault *flint.Fault
	if !errors.As(err, &fault) || fault.Code != "config.invalid" {
		t.Fatal(err)
	}
	got := strings.Split(fault.Err.Error(), "\n")
	want := []string{
		`line 1, column 1: unknown key "log_levle"; did you mean "log_level"?`,
		`line 2, column 18: github.app_id: cannot unmarshal`,
		`line 5, column 15: unknown key "imag" in pools[0]; did you mean "image"?`,
		`line 5, column 29: pools[0].max: cannot unmarshal`,
		`line 5, column 44: pools[0].labels[0]: cannot unmarshal`,
		`line 8, column 5: pools[3]: cannot unmarshal`,
		`unknown variable FLINT_VM_DRIVR; did you mean "FLINT_VM_DRIVER"?`,
		`host.cpus: -3 is below zero`,
		`vm.accel: "warp" is none of auto, kvm, tcg`,
		`pools[1].name: "a" is used twice`,
		`pools[1].vm.cpus: 0 is not between 1 and 256`,
		`github.organization: give exactly one`,
		`read the App's private key ` + filepath.Join(filepath.Dir(file), "none.pem"),
		`pools[1].image: "not a Ref!!" is neither a file or directory that is there nor the name of an image`,
		`pools[1].tool_cache: ` + filepath.Join(filepath.Dir(file), "nowhere") + ": no such file",
		`pools[2].image: ` + filepath.Join(filepath.Dir(file), "nowhere") + ": no such file",
	}
	for i := range max(len(got), len(want)) {
		switch {
		case i >= len(want):
			t.Errorf("and beyond what is wanted: %s", got[i])
		case i >= len(got):
			t.Errorf("nothing says: %s", want[i])
		case !strings.HasPrefix(got[i], want[i]):
			t.Errorf("said: %s\nwant: %s", got[i], want[i])
		}
	}
}

func TestImagesByName(t *testing.T) {
	for _, image := range []string{
		"debian", "docker.io/library/debian:12", "docker://ghcr.io/a/b_c@sha256:0123", "docker-daemon:localhost/team/x:1", "[::1]:5000/x",
		"containers-storage:x", "oci:/some where/layout:tag", "docker-archive:/x/image.tar:name:tag",
	} {
		c := config.Default()
		c.Pools = []config.Pool{config.NewPool("a", image)}
		if err := c.CheckFiles(); err != nil {
			t.Errorf("%s: %v", image, err)
		}
	}
}

// TestImageBesideTheFile: a path that is there is one whether or not it begins with a dot, wherever flint is started.
func TestImageBesideTheFile(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "images", "linux"), 0o755); err != nil {
		t.Fatal(err)
	}
	for image, want := range map[string]string{
		"images/linux":   filepath.Join(dir, "images/linux"),
		"./images/linux": filepath.Join(dir, "images/linux"),
		"images/other":   "images/other", // a registry's, as far as anybody can tell
		"debian:12":      "debian:12",
		"oci:images":     "oci:images",
	} {
		src := "schema_version: 1\ngithub: {token_file: t, organization: acme}\npools: [{name: a, image: \"" + image + "\"}]\n"
		c, err := config.Parse(filepath.Join(dir, "flint.yaml"), []byte(src), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Pools[0].Image; got != want {
			t.Errorf("%s became %s, want %s", image, got, want)
		}
	}
}

func TestKernelWithoutModules(t *testing.T) {
	c, err := config.Parse("/etc/flint/flint.yaml", []byte("kernel: {vmlinuz: vmlinux}\n"), nil)
	if err != nil || c.Kernel != (config.Kernel{Vmlinuz: "/etc/flint/vmlinux"}) {
		t.Fatalf("kernel is %+v, %v", c.Kernel, err)
	}
}

func TestEnvironmentOverridesTheFile(t *testing.T) {
	c, err := config.Parse("flint.yaml", []byte("log_level: info\n"), []string{
		"FLINT_GITHUB_APP_ID=77", "FLINT_NETWORK_IPV4=10.9.0.0/24", "FLINT_HOST_MEMORY=3GiB", "FLINT_VM_BOOT_TIMEOUT=7s", "PATH=/bin", "FLINT_TEST_FIRECRACKER_DIR=/opt", "FLINT_CONFIG=/etc/flint.yaml",
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.GitHub.AppID != 77 || c.Network.IPv4.String() != "10.9.0.0/24" || c.Host.Memory != 3*flint.GiB || c.VM.BootTimeout != 7e9 {
		t.Fatalf("overrides did not arrive: %+v", c)
	}
	if _, err := config.Parse("flint.yaml", []byte("log_level: info\n"), []string{"FLINT_GITHUB_APPID=77"}); err == nil || !strings.Contains(err.Error(), "FLINT_GITHUB_APP_ID") {
		t.Fatalf("a misspelt variable gives %v", err)
	}
}

func TestKeyFileMustBePrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "app.pem")
	key := testKey(t)
	if err := os.WriteFile(path, []byte(key), 0o644); err != nil {
		t.Fatal(err)
	}
	c := config.Default()
	c.GitHub.PrivateKeyFile = path
	if err := c.ReadSecrets(); err == nil || !strings.Contains(err.Error(), "other users can read it") {
		t.Fatalf("a world-readable key gives %v", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.ReadSecrets(); err != nil {
		t.Fatal(err)
	}
	if string(c.GitHub.PrivateKey) != strings.TrimSpace(key) || strings.Contains(c.GitHub.PrivateKey.String(), "KEY") {
		t.Fatal("the key was not read, or shows itself")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(config.Example))
	f.Add([]byte("a: &x [*x]"))
	f.Fuzz(func(t *testing.T, src []byte) {
		if _, err := config.Parse("flint.yaml", src, nil); err != nil && !errors.Is(err, flint.ErrConfig) {
			t.Fatalf("error %v is not flint.ErrConfig", err)
		}
	})
}

func TestRunnerSoftware(t *testing.T) {
	const serving = "github: {app_id: 1, organization: acme, private_key_file: key.pem}\n"
	for src, want := range map[string]string{
		"":                                                      "",
		"runner: {version: 2.335.0}":                            "",
		"runner: {releases: https://ghe/x}":                     "",
		"runner: {dir: /opt/runner}":                            "",
		"runner: {version: latest}":                             "runner.version",
		"runner: {version: 2.335}":                              "runner.version",
		"runner: {version: 2.335.0, dir: /opt/runner}":          "runner.version: is of GitHub's",
		"runner: {version: 2.335.0, in_image: auto}":            "runner.version: is of GitHub's",
		"runner: {dir: /opt/runner, in_image: auto}":            "runner.in_image",
		"pools: [{name: b, image: i, runner_version: 2.334.0}]": "",
		"pools: [{name: b, image: i, runner_version: old}]":     "pools[0].runner_version",
		"runner: {dir: /opt/runner}\npools: [{name: b, image: i, runner_version: 2.334.0}]": "pools[0].runner_version: is of GitHub's",
		"runner: {releases: api.github.com}":                                                "runner.releases",
		"runner: {releases: 'file:///etc'}":                                                 "runner.releases",
	} {
		if !strings.Contains(src, "pools:") {
			src += "\npools: [{name: a, image: b}]"
		}
		c, err := config.Parse("flint.yaml", []byte(serving+src+"\n"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err = c.ValidateServe(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", src, err)
		}
	}
}
