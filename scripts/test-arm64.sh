#!/usr/bin/env bash
# Boots arm64 guests (arm64 agent, Debian's arm64 cloud kernel) under qemu-system-aarch64, on a machine of any architecture, and
# runs the driver suite on them.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/shared.sh

missing=()
command -v qemu-system-aarch64 >/dev/null || missing+=(qemu-system-arm)
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
[ ${#missing[@]} = 0 ] || install "${missing[@]}"

for program in flint flint-agent; do
	CGO_ENABLED=0 GOARCH=arm64 go build -trimpath -ldflags '-s -w' -o "build/arm64/$program" "./cmd/$program"
done

root=build/arm64/root-$(sha256sum scripts/arm64-root.sh | cut -c1-12)
if ! [ -d "$root" ]; then
	echo "flint: making an arm64 root and kernel in $root from Debian's packages"
	"${sudo[@]}" rm -rf "$root.part"
	mkdir -p "$root.part"
	again "${sudo[@]}" sh scripts/arm64-root.sh "$PWD/$root.part"
	mv "$root.part" "$root"
fi
modules=$(echo "$root"/kernel/modules/*)
assets -out "$PWD/build/arm64/assets" -agent build/arm64/flint-agent \
	-kernel "$(echo "$root"/kernel/vmlinuz-*)" -modules "$modules" -image "$root/base.ext4"

export FLINT_TEST_ARCH=arm64 FLINT_TEST_ASSETS="$PWD/build/arm64/assets"
run=(go test -count=1 -v -timeout 15m -run '^(TestRealVM|TestRealNIC)$' ./internal/vm/qemu)
[ ${#sudo[@]} = 0 ] || run+=(-exec "${sudo[*]}")
log=build/arm64/test.log
"${run[@]}" | tee "$log"
# A test that skips itself has tried nothing.
for t in TestRealVM TestRealNIC; do
	grep -q "^--- PASS: $t " "$log" || { echo "test-arm64: $t did not pass"; exit 1; }
done
