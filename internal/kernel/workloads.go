package kernel

import (
	"slices"
	"strings"
)

// Workload says whether a kernel has what one kind of work in jobs asks of it. Options are named less their CONFIG_.
type Workload struct {
	Name    string `json:"name"`
	Verdict string `json:"verdict"` // one of the constants below
	// Lacks are options without which it does not work, Without those that only some of it needs.
	Lacks   []string `json:"lacks,omitempty"`
	Without []string `json:"without,omitempty"`
	Unknown []string `json:"unknown,omitempty"` // of either, options of which it cannot be told
}

// The verdicts on a workload.
const (
	Works   = "yes"
	Partly  = "partly"  // it works, but for what needs the options of Without
	Fails   = "no"      // it does not work for want of the options of Lacks
	Unknown = "unknown" // the kernel's configuration is not known, and its modules do not tell
)

// bootWork is the workload that every guest is.
const bootWork = "boot"

// asks is what one kind of work asks of a kernel. Options are separated by white space. Of alternatives, separated by |, one
// is enough; the first is the name reported. What follows an option's colon is the module it is in where it is not built in.
type asks struct{ name, needs, likes string }

// workloads is what jobs run that asks a kernel for more than any program does. What docker and k3s ask for is in
// contrib/check-config.sh of moby and contrib/util/check-config.sh of k3s; both may use nftables instead of the old tables.
// What kind asks for is what kube-proxy and kindnet do; WireGuard's is wg-quick's; BPF's is in the requirements of Cilium, bcc
// and bpftrace.
func workloads() []asks {
	const containers = `
NAMESPACES NET_NS PID_NS IPC_NS UTS_NS
CGROUPS CGROUP_CPUACCT CGROUP_DEVICE CGROUP_FREEZER CGROUP_SCHED CGROUP_PIDS CGROUP_BPF CPUSETS MEMCG
KEYS POSIX_MQUEUE OVERLAY_FS:overlay EXT4_FS:ext4 VETH:veth BRIDGE:bridge BRIDGE_NETFILTER:br_netfilter IPV6:ipv6
NF_CONNTRACK:nf_conntrack NF_NAT:nf_nat NF_CT_NETLINK:nf_conntrack_netlink
IP_NF_FILTER:iptable_filter|NFT_COMPAT:nft_compat IP_NF_MANGLE:iptable_mangle|NFT_COMPAT:nft_compat
IP_NF_NAT:iptable_nat|NFT_COMPAT:nft_compat IP_NF_RAW:iptable_raw|NFT_COMPAT:nft_compat
IP_NF_TARGET_MASQUERADE|NETFILTER_XT_TARGET_MASQUERADE:xt_MASQUERADE
IP6_NF_FILTER:ip6table_filter|NFT_COMPAT:nft_compat IP6_NF_MANGLE:ip6table_mangle|NFT_COMPAT:nft_compat
IP6_NF_NAT:ip6table_nat|NFT_COMPAT:nft_compat IP6_NF_RAW:ip6table_raw|NFT_COMPAT:nft_compat
IP6_NF_TARGET_MASQUERADE|NETFILTER_XT_TARGET_MASQUERADE:xt_MASQUERADE
NETFILTER_XT_MATCH_ADDRTYPE:xt_addrtype NETFILTER_XT_MATCH_CONNTRACK:xt_conntrack NETFILTER_XT_MARK:xt_mark
NETFILTER_XT_NAT:xt_nat NETFILTER_XT_TARGET_REDIRECT:xt_REDIRECT NETFILTER_XT_MATCH_IPVS:xt_ipvs
`
	const kubernetes = containers + `
SECCOMP SECCOMP_FILTER CFS_BANDWIDTH FAIR_GROUP_SCHED
NETFILTER_XT_MATCH_COMMENT:xt_comment NETFILTER_XT_MATCH_MULTIPORT:xt_multiport NETFILTER_XT_MATCH_STATISTIC:xt_statistic
IP_NF_TARGET_REJECT:ipt_REJECT
`
	const services = `
USER_NS BLK_CGROUP CGROUP_HUGETLB IP_VS:ip_vs IP_VS_NFCT IP_VS_PROTO_TCP IP_VS_PROTO_UDP IP_VS_RR:ip_vs_rr
IP_SET:ip_set NETFILTER_XT_SET:xt_set NETFILTER_XT_MATCH_NFACCT:xt_nfacct NETFILTER_NETLINK_QUEUE:nfnetlink_queue NFT_QUEUE:nft_queue
NFT_NUMGEN:nft_numgen
`
	return []asks{
		{bootWork, `
VIRTIO_MMIO:virtio_mmio VIRTIO_BLK:virtio_blk VIRTIO_NET:virtio_net VIRTIO_CONSOLE:virtio_console
VIRTIO_VSOCKETS:vmw_vsock_virtio_transport HW_RANDOM_VIRTIO:virtio_rng EXT4_FS:ext4 OVERLAY_FS:overlay
TMPFS DEVTMPFS UNIX98_PTYS MODULES MODULE_UNLOAD ACPI|OF VIRTIO_MMIO_CMDLINE_DEVICES|ACPI|OF
SERIAL_8250_CONSOLE|SERIAL_AMBA_PL011_CONSOLE BLK_DEV_INITRD
`, ""},
		{"docker", containers, `
USER_NS SECCOMP SECCOMP_FILTER BLK_CGROUP BLK_DEV_THROTTLING CGROUP_PERF CGROUP_HUGETLB CFS_BANDWIDTH FAIR_GROUP_SCHED
EXT4_FS_POSIX_ACL EXT4_FS_SECURITY FUSE_FS:fuse TUN:tun SECURITY_APPARMOR|SECURITY_SELINUX
NETFILTER_XT_MATCH_COMMENT:xt_comment NETFILTER_XT_MATCH_MULTIPORT:xt_multiport NETFILTER_XT_MATCH_BPF:xt_bpf
IP_VS:ip_vs IP_VS_NFCT IP_VS_PROTO_TCP IP_VS_PROTO_UDP IP_VS_RR:ip_vs_rr
VXLAN:vxlan BRIDGE_VLAN_FILTERING MACVLAN:macvlan IPVLAN:ipvlan DUMMY:dummy
XFRM_USER:xfrm_user INET_ESP:esp4 CRYPTO_GCM:gcm CRYPTO_SEQIV:seqiv
NF_CONNTRACK_FTP:nf_conntrack_ftp NF_NAT_FTP:nf_nat_ftp NF_CONNTRACK_TFTP:nf_conntrack_tftp NF_NAT_TFTP:nf_nat_tftp
`},
		{"k3s", kubernetes + "VXLAN:vxlan", services + "WIREGUARD:wireguard"},
		{"kind", kubernetes, services + "FUSE_FS:fuse"},
		{"nftables", `
NF_TABLES:nf_tables NF_TABLES_INET NF_TABLES_IPV4 NF_TABLES_IPV6 NFT_COMPAT:nft_compat NFT_CT:nft_ct NFT_NAT:nft_nat
NFT_MASQ:nft_masq NFT_REDIR:nft_redir NFT_REJECT:nft_reject NFT_LIMIT:nft_limit NFT_LOG:nft_log NFT_FIB_INET:nft_fib_inet
`, `
NF_TABLES_NETDEV NF_TABLES_BRIDGE NFT_BRIDGE_REJECT:nft_reject_bridge NFT_NUMGEN:nft_numgen NFT_HASH:nft_hash NFT_QUEUE:nft_queue
NFT_QUOTA:nft_quota NFT_CONNLIMIT:nft_connlimit NFT_SOCKET:nft_socket NFT_TPROXY:nft_tproxy NFT_SYNPROXY:nft_synproxy
NFT_TUNNEL:nft_tunnel NFT_FLOW_OFFLOAD:nft_flow_offload
`},
		{"wireguard", `
WIREGUARD:wireguard IP_MULTIPLE_TABLES IPV6_MULTIPLE_TABLES
`, `
NF_TABLES:nf_tables NFT_CT:nft_ct NFT_FIB_INET:nft_fib_inet NETFILTER_XT_CONNMARK:xt_connmark
`},
		{"bpf", `
BPF_SYSCALL BPF_JIT CGROUP_BPF NET_CLS_ACT NET_SCH_INGRESS:sch_ingress NET_CLS_BPF:cls_bpf NET_ACT_BPF:act_bpf
`, `
BPF_STREAM_PARSER LWTUNNEL_BPF XDP_SOCKETS BPF_LSM PERF_EVENTS BPF_EVENTS KPROBES KPROBE_EVENTS UPROBES UPROBE_EVENTS
FUNCTION_TRACER FTRACE_SYSCALLS DEBUG_INFO_BTF
`},
	}
}

