#!/usr/bin/env bash
# Builds the images that flint ships, on a Debian base made here, and boots them and images of every other source in real VMs. Then has
# real engines build and give images.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/shared.sh

if ! command -v busybox >/dev/null || ldd "$(command -v busybox)" >/dev/null 2>&1; then # a static one
	install busybox-static
fi

mkdir -p build/test-assets
assets -out "$PWD/build/test-assets" -shipped
export FLINT_TEST_IMAGES=1
scripts/test.sh ./test/e2e -run '^TestImages'
# Not scripts/test.sh: with the race detector large images take ten times as long, and make test has it look at small ones.
run=(go test -json -count=1 -timeout 20m)
[ ${#sudo[@]} = 0 ] || run+=(-exec "${sudo[*]}")
FLINT_TEST_STATE=$PWD/build/state "${run[@]}" ./internal/image -run '^TestSameAsTheBuilderShows$' | build/summary
scripts/test-engines.sh
