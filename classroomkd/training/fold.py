"""Fold batch norms into the convolutions that they follow: fewer kernels, the same function."""

from __future__ import annotations

import copy
from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# By name, because timm may not be installed. Its convolution pads depending on the input size, and
# its norm includes an activation.
_CONVOLUTIONS = ("torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame")
_NORMS = ("torch.nn.modules.batchnorm.BatchNorm2d", "timm.layers.norm_act.BatchNormAct2d")


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """A copy of ``network`` in eval mode without the batch norms that `foldable` returns.

    Their scales and shifts are merged, in float64, into the convolutions, whose weights keep their
    dtype. Each norm is replaced by an identity or its activation, so that all other names and the
    code stay the same. ``network`` itself is not changed.
    """
    folded = copy.deepcopy(network).eval()
    for norm_name, conv_name in foldable(folded).items():
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)  # timm's are, too
        assert isinstance(norm, nn.BatchNorm2d)
        # Copies, because another layer may share these tensors.
        fused = fuse_conv_bn_eval(copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
        folded.set_submodule(conv_name, fused.to(conv.weight.dtype))
        # For PyTorch's norms, which have no submodules, an empty sequence: the identity.
        rest = nn.Sequential(*norm.children())
        folded.set_submodule(norm_name, rest.eval())
    return folded


def foldable(network: nn.Module) -> dict[str, str]:
    """The batch norms of ``network`` that can be folded, each with its convolution.

    A `BatchNorm2d` (or timm's `BatchNormAct2d`) with running statistics can be folded if its input
    is the output of a `Conv2d` (or timm's `Conv2dSame`) that nothing else uses, both are called
    once, and their tensors are not used elsewhere in the forward pass. The order comes from a
    `torch.fx` trace in eval mode; in a network that cannot be traced, nothing is foldable.
    """
    tracer = _Tracer()
    tracer.proxy_buffer_attributes = True  # traces reads of a norm's statistics
    try:
        graph = tracer.trace(copy.deepcopy(network).eval())
    except Exception:  # a forward pass may raise anything when given a proxy
        return {}
    # torch.fx.experimental.optimization.fuse also folds into a convolution that is called twice,
    # and replaces the network's class by a generated module.
    uses = Counter(
        node.target if node.op == "call_module" else node.target.rpartition(".")[0]
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    )
    modules = dict(network.named_modules())

    def is_single(node: object, kinds: tuple[str, ...]) -> bool:
        return (
            isinstance(node, fx.Node)
            and node.op == "call_module"
            and _class(modules[node.target]) in kinds
            and uses[node.target] == 1
        )

    pairs = {}
    for node in graph.nodes:
        if not is_single(node, _NORMS) or modules[node.target].running_mean is None:
            continue
        (source,) = node.all_input_nodes
        if is_single(source, _CONVOLUTIONS) and len(source.users) == 1:
            pairs[node.target] = source.target
    return pairs


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Whether ``module`` is one node of the trace."""
        return _class(module) in _CONVOLUTIONS + _NORMS or super().is_leaf_module(module, name)


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
