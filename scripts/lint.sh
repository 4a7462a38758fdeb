#!/usr/bin/env bash
# gofumpt, go vet and staticcheck, at pinned versions, over everything.
set -euo pipefail
gofumpt=mvdan.cc/gofumpt@v0.12.0
staticcheck=honnef.co/go/tools/cmd/staticcheck@v0.8.2

unformatted=$(go run "$gofumpt" -l .)
if [ -n "$unformatted" ]; then
	echo "not formatted by gofumpt:" >&2
	echo "$unformatted" >&2
	exit 1
fi
go vet ./...
go run "$staticcheck" ./...
go mod tidy -diff
echo "lint: clean"
