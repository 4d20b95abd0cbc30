"""Fixtures of all tests, and what pytest skips where a package is missing."""

import contextlib
import gc
import itertools
import math
import os
import time
import zlib
from pathlib import Path

import pytest
import torch

from classroomkd.loss import fused, plans
from ffcv_required import why_skipped
from interpreter import INTERPRETED, TRITON

# What a machine that is lent for its GPU may lack; tests that need it are skipped.
_OPTIONAL = {
    "hypothesis",
    "numba",
    "omegaconf",
    "PIL",
    "matplotlib",
    "psutil",
    "rich",
    "safetensors",
}
_OPTIONAL |= {"sklearn", "yaml"}
_ENDS = pytest.StashKey[float]()
# Each launch copies its tensors; and tiles of few columns, which no launch has, do not compile.
_NOT_ON_PTX = {"test_images_beyond_two_gigabytes", "test_tiles_and_extremes"}
_NOT_ON_PTX |= {"test_every_option_tiled", "test_many_mentors_tiled"}
_CASES = 16  # of so many cases of a test, the sample on PTX has one
# Of these, so many cases of a file: they are about what is done with the kernels' results.
_ABOVE_THE_KERNELS = {"test_linear.py", "test_operator.py", "test_plans.py", "test_rows.py"}
_ABOVE_THE_KERNELS |= {"test_a_mentor_weight_for_all", "test_a_mentor_weight_of_one_changes_no_bit"}
_ABOVE_THE_KERNELS |= {"test_mentor_weight_of_any_stride_and_dtype", "test_target_dtypes"}
_ABOVE_THE_KERNELS |= {"test_no_valid_row", "test_inputs_are_not_written_to"}
_ABOVE_THE_KERNELS |= {"test_upstream_gradients", "test_a_second_derivative_raises"}
_ABOVE_THE_KERNELS |= {"test_gradients_reach_the_student_only", "test_without_gradient"}
_ABOVE_THE_KERNELS |= {"test_operator_contract", "test_module", "test_limits_are_named"}
_ABOVE_THE_KERNELS |= {"test_nothing_is_copied", "test_who_lies_otherwise_is_copied"}
_ABOVE_THE_KERNELS |= {"test_more_classes_are_copied_to_rows", "test_compiled", "test_odd_shapes"}


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=math.inf, help="begin no test after so many")
    parser.addoption("--share", metavar="I/N", help="every Nth test, from the Ith on")
    parser.addoption(
        "--every-ptx", action="store_true", help="all tests of kernels on PTX, not a sample of them"
    )
    parser.addoption(
        "--perturb", type=int, metavar="SEED", help="on PTX, let ex2, lg2, rcp, rsqrt and div err"
    )


def pytest_configure(config):
    config.stash[_ENDS] = time.monotonic() + config.getoption("seconds")


def _is_drawn(item):
    """Whether Hypothesis draws the examples, within the test or around it."""
    test = getattr(item, "obj", None)
    return getattr(test, "is_hypothesis_test", False) or getattr(test, "drawn", False)


def _ptx_to_leave_out(items, every):
    """Of the tests that have PTX as their ``device``, those that are not to run on it."""

    def sampled_with(item):
        above = _ABOVE_THE_KERNELS & {item.path.name, item.originalname}
        return item.path.name, item.path.name if above else item.originalname

    on_ptx = [item for item in items if _parameter(item) == "ptx"]
    on_ptx.sort(key=sampled_with)
    for (_, test), cases in itertools.groupby(on_ptx, sampled_with):
        drawn_at = zlib.crc32(test.encode())
        cases = [*cases]
        for first in range(0, len(cases), _CASES):
            some = cases[first : first + _CASES]
            kept = some[drawn_at % len(some)]
            for item in some:
                sampled = item is kept and not _is_drawn(item)  # each draw is compiled
                if item.originalname in _NOT_ON_PTX or not (every or sampled):
                    yield item


def _parameter(item):
    return item.callspec.params.get("device") if hasattr(item, "callspec") else None


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by -m
def pytest_collection_modifyitems(config, items):
    for item in items:
        if _is_drawn(item):
            item.add_marker("property")
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
    left_out = set(_ptx_to_leave_out(items, config.getoption("every_ptx")))
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]
    # Files with long tests come first, so that processes side by side end together.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if share := config.getoption("share"):
        first, step = map(int, share.split("/"))
        items[:] = items[first::step]


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.stash[_ENDS]:
        item.session.shouldstop = "out of time"
        pytest.skip("out of time")
    if item.get_closest_marker("ffcv") and (reason := why_skipped()):
        pytest.skip(reason)


