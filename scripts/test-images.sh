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
FLINT_TEST_IMAGES=1 scripts/test.sh ./test/e2e ./internal/image -run '^(TestImages.*|TestSameAsTheBuilderShows)$'
scripts/test-engines.sh
