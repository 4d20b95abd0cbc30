"""The machine code of a cubin: instructions with what the compiler tells the hardware's scheduler.

An instruction's 128 bits end with five fields: how many cycles its warp waits before it issues the
next one, which of six scoreboards it holds until its result is written and which until its operands
are read, and which of them it waits for itself.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# The unit that executes an opcode: the first pattern that it begins with.
UNITS = {
    "unknown": r"UTMA|UBLKCP|SYNCS|HGMMA|WGMMA|HMMA|IMMA|DMMA|CALL|RET|BRX|JMP|UCGABAR|ELECT",
    "async_wait": r"DEPBAR",
    "async_commit": r"LDGDEPBAR",
    "async_copy": r"LDGSTS",
    "load": r"LDG\b|LD\.E|LDL",
    "store": r"STG|ST\.E|STL",
    "shared": r"LDS|STS|LDSM|STSM",
    "atomic": r"ATOM|RED\.|REDG",
    "fence": r"MEMBAR",
    "barrier": r"BAR",
    "fma": r"FADD|FMUL|FFMA|HFMA2|HADD2|HMUL2|FSWZ",
    "imad": r"IMAD",
    "special": r"MUFU|F2I|I2F\b|F2F|FRND|POPC|FLO|BREV",
    "shuffle": r"SHFL|VOTE\b|REDUX|MATCH",
    "constant": r"ULDC|LDC|S2R|S2UR",
    "uniform": r"U[A-Z]|R2UR|VOTEU",
    "control": r"BRA|EXIT|BSSY|BSYNC|NOP|WARPSYNC|BMOV|ERRBAR|CGAERRBAR|CCTL|BREAK|YIELD",
    "alu": r"",
}
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+?)(?:\s+(.*?))?\s*;")
_HIGH_WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")


class Instruction(NamedTuple):
    """One line of the disassembly."""

    address: int
    guard: str  # "P0", "!UP1", or "" where it always executes
    opcode: str  # with its modifiers, "LDG.E.128"
    operands: tuple[str, ...]
    unit: str  # of UNITS
    stall: int  # cycles until the warp's next instruction
    sets: int  # the scoreboard held until the result is there; 7 for none
    reads: int  # the scoreboard held until the operands are read; 7 for none
    waits: int  # a bit for each scoreboard that must be free

    @property
    def width(self) -> int:
        """Bytes a thread of a load or store."""
        size = re.search(r"\.[US]?(8|16|64|128)\b", self.opcode)
        return int(size[1]) // 8 if size else 4


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin with one kernel, in the order of their addresses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOL, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = text.splitlines()
    code = []
    for line, following in itertools.pairwise(lines):
        found = _LINE.match(line)
        if not found:
            continue
        address, guard, opcode, operands = found.groups()
        control = int(_HIGH_WORD.search(following)[1], 16) >> 41
        code.append(
            Instruction(
                int(address, 16),
                guard or "",
                opcode,
                tuple(re.split(r",\s*", operands.replace(".reuse", ""))) if operands else (),
                next(name for name, of in UNITS.items() if re.match(of, opcode)),
                stall=control & 15,
                sets=control >> 5 & 7,
                reads=control >> 8 & 7,
                waits=control >> 11 & 63,
            )
        )
    return code
