#!/usr/bin/env bash
# install_ffcv.sh [PYTHON]: installs FFCV into the environment of PYTHON (python3), which holds torch
# already. Needs g++ and TurboJPEG's header, and as root with apt-get installs them itself. Compiles
# against OpenCV where its headers are, else against the stand-in. Status 2: something is missing.
set -euo pipefail
python=${1:-python3}
# shellcheck source-path=SCRIPTDIR source=ffcv/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/ffcv/common.sh"

# -P: a folder that happens to be called ffcv, in the current one, is not FFCV.
works() {
    "$python" -P -c '
import importlib.metadata, sys
import numpy, ffcv.loader
from ffcv.libffcv import resize_crop

pixels = numpy.arange(0, 24, 2, dtype=numpy.uint8).reshape(2, 2, 3)
mean = numpy.zeros((1, 1, 3), numpy.uint8)
resize_crop(pixels, 0, 2, 0, 2, mean)
sys.exit(importlib.metadata.version("ffcv") != sys.argv[1] or mean.tolist() != [[[9, 11, 13]]])
' "$ffcv_version"
}

# Prints the packages whose modules PYTHON lacks.
lacking() {
    "$python" -P -c '
import sys
from importlib.util import find_spec
for pair in sys.argv[1:]:
    module, package = pair.split("=")
    if not find_spec(module):
        print(package)
' "$@"
}

if works 2>/dev/null; then
    echo "ffcv $ffcv_version works already in $python"
    exit
fi
[[ -z $(lacking torch=torch pip=pip) ]] ||
    die "$python lacks torch or pip: give it both, then run this again"
require_tools

# Torch is left alone: none of these needs it, and FFCV is installed without what it asks for.
mapfile -t packages < <(lacking numba=numba cv2=opencv-python-headless PIL=pillow tqdm=tqdm \
    setuptools=setuptools)
if ((${#packages[@]})); then
    "$python" -m pip install -q -c "$here/../../constraints.txt" "${packages[@]}"
fi
if opencv=$(find_opencv); then
    # FFCV includes all of OpenCV's headers, some of which come with neither core nor imgproc.
    mkdir -p "$work/include/opencv2"
    printf '#include <opencv2/%s.hpp>\n' core imgproc >"$work/include/opencv2/opencv.hpp"
    answer_pkg_config "-I$work/include $opencv -lopencv_core -lopencv_imgproc -lturbojpeg"
    against=OpenCV
else
    answer_pkg_config "-I$here -lturbojpeg"
    against="the stand-in for OpenCV"
fi
# No cache and by force: an ffcv that was built against something since removed does not import.
"$python" -m pip install -q --no-cache-dir --force-reinstall --no-deps --no-binary ffcv \
    "ffcv==$ffcv_version"
works || die "ffcv $ffcv_version is installed in $python, but does not work"
echo "installed ffcv $ffcv_version in $python, compiled against $against${packages[*]:+, and ${packages[*]}}"
