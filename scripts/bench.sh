#!/usr/bin/env bash
# Prints medians; judges nothing. BENCHTIME=1s for the Go benchmarks, VMS=15 for the figures of real VMs,
# ROUNDS=3 for the comparison of base images with umoci, mkfs.ext4 and mksquashfs, CONTENT=5GiB for the memory a large one takes,
# FILES=1000000 for what one of so many small files takes, which needs 5 GB of disk.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/shared.sh

go build -o build/bench ./test/bench
assets -out "$PWD/build/test-assets" >/dev/null
export FLINT_TEST_ASSETS="$PWD/build/test-assets"
run=(go test -run '^$' -bench . -benchtime "${BENCHTIME:-1s}")
[ ${#sudo[@]} = 0 ] || run+=(-exec "${sudo[*]}")
"${run[@]}" ./internal/... | grep -E '^(Benchmark|pkg:|FAIL)'
"${sudo[@]}" build/bench -state "$PWD/build/state" -n "${VMS:-15}"
# The kernel without modules, if make kernel has built it.
[ ! -e build/kernel/vmlinux ] || "${sudo[@]}" build/bench -state "$PWD/build/state" -n "${VMS:-15}" -kernel build/kernel/vmlinux
for layout in build/state/images/debian/*; do
	"${sudo[@]}" build/bench -state "$PWD/build/state" -layout "$layout" -rounds "${ROUNDS:-3}"
done
"${sudo[@]}" build/bench -state "$PWD/build/state" -layout synthetic -content "${CONTENT:-5GiB}"
[ -z "${FILES-}" ] || "${sudo[@]}" build/bench -state "$PWD/build/state" -layout synthetic -files "$FILES"
