#!/bin/sh
# Makes what an arm64 guest boots, on a machine of any architecture: arm64-root.sh DIRECTORY gets a base image, a kernel and its
# modules. Debian's packages are fetched and verified by apt and only unpacked: nothing of them is executed, so no emulation
# is needed. Runs as root. What is cached is named by a hash of this file.
set -eu
out=$1
root=$(mktemp -d "$out/root.XXXXXX")
trap 'rm -rf "$root"' EXIT
mmdebstrap --quiet --mode=root --variant=extract --architectures=arm64 --aptopt='APT::Install-Recommends "false"' \
	--include=base-files,base-passwd,dash,coreutils,linux-image-cloud-arm64 bookworm "$root"

mkdir "$out/kernel"
mv "$root"/boot/* "$root"/lib/modules "$out/kernel"
# What the packages' scripts would have done.
cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
[ -e "$root/bin/sh" ] || ln -s dash "$root/bin/sh"
mke2fs -q -t ext4 -O ^has_journal -d "$root" "$out/base.ext4" 512M >/dev/null
chmod -R a+rX "$out"
