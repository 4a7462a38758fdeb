package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"flint"
	"flint/internal/config"
	"flint/internal/doctor"
)

// doctorFile writes a configuration that no machine is fit for.
func doctorFile(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "flint.yaml")
	content := "vm: {driver: firecracker}\nfirecracker: {binary: ./nowhere/firecracker, jailer: ./nowhere/jailer, jail: false}\n" +
		"pools: [{name: a, image: ./image, vm: {memory: 1GiB}}]\n"
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestDoctorFails(t *testing.T) {
	file := doctorFile(t)
	code, stdout, stderr := flintCommand("doctor", "-c", file)
	if code != exitChecks || stderr != "" {
		t.Errorf("exit %d, want %d; stderr %q", code, exitChecks, stderr)
	}
	if !strings.Contains(stdout, "FAIL firecracker.binary   "+filepath.Dir(file)+"/nowhere/firecracker") || !strings.Contains(stdout, "\n"+strings.Repeat(" ", 26)+"fix: install firecracker") {
		t.Errorf("printed:\n%s", stdout)
	}

	code, stdout, _ = flintCommand("doctor", "--json", "-c", file)
	var found []doctor.Finding
	dec := json.NewDecoder(strings.NewReader(stdout))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&found); err != nil {
		t.Fatalf("%v in\n%s", err, stdout)
	}
	if len(found) != len(doctor.IDs()) || code != exitChecks {
		t.Errorf("exit %d and %d findings, want %d and %d", code, len(found), exitChecks, len(doctor.IDs()))
	}
}

func TestDoctorReadsTheConfiguration(t *testing.T) {
	if code, stdout, stderr := flintCommand("doctor", "-c", filepath.Join(t.TempDir(), "none.yaml")); code != exitNotFound || stdout != "" {
		t.Errorf("a file that is named and missing: exit %d, %s%s", code, stdout, stderr)
	}
	missing := filepath.Join(t.TempDir(), "flint.yaml")
	if _, source, err := doctorConfig(newDoctor(), missing); err != nil || source != "the defaults, as there is no "+missing {
		t.Errorf("no file at the default path: %q, %v", source, err)
	}
	file := doctorFile(t)
	cfg, _, err := doctorConfig(newDoctor(), file)
	if err != nil {
		t.Fatal(err)
	}
	d := examined(t.Context(), cfg)
	if d.Dockerfile {
		t.Error("there is no Dockerfile yet")
	}
	if err := os.MkdirAll(filepath.Join(filepath.Dir(file), "image"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(file), "image", "Dockerfile"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	d = examined(t.Context(), cfg)
	if !d.Dockerfile || !d.NoJail || d.Monolithic || d.ChrootBase != config.Default().StateDir+"/jail" || d.Memory == 0 || d.QEMUOverhead == (flint.Overhead{}) || d.FirecrackerOverhead.Share == 0 || len(d.Pools) != 1 {
		t.Errorf("examined %+v", d)
	}
}

func TestFindingsAreAlignedAndPrintable(t *testing.T) {
	var b bytes.Buffer
	showFindings(&b, "f.yaml", []doctor.Finding{
		{ID: "smt", Verdict: doctor.Pass, Text: "off"},
		{ID: "a.longer.id", Verdict: doctor.Fail, Text: "it says\n\x1b[31mred", Fix: "mend it"},
	})
	want := "this machine against f.yaml\n" +
		"PASS smt          off\n" +
		"FAIL a.longer.id  it says [31mred\n" +
		"                  fix: mend it\n" +
		"1 passed, 0 to look at, 1 failed, 0 skipped\n"
	if b.String() != want {
		t.Errorf("printed:\n%swant:\n%s", b.String(), want)
	}
}

func TestTheReferenceListsEveryCheck(t *testing.T) {
	page, err := os.ReadFile("../../docs/reference.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range doctor.IDs() {
		if !strings.Contains(string(page), "| `"+id+"` |") {
			t.Errorf("docs/reference.md lacks %s", id)
		}
	}
}

// TestTheProductionGuideNamesTheChecks holds the guide to the doctor: whatever concerns a host for Firecracker is in its
// table, and nothing that does not exist.
func TestTheProductionGuideNamesTheChecks(t *testing.T) {
	page, err := os.ReadFile("../../docs/production-host.md")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for line := range strings.Lines(string(page)) {
		if cells := strings.Split(line, "|"); len(cells) == 4 && strings.HasPrefix(cells[2], " `") {
			for id := range strings.SplitSeq(cells[2], ",") {
				named[strings.Trim(id, " `")] = true
			}
		}
	}
	elsewhere := []string{"qemu.binary", "depmod", "builder", "kernel.pack", "runner.age", "net.forwarding", "net.uplink", "net.dns"}
	for _, id := range doctor.IDs() {
		if named[id] == slices.Contains(elsewhere, id) {
			t.Errorf("%s: named in docs/production-host.md: %v", id, named[id])
		}
		delete(named, id)
	}
	if len(named) > 0 {
		t.Errorf("docs/production-host.md names checks that do not exist: %v", named)
	}
}
