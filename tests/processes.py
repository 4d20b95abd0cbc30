"""Processes of their own, forked from one that has imported what takes seconds and done nothing."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from patience import LAST_RESORT

_IMPORTED = ["torch", "torch._dynamo", "torch.distributed", "numba", "matplotlib.figure", "rich"]
_IMPORTED += ["safetensors.torch", "omegaconf", "classroomkd.runs.training_run"]
_IMPORTED += ["classroomkd.report.page", "classroomkd.loss.methods", "classroomkd.data.pixels"]


@functools.cache
def context():
    """The start method, whose server has one thread and no kernels that are interpreted."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return found


def _execute(code, arguments, environment, folder, outputs):
    for number, file in enumerate(outputs, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


# What ``python -m classroomkd`` does.
COMMAND = "import sys; from classroomkd import cli; sys.exit(cli.main())"


class Running:
    """Python code in a process, which has ``returncode``, ``stdout`` and ``stderr`` once it ends.

    As ``subprocess.Popen([sys.executable, "-c", code])`` with an environment that has these too.
    """

    def __init__(self, code: str, *arguments: object, cwd: Path | None = None, **environment: str):
        self._outputs = [Path(tempfile.mkstemp()[1]) for _ in range(2)]
        self._process = context().Process(
            target=_execute,
            args=(
                textwrap.dedent(code),
                [*map(str, arguments)],
                os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                cwd or Path.cwd(),
                self._outputs,
            ),
        )
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.exitcode is None

    def wait(self) -> Running:
        """Itself, ended; killed if it takes too long."""
        self._process.join(LAST_RESORT)
        self.kill()
        self._process.join()
        self.returncode = self._process.exitcode
        self.stdout, self.stderr = (file.read_text() for file in self._outputs)
        for file in self._outputs:
            file.unlink()
        return self


@contextlib.contextmanager
def group_of_two(rank: int, folder: str) -> Iterator[None]:
    """The default process group, over gloo, with another process.

    Nothing may hold it afterwards. Then its threads end with it: one that frees a tensor while
    Python finalizes aborts the process.
    """
    import torch.distributed.nn.functional  # imported later, its defaults would hold the group

    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    yield
    gc.collect()
    torch.distributed.destroy_process_group()
