#!/usr/bin/env bash
# A coordinator, restarted without end, against a GitHub that misbehaves in every way it can: 2,000 jobs over 20 pools, in memory
# and in time that is made up. JOBS and POOLS change that, SEED repeats the choices of a run, RUNS makes several; LOG names a file
# for the log of the last one.
set -euo pipefail
cd "$(dirname "$0")/.."

# Records are synced to disk, thousands of times; where that is a memory, the disk's speed does not matter.
[ -n "${TMPDIR-}" ] || [ ! -w /dev/shm ] || export TMPDIR=/dev/shm
export FLINT_SOAK_JOBS=${JOBS:-2000} FLINT_SOAK_POOLS=${POOLS:-20}
[ -z "${SEED-}" ] || export FLINT_SOAK_SEED=$SEED
[ -z "${LOG-}" ] || export FLINT_SOAK_LOG="$(realpath "$LOG")"
exec go test -run '^TestSoak$' -count "${RUNS:-1}" -timeout 30m -v ./internal/app
