#!/usr/bin/env bash
# Builds a kernel without modules for flint's guests, from the distribution's linux-source package and the fragments beside
# this file: vmlinux (x86-64) or Image (arm64), its configuration beside it. What is made already is not made again; what was
# broken off goes on where it stopped. `make kernel` runs it, and `flint kernel build`, which carries it. Environment:
#   OUT      the directory to build in, and to leave the kernel in; build/kernel without it
#   VERSION  the series to take, such as 6.1; without it the newest that apt knows or that is installed
#   ARCH     amd64 or arm64; without it this machine's. Another than this machine's is cross-compiled
#   JOBS     how many compilers at once; without it as many as there are processors
#   LOUD     1 names each file that is compiled
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# An ARCH or a VERSION that is exported would steer the kernel's own Makefile.
arch=${ARCH:-$(dpkg --print-architecture)} series=${VERSION:-} jobs=${JOBS:-$(nproc)} out=${OUT:-build/kernel}
silent=-s
[ -z "${LOUD:-}" ] || silent=
unset ARCH VERSION JOBS OUT LOUD MAKEFLAGS MAKELEVEL MFLAGS

die() {
	echo "flint: $*" >&2
	exit 1
}

case $arch in
amd64 | x86_64) arch=amd64 karch=x86_64 target=vmlinux built=vmlinux prefix=x86_64-linux-gnu ;;
arm64 | aarch64) arch=arm64 karch=arm64 target=Image built=arch/arm64/boot/Image prefix=aarch64-linux-gnu ;;
*) die "ARCH=$arch: flint's guests are amd64 or arm64" ;;
esac
[[ $jobs =~ ^[1-9][0-9]*$ ]] || die "JOBS=$jobs is not a number of compilers"
[[ $series =~ ^([0-9]+(\.[0-9]+)*)?$ ]] || die "VERSION=$series is not a kernel series such as 6.1"

packages=(gcc libc6-dev make flex bison bc perl libelf-dev xz-utils bzip2)
cross=
if [ "$arch" != "$(dpkg --print-architecture)" ]; then
	cross=$prefix-
	packages+=("gcc-${prefix//_/-}")
fi

sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)
installed() { dpkg-query -W -f '${db:Status-Status} ${Version}' "$1" 2>/dev/null | sed -n 's/^installed //p' || true; }
candidate() { apt-cache policy "$1" | sed -n 's/^ *Candidate: //p' | grep -vxF '(none)' || true; }
install() { "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o DPkg::Lock::Timeout=120 --no-install-recommends "$@" >/dev/null; }

missing=()
for p in "${packages[@]}"; do
	[ -n "$(installed "$p")" ] || missing+=("$p")
done
if [ ${#missing[@]} != 0 ]; then
	echo "flint: installing Debian packages: ${missing[*]}"
	install "${missing[@]}"
fi

# The source: the newest series, in the newest version there is of it.
source=
while read -r p; do
	[ -n "$(candidate "$p")" ] && source=$p
done < <(apt-cache pkgnames linux-source- | grep -E "^linux-source-${series//./\\.}${series:+(\\.0)?\$}" |
	grep -E '^linux-source-[0-9.]+$' | sort -V)
[ -n "$source" ] || die "apt knows no linux-source${series:+-$series}: apt-cache search linux-source says what there is"
version=$(installed "$source")
if [ "$version" != "$(candidate "$source")" ]; then
	echo "flint: installing Debian packages: $source $(candidate "$source")"
	install "$source" || [ -n "$version" ] || die "there is no kernel source"
	version=$(installed "$source")
fi
tarball=$(dpkg -L "$source" | grep -E '/linux-source-[0-9.]+\.tar\.(xz|bz2)$' | sort | tail -1)
[ -e "$tarball" ] || die "$source has no tar file of the source"

fragments=("$here/common.config" "$here/$karch.config")
lines() { grep -hE '^(CONFIG_[A-Za-z0-9_]+=|# CONFIG_[A-Za-z0-9_]+ is not set$)' "${fragments[@]}"; }
key=$({ echo "$source $version $karch" && lines; } | sha256sum | cut -c1-16)
mkdir -p "$out"
out=$(cd "$out" && pwd)
exec 9>"$out/.lock"
flock -n 9 || { echo "flint: waiting for another build of a kernel" && flock 9; }
if [ -e "$out/$target.key" ] && [ "$(head -1 "$out/$target.key")" = "$key" ] && (cd "$out" && tail -n +2 $target.key | sha256sum --quiet -c) 2>/dev/null; then
	echo "flint: $out/$target is there: Linux $version for $arch"
	exit
fi

work=$out/src-$karch-$key
for old in "$out/src-$karch-"*; do
	[ "$old" = "$work" ] || rm -rf "$old"
done
free=$(df --output=avail -BM "$out" | tail -1 | tr -dc 0-9)
[ -d "$work/objects" ] || [ "$free" -ge 5000 ] || die "a kernel build takes about 5 GB for a while; $out has $free MB free"
echo "flint: building Linux $version ($source) for $arch with $jobs compilers, key $key"
if [ ! -d "$work/source" ]; then
	rm -rf "$work"
	mkdir -p "$work/unpacking"
	tar -C "$work/unpacking" --strip-components=1 -xf "$tarball"
	mv "$work/unpacking" "$work/source"
fi
mkdir -p "$work/objects"
config=$work/objects/.config fragment=$work/fragment

# Who, where and when are in the kernel's banner; these make it depend on the source alone.
kmake() {
	nice -n 19 make -C "$work/source" O="$work/objects" ARCH=$karch CROSS_COMPILE="$cross" -j"$jobs" \
		KBUILD_BUILD_USER=flint KBUILD_BUILD_HOST=flint KBUILD_BUILD_VERSION=1 \
		KBUILD_BUILD_TIMESTAMP="$(date -u -d "@$(stat -L -c %Y "$tarball")")" "$@"
}

lines >"$fragment"
if [ ! -e "$config" ]; then
	kmake -s KCONFIG_ALLCONFIG="$fragment" alldefconfig
fi
# A line that Kconfig does not take is not an error to it: a dependency is missing, or this series has no such option.
refused=0
while read -r line; do
	name=${line#\# } name=${name%%[= ]*}
	case $line in
	*=*) grep -qxF "$line" "$config" && continue ;;
	*) grep -q "^$name=" "$config" || continue ;;
	esac
	refused=$((refused + 1))
	echo "flint: this kernel does not take \"$line\"; it has \"$(grep -E "^(# )?$name[ =]" "$config" || echo "no such option")\"" >&2
done <"$fragment"
echo "flint: $(($(wc -l <"$fragment") - refused)) of $(wc -l <"$fragment") lines of the fragments are in the configuration"

begin=$SECONDS
kmake $silent "$target"
# An ELF has twice its size in symbols and relocations, which no VMM reads; an Image has none.
if [ $target = vmlinux ]; then
	"${cross}objcopy" -S "$work/objects/$built" "$out/$target.new"
else
	cp "$work/objects/$built" "$out/$target.new"
fi
cp "$config" "$out/$target.config.new"
rm -f "$out/$target.key"
sync "$out/$target.new" "$out/$target.config.new"
mv "$out/$target.config.new" "$out/$target.config"
mv "$out/$target.new" "$out/$target"
(cd "$out" && { echo "$key" && sha256sum $target $target.config; } >$target.key.new && mv $target.key.new $target.key)
rm -rf "$work"
echo "flint: $out/$target: $(($(stat -c %s "$out/$target") >> 20)) MiB, built in $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s; boot it with flint run --kernel $out/$target"
