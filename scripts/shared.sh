# shellcheck shell=bash
# What the scripts share: they source it, from the project's root, after `set -euo pipefail`.

umask 022 # QEMU's user and apt's read what is made here
export GOFLAGS="${GOFLAGS-} -buildvcs=false" # go asks git, which refuses a checkout of another user's; the version comes from the Makefile
[ "${TMPDIR-}" = "" ] || [ ${#TMPDIR} -le 40 ] || export TMPDIR=/tmp # the paths of sockets must be short
export PATH=$PATH:/usr/sbin:/sbin # where nft and ip are, which is not everybody's

sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo -E env "PATH=$PATH")

# again COMMAND… runs what asks a mirror or a proxy, up to three times: they change and stumble.
again() {
	local pause status
	for pause in 5 30; do
		"$@" 9<&- && return # 9 is setup.sh's lock, which what stays behind must not hold
		status=$?
		[ $status -lt 128 ] || return $status # a person's Ctrl-C
		echo "flint: that failed; once more in $pause s: $*" >&2
		sleep "$pause"
	done
	"$@" 9<&-
}

# install PACKAGE… waits for who else installs something, as a fresh machine does by itself.
install() {
	echo "flint: installing Debian packages: $*"
	again "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=600 "$@" >/dev/null
}

# assets ARGUMENT… makes what guests boot from, as far as it is not there.
assets() {
	go build -o build/assets ./test/assets
	again "${sudo[@]}" build/assets -state "$PWD/build/state" "$@"
}
