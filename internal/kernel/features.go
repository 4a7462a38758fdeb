package kernel

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"flint"
)

// wanted lists the kernel options that docker, nftables and bridged networks want, in groups a person can search for:
// docker's contrib/check-config.sh; what `nft` needs to take an ordinary ruleset; what iptables-nft translates to. Of
// alternatives, separated by |, one is enough; the first is the name reported.
const wanted = `
NAMESPACES NET_NS PID_NS IPC_NS UTS_NS USER_NS
CGROUPS CGROUP_CPUACCT CGROUP_DEVICE CGROUP_FREEZER CGROUP_SCHED CGROUP_PIDS CGROUP_BPF CPUSETS MEMCG BLK_CGROUP
FAIR_GROUP_SCHED CFS_BANDWIDTH
KEYS SECCOMP SECCOMP_FILTER POSIX_MQUEUE OVERLAY_FS EXT4_FS TMPFS DEVTMPFS FUSE_FS UNIX98_PTYS
VETH BRIDGE BRIDGE_NETFILTER BRIDGE_VLAN_FILTERING TUN DUMMY VXLAN MACVLAN IPVLAN IPV6
NF_CONNTRACK NF_NAT NF_CT_NETLINK
IP_NF_FILTER|NFT_COMPAT IP_NF_MANGLE|NFT_COMPAT IP_NF_NAT|NFT_COMPAT IP_NF_RAW|NFT_COMPAT IP_NF_TARGET_MASQUERADE|NETFILTER_XT_TARGET_MASQUERADE
IP6_NF_FILTER|NFT_COMPAT IP6_NF_MANGLE|NFT_COMPAT IP6_NF_NAT|NFT_COMPAT IP6_NF_RAW|NFT_COMPAT IP6_NF_TARGET_MASQUERADE|NETFILTER_XT_TARGET_MASQUERADE
NETFILTER_XT_MATCH_ADDRTYPE NETFILTER_XT_MATCH_CONNTRACK NETFILTER_XT_MATCH_COMMENT NETFILTER_XT_MATCH_MULTIPORT
NETFILTER_XT_MARK NETFILTER_XT_NAT NETFILTER_XT_TARGET_REDIRECT
IP_VS NETFILTER_XT_MATCH_IPVS
NF_TABLES NF_TABLES_INET NF_TABLES_IPV4 NF_TABLES_IPV6 NFT_COMPAT NFT_CT NFT_NAT NFT_MASQ NFT_REDIR NFT_REJECT
NFT_LIMIT NFT_LOG NFT_FIB_INET
VIRTIO_MMIO VIRTIO_BLK VIRTIO_NET VIRTIO_CONSOLE VIRTIO_VSOCKETS HW_RANDOM_VIRTIO
MODULES MODULE_UNLOAD BPF_SYSCALL ACPI|OF VIRTIO_MMIO_CMDLINE_DEVICES|ACPI|OF SERIAL_8250_CONSOLE|SERIAL_AMBA_PL011_CONSOLE
BLK_DEV_INITRD
`

// Options that a caller's Source.Needs may name beside those of wanted.
const (
	// NeedsPVH is the entry point by which QEMU boots an ELF.
	NeedsPVH = "PVH"
	// NeedsACPI is how QEMU's machines tell an x86-64 guest of its devices. A device tree is as good.
	NeedsACPI = "ACPI"
	// NeedsSerial and NeedsVsock are the ways to the agent.
	NeedsSerial = "VIRTIO_CONSOLE"
	NeedsVsock  = "VIRTIO_VSOCKETS"
)

// essential lists the options, as wanted names them, without which no guest of flint's gets as far as its agent. Of a kernel with
// modules, the boot set answers for them.
const essential = `
BLK_DEV_INITRD VIRTIO_MMIO VIRTIO_MMIO_CMDLINE_DEVICES VIRTIO_BLK VIRTIO_NET EXT4_FS OVERLAY_FS TMPFS DEVTMPFS
`

// lacks refuses a kernel that cannot boot a guest, where what it has is known.
func (e *entry) lacks(needs []string) error {
	if e.Monolithic {
		needs = slices.Concat(strings.Fields(essential), needs)
	}
	needs = slices.DeleteFunc(slices.Compact(slices.Sorted(slices.Values(needs))), func(n string) bool { return !slices.Contains(e.Missing, n) })
	if len(needs) == 0 {
		return nil
	}
	return &flint.Fault{
		Code: "kernel.lacks", What: "boot kernel " + e.Version + " from " + e.From, Kind: flint.ErrConfig,
		Err: errors.New("it was built without what a guest needs: CONFIG_" + strings.Join(needs, ", CONFIG_")),
		Fix: "give its modules, too, if it has any (kernel.modules), or another kernel: `make kernel` builds one that has all",
	}
}

// embeddedConfig returns the configuration that a kernel built with CONFIG_IKCONFIG carries after a mark (the kernel's
// kernel/configs.c), or nil.
func embeddedConfig(kernel []byte) []byte {
	for {
		_, rest, ok := bytes.Cut(kernel, []byte("IKCFG_ST"))
		if !ok {
			return nil
		}
		kernel = rest
		if compression(rest) != "gzip" {
			continue
		}
		if config, err := decompress(rest, maxConfig); err == nil {
			return config
		}
	}
}

// missingDrivers names the virtio drivers that a monolithic kernel of unknown configuration cannot have, because the name
// under which it would register them is nowhere in it.
func missingDrivers(kernel []byte) []string {
	var missing []string
	for _, d := range []struct{ option, name string }{
		{"VIRTIO_MMIO", "virtio-mmio"},
		{"VIRTIO_BLK", "virtio_blk"},
		{"VIRTIO_NET", "virtio_net"},
		{"VIRTIO_CONSOLE", "virtio_console"},
		{"VIRTIO_VSOCKETS", "vmw_vsock_virtio_transport"},
	} {
		if !bytes.Contains(kernel, []byte(d.name+"\x00")) {
			missing = append(missing, d.option)
		}
	}
	return missing
}

// missingOptions names what of the wanted a kernel configuration does not have, as it calls it less the CONFIG_. Of a
// monolithic kernel only what is built in counts, and it need not be able to load modules.
func missingOptions(config []byte, monolithic bool) []string {
	have := map[string]bool{"MODULES": monolithic, "MODULE_UNLOAD": monolithic}
	for line := range strings.Lines(string(config)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if name, is := strings.CutPrefix(name, "CONFIG_"); ok && is && (value == "y" || value == "m" && !monolithic) {
			have[name] = true
		}
	}
	var missing []string
	for option := range strings.FieldsSeq(wanted) {
		found := false
		names := strings.Split(option, "|")
		for _, n := range names {
			found = found || have[n]
		}
		if !found {
			missing = append(missing, names[0])
		}
	}
	return missing
}
