#!/usr/bin/env bash
# Runs the tests with the race detector. Those that need root run as root; those that need KVM say so and skip.
# Arguments go to go test: scripts/test.sh ./internal/host -run Sweep
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/shared.sh

go build -o build/summary ./test/summary
assets -out "$PWD/build/test-assets"
export FLINT_TEST_ASSETS="$PWD/build/test-assets"
export FLINT_TEST_ACT_RUNNER="$PWD/build/test-assets/github-act-runner"
export FLINT_TEST_PROGRAM="$PWD/build/flint"
export FLINT_TEST_STATE="$PWD/build/state"
# What make kernel has built, if it has: it takes too long to be built for the tests.
[ ! -e build/kernel/vmlinux ] || export FLINT_TEST_MONOLITHIC=${FLINT_TEST_MONOLITHIC-$PWD/build/kernel/vmlinux}

args=("$@")
# Those that take longest begin first, so that none of them is left for a single processor at the end.
[ ${#args[@]} -gt 0 ] || args=(./test/e2e ./internal/vm/qemu ./internal/host/crashtest ./internal/app ./...)
run=(go test -race -json -timeout 20m)
[ ${#sudo[@]} = 0 ] || run+=(-exec "${sudo[*]}")
"${run[@]}" "${args[@]}" | build/summary
