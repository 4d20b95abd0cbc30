"""The ImageNet networks of torchvision and timm, by name: ``tv:NAME`` and ``timm:NAME``."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

import safetensors.torch
import torch
from torch import nn

from classroomkd.errors import UserError
from classroomkd.models.info import NetworkInfo
from classroomkd.torchvision import import_torchvision

# Two networks of torchvision have auxiliary heads, which are not needed here. They also expect
# another normalisation than their weights' transforms, unless ``transform_input`` is set.
_TORCHVISION_OPTIONS = {
    name: {"aux_logits": False, "transform_input": True, "init_weights": True}
    for name in ("googlenet", "inception_v3")
}


@functools.cache
def architectures(library: str) -> list[str]:
    """The names of the networks of "tv" or "timm", with prefix; none if it is not installed."""
    try:
        models = import_torchvision("models")
        if library == "tv":
            return [f"tv:{name}" for name in models.list_models(module=models)]
        import timm
    except ImportError:
        return []
    return [f"timm:{name}" for name in timm.list_models()]


def named(texts: Collection[str]) -> list[str]:
    """The networks whose name, with or without prefix, is one of ``texts``."""
    return [
        name
        for library in ("tv", "timm")
        for name in architectures(library)
        if name in texts or name.partition(":")[2] in texts
    ]


def with_tensors(library: str, names: Collection[str]) -> list[str]:
    """The networks of a library whose first convolution may be among tensors of these ``names``.

    For torchvision, which has few networks, all of them. timm names the first convolution of each,
    so that only few of its thousand networks must be built.
    """
    if library == "tv" or not architectures(library):
        return architectures(library)
    import timm

    def may_be(name: str) -> bool:
        config = timm.get_pretrained_cfg(name)
        first = config.first_conv if config else None
        places = (first,) if isinstance(first, str) else first or ()
        return not places or any(f"{place}.weight" in names for place in places)

    return [f"timm:{name}" for name in timm.list_models() if may_be(name)]


def build(name: str, num_classes: int) -> nn.Module:
    """The network, mapping images to [B, num_classes], initialised by its library.

    Raises UserError if the library has no network of this name, or timm is not installed.
    """
    try:
        return _build(name, num_classes)
    except NotImplementedError:  # some constructors read values, which meta tensors lack
        device = torch.get_default_device()
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return _build(name, num_classes).to(device)


def _build(name: str, num_classes: int) -> nn.Module:
    library, architecture = _find(name)
    if library.__name__ == "timm":
        return library.create_model(architecture, num_classes=num_classes)
    options = _TORCHVISION_OPTIONS.get(architecture, {})
    return library.get_model(architecture, num_classes=num_classes, **options)


def load_pretrained(name: str) -> tuple[nn.Module, NetworkInfo]:
    """The network with its library's default weights, in eval mode, and its info.

    Weights missing from torch.hub's folder are downloaded there first.

    Raises UserError as `build` does, and if there are no weights, they cannot be downloaded, or
    their file is damaged.
    """
    library, architecture = _find(name)
    if library.__name__ == "timm":
        return _load_timm(library, name, architecture)
    weights = library.get_model_weights(architecture).DEFAULT
    # The names of torchvision's files end in the first digits of their SHA-256.
    file = _fetch(name, weights.url, Path(weights.url).name, Path(weights.url).stem.split("-")[-1])
    try:  # first with weights_only, because get_model unpickles anything
        torch.load(file, map_location="cpu", weights_only=True)
        network = library.get_model(architecture, weights=weights)
    except Exception as error:  # damaged pickles raise almost anything
        raise _damaged(name, file) from error
    if hasattr(network, "AuxLogits"):
        network.aux_logits, network.AuxLogits = False, None
    transforms = weights.transforms()
    return network.eval(), NetworkInfo(
        architecture=name,
        classes=list(weights.meta["categories"]),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        image_size=transforms.crop_size[0],
    )


def _load_timm(timm: ModuleType, name: str, architecture: str) -> tuple[nn.Module, NetworkInfo]:
    config = timm.get_pretrained_cfg(architecture)
    if config is None or not config.hf_hub_id:
        raise UserError(
            f"timm's hub has no weights for {name}: use another network or train this one"
        )
    url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
    # Not downloaded by timm, which retries for most of a minute without a network.
    file = _fetch(name, url, Path(config.hf_hub_id).name + ".safetensors")
    try:
        overlay = {"state_dict": safetensors.torch.load_file(file)}
        network = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:
        raise _damaged(name, file) from error
    categories = (
        import_torchvision("models").get_model_weights("resnet18").DEFAULT.meta["categories"]
    )
    is_imagenet = config.num_classes == len(categories)
    return network.eval(), NetworkInfo(
        architecture=name,
        classes=list(categories if is_imagenet else map(str, range(config.num_classes))),
        mean=tuple(config.mean),
        std=tuple(config.std),
        image_size=config.input_size[-1],
    )


def _find(name: str) -> tuple[ModuleType, str]:
    """The library of the network ``name``, and its name there."""
    prefix, _, architecture = name.partition(":")
    models = import_torchvision("models")  # timm imports it too, but without the shim
    known: Collection[str]
    if prefix == "tv":
        library, known = models, [name[len("tv:") :] for name in architectures("tv")]
    else:
        try:
            import timm as library
        except ImportError:
            raise UserError(f"{name} needs timm: pip install timm") from None
        known = _names_in_timm()
    if architecture not in known:
        nearest = difflib.get_close_matches(architecture.lower(), known, cutoff=0.0)
        raise UserError(
            f"no network is called {name!r}; the nearest names are "
            + ", ".join(f"{prefix}:{near}" for near in nearest)
        )
    return library, architecture


@functools.cache
def _names_in_timm() -> dict[str, None]:
    """The names of all networks of timm, with and without a tag for weights."""
    import timm

    return dict.fromkeys(timm.list_models() + timm.list_pretrained())


def _fetch(name: str, url: str, file_name: str, sha256: str | None = None) -> Path:
    """The path of the file in torch.hub's folder, downloaded if it is missing.

    ``sha256`` is the prefix, in hexadecimal, of a downloaded file's hash.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", file_name)
    if file.is_file():
        return file
    try:
        os.makedirs(file.parent, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), sha256)
    except (OSError, RuntimeError) as error:
        reason = str(getattr(error, "reason", error)).replace("\n", " ")
        raise UserError(
            f"cannot download the weights of {name} ({reason}): download {url} yourself and put it "
            f"at {file}"
        ) from None
    return file


def _damaged(name: str, file: Path) -> UserError:
    return UserError(f"{file} does not hold the weights of {name}, or is damaged: delete it")
