#!/bin/bash
# Builds the guest kernel for the purpose: the distribution's kernel source package with our configuration and
# everything built in, for `crivm guest build --kernel OUTPUT --modules none` (docs/guest-kernel.md).
#
#   build.sh OUTPUT WORKDIR
#
# Needs apt, gcc, make, flex, bison, bc, libelf-dev. The source package is unpacked below WORKDIR, nothing is
# installed. A kernel that is already at OUTPUT and made of the same package, configuration and compiler is kept.
set -euo pipefail

[ $# = 2 ] || { echo "usage: $0 OUTPUT WORKDIR" >&2; exit 2; }
fragment=$(realpath "$(dirname "$0")/x86_64.config")
output=$(realpath -m "$1")
mkdir -p "$2"
work=$(realpath "$2")

[ "$(uname -m)" = x86_64 ] || { echo "$0: there is a configuration for x86-64 only" >&2; exit 1; }
for program in apt-get dpkg-deb gcc make flex bison bc; do
	command -v "$program" >/dev/null || { echo "$0: no $program: install the packages gcc, make, flex, bison, bc and libelf-dev" >&2; exit 1; }
done
package=$(apt-cache depends linux-source 2>/dev/null | sed -n 's/^ *Depends: \(linux-source-[0-9.]*\)$/\1/p' | head -n 1)
[ -n "$package" ] || { echo "$0: apt knows no package linux-source: run apt-get update" >&2; exit 1; }
version=$(apt-cache policy "$package" | sed -n 's/^  Candidate: //p')
made="$package $version $(sha256sum <"$fragment") $(gcc --version | head -n 1)"
if [ -s "$output" ] && [ "$(cat "$work/made" 2>/dev/null)" = "$made" ]; then
	exit 0
fi

rm -rf "${work:?}"/{source,package}
mkdir -p "$work"/{source,package}
(cd "$work/package" && apt-get -q -o APT::Sandbox::User=root download "$package=$version") >"$work/log" 2>&1 || { tail "$work/log" >&2; exit 1; }
dpkg-deb --fsys-tarfile "$work/package/$package"_*.deb | tar -xO "./usr/src/$package.tar.xz" | tar -xJ -C "$work/source" --strip-components=1
rm -r "$work/package"

# Nothing of this machine or moment is in the kernel. The timestamp must be one that date(1) reads, or the archive that every
# kernel has built in for its first root gets the moment of the build: it is the package's.
cd "$work/source"
export KBUILD_BUILD_USER=crivm KBUILD_BUILD_HOST=crivm KBUILD_BUILD_VERSION=1 LC_ALL=C
KBUILD_BUILD_TIMESTAMP=$(date -u -d "@$(stat -c %Y Makefile)")
KBUILD_BUILD_VERSION_TIMESTAMP="$package $version" # uname -v
export KBUILD_BUILD_TIMESTAMP KBUILD_BUILD_VERSION_TIMESTAMP
make -s KCONFIG_ALLCONFIG="$fragment" allnoconfig >>"$work/log" 2>&1 || { tail -20 "$work/log" >&2; exit 1; }
missing=$(grep '^CONFIG_' "$fragment" | grep -vxFf .config || true)
[ -z "$missing" ] || { printf '%s: this kernel source does not take:\n%s\n' "$0" "$missing" >&2; exit 1; }
make -j"$(nproc)" vmlinux >>"$work/log" 2>&1 || { tail -20 "$work/log" >&2; exit 1; }
mkdir -p "$(dirname "$output")"
strip -o "$output.new" vmlinux
mv "$output.new" "$output"
cp .config "$output.config"
echo "$made" >"$work/made"
rm -rf "${work:?}/source"
echo "$output: $package $version, $(stat -c %s "$output") bytes"
