"""Names and sizes of networks, in a module that does not import torch."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from classroomkd.errors import UserError

PRETRAINED = "pretrained"  # stands for the weights from a network's library
# The suffixes of checkpoints.
SUFFIXES = (".bin", ".ckpt", ".npy", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".th")


class Size(NamedTuple):
    """The size of a network with 100 classes, for one image of 32×32 pixels."""

    parameters: int
    flops: int
    """Floating-point operations of a forward pass, counted by `torch.utils.flop_counter`."""


SIZES = {
    "resnet8": Size(83_892, 25_014_784),
    "resnet14": Size(181_108, 53_326_336),
    "resnet20": Size(278_324, 81_637_888),
    "resnet32": Size(472_756, 138_260_992),
    "resnet44": Size(667_188, 194_884_096),
    "resnet56": Size(861_620, 251_507_200),
    "resnet110": Size(1_736_564, 506_311_168),
    "resnet8x4": Size(1_233_540, 354_142_208),
    "resnet32x4": Size(7_433_860, 2_166_081_536),
    "resnet20_a": Size(275_572, 81_113_600),
    "resnet32_a": Size(470_004, 137_736_704),
    "resnet44_a": Size(664_436, 194_359_808),
    "resnet56_a": Size(858_868, 250_982_912),
    "resnet110_a": Size(1_733_812, 505_786_880),
    "resnet18": Size(11_220_132, 1_110_937_600),
    "resnet34": Size(21_328_292, 2_318_897_152),
    "resnet50": Size(23_705_252, 2_596_028_416),
    "wrn_16_1": Size(180_916, 53_326_336),
    "wrn_16_2": Size(703_284, 202_236_928),
    "wrn_16_8": Size(11_007_540, 3_096_383_488),
    "wrn_28_10": Size(36_536_884, 10_486_772_736),
    "wrn_40_1": Size(569_780, 166_572_544),
    "wrn_40_2": Size(2_255_156, 655_221_760),
    "vgg8": Size(3_965_028, 192_385_024),
    "vgg11": Size(9_277_284, 418_877_440),
    "vgg13": Size(9_462_180, 569_872_384),
    "vgg16": Size(14_774_436, 796_364_800),
    "vgg19": Size(20_086_692, 1_022_857_216),
    "mobilenetv2": Size(812_836, 13_047_296),
    "shufflenetv1": Size(949_258, 77_382_912),
    "shufflenetv2": Size(1_355_528, 89_008_896),
}
"""The zoo, in its listed order."""


def names() -> list[str]:
    """The names of the zoo's networks."""
    return list(SIZES)


def is_external(name: str) -> bool:
    """Whether ``name`` is a network of torchvision or timm, not of the zoo."""
    return name.startswith(("tv:", "timm:"))


def is_code(source: str) -> bool:
    """Whether ``source`` names a callable: ``FILE.py:NAME``, or ``package.module:NAME``.

    A ``FILE.py`` without a name counts too, so that the error can say what is missing.
    """
    place, colon, name = source.rpartition(":")
    if source.endswith(".py") or (place.endswith(".py") and name.isidentifier()):
        return True
    modules = place.split(".")
    return (
        bool(colon)
        and not is_external(source)
        and name.isidentifier()
        and all(module.isidentifier() for module in modules)
        and Path(place).suffix not in SUFFIXES
        and not Path(place).is_file()
    )


def split_code(source: str) -> tuple[str, str]:
    """The file or module of a callable, and its name; the name is empty if there is none."""
    if source.endswith(".py"):
        return source, ""
    place, _, name = source.rpartition(":")
    return place, name


def code_file(source: str) -> Path:
    """The file that defines the network ``source`` of `is_code`.

    The current folder counts among those that modules are imported from. Raises UserError if there
    is no such file.
    """
    place, name = split_code(source)
    if place.endswith(".py"):
        file = Path(place).expanduser()
        if not file.is_file():
            raise UserError(f"there is no file {file}, which {source} names")
        if not name:
            raise UserError(f"{source} needs the name of what makes the network, {source}:NAME")
        return file
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    from classroomkd.torchvision import retried  # which imports torch, as most such modules do

    try:
        found = retried(lambda: importlib.util.find_spec(place))
    except Exception as error:  # the packages above it may raise anything
        raise UserError(f"cannot import {place} for {source}: {error}") from None
    if found is None or not found.has_location or found.origin is None:
        raise UserError(f"there is no module {place}, which {source} names")
    return Path(found.origin)


def code_digest(source: str) -> str:
    """The SHA-256, in hexadecimal, of `code_file`; UserError if there is none."""
    return hashlib.sha256(code_file(source).read_bytes()).hexdigest()


def label(source: str) -> str:
    """A network's name in messages and records, without the folders of a user's file."""
    place, name = split_code(source) if is_code(source) else ("", "")
    return f"{Path(place).name}:{name}" if place.endswith(".py") else source


def split_weights(text: str) -> tuple[str, str | None]:
    """The name and the weights of ``NAME=WEIGHTS``; the weights are None if there are none."""
    found = re.fullmatch(r"(.+?:[\w.-]+|[^=:]+)=(.*)", text)
    if not found or Path(text).exists():
        return text, None
    name, weights = found.groups()
    named = is_external(name) or is_code(name) or name in SIZES
    return (name, weights) if named else (text, None)


def split_entry(source: str | Path) -> tuple[Path, str | None]:
    """The path, with ``~`` expanded, and the entry of ``FILE:ENTRY``.

    The entry is None if ``source`` is an existing path or has no file before a colon.
    """
    text = os.path.expanduser(source)
    if not Path(text).exists():
        for colon in re.finditer(":(?=.)", text):
            file = Path(text[: colon.start()])
            if file.is_file() or file.suffix in SUFFIXES:
                return file, text[colon.end() :]
    return Path(text), None


def is_checkpoint(source: str) -> bool:
    """Whether ``source`` is a file, an entry of one, or a run folder, not a network's name."""
    path, _ = split_entry(source)
    return (
        bool(source)
        and not is_external(source)
        and not is_code(source)
        and source not in SIZES
        and (path.exists() or len(path.parts) > 1 or path.suffix in SUFFIXES)
    )


def is_logits(source: str) -> bool:
    """Whether the mentor ``source`` is a file of logits, and no network."""
    path = Path(source).expanduser()
    if path.suffix != ".safetensors":
        return path.suffix == ".npy"
    from safetensors import SafetensorError, safe_open

    with suppress(OSError, SafetensorError), safe_open(path, "np") as file:
        return list(file.keys()) == ["logits"]
    return False


def absolute(source: str) -> str:
    """The same network; if it is a file's, by a path that is valid in any working folder."""
    is_file = is_checkpoint(source) or (is_code(source) and split_code(source)[0].endswith(".py"))
    return str(Path(source).expanduser().absolute()) if is_file else source


def require_known(name: str) -> None:
    """Raise UserError, listing the nearest names, if the zoo has no network ``name``."""
    if name not in SIZES:
        nearest = ", ".join(difflib.get_close_matches(name.lower(), SIZES, cutoff=0.0))
        raise UserError(f"no network is called {name!r}; the nearest names are {nearest}")
