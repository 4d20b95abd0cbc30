"""The stand-in for OpenCV that FFCV is compiled with, and how the install script fails.

That the script installs an FFCV that works is seen by running it, which .ci/run does.
"""

import ctypes
import math
import os
import re
import shutil
import subprocess
import venv
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

SCRIPTS = Path(__file__).parents[2] / "scripts"
RESIZE = """
#include <opencv2/opencv.hpp>
extern "C" void resize_crop(uint8_t *source, int rows, int cols, int top, int bottom, int left,
                            int right, uint8_t *target, int height, int width) {
    cv::Mat from(rows, cols, CV_8UC3, source), to(height, width, CV_8UC3, target);
    cv::resize(from.colRange(left, right).rowRange(top, bottom), to, to.size(), 0, 0,
               cv::INTER_AREA);
}
"""
# Every read and write of these goes to a heap block of exactly the image's size.
RESIZE_ALL = """
int main() {
    for (int rows = 1; rows < 8; ++rows) for (int cols = 1; cols < 8; ++cols)
    for (int height = 1; height < 16; ++height) for (int width = 1; width < 16; ++width) {
        std::vector<uint8_t> source(3 * rows * cols, 255), target(3 * height * width);
        resize_crop(source.data(), rows, cols, 0, rows, 0, cols, target.data(), height, width);
        for (uint8_t value : target) if (value != 255) return 1;
    }
}
"""
LENGTHS = st.integers(1, 40)


def compile_resize(target, *flags, source=RESIZE):
    if not shutil.which("g++"):
        assert not os.environ.get("CI"), "no g++"
        pytest.skip("no g++")
    command = ["g++", "-O2", "-Wall", "-Wextra", "-Werror", "-x", "c++", "-", "-o", str(target)]
    include = f"-I{SCRIPTS / 'ffcv'}"
    subprocess.run([*command, include, *flags], input=source, text=True, check=True)
    return str(target)


@pytest.fixture(scope="module")
def resize_crop(tmp_path_factory):
    path = tmp_path_factory.mktemp("resize") / "resize.so"
    library = ctypes.CDLL(compile_resize(path, "-shared", "-fPIC"))

    def resize_crop(image, top, bottom, left, right, height, width):
        assert image.flags.c_contiguous
        assert image.dtype == np.uint8
        # The canary shows a write behind the end.
        result = np.full((height * width + 1, 3), 77, np.uint8)
        library.resize_crop(
            ctypes.c_void_p(image.ctypes.data),
            *(image.shape[0], image.shape[1], top, bottom, left, right),
            *(ctypes.c_void_p(result.ctypes.data), height, width),
        )
        assert (result[-1] == 77).all()
        return result[:-1].reshape(height, width, 3)

    return resize_crop


def slow_area(n, m):
    """[m, n]: the share of each of n inputs in each of m outputs, by length in common."""
    weights = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            common = min(Fraction(i + 1, m), Fraction(j + 1, n)) - max(
                Fraction(i, m), Fraction(j, n)
            )
            weights[i, j] = max(common, 0) * m
    return weights


def slow_linear(n, m):
    """[m, n]: as OpenCV documents in code, linear with the coordinates of INTER_AREA, exactly."""
    weights = np.zeros((m, n))
    for i in range(m):
        j = math.floor(i * Fraction(n, m))
        fraction = max(i + 1 - (j + 1) * Fraction(m, n), 0)
        weights[i, j] += 1 - fraction
        weights[i, min(j + 1, n - 1)] += fraction
    return weights


def slow_resize(image, height, width):
    """[height, width, 3] float64, not rounded."""
    rows, cols, _ = image.shape
    weights = slow_area if height <= rows and width <= cols else slow_linear
    sums = np.tensordot(weights(rows, height), image.astype(float), 1)
    return np.tensordot(weights(cols, width), sums, (1, 1)).swapaxes(0, 1)


@st.composite
def crops(draw):
    rows, cols = draw(LENGTHS), draw(LENGTHS)
    top, left = draw(st.integers(0, rows - 1)), draw(st.integers(0, cols - 1))
    bottom, right = draw(st.integers(top + 1, rows)), draw(st.integers(left + 1, cols))
    return (rows, cols), (top, bottom, left, right)


@settings(deadline=None, max_examples=200)
@given(crop=crops(), height=LENGTHS, width=LENGTHS, seed=st.integers(0, 2**32))
def test_resize_is_the_nearest_level_of_the_crop_alone(resize_crop, crop, height, width, seed):
    shape, (top, bottom, left, right) = crop
    inside = np.random.default_rng(seed).integers(0, 256, (bottom - top, right - left, 3), np.uint8)
    exact = slow_resize(inside, height, width)
    for poison in (0, 255):
        image = np.full((*shape, 3), poison, np.uint8)
        image[top:bottom, left:right] = inside
        result = resize_crop(image, top, bottom, left, right, height, width)
        assert np.abs(result - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (500, 224), (224, 700)])
