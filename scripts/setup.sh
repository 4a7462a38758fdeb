#!/usr/bin/env bash
# Installs what flint needs to be built, run and tested on Debian or Ubuntu. Says what it installs; does nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/shared.sh

packages=(
	qemu-system-x86    # runs the VMs where there is no KVM, and where there is
	buildah crun       # builds images from Dockerfiles when neither docker nor podman does
	mmdebstrap         # makes the base image where no registry can be reached
	kmod               # depmod, for the kernel pack
	e2fsprogs          # e2fsck checks images in the tests,
	erofs-utils        # and fsck.erofs and mkfs.erofs do
	iproute2 nftables  # ip and nft look for what is left, in the tests
	gcc libc6-dev      # the race detector needs cgo
	ca-certificates git make
)
# A machine of another architecture has its own emulator; Ubuntu has Debian's keys in a package of their own.
[ "$(dpkg --print-architecture)" = arm64 ] && packages[0]=qemu-system-arm
grep -qx 'ID=ubuntu' /etc/os-release && packages+=(debian-archive-keyring)

mkdir -p build
exec 9<build # two that run side by side must not refresh apt's lists at once
flock 9

installed() { dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed; }

# apt's lists are refreshed at most once a day: they name the kernel package, and an old list may name a file that is gone.
refresh() {
	[ -n "$(find build/.apt-refreshed -mtime -1 2>/dev/null)" ] && return
	echo "flint: refreshing apt's package lists"
	if again "${sudo[@]}" apt-get update -qq -o APT::Update::Error-Mode=any; then # by default a mirror that does not answer is no error
		touch build/.apt-refreshed
	elif [ ${#missing[@]} -gt 0 ]; then
		exit 1
	else
		echo "flint: apt's package lists stay old; nothing has to be installed" >&2
	fi
}

missing=()
for p in "${packages[@]}"; do
	installed "$p" || missing+=("$p")
done
refresh
[ ${#missing[@]} = 0 ] || install "${missing[@]}"

# Go: any go from 1.21 on fetches the toolchain that go.mod names by itself. An older one can still fetch it as the module
# it is published as, verified by the checksum database; the Makefile puts build/toolchain first in PATH.
newer() { [ "$(printf '%s\n' 1.21 "$1" | sort -V | head -1)" = 1.21 ]; }
PATH="$PWD/build/toolchain/bin:$PATH"
command -v go >/dev/null || install golang-go
have=$(go env GOVERSION 2>/dev/null || go version | awk '{print $3}')
if ! newer "${have#go}"; then
	want=golang.org/toolchain@v0.0.1-go$(awk '$1 == "go" {print $2}' go.mod).linux-$(dpkg --print-architecture)
	echo "flint: this distribution's $have is too old; fetching $want"
	scratch=$(mktemp -d)
	(cd "$scratch" && go mod init scratch 2>/dev/null && again go mod download "$want")
	rmdir "$scratch" 2>/dev/null || rm -rf "$scratch"
	dir=$(go env GOMODCACHE)/$want
	rm -rf build/toolchain
	cp -r "$dir" build/toolchain
	chmod -R u+w build/toolchain
	chmod +x build/toolchain/bin/* build/toolchain/pkg/tool/*/*
fi

# Modules, once for each go.sum: go itself does not ask a proxy twice.
modules=build/.modules-$(sha256sum go.sum | cut -c1-12)
if [ ! -e "$modules" ]; then
	again go list -deps -test ./... >/dev/null
	touch "$modules"
fi
