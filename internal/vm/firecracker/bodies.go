package firecracker

import (
	"fmt"
	"runtime"
	"strings"

	"flint"
	"flint/internal/vm"
)

// The bodies of the requests, field by field as Firecracker's API definition (src/firecracker/swagger/firecracker.yaml)
// has them. It refuses fields it does not know.
type (
	loggerBody struct {
		Path      string `json:"log_path"`
		Level     string `json:"level"`
		ShowLevel bool   `json:"show_level"`
	}
	metricsBody struct {
		Path string `json:"metrics_path"`
	}
	machineBody struct {
		CPUs      int   `json:"vcpu_count"`
		MemoryMiB int64 `json:"mem_size_mib"`
		SMT       bool  `json:"smt"`
	}
	bootSourceBody struct {
		Kernel string `json:"kernel_image_path"`
		Initrd string `json:"initrd_path"`
		Args   string `json:"boot_args"`
	}
	driveBody struct {
		ID       string       `json:"drive_id"`
		Path     string       `json:"path_on_host"`
		Root     bool         `json:"is_root_device"`
		ReadOnly bool         `json:"is_read_only"`
		Cache    string       `json:"cache_type"`
		IOEngine string       `json:"io_engine"`
		Limiter  *limiterBody `json:"rate_limiter,omitempty"`
	}
	nicBody struct {
		ID  string       `json:"iface_id"`
		Tap string       `json:"host_dev_name"`
		MAC string       `json:"guest_mac"`
		MTU int          `json:"mtu,omitempty"`
		Rx  *limiterBody `json:"rx_rate_limiter,omitempty"`
		Tx  *limiterBody `json:"tx_rate_limiter,omitempty"`
	}
	vsockBody struct {
		CID  uint32 `json:"guest_cid"`
		Path string `json:"uds_path"`
	}
	entropyBody struct{}
	balloonBody struct {
		AmountMiB     int  `json:"amount_mib"`
		DeflateOnOOM  bool `json:"deflate_on_oom"`
		FreeReporting bool `json:"free_page_reporting,omitempty"`
	}
	limiterBody struct {
		Bandwidth *bucketBody `json:"bandwidth,omitempty"`
		Ops       *bucketBody `json:"ops,omitempty"`
	}
	bucketBody struct {
		Size     int64 `json:"size"`
		RefillMs int64 `json:"refill_time"`
	}
	actionBody struct {
		Type string `json:"action_type"`
	}
)

// guestCID is the guest's vsock address. Every Firecracker has its own numbers, so all guests have the same.
const guestCID = 3

type request struct {
	path string
	body any
}

// requests lists what a machine is configured with, in the order of the requests; the last one starts it.
func requests(s vm.Spec, args string, v view, version flint.Version) []request {
	list := []request{
		{"/logger", loggerBody{Path: v.see(logPipe), Level: "Info", ShowLevel: true}},
		{"/metrics", metricsBody{v.see(metricsPipe)}},
		{"/machine-config", machineBody{CPUs: s.CPUs, MemoryMiB: int64(s.Memory / flint.MiB)}},
		{"/boot-source", bootSourceBody{Kernel: v.kernel, Initrd: v.initrd, Args: args}},
	}
	for i, d := range s.Drives {
		id := resourceID(d.ID)
		list = append(list, request{"/drives/" + id, driveBody{
			ID: id, Path: v.drives[i], ReadOnly: d.ReadOnly,
			// The disk is thrown away with the VM, so nothing needs to be flushed; and the asynchronous engine makes
			// every device take long to begin.
			Cache: "Unsafe", IOEngine: "Sync", Limiter: limiter(int64(s.Limits.DiskBytes), s.Limits.DiskOps),
		}})
	}
	if s.NIC != nil {
		nic := nicBody{
			ID: "eth0", Tap: s.NIC.Name, MAC: s.NIC.MAC.String(),
			Rx: limiter(int64(s.Limits.NetRx), 0), Tx: limiter(int64(s.Limits.NetTx), 0),
		}
		if atLeast(version, mtuMinor) {
			nic.MTU = s.NIC.MTU
		}
		list = append(list, request{"/network-interfaces/eth0", nic})
	}
	return append(
		list,
		request{"/vsock", vsockBody{guestCID, v.see(vsockSocket)}},
		request{"/entropy", entropyBody{}},
		request{"/balloon", balloonBody{DeflateOnOOM: true, FreeReporting: atLeast(version, reportingMinor)}},
		request{"/actions", actionBody{"InstanceStart"}},
	)
}

// resourceID makes an ID of the API, which has no hyphen, of one of ours, which has no underscore.
func resourceID(id string) string { return strings.ReplaceAll(id, "-", "_") }

// limiter makes a rate limiter that holds a second's worth, or nil.
func limiter(bytes, ops int64) *limiterBody {
	bucket := func(rate int64) *bucketBody {
		if rate <= 0 {
			return nil
		}
		return &bucketBody{Size: rate, RefillMs: 1000}
	}
	if bytes <= 0 && ops <= 0 {
		return nil
	}
	return &limiterBody{Bandwidth: bucket(bytes), Ops: bucket(ops)}
}

// maxKernelArgs leaves room for what Firecracker adds to the 2048 bytes an x86 kernel takes: a description of each of
// at most a dozen devices.
const maxKernelArgs = 1500

// kernelArgs returns the guest kernel's command line: the driver's own arguments, then the spec's. They replace
// Firecracker's own, of which `nomodule` would leave the agent without its modules.
func kernelArgs(s vm.Spec, serial bool) (string, error) {
	a := []string{"reboot=k", "panic=1"}
	if serial {
		a = append(a, "console=ttyS0", "8250.nr_uarts=1")
	} else {
		a = append(a, "8250.nr_uarts=0")
	}
	if runtime.GOARCH == "amd64" {
		a = append(a, "i8042.noaux", "i8042.nomux", "i8042.dumbkbd")
	}
	a = append(a, "swiotlb=noforce", "random.trust_cpu=on", "quiet", "loglevel=3", "cryptomgr.notests",
		"flint.channel=vsock", vm.DrivesArg(s.Drives))
	line := strings.Join(append(a, s.Args...), " ")
	if len(line) > maxKernelArgs {
		return "", fmt.Errorf("kernel arguments are %d bytes long: at most %d are possible", len(line), maxKernelArgs)
	}
	return line, nil
}
