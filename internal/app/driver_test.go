package app

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"flint"
	"flint/internal/config"
	"flint/internal/doctor"
	"flint/internal/vm"
)

func kvm(state vm.KVMState) probe {
	return func(context.Context) vm.KVMStatus { return vm.KVMStatus{State: state, Reason: "as the test has it"} }
}

// among finds programs as exec.LookPath would, if those of path were all there are.
func among(path ...string) func(string) (string, error) {
	return func(name string) (string, error) {
		for _, p := range path {
			if name == p || name == filepath.Base(p) {
				return p, nil
			}
		}
		return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
	}
}

const fcPath, jailerPath = "/usr/bin/firecracker", "/usr/bin/jailer"

func TestChoose(t *testing.T) {
	configured := func(driver, accel, binary, jailer string) config.Config {
		c := config.Default()
		c.VM.Driver, c.VM.Accel, c.Firecracker.Binary, c.Firecracker.Jailer = driver, accel, binary, jailer
		return c
	}
	for name, tt := range map[string]struct {
		cfg  config.Config
		kvm  vm.KVMState
		have []string
		want choice
	}{
		"both":                       {configured("auto", "auto", "", ""), vm.KVMWorks, []string{fcPath, jailerPath}, choice{firecracker: true}},
		"no jailer":                  {configured("auto", "auto", "", ""), vm.KVMWorks, []string{fcPath}, choice{firecracker: true}},
		"named and missing":          {configured("auto", "auto", "/opt/firecracker", ""), vm.KVMWorks, nil, choice{firecracker: true}},
		"jailer named and missing":   {configured("auto", "auto", "", "/opt/jailer"), vm.KVMWorks, nil, choice{firecracker: true}},
		"nothing":                    {configured("auto", "auto", "", ""), vm.KVMWorks, nil, choice{why: "Firecracker is not installed"}},
		"no KVM":                     {configured("auto", "auto", "", ""), vm.KVMAbsent, []string{fcPath, jailerPath}, choice{why: "Firecracker needs KVM: absent: as the test has it"}},
		"KVM that does not work":     {configured("auto", "auto", fcPath, jailerPath), vm.KVMBroken, nil, choice{why: "Firecracker needs KVM: broken: as the test has it"}},
		"software is asked for":      {configured("auto", "tcg", fcPath, jailerPath), vm.KVMWorks, []string{fcPath, jailerPath}, choice{}},
		"QEMU is asked for":          {configured("qemu", "auto", fcPath, jailerPath), vm.KVMWorks, []string{fcPath, jailerPath}, choice{}},
		"Firecracker is asked for":   {configured("firecracker", "tcg", "", ""), vm.KVMAbsent, nil, choice{firecracker: true}},
		"QEMU's KVM is not only its": {configured("auto", "kvm", "", ""), vm.KVMWorks, []string{fcPath}, choice{firecracker: true}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := choose(t.Context(), tt.cfg, kvm(tt.kvm), among(tt.have...)); got != tt.want {
				t.Errorf("chose %+v, want %+v", got, tt.want)
			}
		})
	}
	inThisDirectory := func(string) (string, error) { return "firecracker", &exec.Error{Name: "firecracker", Err: exec.ErrDot} }
	if got := choose(t.Context(), config.Default(), kvm(vm.KVMWorks), inThisDirectory); !got.firecracker {
		t.Errorf("a Firecracker that PATH finds in the working directory: chose %+v", got)
	}
}

// TestTheDoctorDecidesAlike holds the doctor's verdicts to what flint does, over everything the choice depends on.
func TestTheDoctorDecidesAlike(t *testing.T) {
	for _, driver := range []string{"auto", "firecracker", "qemu"} {
		for _, accel := range []string{"auto", "kvm", "tcg"} {
			for state := vm.KVMWorks; state <= vm.KVMBroken; state++ {
				for _, have := range [][]string{nil, {fcPath}, {jailerPath}, {fcPath, jailerPath}} {
					for _, named := range [][2]string{{}, {fcPath}, {"", jailerPath}, {fcPath, jailerPath}} {
						for _, jail := range []bool{true, false} {
							c := config.Default()
							c.VM.Driver, c.VM.Accel, c.Firecracker.Jail = driver, accel, jail
							c.Firecracker.Binary, c.Firecracker.Jailer = named[0], named[1]
							alike(t, c, kvm(state), have, fmt.Sprintf("driver %s, accel %s, KVM %s, have %v, named %q, jail %v", driver, accel, state, have, named, jail))
						}
					}
				}
			}
		}
	}
}

