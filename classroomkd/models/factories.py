"""User-defined networks by name: a callable in a Python file or in an importable module.

Naming one runs its file, as importing it does.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from classroomkd.errors import UserError
from classroomkd.models.network_names import code_file, label, split_code
from classroomkd.torchvision import retried

_CONTENT = "__content__"  # the attribute that keeps the source a module was executed from
_PARAMETER = "classes"  # part of the name of the parameter for their number


def build(source: str, num_classes: int, digest: str | None = None) -> nn.Module:
    """A copy of what the callable ``FILE.py:NAME`` or ``package.module:NAME`` returns.

    It is given the number of classes: as ``num_classes``, or as another parameter with "classes" in
    its name, or as its first required one. A callable without any of these is given nothing. With
    the ``digest`` of what the file held when it was first used in this process, later changes to it
    do not count.

    Raises UserError if there is no such callable, or it raises or returns anything but a module.
    """
    function, device = find(source, digest), torch.get_default_device()
    try:
        network = retried(lambda: _call(function, num_classes))
    except (Exception, SystemExit) as error:
        if device.type == "meta":  # values are read while it is made, and meta tensors have none
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                return build(source, num_classes, digest).to(device)
        raise UserError(f"{label(source)} raised {_error_text(error, source)}") from None
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise UserError(f"{label(source)} must return a torch.nn.Module, not {kind}")
    return copy.deepcopy(network)  # the callable may return the same module again


def find(source: str, digest: str | None = None) -> Callable[..., Any]:
    """The callable that ``source`` names, as `build` says; UserError if there is none."""
    place, name = split_code(source)
    try:
        module = sys.modules.get(_name(source, digest)) if digest else None
        if module is None and place.endswith(".py"):
            module = retried(lambda: _executed(source))
        elif module is None:
            module = retried(lambda: importlib.import_module(place))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{place} cannot be imported: {_error_text(error, source)}") from None
    found = getattr(module, name, None)
    if found is None:
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        nearest = ", ".join(difflib.get_close_matches(name, own, cutoff=0.0)) or "none"
        raise UserError(f"{place} has no {name}; the nearest names in it are {nearest}")
    if isinstance(found, nn.Module) or not callable(found):
        kind = type(found).__name__
        raise UserError(
            f"{label(source)} is a {kind}: name a function or class that returns a torch.nn.Module"
        )
    return found


def content(source: str, digest: str | None) -> bytes:
    """What the file that ``source`` names held when it had this ``digest``, or else holds."""
    module = sys.modules.get(_name(source, digest)) if digest else None
    return code_file(source).read_bytes() if module is None else getattr(module, _CONTENT)


def _name(source: str, digest: str) -> str:
    """The name in ``sys.modules`` of a user's file with this ``digest``."""
    place = Path(split_code(source)[0]).expanduser().absolute()
    return f"_{place.stem}_{hashlib.sha256(f'{place} {digest}'.encode()).hexdigest()[:16]}"


def _executed(source: str) -> ModuleType:
    """The module in the file that ``source`` names, executed once for each content it had."""
    file = code_file(source)
    read = file.read_bytes()
    name = _name(source, hashlib.sha256(read).hexdigest())
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # a .py file always has one
    module = importlib.util.module_from_spec(spec)
    setattr(module, _CONTENT, read)
    folder = str(file.absolute().parent)
    sys.modules[name] = module
    sys.path.insert(0, folder)  # as for a script: it may import its neighbours
    try:
        exec(compile(read, file, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module


def _call(function: Callable[..., Any], num_classes: int) -> Any:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have none
        return function(num_classes)
    kinds = inspect.Parameter
    usual = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    named = [
        key
        for key, parameter in parameters.items()
        if _PARAMETER in key and parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    ]
    if named:
        return function(**{"num_classes" if "num_classes" in named else named[0]: num_classes})
    positional = [parameter for parameter in parameters.values() if parameter.kind in usual]
    if any(parameter.default is kinds.empty for parameter in positional):
        return function(num_classes)
    if not positional and any(p.kind is kinds.VAR_KEYWORD for p in parameters.values()):
        return function(num_classes=num_classes)  # as torchvision's, which pass it on
    return function()


def _error_text(error: BaseException, source: str) -> str:
    """An error in one line, with the line of the named file that it came from."""
    file = code_file(source).resolve()
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == file and frame.lineno
    ]
    text = " ".join(str(error).split())
    where = f" (line {lines[-1]} of {file.name})" if lines else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"
