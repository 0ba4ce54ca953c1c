#!/bin/bash
# Builds crun as a static program out of the distribution's source package, for the guest image. Why: Debian's
# crun loads eleven shared libraries, which costs more than all it then does
# (docs/decisions/0001-oci-runtime-in-the-guest.md).
#
#   build.sh OUTPUT WORKDIR
#
# Needs apt, gcc, make and patch. Nothing is installed: source and -dev packages are unpacked below WORKDIR. The
# sources are asked for where this machine gets its packages from. A crun that is already at OUTPUT and of
# the current version is kept.
set -euo pipefail

[ $# = 2 ] || { echo "usage: $0 OUTPUT WORKDIR" >&2; exit 2; }
output=$(realpath -m "$1")
mkdir -p "$2"
work=$(realpath "$2")

for program in apt-get dpkg-deb gcc make patch; do
	command -v "$program" >/dev/null || { echo "$0: no $program: install the packages gcc, make and patch" >&2; exit 1; }
done
version=$(apt-cache policy crun | sed -n 's/^  Candidate: //p')
case $version in
"" | "(none)") echo "$0: apt knows no package crun: run apt-get update" >&2; exit 1 ;;
esac
if [ -x "$output" ] && [ "$(cat "$work/version" 2>/dev/null)" = "$version" ]; then
	exit 0
fi
rm -rf "${work:?}"/{source,root,lists,sources.list}
mkdir -p "$work"/{source/crun,root,lists/partial}

# The same places as for binary packages, asked for sources. Signatures are checked with apt's own keys.
# shellcheck disable=SC2016 # apt fills these in
apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' | sort -u |
	sed 's/^/deb-src /' >"$work/sources.list"
apt=(apt-get -q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists" -o APT::Sandbox::User=root)
"${apt[@]}" update >"$work/log" 2>&1 || { tail "$work/log" >&2; exit 1; }
(cd "$work/source" && "${apt[@]}" source --download-only "crun=$version" && apt-get -q -o APT::Sandbox::User=root download libseccomp-dev libcap-dev libyajl-dev) >>"$work/log" 2>&1 ||
	{ tail "$work/log" >&2; exit 1; }
tar -xf "$(echo "$work"/source/crun_*.orig.tar.?z)" -C "$work/source/crun" --strip-components=1
tar -xf "$(echo "$work"/source/crun_*.debian.tar.?z)" -C "$work/source/crun"
for package in "$work"/source/*.deb; do
	dpkg-deb -x "$package" "$work/root"
done

libraries=$(dirname "$(find "$work/root" -name libseccomp.a)")
rm -f "$libraries"/*.so*                        # else the linker takes these
[ -e "$libraries/libyajl.a" ] || ln -s libyajl_s.a "$libraries/libyajl.a"
cd "$work/source/crun"
grep -v '^ *\(#\|$\)' debian/patches/series 2>/dev/null | while read -r name _; do
	patch -s -p1 <"debian/patches/$name"
done
[ -e git-version.h ] || echo "#define GIT_VERSION \"$version\"" >git-version.h
{
	ac_cv_search_gcry_check_version=no CFLAGS="-O2" CPPFLAGS="-I$work/root/usr/include" LDFLAGS="-L$libraries" LIBS=-lm \
		SECCOMP_CFLAGS=" " SECCOMP_LIBS=-lseccomp YAJL_CFLAGS=" " YAJL_LIBS=-lyajl \
		./configure --disable-systemd --disable-dl --enable-static --disable-shared --with-python-bindings=no
	make -j"$(nproc)" crun LDFLAGS="-L$libraries -all-static"
} >>"$work/log" 2>&1 || { tail -20 "$work/log" >&2; exit 1; }
mkdir -p "$(dirname "$output")"
strip -o "$output.new" crun
"$output.new" --version >/dev/null
mv "$output.new" "$output"
echo "$version" >"$work/version"
