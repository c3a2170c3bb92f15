"""A convolution with the batch norm, the sum and the activation behind it, computed in one pass
over memory by oneDNN.

The norm goes into the weights, W' = W g / sqrt(v + eps), and the kernel adds and cuts before it
writes: the same numbers up to rounding, without reading and writing each feature map again for
every small operation. These are the kernels that torch.compile uses on a CPU.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from workbench.graph.kinds import BATCHNORM, adds, ends, is_idle
from workbench.graph.running import Runner

# where it cuts: oneDNN's name for it
_CUTS = {(0.0, float("inf")): ("relu", []), (0.0, 6.0): ("hardtanh", [0.0, 6.0])}
_CURVES = {torch.ops.aten.silu.default: ("swish", []),
           torch.ops.aten.hardswish.default: ("hardswish", [])}


class Fused:
    """One convolution of a graph and the nodes that its kernel computes with it, `last` being what
    comes out.

    names: the modules among them. other: the node of the second summand, or None; adding: the place
    of that sum.

    Example: `next(iter(fusions(running.Runner(folded, x)).values())).names`
    """

    def __init__(self, graph: Runner, place: int):
        self.conv = graph.modules[graph.nodes[place].target]
        self.source, self.last = graph.nodes[place].args[0], graph.nodes[place]
        self.names, self.covered = {graph.nodes[place].target}, set()
        self.norm, self.other, self.activation = None, None, ("none", [])
        self.adding: int | None = None
        while len(self.last.users) == 1 and self.activation[0] == "none":
            follower = next(iter(self.last.users))
            if not self._takes(follower, graph, place):
                break
            self.last = follower
            self.covered.add(graph.order[follower])
        self.weights: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def run(self, values: Mapping[fx.Node, Any], *, overwrite: bool) -> Tensor:
        """What comes out of the last node. overwrite: whether the result may take the memory of the
        second summand."""
        x, conv = values[self.source], self.conv
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        weight, bias = self._folded(dtype)
        shape = conv.padding, conv.stride, conv.dilation, conv.groups
        name, scalars = self.activation
        if self.other is None:
            return torch.ops.mkldnn._convolution_pointwise(x.to(dtype), weight, bias, *shape, name,
                                                           scalars, "")
        after = None if name == "none" else name
        if overwrite and values[self.other].dtype == dtype:
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                values[self.other], x.to(dtype), weight, bias, *shape, "add", 1.0, after, scalars,
                "")
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x.to(dtype), values[self.other].to(dtype), weight, bias, *shape, "add", 1.0, after,
            scalars, "")

    def _takes(self, node: fx.Node, graph: Runner, place: int) -> bool:
        """Whether the kernel can compute this follower too; if so it is noted."""
        if node.op == "call_module":
            self.names.add(node.target)
        if is_idle(node, graph.modules):
            return True
        if node.op == "call_module":
            norm = graph.modules[node.target]
            if (not isinstance(norm, BATCHNORM) or norm.running_mean is None or self.norm
                or self.other):
                return False
            self.norm = norm
            return True
        if adds(node) and not node.kwargs and self.other is None:
            other = node.args[node.args[0] is self.last]
            same = (other is not self.last
                    and other.meta.get("shape") == node.meta.get("shape")
                    == self.last.meta.get("shape"))
            if not same or graph.order[other] > place:
                return False
            self.other, self.adding = other, graph.order[node]
            return True
        activation = _CUTS.get(ends(node)) or _CURVES.get(node.target)
        # behind a sum the kernel knows no other
        if activation is None or (self.other and activation[0] != "relu"):
            return False
        self.activation = activation
        return True

    def _folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype not in self.weights:
            weight, bias, norm = self.conv.weight, self.conv.bias, self.norm
            if norm is not None:
                weight, bias = fuse_conv_bn_weights(weight, bias, norm.running_mean,
                                                    norm.running_var, norm.eps, norm.weight,
                                                    norm.bias)
            self.weights[dtype] = (weight.detach().to(dtype),
                                   None if bias is None else bias.detach().to(dtype))
        return self.weights[dtype]


def fusions(graph: Runner) -> dict[int, Fused]:
    """By its place, each convolution of the graph that has something to fuse; none where torch was
    built without oneDNN.

    Example: `len(fusions(running.Runner(model, x))) <= 19`
    """
    if not torch.backends.mkldnn.is_available():
        return {}
    found = {i: Fused(graph, i) for i, node in enumerate(graph.nodes)
             if node.op == "call_module" and _fits(graph.modules[node.target])}
    return {i: fused for i, fused in found.items() if fused.covered}


def _fits(module: nn.Module) -> bool:
    return (type(module) is nn.Conv2d and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu")
