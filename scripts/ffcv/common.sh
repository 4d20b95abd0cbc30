# shellcheck shell=bash disable=SC2034,SC2154  # it shares variables with those who source it
# What compiling FFCV takes, for the two scripts in the folder above: they set $python and source
# this. FFCV's setup.py asks pkg-config for OpenCV and TurboJPEG. Of OpenCV it uses only views and
# cv::resize: OpenCV's core and imgproc are enough, and so is the stand-in header beside this file.
ffcv_version=1.0.2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# One compiler for everything, whichever one this Python was built with.
export CXX=${CXX:-g++}
export CC=$CXX

die() {
    echo "${0##*/}: $*" >&2
    exit 2
}

facts=$("$python" -c '
import sys, sysconfig
print("%d.%d" % sys.version_info[:2], sys.base_prefix, sysconfig.get_path("include"), sep="\n")
' 2>/dev/null) || die "$python does not run: name a Python interpreter"
{ read -r python_version && read -r prefix && read -r python_headers; } <<<"$facts"

find_missing() {
    missing=() debian=() fedora=() conda=()
    if ! command -v "${CXX%% *}" >/dev/null; then
        missing+=("${CXX%% *}") debian+=(g++) fedora+=(gcc-c++) conda+=(cxx-compiler)
    fi
    if [[ ! -e /usr/include/turbojpeg.h && ! -e /usr/local/include/turbojpeg.h &&
        ! -e $prefix/include/turbojpeg.h ]]; then
        missing+=(turbojpeg.h) debian+=(libturbojpeg0-dev)
        fedora+=(turbojpeg-devel) conda+=(libjpeg-turbo)
    fi
    if [[ ! -e $python_headers/Python.h ]]; then
        missing+=(Python.h) debian+=("python$python_version-dev")
        fedora+=("python$python_version-devel") conda+=("python=$python_version")
    fi
}

# Installs what is missing if it may, and only that; else says in one line what to install.
require_tools() {
    find_missing
    if ((${#missing[@]} && EUID == 0)) && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq >/dev/null &&
            apt-get install -y -qq --no-install-recommends "${debian[@]}" >/dev/null || true
        find_missing
    fi
    ((${#missing[@]} == 0)) || die "missing ${missing[*]}: install ${debian[*]} (Debian, Ubuntu)," \
        "${fedora[*]} (Fedora) or ${conda[*]} (conda-forge)"
    # A conda environment keeps its libraries beside its Python: compile, link and load there too.
    if [[ $prefix != /usr && -e $prefix/include/turbojpeg.h ]]; then
        export CPATH=$prefix/include${CPATH:+:$CPATH} LD_RUN_PATH=$prefix/lib
        export LIBRARY_PATH=$prefix/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
    fi
}

# Prints the flags of an OpenCV whose core and imgproc compile, link and run here; fails without.
find_opencv() {
    local flags
    for flags in "$(pkg-config --cflags-only-I --libs-only-L opencv4 2>/dev/null)" \
        "-I$prefix/include/opencv4" -I/usr/local/include/opencv4 -I/usr/include/opencv4; do
        # shellcheck disable=SC2086  # several flags, and CXX may be two words: ccache g++
        $CXX -x c++ -o "$work/probe" - $flags -lopencv_imgproc -lopencv_core >/dev/null 2>&1 <<<'
            #include <opencv2/imgproc.hpp>
            int main() { cv::Mat m(2, 2, CV_8UC3); cv::resize(m, m, cv::Size(1, 1)); }' &&
            "$work/probe" 2>/dev/null && echo "$flags" && return
    done
    return 1
}

# From here on setup.py's calls of pkg-config get these flags, so that pkg-config need not exist and
# no .pc file either.
answer_pkg_config() {
    mkdir "$work/bin"
    printf '#!/bin/sh\necho "%s"\n' "$*" >"$work/bin/pkg-config"
    chmod +x "$work/bin/pkg-config"
    export PATH=$work/bin:$PATH
}
