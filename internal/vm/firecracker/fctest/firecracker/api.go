package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	afterStart  = "The requested operation is not supported after starting the microVM."
	beforeStart = "The requested operation is not supported before starting the microVM."
)

// serve answers requests.
func (v *vmm) serve(l net.Listener) {
	_ = http.Serve(l, http.HandlerFunc(v.answer))
}

func (v *vmm) answer(w http.ResponseWriter, r *http.Request) {
	v.mu.Lock()
	defer v.mu.Unlock()
	call := r.Method + " " + r.URL.Path
	v.say("fc_api", fmt.Sprintf("The API server received a %s request on %q.", r.Method, r.URL.Path))
	switch {
	case v.o.DieAt == call:
		syscall.Exit(v.o.DieCode)
	case v.o.HangAt == call:
		select {}
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, 51200))
	var answer any
	if err == nil {
		answer, err = v.do(call, r.Method, r.URL.Path, body)
	}
	w.Header().Set("Server", "Firecracker API")
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": err.Error()})
		return
	}
	if answer == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	_ = json.NewEncoder(w).Encode(answer)
}

func (v *vmm) do(call, method, path string, body []byte) (any, error) {
	if text, ok := v.o.Answers[call]; ok {
		return nil, errors.New(text)
	}
	if call == "GET /version" {
		return map[string]string{"firecracker_version": v.o.Version}, nil
	}
	kind, id := strings.TrimPrefix(path, "/"), ""
	if at := strings.IndexByte(kind, '/'); at >= 0 {
		kind, id = kind[:at], kind[at+1:]
	}
	put, known := map[string]func(string, []byte) error{
		"logger": v.putLogger, "metrics": v.putMetrics, "machine-config": v.putMachine, "boot-source": v.putBoot, "drives": v.putDrive,
		"network-interfaces": v.putNIC, "vsock": v.putVsock, "entropy": v.putEntropy, "balloon": v.putBalloon, "actions": v.putAction,
	}[kind]
	withID := kind == "drives" || kind == "network-interfaces"
	switch {
	case method != http.MethodPut || !known || withID != (id != ""):
		return nil, fmt.Errorf("Invalid request method and/or path: %s %s.", method, strings.TrimPrefix(path, "/")) //nolint:staticcheck // its words
	case len(body) == 0:
		return nil, errors.New("Empty PUT request.") //nolint:staticcheck // its words
	case withID && !plainID(id):
		return nil, errors.New("API Resource IDs can only contain alphanumeric characters and underscores.") //nolint:staticcheck // its words
	}
	return nil, put(id, body)
}

func plainID(id string) bool {
	return !strings.ContainsFunc(id, func(r rune) bool {
		return r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	})
}

// take decodes the body of a request that is only good before the start.
func (v *vmm) take(body []byte, s shape, to any) error {
	if err := v.decode(body, s, to); err != nil {
		return err
	}
	if v.started {
		return errors.New(afterStart)
	}
	return nil
}

