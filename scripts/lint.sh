#!/usr/bin/env bash
# gofumpt, go vet and staticcheck, at pinned versions, over everything.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/shared.sh

# program MODULE-PATH VERSION installs one once, and prints its path.
program() {
	local at=build/lint/$2/${1##*/}
	[ -x "$at" ] || again env GOBIN="$PWD/${at%/*}" go install "$1@$2" >&2 || return
	echo "$at"
}
gofumpt=$(program mvdan.cc/gofumpt v0.12.0)
staticcheck=$(program honnef.co/go/tools/cmd/staticcheck v0.8.2)

unformatted=$("$gofumpt" -l .)
if [ -n "$unformatted" ]; then
	echo "not formatted by gofumpt:" >&2
	echo "$unformatted" >&2
	exit 1
fi
go vet ./...
"$staticcheck" ./...
go mod tidy -diff
echo "lint: clean"
