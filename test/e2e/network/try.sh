#!/bin/sh
# Asks the kernel for what docker, k3s, WireGuard and nftables ask of it, and says what it refuses. KINDS names the kinds of iptables; both without it.
failed=0
try() {
	if ! out=$("$@" 2>&1 </dev/null); then
		failed=1
		echo "refused: $*: $out"
	fi
}

for fs in overlay ext4 erofs squashfs fuse tmpfs vfat iso9660; do
	# Asking for it loads its module.
	grep -qw "$fs" /proc/filesystems || mount -t "$fs" nothing /mnt 2>/dev/null || grep -qw "$fs" /proc/filesystems ||
		{ failed=1 && echo "no file system $fs"; }
done
for c in cpu cpuset io memory pids hugetlb; do
	grep -qw "$c" /sys/fs/cgroup/cgroup.controllers || { failed=1 && echo "no cgroup controller $c"; }
done
ls /dev/net/tun /dev/fuse /dev/loop-control >/dev/null || failed=1
try unshare --user --map-root-user --mount --uts --ipc --net --cgroup --time --pid --fork true
case $(ip -o link show | cut -d: -f2 | tr -d '\n ') in
loeth0) ;;
*) failed=1 && ip -br link show ;;
esac

try ip link add br0 type bridge vlan_filtering 1
try ip link add v0 type veth peer name v1
try ip link set v0 master br0
try ip link add vx0 type vxlan id 7 dstport 8472 local 127.0.0.1
try ip link add mv0 link v1 type macvlan mode bridge
try ip link add link v1 name vl7 type vlan id 7
try ip link add v2 type veth peer name v3
try ip link add iv0 link v3 type ipvlan mode l2
try ip link add d0 type dummy
try ip link add wg0 type wireguard
try ip link add ifb7 type ifb
try ip tuntap add tap7 mode tap
try tc qdisc add dev v1 root netem delay 1ms
try tc qdisc add dev v2 clsact
try tc filter add dev v2 ingress bpf bytecode '1,6 0 0 4294967295,' flowid 1:1
try tc actions add action bpf bytecode '1,6 0 0 4294967295,'
try mount -t bpf bpf /sys/fs/bpf
try bpftool map create /sys/fs/bpf/m type hash key 4 value 4 entries 8 name m
try ip rule add fwmark 1 lookup 100
try ip xfrm state add src 10.0.0.1 dst 10.0.0.2 proto esp spi 1 aead 'rfc4106(gcm(aes))' 0x0102030405060708090a0b0c0d0e0f1011121314 128

cat >/tmp/rules.nft <<'N'
table inet t {
	set nets { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 } }
	map ports { type inet_service : ipv4_addr . inet_service; elements = { 80 : 10.0.0.1 . 8080 } }
	chain pre {
		type nat hook prerouting priority -100
		fib daddr type local counter
		dnat ip to tcp dport map @ports
		tcp dport 81 redirect to :8081
	}
	chain post {
		type nat hook postrouting priority 100
		ip saddr @nets masquerade
	}
	chain in {
		type filter hook input priority 0
		ct state established,related accept
		meta mark set numgen random mod 2
		limit rate 1/second log prefix "x" accept
		reject with icmpx type admin-prohibited
	}
}
table bridge b {
	chain f {
		type filter hook input priority 0
		ether type ip reject
	}
}
table netdev n {
	chain i {
		type filter hook ingress device v0 priority 0
		drop
	}
}
N
try nft -f /tmp/rules.nft
try nft flush ruleset
try ipset create s hash:ip,port
for t in iptables ip6tables; do
	for kind in ${KINDS:-nft legacy}; do
		for table in filter nat mangle raw; do
			try $t-$kind -t $table -N TRY
		done
		try $t-$kind -t nat -A TRY -m comment --comment try -m addrtype --dst-type LOCAL -m conntrack --ctstate NEW -j RETURN
		try $t-$kind -t nat -A POSTROUTING -j MASQUERADE
		try $t-$kind -t nat -A TRY -p tcp -m multiport --dports 80,81 -j REDIRECT --to-ports 8080
		try $t-$kind -t nat -A TRY -m statistic --mode random --probability 0.5 -j RETURN
		try $t-$kind -t mangle -A TRY -m mark --mark 1/1 -j CONNMARK --save-mark
		try $t-$kind -t raw -A TRY -m physdev --physdev-is-bridged -j NOTRACK
		try $t-$kind -t filter -A TRY -m limit --limit 1/s -j NFLOG --nflog-group 1
		try $t-$kind -t filter -A TRY -m ipvs --ipvs -m recent --set -j REJECT
	done
done
try iptables-nft -t filter -A TRY -m set --match-set s src,dst -j RETURN
try test -e /proc/sys/net/bridge/bridge-nf-call-iptables
[ $failed = 0 ] && echo "the kernel has all that was asked for"
exit $failed
