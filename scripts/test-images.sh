#!/usr/bin/env bash
# Builds the images that flint ships, on a Debian base made here, and boots them and images of every other source in real VMs. Then has
# real engines build and give images.
set -euo pipefail
cd "$(dirname "$0")/.."

sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo -E env "PATH=$PATH")

if ! command -v busybox >/dev/null || ldd "$(command -v busybox)" >/dev/null 2>&1; then # a static one
	echo "flint: installing Debian packages: busybox-static"
	"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends busybox-static >/dev/null
fi

go build -o build/assets ./test/assets
mkdir -p build/test-assets
"${sudo[@]}" build/assets -state "$PWD/build/state" -out "$PWD/build/test-assets" -shipped
FLINT_TEST_IMAGES=1 scripts/test.sh ./test/e2e -run '^TestImages'
scripts/test-engines.sh
