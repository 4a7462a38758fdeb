#!/usr/bin/env bash
# Installs what flint needs to be built, run and tested on Debian or Ubuntu. Says what it installs; does nothing twice.
set -euo pipefail

packages=(
	qemu-system-x86   # runs the VMs where there is no KVM, and where there is
	buildah           # builds images from Dockerfiles when neither docker nor podman does
	mmdebstrap        # makes the base image where no registry can be reached
	kmod              # depmod, for the kernel pack
	e2fsprogs         # e2fsck checks images in the tests
	iproute2 nftables # ip and nft look for what is left, in the tests
	ca-certificates git make
)
# A machine of another architecture has its own emulator.
[ "$(dpkg --print-architecture)" = arm64 ] && packages[0]=qemu-system-arm

missing=()
for p in "${packages[@]}"; do
	dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
done
# An engine that works makes buildah superfluous, but installing it harms nothing and keeps the way short.
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)

# apt lists younger than a day name the kernel package; older ones may name a file that is gone.
stale=1
[ -n "$(find /var/lib/apt/lists -maxdepth 1 -name '*Packages*' -mtime -1 -print -quit 2>/dev/null)" ] && stale=0
if [ ${#missing[@]} -gt 0 ] || [ "$stale" = 1 ]; then
	echo "flint: refreshing apt's package lists"
	"${sudo[@]}" apt-get update -qq
fi
if [ ${#missing[@]} -gt 0 ]; then
	echo "flint: installing Debian packages: ${missing[*]}"
	"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# go 1.21 and later fetch the toolchain that go.mod names by themselves.
if ! command -v go >/dev/null; then
	echo "flint: installing Go"
	candidate=$(apt-cache policy golang-go | awk '/Candidate:/{print $2}')
	if dpkg --compare-versions "${candidate#*:}" ge 1.21; then
		"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends golang-go >/dev/null
	else
		echo "flint: this distribution's Go ($candidate) is older than 1.21, which cannot fetch a newer one by itself." >&2
		echo "       install Go 1.26 from https://go.dev/dl/ or from backports, and run make again" >&2
		exit 1
	fi
fi
