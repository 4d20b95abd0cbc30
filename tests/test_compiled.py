"""The kernels as machine code, compiled ahead of time for GPUs that need not be there."""

import ast
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.3", reason="needs Triton 3.3")

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@pytest.fixture(scope="module")
def compile_all():
    """Compile in fresh processes, since this one may be interpreting the kernels."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        yield lambda jobs: list(pool.map(_compile, jobs))


def _compile(job):
    from classroomkd.kernels.ahead_of_time import compile_kernel

    kernel, options = job
    return compile_kernel(kernel, **options)


# The widest load that 16-byte registers and the rows' alignment allow: a row of 100 bfloat16
# numbers is 200 bytes long, which 8 divides and 16 does not.
@pytest.mark.parametrize(
    ("n_classes", "dtype", "width"),
    [(100, "fp32", 16), (100, "bf16", 8), (1000, "fp32", 16), (1000, "bf16", 16)],
)
def test_one_wide_load_a_logit_and_no_spill(compile_all, n_classes, dtype, width):
    n_mentors = 6
    jobs = [
        (
            "classroom",
            {
                "n_classes": n_classes,
                "n_mentors": n_mentors,
                "dtype": dtype,
                "target": target,
                "reduction": "none",  # nothing but the rows: no counting, no summing
            },
        )
        for target in TARGETS
    ]
    for target, got in zip(TARGETS, compile_all(jobs), strict=True):
        assert got.spilled_bytes == 0, target
        threads = got.blocks.num_warps * (32 if target.startswith("cuda") else 64)
        elements = (n_mentors + 1) * got.blocks.ROWS * got.blocks.BLOCK_C
        n_loads, rest = divmod(elements * BYTES[dtype], threads * width)
        assert rest == 0
        # Besides the rows at most the target class, 8 bytes, and the one logit of each row that it
        # names; AMD's compiler may take these as scalars.
        rows = Counter({width: n_loads})
        others = Counter({8: 1}) + Counter({BYTES[dtype]: n_mentors + 1})
        assert rows <= Counter(got.loads) <= rows + others, f"{target}: {got.loads}"


MODES = {
    "correct": {"knowledge_filter": "correct"},
    "correct_and_better": {"knowledge_filter": "correct_and_better", "rounded": True},
    "unfiltered": {"knowledge_filter": "none", "mentoring": "fixed"},
    "dtkd": {"mentoring": "dtkd"},
    "unmentored": {"mentoring": "none"},
    "batch": {"ranking": "batch", "rounded": True},
    "probabilities": {"class_probabilities": True},
    "batch_probabilities": {"ranking": "batch", "class_probabilities": True},
    "forward": {"with_grad": False, "with_report": True},
    "autograd": {"finished_grad": False},
    "fp16": {"dtype": "fp16"},
}


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_no_mode_spills(compile_all, target):
    sizes = {"n_classes": 100, "n_mentors": 6, "target": target}
    jobs = [("classroom", sizes | {"finished_grad": True} | mode) for mode in MODES.values()]
    jobs += [("confidence", sizes), ("scale_rows", sizes)]
    jobs += [("classroom", sizes | {"n_classes": 10, "n_mentors": 1})]
    long = sizes | {"n_classes": 32_768}
    jobs += [("classroom", long), ("classroom", long | {"class_probabilities": True})]
    jobs += [("classroom", long | MODES["batch"]), ("classroom", long | MODES["dtkd"])]
    jobs += [("confidence", long)]
    # One row, one class, one mentor: lengths and strides of 1 are constants to Triton.
    one = {"n_classes": 1, "n_mentors": 1, "n_rows": 1, "target": target, "with_report": True}
    jobs += [("classroom", one), ("classroom", one | {"class_probabilities": True})]
    jobs += [("confidence", one), ("scale_rows", one)]
    for (kernel, mode), got in zip(jobs, compile_all(jobs), strict=True):
        assert got.spilled_bytes == 0, f"{kernel} {mode}: {got}"


def _compile_squeezed(target, n_classes):
    """A row in the registers of one warp, where it cannot fit."""
    from classroomkd.kernels import ahead_of_time
    from classroomkd.kernels.launch import Blocks

    original, ahead_of_time.blocks = ahead_of_time.blocks, lambda *_: Blocks(n_classes, 1, 1)
    try:
        return ahead_of_time.compile_kernel(
            "classroom", n_classes=n_classes, n_mentors=6, target=target
        )
    finally:
        ahead_of_time.blocks = original


def test_the_reader_sees_spills_and_narrow_loads():
    """The counts above are only worth something if they can come out otherwise."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        squeezed = pool.map(_compile_squeezed, ["cuda:90", "hip:gfx942"], [1024, 4096])
        sizes = {"n_classes": 99, "n_mentors": 2, "target": "cuda:90", "reduction": "none"}
        narrow = pool.submit(_compile, ("classroom", sizes))
        assert all(got.spilled_bytes > 0 for got in squeezed)
        # Rows of 99 floats: four bytes a load, four of them a thread; the targets beside.
        assert narrow.result().loads == {4: 12 + 3, 8: 1}


def test_bounds_of_unrolled_loops_are_constants_to_triton_3_3():
    """There ``min`` and ``max`` of two constants are tensors, which such loops refuse."""
    kernels = Path(__file__).parent.parent / "kernels"
    loops = [
        node
        for file in kernels.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.static_range"
    ]
    assert len(loops) > 10
    for loop in loops:
        called = {ast.unparse(n.func) for n in ast.walk(loop) if isinstance(n, ast.Call)}
        assert called <= {"tl.static_range", "len"}, ast.unparse(loop)
