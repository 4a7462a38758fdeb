#!/bin/sh
# The runner finds its own directory by the real path of its program, and keeps its settings, its logs and the jobs' workspaces
# there. This directory is read-only, and a link to the program would lead back to it: so the programs are copied below the
# current directory, which must be writable, and what they only read is linked.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$PWD/runner
mkdir "$root"
cp -R "$here/bin" "$root/bin"
for file in "$here"/*; do
	case ${file##*/} in
	bin | start | version) ;;
	*) ln -s "$file" "$root/" ;;
	esac
done
cd "$root"

