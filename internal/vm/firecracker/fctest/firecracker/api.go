package main

import (
	"encoding/json"
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

// words are a refusal as the real one words it: sentences, which errors of ours are not.
type words string

// Error returns the words.
func (w words) Error() string { return string(w) }

func wordsf(format string, args ...any) error { return words(fmt.Sprintf(format, args...)) }

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
		return nil, words(text)
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
		return nil, wordsf("Invalid request method and/or path: %s %s.", method, strings.TrimPrefix(path, "/"))
	case len(body) == 0:
		return nil, words("Empty PUT request.")
	case withID && !plainID(id):
		return nil, words("API Resource IDs can only contain alphanumeric characters and underscores.")
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
		return words(afterStart)
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
		return wordsf("Failed to open target file: %v", err)
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
		return words("Reinitialization of metrics not allowed.")
	}
	fd, err := openPipe(in.Path)
	if err != nil {
		return wordsf("Failed to open target file: %v", err)
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
		return words("The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled.")
	case in.MemoryMiB < 1:
		return words("The memory size (MiB) is either 0, or not a multiple of the configured page size.")
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
			return wordsf("The %s file cannot be opened: %v", f[0], err)
		}
	}
	if len(in.Args) > 2047 {
		return words("The kernel command line is invalid: the command line is too large")
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
		return words("The id from the path does not match the id from the body!")
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
		return wordsf("Unable to create the block device: Virtio backend error: Error manipulating the backing file: %v", err)
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
		return words("The id from the path does not match the id from the body!")
	}
	if mac, err := net.ParseMAC(in.MAC); err != nil || len(mac) != 6 {
		return wordsf(errJSON+"invalid value: string %q, expected MAC address", in.MAC)
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
		return wordsf("Could not create the network device: Open tap device failed: Error while creating ifreq structure: %v. Invalid TUN/TAP Backend provided by %s. Check our documentation on setting up the network devices.", err, in.Tap)
	}
	return nil
}

func (v *vmm) putVsock(_ string, body []byte) error {
	in := vsockConfig{}
	if err := v.take(body, vsockShape, &in); err != nil {
		return err
	}
	if in.CID < 3 {
		return wordsf(errJSON+"invalid guest_cid %d", in.CID)
	}
	if v.vsock != nil {
		v.vsock.Close()
	}
	l, err := net.Listen("unix", in.Path)
	if err != nil {
		return wordsf("Cannot create backend for vsock device: Error binding to the host-side Unix socket: %v", err)
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
		return words(beforeStart)
	case in.Type == "FlushMetrics":
		v.flush()
		return nil
	case in.Type == "SendCtrlAltDel":
		return nil
	case v.started:
		return words(afterStart)
	case v.config.boot.Kernel == "":
		return words("Start microvm error: Cannot start microvm without kernel configuration.")
	}
	if v.config.machine.CPUs == 0 {
		v.config.machine = machineConfig{CPUs: 1, MemoryMiB: 128}
	}
	if err := isKernel(v.config.boot.Kernel); err != nil && runtime.GOARCH == "amd64" {
		return wordsf("Start microvm error: Cannot load kernel due to invalid memory configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel image: %v", err)
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
