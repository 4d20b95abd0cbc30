"""The Triton code: device functions, kernels and their launch.

Imported as ``classroomkd.kernels``. The loss is one kernel, ``one_pass``: rows are ``held`` in
registers, loaded in ``pieces``, or ``swept``, with their ``kd`` terms; dense logits are read along
``positions``. ``ranks`` has the work per network (gate, temperatures, weights), ``batch`` the work
across rows (valid count, sums), and ``device`` shared arithmetic. ``scaling`` is autograd's
backward, and ``augment`` makes the resident loader's batches.

``layout`` says which memory is read in place, ``blocks`` chooses tile sizes, ``launch_plan`` the
arguments that are not tensors, and ``launch`` allocates outputs and launches, with the states of
``counters``; ``ahead_of_time`` cross-compiles such launches of ``meta_calls``. ``report_layout`` is
the order of a report's numbers. Nothing here checks arguments: ``classroomkd.loss`` and
``classroomkd.data`` have done so.
"""

from __future__ import annotations


def triton_obstacle(major: int, minor: int) -> str | None:
    """Why kernels that need at least this Triton version cannot run; None if they can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (major, minor):
        return f"Triton {triton.__version__} is too old (the kernels need {major}.{minor})"
    return None
