package firecracker

import (
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"

	"flint"
	"flint/internal/vm"
)

// TestRequests has every call as it goes over the wire, in its order, for a machine with everything there is.
func TestRequests(t *testing.T) {
	s := vm.Spec{
		CPUs: 4, Memory: 2 * flint.GiB, Drives: []vm.Drive{{ID: "base", ReadOnly: true}, {ID: "more-scratch"}},
		NIC:    &vm.NIC{Name: "tap0", MAC: net.HardwareAddr{2, 0xf1, 0, 0, 0, 7}, MTU: 1400},
		Limits: vm.Limits{DiskBytes: 50 * flint.MiB, DiskOps: 1000, NetRx: flint.MiB, NetTx: 2 * flint.MiB},
	}
	v := view{prefix: "/", kernel: "/kernel", initrd: "/initrd", drives: []string{"/drive0", "/drive1"}}
	const disk = `"rate_limiter":{"bandwidth":{"size":52428800,"refill_time":1000},"ops":{"size":1000,"refill_time":1000}}`
	const want = `/logger {"log_path":"/log","level":"Info","show_level":true}
/metrics {"metrics_path":"/metrics"}
/machine-config {"vcpu_count":4,"mem_size_mib":2048,"smt":false}
/boot-source {"kernel_image_path":"/kernel","initrd_path":"/initrd","boot_args":"quiet"}
/drives/base {"drive_id":"base","path_on_host":"/drive0","is_root_device":false,"is_read_only":true,"cache_type":"Unsafe","io_engine":"Sync",` + disk + `}
/drives/more_scratch {"drive_id":"more_scratch","path_on_host":"/drive1","is_root_device":false,"is_read_only":false,"cache_type":"Unsafe","io_engine":"Sync",` + disk + `}
/network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"02:f1:00:00:00:07",MTU"rx_rate_limiter":{"bandwidth":{"size":1048576,"refill_time":1000}},"tx_rate_limiter":{"bandwidth":{"size":2097152,"refill_time":1000}}}
/vsock {"guest_cid":3,"uds_path":"/v.sock"}
/entropy {}
/balloon {"amount_mib":0,"deflate_on_oom":trueREPORTING}
/actions {"action_type":"InstanceStart"}
`
	for _, c := range []struct {
		version        flint.Version
		mtu, reporting string
	}{
		{flint.Version{1, 13, 0}, "", ""},
		{flint.Version{1, 14, 0}, "", `,"free_page_reporting":true`},
		{flint.Version{1, 16, 1}, `"mtu":1400,`, `,"free_page_reporting":true`},
		{flint.Version{2, 0, 0}, `"mtu":1400,`, `,"free_page_reporting":true`},
	} {
		var have strings.Builder
		for _, r := range requests(s, "quiet", v, c.version) {
			b, err := json.Marshal(r.body)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&have, "%s %s\n", r.path, b)
		}
		if w := strings.NewReplacer("MTU", c.mtu, "REPORTING", c.reporting).Replace(want); have.String() != w {
			t.Errorf("%s:\n%s\nwant:\n%s", c.version, have.String(), w)
		}
	}
	for _, r := range requests(vm.Spec{CPUs: 1, Memory: flint.GiB}, "", v, flint.Version{1, 16, 1}) {
		if b, _ := json.Marshal(r.body); strings.Contains(string(b), "limiter") || strings.HasPrefix(r.path, "/network") {
			t.Errorf("a machine without network and limits: %s %s", r.path, b)
		}
	}
}
