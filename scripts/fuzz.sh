#!/usr/bin/env bash
# Runs every fuzz target for a while: FUZZTIME=20s by default. Go would spend up to a minute on making each new input smaller, which
# is all the time there is.
set -euo pipefail
go list -f '{{.Dir}}' ./... | while read -r dir; do
	{ grep -hoE '^func Fuzz[A-Za-z0-9_]+' "$dir"/*_test.go 2>/dev/null || true; } | awk '{print $2}' | sort -u | while read -r target; do
		echo "fuzz: $target in ${dir#"$PWD"/}"
		(cd "$dir" && go test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-20s}" -fuzzminimizetime 10x . </dev/null)
	done
done
