#!/usr/bin/env bash
# Has flint build images with the real podman and docker, and take images from them. Neither is installed: what is missing is unpacked
# into build/engines, and docker's daemon runs in a network of its own as long as the tests do.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/shared.sh

go build -o build/summary ./test/summary
root=$PWD/build/engines
if [ ! -e "$root/done" ]; then
	simulated=$(apt-get install -s -qq --no-install-recommends podman docker.io)
	mapfile -t packages < <(awk '$1 == "Inst" {print $2}' <<<"$simulated")
	libraries=() programs=()
	for p in "${packages[@]}"; do
		[[ $p = lib* ]] && libraries+=("$p") || programs+=("$p")
	done
	[ ${#libraries[@]} = 0 ] || install "${libraries[@]}"
	echo "flint: unpacking Debian packages: ${programs[*]}"
	rm -rf "$root"
	mkdir -p "$root/packages"
	[ ${#programs[@]} = 0 ] || (cd "$root/packages" && again apt-get download -qq "${programs[@]}")
	for p in "$root"/packages/*.deb; do
		[ ! -e "$p" ] || dpkg-deb -x "$p" "$root"
	done
	rm -rf "$root/packages"
	touch "$root/done"
fi
export PATH=$root/usr/bin:$root/usr/sbin:$PATH
[ ${#sudo[@]} = 0 ] || sudo=(sudo -E env "PATH=$PATH")

dir=$(mktemp -d /tmp/flint-docker.XXXXXX) # the paths of sockets must be short
daemon=
end() {
	if [ -e "$dir/pid" ]; then "${sudo[@]}" kill "$(cat "$dir/pid")" || true; fi
	[ -z "$daemon" ] || wait "$daemon" || true
	"${sudo[@]}" rm -rf "$dir" || echo "test-engines: something is left in $dir" # no reason to fail what has passed
}
trap end EXIT
log=build/engines-docker.log
"${sudo[@]}" unshare --net sh -c 'ip link set lo up; exec dockerd --host "unix://$0/socket" --data-root "$0/data" \
	--exec-root "$0/run" --pidfile "$0/pid" --storage-driver vfs --bip 172.31.255.1/24 --iptables=false --ip6tables=false' "$dir" >"$log" 2>&1 &
daemon=$!
export DOCKER_HOST=unix://$dir/socket
end=$((SECONDS + 180))
until "${sudo[@]}" docker version >/dev/null 2>&1; do
	kill -0 "$daemon" && [ $SECONDS -lt $end ] || { cat "$log"; echo "test-engines: docker's daemon does not answer"; exit 1; }
	sleep 0.5
done
# Not scripts/test.sh, which would have these engines make what other tests need.
export FLINT_TEST_ENGINES=1
run=(go test -race -json -count=1 -timeout 20m)
[ ${#sudo[@]} = 0 ] || run+=(-exec "${sudo[*]}")
"${run[@]}" ./internal/image -run '^TestReal' | build/summary