func alike(t *testing.T, c config.Config, kvm probe, have []string, what string) {
	t.Helper()
	qemu := "/usr/bin/qemu-system-x86_64"
	look := among(append(have, qemu)...)
	found, err := doctor.Run(t.Context(), doctor.Config{
		Driver: c.VM.Driver, Accel: c.VM.Accel, Firecracker: c.Firecracker.Binary, Jailer: c.Firecracker.Jailer, NoJail: !c.Firecracker.Jail,
		ParentCgroup: "flint", ChrootBase: "/jail", StateDir: "/state",
	}, doctor.System{
		Files: programs(t, have...), Arch: "amd64", LookPath: look, KVM: kvm,
		Real:    func(path string) (string, error) { return path, nil },
		Space:   func(string) (free, total flint.Bytes, err error) { return 0, 0, errors.New("unknown") },
		Version: func(context.Context, string) (string, error) { return "v7.2.0", nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	verdicts := map[string]doctor.Verdict{}
	for _, f := range found {
		if f.ID == "qemu.binary" || strings.HasPrefix(f.ID, "firecracker.") {
			verdicts[f.ID] = f.Verdict
		}
	}
	want := choose(t.Context(), c, kvm, look)
	if qemuIsUsed := verdicts["qemu.binary"] != doctor.Skip; qemuIsUsed == want.firecracker {
		t.Errorf("%s: flint chooses %+v, the doctor says %v", what, want, verdicts)
	}
	missing := func(path, name string) bool {
		if path == "" {
			path = name
		}
		_, err := look(path)
		return err != nil
	}
	refused := want.firecracker && (missing(c.Firecracker.Binary, "firecracker") || c.Firecracker.Jail && missing(c.Firecracker.Jailer, "jailer"))
	if says := verdicts["firecracker.binary"] == doctor.Fail || verdicts["firecracker.jailer"] == doctor.Fail; says != refused {
		t.Errorf("%s: flint refuses: %v, the doctor says %v", what, refused, verdicts)
	}
}

// programs are files that look like static programs.
func programs(t *testing.T, paths ...string) fstest.MapFS {
	t.Helper()
	var program bytes.Buffer
	ident := [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)}
	head := elf.Header64{Ident: ident, Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT), Ehsize: 64, Phentsize: 56}
	if err := binary.Write(&program, binary.LittleEndian, head); err != nil {
		t.Fatal(err)
	}
	files := fstest.MapFS{}
	for _, path := range paths {
		files[strings.TrimPrefix(path, "/")] = &fstest.MapFile{Data: program.Bytes(), Mode: 0o755}
	}
	return files
}

// TestWhatIsWrongWithFirecrackerIsNotHidden opens the driver that is chosen. QEMU is nowhere, so that its own fault shows
// where it is chosen.
func TestWhatIsWrongWithFirecrackerIsNotHidden(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: the jailer does, and without it nothing else is looked at")
	}
	both := map[string]string{"firecracker": "1.16.1", "jailer": "1.16.1"}
	for name, tt := range map[string]struct {
		programs map[string]string // name → version
		named    string
		kvm      vm.KVMState
		code     string
		fix      string
		info     string
		driver   string
	}{
		"asked for, no KVM":         {both, "", vm.KVMAbsent, "firecracker.kvm", "firmware", "", "firecracker"},
		"asked for, KVM not ours":   {both, "", vm.KVMNoPermission, "firecracker.kvm", "as root", "", "firecracker"},
		"asked for, KVM is broken":  {both, "", vm.KVMBroken, "firecracker.kvm", "nested virtualisation", "", "firecracker"},
		"asked for, nothing there":  {nil, "", vm.KVMWorks, "firecracker.missing", "install firecracker", "", "firecracker"},
		"nothing":                   {nil, "", vm.KVMWorks, "qemu.missing", "apt-get", "Firecracker is not installed", "auto"},
		"no KVM":                    {map[string]string{"firecracker": "1.16.1"}, "", vm.KVMAbsent, "qemu.missing", "apt-get", "Firecracker needs KVM", "auto"},
		"no jailer":                 {map[string]string{"firecracker": "1.16.1"}, "", vm.KVMWorks, "firecracker.missing", "vm.driver: qemu", "", "auto"},
		"another jailer":            {map[string]string{"firecracker": "1.16.1", "jailer": "1.15.0"}, "", vm.KVMWorks, "firecracker.mismatch", "one release archive", "", "auto"},
		"named and missing":         {map[string]string{"jailer": "1.16.1"}, "firecracker", vm.KVMWorks, "firecracker.missing", "vm.driver: qemu", "", "auto"},
		"a name the jailer refuses": {map[string]string{"fc": "1.16.1", "jailer": "1.16.1"}, "fc", vm.KVMWorks, "firecracker.missing", "rename it", "", "auto"},
		"old":                       {map[string]string{"firecracker": "1.12.0", "jailer": "1.12.0"}, "", vm.KVMWorks, "firecracker.version", "vm.driver: qemu", "", "auto"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for program, version := range tt.programs {
				if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\necho v"+version+"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", dir)
			c := config.Default()
			c.StateDir, c.VM.Driver = t.TempDir(), tt.driver
			if tt.named != "" {
				c.Firecracker.Binary = filepath.Join(dir, tt.named)
			}
			var log strings.Builder
			a := &App{cfg: c, log: slog.New(slog.NewTextHandler(&log, nil))}
			err := a.openDriver(t.Context(), kvm(tt.kvm))
			var fault *flint.Fault
			if !errors.As(err, &fault) || fault.Code != tt.code || !strings.Contains(fault.Fix, tt.fix) {
				t.Errorf("%v, want %s with a fix that says %q; fault %+v", err, tt.code, tt.fix, fault)
			}
			if tt.driver == "firecracker" && strings.Contains(fault.Fix, "vm.driver: qemu") {
				t.Errorf("QEMU is offered to somebody who asked for Firecracker: %s", fault.Fix)
			}
			if tt.info != "" && !strings.Contains(log.String(), tt.info) {
				t.Errorf("the log does not say %q:\n%s", tt.info, log.String())
			}
		})
	}
}