class _Module(pytest.Module):
    """A test file, skipped where an optional package is missing."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            name = (getattr(cause, "name", None) or "").partition(".")[0]
            if isinstance(cause, ModuleNotFoundError) and name in _OPTIONAL:
                pytest.skip(f"{self.path.name}: not installed: {name}", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return _Module.from_parent(parent, path=module_path)


@pytest.fixture(
    params=[
        "cpu",
        "interpreter",
        pytest.param("ptx", marks=pytest.mark.ptx),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def device(request, monkeypatch):
    """A device on which `fused_classroom_loss` runs its fused pass.

    "cpu" is the pass that numba compiles, which only the loss has; the others are the kernels. On
    "ptx", which is the CPU too, they are compiled and their PTX is executed, for one of three
    targets, in an order of programs that differs from test to test. What that finds fails the test.
    """
    if request.param == "cpu":
        if "loss" not in request.path.parts:
            pytest.skip("a test of kernels")
        pytest.importorskip("numba")
        monkeypatch.setattr(fused, "_INTERPRET", False)
        yield torch.device("cpu")
        return
    if not TRITON:
        pytest.skip("no Triton")
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if INTERPRETED:
            pytest.skip("TRITON_INTERPRET=1: this process interprets the kernels")
        yield torch.device("cuda")
    elif request.param == "ptx":
        from tests.ptx import TARGETS, ptx_execution

        number = zlib.crc32(request.node.nodeid.encode())
        target = TARGETS[number % len(TARGETS)]
        perturb = request.config.getoption("perturb")
        with ptx_execution(target, seed=number, perturb=perturb) as run:
            yield torch.device("cpu")
            monkeypatch.undo()  # first, lest it put back later what the execution has replaced
        assert not run.findings, "\n".join(map(str, run.findings))
    else:
        if not INTERPRETED:
            pytest.skip("this process compiles the kernels for its GPU")
        monkeypatch.setattr(fused, "_INTERPRET", True)
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_plans_of_earlier_tests():
    """Else what a test replaces may be passed by, as an earlier call has found it."""
    plans._kind.cache_clear()


@pytest.fixture(scope="module")
def small_heap():
    """Leaves what earlier tests imported out of a module's collections, which take seconds each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def one_thread():
    """Networks as small as those of runs in tests only wait for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory():
    """Fill every freshly allocated tensor with NaN, so that an element left unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    """What runs pack is neither left in the user's cache nor found there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASSROOMKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def pages():
    """Runs end with their pages, as they do outside of tests."""


@pytest.fixture(autouse=True)
def _no_pages(request, monkeypatch):
    """Elsewhere they leave an empty one: drawing takes as long as all training of a tiny run."""
    runs = {"cli", "runs", "training"}
    if request.path.parent.name in runs and "pages" not in request.fixturenames:
        with contextlib.suppress(ImportError):  # as where the loss alone is tested
            from classroomkd.runs import training_run

            monkeypatch.setattr(
                training_run, "write_report", lambda out: (out / "report.html").touch()
            )


@pytest.fixture(scope="session")
def shared_file(tmp_path_factory):
    """What takes long to make, made by the first process of pytest that wants it."""

    def load(name, make):
        from filelock import FileLock  # which torch brings

        folder = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent
        path = folder / f"{name}.pt"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                torch.save(make(), path)
        return torch.load(path, weights_only=False)

    return load


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """The store of mentors, an empty one."""
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mentors"


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The names of the networks that are trained."""
    from classroomkd.runs import networks

    names = []

    class Spy(networks.Trainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            names.append(self.name)

    monkeypatch.setattr(networks, "Trainer", Spy)
    return names


@pytest.fixture
def states_kept(monkeypatch) -> None:
    """Finished networks keep their training states, as if killed just before they go."""
    from classroomkd.runs.checkpoints import Checkpoints

    monkeypatch.setattr(Checkpoints, "clear", lambda _: None)


@pytest.fixture
def make(tmp_path):
    """Makes any kind of loader, closed when the test ends."""
    from loader_cases import Makers

    makers = Makers(tmp_path)
    yield makers
    for loader in makers.opened:
        loader.close()
