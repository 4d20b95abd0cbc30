"""PTX text to a list of instructions: what Triton's compiler writes, and an error for all else."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WIDTH = {"pred": 0} | {
    kind + str(bits): bits // 8
    for bits in (8, 16, 32, 64)
    for kind in ("b", "u", "s", "f")
    if (kind, bits) != ("f", 8)
}
WIDTH |= {"bf16": 2, "f16x2": 4, "bf16x2": 4, "f32x2": 8}
"""Bytes of each type; a predicate has none."""


class PtxError(Exception):
    """PTX that cannot be executed, or that may not do what it does."""


class UnknownInstructionError(PtxError):
    """An instruction, or a form of one, that has no semantics here yet."""


@dataclass(frozen=True)
class Register:
    """``%r12``, of so many bytes."""

    name: str
    width: int


@dataclass(frozen=True)
class Immediate:
    """A number as it is written."""

    text: str

    def bits(self, width: int) -> int:
        """The number in so many bytes; floating-point ones are written as their bits."""
        text = self.text
        value = int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text.rstrip("U"), 0)
        return value & (256**width - 1) if width else int(value != 0)


@dataclass(frozen=True)
class Symbol:
    """A label, a special register such as ``%tid.x``, a parameter or the shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, …}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``%p1|%p2``, the two destinations of a comparison."""

    items: tuple[Operand, ...]


Operand = Register | Immediate | Symbol | Address | Vector | Pair


@dataclass(frozen=True)
class Instruction:
    """One statement, with the line of the PTX and that of the Triton source it stands for."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    text: str
    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.text!r}, PTX line {self.line}, {self.source}"


@dataclass
class Kernel:
    """A parsed entry point."""

    name: str
    parameters: dict[str, str]
    """Name → type, in order."""
    n_threads: int
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Label → index into ``code``."""


_NUMBER = re.compile(r"0[fFdD][0-9a-fA-F]+|-?0[xX][0-9a-fA-F]+U?|-?\d+U?")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)


class _Body:
    """The statements of a kernel's body, one after another."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.widths: dict[str, int] = {}  # by the letters before a register's number
        self.source = ""

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text[0] == "{" and text[-1] == "}":
            return Vector(tuple(self.operand(part) for part in text[1:-1].split(",")))
        if match := _ADDRESS.fullmatch(text):
            base = self.operand(match[1])
            assert isinstance(base, Register | Symbol | Immediate)
            return Address(base, int(match[2] or "0", 0))
        if _NUMBER.fullmatch(text):
            return Immediate(text)
        if "|" in text:
            return Pair(tuple(self.operand(part) for part in text.split("|")))
        if not re.fullmatch(r"[%$\w.]+", text):
            raise ValueError(f"operand {text!r}")
        width = self.widths.get(text.rstrip("0123456789"))
        return Symbol(text) if width is None else Register(text, width)

    def statement(self, text: str, line: int) -> Instruction | None:
        """An instruction, or None where there is nothing to execute."""
        if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(%\w+)<\d+>", text):
            self.widths[match[2]] = WIDTH[match[1]]
            return None
        if text.startswith(".loc"):
            file, number = text.split()[1:3]
            self.source = f"{self.files.get(file, file)}:{number}"
            return None
        if text.startswith(".pragma"):
            return None
        match = _STATEMENT.fullmatch(text)
        if not match:
            raise ValueError("statement")
        operands = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", match[4])
        guard = self.operand(match[2]) if match[2] else None
        assert guard is None or isinstance(guard, Register)
        return Instruction(
            tuple(re.split(r"\.|(?=::)", match[3])),
            tuple(self.operand(each) for each in operands if each.strip()),
            guard,
            match[1] == "!",
            text,
            line,
            self.source,
        )


def parse(ptx: str) -> Kernel:
    """The one kernel in a PTX text. Raises PtxError with the line that it cannot read."""
    head = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{", ptx)
    threads = head and re.search(r"\.reqntid\s+(\d+)", head[3])
    if not head or not threads:
        raise PtxError("no kernel with a fixed number of threads in this PTX")
    parameters = re.findall(r"\.param\s+\.(\w+)\s.*?(\w+)\s*(?:,|$)", head[2], re.M)
    kernel = Kernel(head[1], {name: kind for kind, name in parameters}, int(threads[1]))
    files = re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', ptx, re.M)
    body = _Body(dict(files))
    first = ptx.count("\n", 0, head.end()) + 1
    for line, text in enumerate(ptx[head.end() :].split("\n"), first):
        text = text.split("//")[0].strip()
        if text == "}":
            break
        if match := re.match(r"([$\w]+):\s*", text):
            kernel.labels[match[1]] = len(kernel.code)
            text = text[match.end() :]
        # A .loc is the one statement without a semicolon.
        for statement in filter(None, map(str.strip, text.split(";"))):
            try:
                instruction = body.statement(statement, line)
            except (ValueError, KeyError, AssertionError) as error:
                raise PtxError(f"cannot read {statement!r}, PTX line {line}: {error}") from None
            if instruction:
                kernel.code.append(instruction)
    return kernel