// facts is what is known of the options of a kernel.
type facts struct {
	config     map[string]string // y or m, by option; nil: not known
	modules    map[string]bool   // those it has, by name, and those built into it; nil: not known, or it has none
	absent     []string          // options it is known to lack whatever else is not known
	monolithic bool
}

// readConfig reads a kernel's configuration.
func readConfig(b []byte) map[string]string {
	config := map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if name, is := strings.CutPrefix(name, "CONFIG_"); ok && is && (value == "y" || value == "m") {
			config[name] = value
		}
	}
	return config
}

// has reports whether the kernel has an option, where that is known. One that is a module counts only where that module is there:
// distributions keep some in packages of their own.
func (f facts) has(option string) (has, known bool) {
	option, module, named := strings.Cut(option, ":")
	switch {
	case slices.Contains(f.absent, option):
		return false, true
	case f.monolithic && (option == "MODULES" || option == "MODULE_UNLOAD"):
		return true, true // it need not load any
	case f.config != nil:
		value := f.config[option]
		there := !named || f.modules == nil || f.modules[module]
		return value == "y" || value == "m" && !f.monolithic && there, true
	case named && f.modules != nil:
		return f.modules[module], true
	}
	return false, false
}

// report says of each workload whether the kernel has what it asks for.
func (f facts) report() []Workload {
	var all []Workload
	for _, a := range workloads() {
		w := Workload{Name: a.name}
		var unsure bool
		w.Lacks, unsure = f.missing(a.needs, &w.Unknown)
		w.Without, _ = f.missing(a.likes, &w.Unknown)
		switch {
		case len(w.Lacks) > 0:
			w.Verdict = Fails
		case unsure:
			w.Verdict = Unknown
		case len(w.Without) > 0:
			w.Verdict = Partly
		default:
			w.Verdict = Works
		}
		all = append(all, w)
	}
	return all
}

// missing names the options of a list that the kernel lacks; those of which that is not known are added to unknown.
func (f facts) missing(options string, unknown *[]string) (missing []string, unsure bool) {
	for option := range strings.FieldsSeq(options) {
		names := strings.Split(option, "|")
		found, sure := false, true
		for _, n := range names {
			has, known := f.has(n)
			found, sure = found || has, sure && known
		}
		name, _, _ := strings.Cut(names[0], ":")
		switch {
		case found:
		case sure:
			missing = append(missing, name)
		default:
			unsure = true
			*unknown = append(*unknown, name)
		}
	}
	return missing, unsure
}

// lacked names, once each, the options that some workload cannot do without and the kernel lacks.
func lacked(report []Workload) []string {
	var all []string
	for _, w := range report {
		for _, option := range w.Lacks {
			if !slices.Contains(all, option) {
				all = append(all, option)
			}
		}
	}
	return all
}
