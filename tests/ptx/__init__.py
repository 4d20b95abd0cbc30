"""Triton's compiled kernels, executed on the CPU from their PTX and watched while they run.

    with ptx_execution("cuda:90") as run:
        loss, grad = fused_classroom_loss_and_grad(student_logits, mentor_logits, targets)
    assert not run.findings

``parse.py`` reads PTX, ``arithmetic.py`` knows what an instruction computes, ``memory.py`` judges
what it loads and stores, ``machine.py`` runs the threads of all programs, and ``execution.py``
leads the project's launches here. ``docs/ptx.md`` says what this proves and what it does not.
"""

from tests.ptx.execution import TARGETS, Run, ptx_execution
from tests.ptx.parse import PtxError, UnknownInstructionError

__all__ = ["TARGETS", "PtxError", "Run", "UnknownInstructionError", "ptx_execution"]