// openPipe opens a file or named pipe to write to, as the real one does: for both, so that it never breaks.
func openPipe(path string) (int, error) {
	return syscall.Open(path, syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
}

func (v *vmm) putLogger(_ string, body []byte) error {
	var in struct {
		Path string `json:"log_path"`
	}
	if err := v.take(body, loggerShape, &in); err != nil || in.Path == "" {
		return err
	}
	fd, err := openPipe(in.Path)
	if err != nil {
		return fmt.Errorf("Failed to open target file: %w", err) //nolint:staticcheck // its words
	}
	v.logFD = fd
	return nil
}

func (v *vmm) putMetrics(_ string, body []byte) error {
	var in struct {
		Path string `json:"metrics_path"`
	}
	if err := v.take(body, metricsShape, &in); err != nil {
		return err
	}
	if v.metricsFD >= 0 {
		return errors.New("Reinitialization of metrics not allowed.") //nolint:staticcheck // its words
	}
	fd, err := openPipe(in.Path)
	if err != nil {
		return fmt.Errorf("Failed to open target file: %w", err) //nolint:staticcheck // its words
	}
	v.metricsFD = fd
	return nil
}

func (v *vmm) putMachine(_ string, body []byte) error {
	in := machineConfig{}
	if err := v.take(body, machineShape, &in); err != nil {
		return err
	}
	switch {
	case in.CPUs < 1 || in.CPUs > 32:
		return errors.New("The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled.") //nolint:staticcheck // its words
	case in.MemoryMiB < 1:
		return errors.New("The memory size (MiB) is either 0, or not a multiple of the configured page size.") //nolint:staticcheck // its words
	}
	v.config.machine = in
	return nil
}

func (v *vmm) putBoot(_ string, body []byte) error {
	in := bootConfig{}
	if err := v.take(body, bootShape, &in); err != nil {
		return err
	}
	for _, f := range [][2]string{{"kernel", in.Kernel}, {"initrd", in.Initrd}} {
		if err := readable(f[1], os.O_RDONLY); err != nil && f[1] != "" {
			return fmt.Errorf("The %s file cannot be opened: %w", f[0], err) //nolint:staticcheck // its words
		}
	}
	if len(in.Args) > 2047 {
		return errors.New("The kernel command line is invalid: the command line is too large") //nolint:staticcheck // its words
	}
	v.config.boot = in
	return nil
}

func readable(path string, mode int) error {
	f, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func (v *vmm) putDrive(id string, body []byte) error {
	var in struct {
		ID       string `json:"drive_id"`
		Path     string `json:"path_on_host"`
		ReadOnly bool   `json:"is_read_only"`
		Cache    string `json:"cache_type"`
		Engine   string `json:"io_engine"`
	}
	if err := v.take(body, driveShape, &in); err != nil {
		return err
	}
	if in.ID != id {
		return errors.New("The id from the path does not match the id from the body!") //nolint:staticcheck // its words
	}
	if err := oneOf(in.Cache, "Unsafe", "Writeback"); err != nil {
		return err
	}
	if err := oneOf(in.Engine, "Sync", "Async"); err != nil {
		return err
	}
	mode := os.O_RDWR
	if in.ReadOnly {
		mode = os.O_RDONLY
	}
	if err := readable(in.Path, mode); err != nil {
		return fmt.Errorf("Unable to create the block device: Virtio backend error: Error manipulating the backing file: %w", err) //nolint:staticcheck // its words
	}
	return nil
}

func (v *vmm) putNIC(id string, body []byte) error {
	var in struct {
		ID  string `json:"iface_id"`
		Tap string `json:"host_dev_name"`
		MAC string `json:"guest_mac"`
	}
	if err := v.take(body, nicShape, &in); err != nil {
		return err
	}
	if in.ID != id {
		return errors.New("The id from the path does not match the id from the body!") //nolint:staticcheck // its words
	}
	if mac, err := net.ParseMAC(in.MAC); err != nil || len(mac) != 6 {
		return fmt.Errorf("%winvalid value: string %q, expected MAC address", errJSON, in.MAC)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == nil {
		var req *unix.Ifreq
		if req, err = unix.NewIfreq(in.Tap); err == nil {
			req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req) // kept open: it is the guest's
		}
	}
	if err != nil {
		return fmt.Errorf("Could not create the network device: Open tap device failed: Error while creating ifreq structure: %w. Invalid TUN/TAP Backend provided by %s. Check our documentation on setting up the network devices.", err, in.Tap) //nolint:staticcheck // its words
	}
	return nil
}

func (v *vmm) putVsock(_ string, body []byte) error {
	in := vsockConfig{}
	if err := v.take(body, vsockShape, &in); err != nil {
		return err
	}
	if in.CID < 3 {
		return fmt.Errorf("%winvalid guest_cid %d", errJSON, in.CID)
	}
	if v.vsock != nil {
		v.vsock.Close()
	}
	l, err := net.Listen("unix", in.Path)
	if err != nil {
		return fmt.Errorf("Cannot create backend for vsock device: Error binding to the host-side Unix socket: %w", err) //nolint:staticcheck // its words
	}
	v.vsock, v.config.vsock = l, in
	return nil
}

func (v *vmm) putEntropy(_ string, body []byte) error {
	return v.take(body, entropyShape, &struct{}{})
}

func (v *vmm) putBalloon(_ string, body []byte) error {
	return v.take(body, balloonShape, &struct{}{})
}

func (v *vmm) putAction(_ string, body []byte) error {
	var in struct {
		Type string `json:"action_type"`
	}
	if err := v.decode(body, actionShape, &in); err != nil {
		return err
	}
	if err := oneOf(in.Type, "FlushMetrics", "InstanceStart", "SendCtrlAltDel"); err != nil {
		return err
	}
	switch {
	case in.Type != "InstanceStart" && !v.started:
		return errors.New(beforeStart)
	case in.Type == "FlushMetrics":
		v.flush()
		return nil
	case in.Type == "SendCtrlAltDel":
		return nil
	case v.started:
		return errors.New(afterStart)
	case v.config.boot.Kernel == "":
		return errors.New("Start microvm error: Cannot start microvm without kernel configuration.") //nolint:staticcheck // its words
	}
	if v.config.machine.CPUs == 0 {
		v.config.machine = machineConfig{CPUs: 1, MemoryMiB: 128}
	}
	if err := isKernel(v.config.boot.Kernel); err != nil && runtime.GOARCH == "amd64" {
		return fmt.Errorf("Start microvm error: Cannot load kernel due to invalid memory configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel image: %w", err) //nolint:staticcheck // its words
	}
	return v.begin()
}

func absolute(path string) string {
	abs, err := filepath.Abs(path)
	if err != nil {
		return path
	}
	return abs
}
