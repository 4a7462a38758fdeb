#!/bin/sh
# Makes the root image and the kernel of the KVM host: image.sh DIRECTORY. Runs as root, because the files of a root file
# system belong to root. What is cached under build/kvmhost is named by a hash of this file: edit it, and the next run makes a new one.
set -eu
out=$1

# Bookworm, whatever Debian or Ubuntu this machine runs: its cloud kernel has NVMe and ext4 built in, so that the host needs
# no initramfs, and what was tried here stays what is run.
suite=bookworm
kernel=linux-image-cloud-amd64
packages="$kernel
	systemd-sysv dbus udev kmod procps
	iproute2 nftables ca-certificates curl
	e2fsprogs qemu-system-x86"

root=
trap 'rm -rf --one-file-system "$root"' EXIT
debian() {
	rm -rf --one-file-system "$root"
	root=$(mktemp -d "$out/root.XXXXXX") || return # set -e does not hold before ||, and without a name it would be this machine's /boot
	mmdebstrap --quiet --mode=root --variant=minbase \
		--include="$(echo $packages | tr ' ' ,)" \
		--aptopt='APT::Install-Recommends "false"' \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		"$suite" "$root"
}
debian || { sleep 30; debian; } # a mirror that changes in the middle gives what does not fit

cp "$root"/boot/vmlinuz-* "$out/vmlinuz"
find "$root/boot" -type f ! -name "vmlinuz-*" ! -name "config-*" -delete
echo kvmhost >"$root/etc/hostname"
printf '127.0.0.1 localhost kvmhost\n::1 localhost\n' >"$root/etc/hosts"
mkdir -p "$root/job"
dpkg-query --admindir="$root/var/lib/dpkg" -W -f '${Package} ${Version}\n' >"$out/packages"
# Sparse: 8 GiB to write on, and half a gigabyte on disk.
# With a journal, as a host has it: it is reset in the middle of its work.
mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=1,nodiscard -d "$root" "$out/root.ext4" 8G >/dev/null
chmod a+r "$out/vmlinuz" "$out/packages" "$out/root.ext4"