def test_resize_of_a_photo_sized_crop(resize_crop, size):
    image = np.random.default_rng(0).integers(0, 256, (480, 400, 3), np.uint8)
    result = resize_crop(image, 7, 470, 11, 390, *size)
    assert np.abs(result - slow_resize(image[7:470, 11:390], *size)).max() <= 0.5 + 1e-9


def test_ties_go_up(resize_crop):
    levels = np.arange(255, dtype=np.uint8)
    image = np.stack([levels, levels + 1])[:, :, None].repeat(3, 2)
    assert (resize_crop(image, 0, 2, 0, 255, 1, 255) == image[1:]).all()


def test_resize_reads_and_writes_nothing_outside(tmp_path):
    program = compile_resize(
        tmp_path / "all", "-fsanitize=address,undefined", "-g", source=RESIZE + RESIZE_ALL
    )
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def opencv_misplaces(n, m):
    """Whether OpenCV's float64 coordinates fall on the wrong side of a pixel's border, which makes
    it take the pixel before: n / m · i comes out just below a whole number that it is.
    """
    return any(math.floor(i * (1 / (m / n))) != i * n // m for i in range(m))


@settings(deadline=None, max_examples=200)
@given(crop=crops(), height=LENGTHS, width=LENGTHS, seed=st.integers(0, 2**32))
def test_resize_is_opencvs(resize_crop, crop, height, width, seed):
    """To one level: OpenCV rounds its weights (to 1/2048 when growing, and it leaves out shares
    below 1/1000 of a pixel when shrinking), which is less than half a level, and ours is exact.
    """
    cv2 = pytest.importorskip("cv2")
    shape, (top, bottom, left, right) = crop
    if height > bottom - top or width > right - left:
        assume(not opencv_misplaces(bottom - top, height))
        assume(not opencv_misplaces(right - left, width))
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    ours = resize_crop(image, top, bottom, left, right, height, width).astype(int)
    size = (width, height)
    theirs = cv2.resize(image[top:bottom, left:right], size, interpolation=cv2.INTER_AREA)
    assert np.abs(ours - theirs).max() <= 1


@pytest.fixture
def install(tmp_path):
    """Runs install_ffcv.sh for an environment without FFCV, with only the tools named in PATH."""
    venv.create(tmp_path / "venv", with_pip=False)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "mktemp", "rm"):
        (tools / tool).symlink_to(shutil.which(tool))
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for module in ("torch.py", "pip.py"):
        (stubs / module).touch()

    def install(python=tmp_path / "venv/bin/python", **environment):
        return subprocess.run(
            [tools / "bash", SCRIPTS / "install_ffcv.sh", python],
            env={"PATH": str(tools), "PYTHONPATH": str(stubs), "TMPDIR": str(tmp_path)}
            | environment,
            capture_output=True,
            text=True,
        )

    install.tools = tools
    return install


def assert_fails_in_one_line(done, pattern):
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"install_ffcv.sh: {pattern}\n", done.stderr), done.stderr


def test_a_missing_compiler_is_one_line(install, tmp_path):
    before = set(tmp_path.iterdir())
    assert_fails_in_one_line(
        install(),
        r"missing g\+\+.*: install g\+\+.* \(Debian, Ubuntu\), gcc-c\+\+.* \(Fedora\)"
        r" or cxx-compiler.* \(conda-forge\)",
    )
    assert set(tmp_path.iterdir()) == before, "temporary files stay behind"


def test_the_compiler_asked_for_is_the_one_missed(install):
    assert_fails_in_one_line(install(CXX="clang++-99"), r"missing clang\+\+-99.*")


def test_root_installs_just_what_is_missing(install, tmp_path):
    log = tmp_path / "log"
    apt_get = install.tools / "apt-get"
    apt_get.write_text(f'#!{install.tools}/bash\necho "$@" >>{log}\n')
    apt_get.chmod(0o755)
    assert_fails_in_one_line(install(), r"missing g\+\+.*")
    if os.geteuid() != 0:
        assert not log.exists()
        return
    update, installed = log.read_text().splitlines()
    assert update == "update -qq"
    packages = installed.removeprefix("install -y -qq --no-install-recommends ").split()
    assert packages[0] == "g++"
    if Path("/usr/include/turbojpeg.h").exists():
        assert "libturbojpeg0-dev" not in packages


def test_torch_comes_first(install):
    assert_fails_in_one_line(install(PYTHONPATH=""), ".* lacks torch or pip: .*")


def test_a_python_that_is_none(install):
    assert_fails_in_one_line(install("/nowhere/python"), "/nowhere/python does not run: .*")
