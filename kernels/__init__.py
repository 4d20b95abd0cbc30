"""Triton only: device functions, the kernels made of them, and their launch.

Imported as ``classroomkd.kernels``. The loss is one kernel, ``classroom``: rows are ``held`` in
registers or ``swept``, with their ``kd`` terms; ``ranks`` is what is done once a network, ``batch``
what the rows of a batch do together, ``device`` the arithmetic that all share. ``scaling`` is
autograd's backward, ``augment`` the resident loader's batches. ``blocks`` cuts the work up,
``launch`` makes the outputs, with the states of ``counters``; ``ahead_of_time`` compiles everything
for GPUs that this machine does not have. ``report_layout`` is the order of a report's numbers.
Nothing here checks arguments: they come checked from ``classroomkd.loss`` and ``classroomkd.data``.
"""

from __future__ import annotations


def triton_obstacle(major: int, minor: int) -> str | None:
    """What keeps kernels that need this Triton, or a newer one, from running; None if nothing."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (major, minor):
        return f"Triton {triton.__version__} is too old (the kernels need {major}.{minor})"
    return None
