#!/usr/bin/env bash
# Runs on a real /dev/kvm what needs one, in an emulated Debian host (test/kvmhost): the probe of KVM, the driver suite, and
# whole jobs. FLINT_TEST_FIRECRACKER_DIR names a directory with static `firecracker` and `jailer` binaries, to try those too.
# FLINT_TEST_TIMEOUT bounds the host's life: by default it is three times as long as both take side by side on two processors, and more.
# Nothing is built inside the host: it gets test binaries, programs and prepared assets. A second host, with systemd, tries the
# unit. With an argument, kvm or systemd, only that one runs; without one they run side by side, as each has one processor.
set -euo pipefail
hosts=${1:-kvm systemd}
programs=${FLINT_TEST_FIRECRACKER_DIR:+$(realpath -- "$FLINT_TEST_FIRECRACKER_DIR")} # before we go elsewhere
cd "$(dirname "$0")/.."
. scripts/shared.sh

if [ "$(uname -m)" != x86_64 ]; then
	echo "test-kvm: the emulated host is an x86-64 machine and gets this machine's programs, which are for $(uname -m)" >&2
	echo "  fix: run it on an x86-64 machine; make test-arm64 boots arm64 guests" >&2
	exit 1
fi
if [ -n "$programs" ]; then
	for program in firecracker jailer; do
		if ! [ -f "$programs/$program" ]; then
			echo "test-kvm: FLINT_TEST_FIRECRACKER_DIR=$FLINT_TEST_FIRECRACKER_DIR holds no program $program" >&2
			echo "  fix: unpack a Firecracker release there, under the plain names firecracker and jailer" >&2
			exit 1
		fi
	done
	# The doctor knows what is wrong with them now, not minutes later. What else it says of this machine does not matter.
	said=$(FLINT_VM_DRIVER=firecracker FLINT_FIRECRACKER_BINARY=$programs/firecracker FLINT_FIRECRACKER_JAILER=$programs/jailer build/flint doctor) || true
	if grep -q '^FAIL firecracker' <<<"$said"; then
		grep -A1 '^FAIL firecracker' <<<"$said" >&2
		exit 1
	fi
fi

if ! [ -e /usr/share/keyrings/debian-archive-keyring.gpg ]; then # on Ubuntu
	install debian-archive-keyring
fi

assets -out "$PWD/build/test-assets"

out=build/test-kvm${1:+-$1}
rm -rf "$out"
mkdir -p "$out"
for package in vm vm/qemu vm/firecracker; do
	CGO_ENABLED=0 go test -c -o "$out/${package##*/}.test" "./internal/$package"
done
for double in firecracker jailer; do
	CGO_ENABLED=0 go build -o "$out/doubles/$double" "./internal/vm/firecracker/fctest/$double"
done

add=(--add "$out:tests" --add build/flint --add build/flint-agent --add build/state/kernels:state/kernels
	--add build/state/demo-runner:runner --add examples/hello/.github/workflows/ci.yml)
for asset in vmlinux initrd base.ext4 scratch.ext4; do
	add+=(--add "build/test-assets/$asset:assets/$asset")
done
timeout=60m
if [ -n "$programs" ]; then
	timeout=70m
	add+=(--add "$programs/firecracker:firecracker/firecracker" --add "$programs/jailer:firecracker/jailer")
fi
emulator=build/kvmhost/run${1:+-$1} # beside one that runs
go build -o "$emulator" ./test/kvmhost

# emulate OPTION… SCRIPT [ARGUMENT…] runs a host, as root, because the images belong to root.
emulate() { "${sudo[@]}" "$emulator" --cache "$PWD/build/kvmhost" --timeout "${FLINT_TEST_TIMEOUT:-$timeout}" "${add[@]}" "$@"; }

kvm() { emulate test/kvmhost/test-kvm; }

# systemd runs the host with systemd, and for it a GitHub outside of it, which outlives its reboot. Nothing may be left there.
systemd() {
	local github port log=$out/github.log status=0
	for try in 1 2 3 4 5; do # the port may be taken
		port=$((20000 + RANDOM % 12000))
		: >"$log"
		build/flint dev github --listen "127.0.0.1:$port" --url "http://10.0.2.2:$port" --key-file "$out/app.pem" --lease 3m >"$log" 2>&1 &
		github=$!
		until grep -q 'private key' "$log" || ! kill -0 $github 2>/dev/null; do sleep 0.1; done
		grep -q 'private key' "$log" && break
		[ "$try" != 5 ] || { cat "$log" >&2; return 1; }
	done
	emulate --systemd --network --reboots --add packaging/flint.service --add "$out/app.pem" test/kvmhost/test-systemd \
		"http://10.0.2.2:$port" "$(sed -n 's/^ *App id  *\([0-9]*\)$/\1/p' "$log")" "$(sed -n 's/^ *installation id  *\([0-9]*\)$/\1/p' "$log")" 2>&1 | tee "$out/systemd.log" || status=$?
	kill -INT $github
	wait $github || true
	if grep -q 'starting it once more' "$out/systemd.log"; then
		echo "what is left at the simulated GitHub is not looked at: the first host's is among it"
	elif ! grep -q 'left: 0 open jobs, 0 registrations' "$log"; then
		echo "systemd: FAILED: at the simulated GitHub is left what should not be:"
		tail -n 20 "$log"
		status=1
	fi
	return $status
}

for host in $hosts; do
	case $host in
	kvm | systemd) ;;
	*)
		echo "test-kvm: there is no host $host; kvm and systemd are" >&2
		exit 2
		;;
	esac
done
pids=() status=0
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
for host in $hosts; do # each line says whose it is
	(set -o pipefail; $host 2>&1 | sed -u "s/^/$host: /") &
	pids+=($!)
done
for pid in "${pids[@]}"; do
	wait "$pid" || status=$?
done
exit "$status"
