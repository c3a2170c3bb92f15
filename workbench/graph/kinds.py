"""Questions to a node of a traced graph: is it a layer, does it keep values on their grid, what
follows it alone."""

from collections.abc import Mapping

import torch
from torch import fx, nn

from workbench.graph.layers import WEIGHTED

aten = torch.ops.aten
Modules = Mapping[str, nn.Module]
BATCHNORM = nn.modules.batchnorm._BatchNorm

# operator: where it cuts
_RELUS = {aten.relu.default: (0.0, float("inf")), aten.relu6.default: (0.0, 6.0)}
_CLIPS = {aten.hardtanh.default: (-1.0, 1.0), aten.clamp.default: (None, None),
          aten.clamp_min.default: (None, None)}
_ADDING = {aten.add.Tensor, aten.add_.Tensor}
_JOINING = (_ADDING
            | {aten.cat.default, aten.mean.dim, aten.avg_pool2d.default,
               aten.adaptive_avg_pool2d.default})
_PASSING = {getattr(getattr(aten, name), overload) for name, overload in (
    ("flatten", "using_ints"), ("view", "default"), ("reshape", "default"), ("permute", "default"),
    ("transpose", "int"),
    ("contiguous", "default"), ("clone", "default"), ("slice", "Tensor"), ("select", "int"),
    ("squeeze", "default"),
    ("squeeze", "dim"), ("squeeze", "dims"), ("unsqueeze", "default"), ("expand", "default"),
    ("max_pool2d", "default"),
    ("dropout", "default"), ("split", "Tensor"), ("split_with_sizes", "default"),
    ("chunk", "default"), ("unbind", "int"),
    ("channel_shuffle", "default"))}
_IDLE = {aten.dropout.default, aten.alias.default, aten.clone.default, aten.contiguous.default}
_NEUTRAL = {aten.add.Tensor: 0, aten.add_.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1,
            aten.div.Tensor: 1}


def is_layer(node: fx.Node, modules: Modules) -> bool:
    """A convolution or linear layer.

    Example: `kinds.is_layer(node, modules)`
    """
    return node.op == "call_module" and isinstance(modules[node.target], WEIGHTED)


def is_convolution(node: fx.Node, modules: Modules) -> bool:
    """A layer that an integer runtime computes with its result quantised in the same kernel.

    Example: `kinds.is_convolution(node, modules)`
    """
    return is_layer(node, modules) and not isinstance(modules[node.target], nn.Linear)


def adds(node: fx.Node) -> bool:
    """The sum of two values of the graph.

    Example: `any(kinds.adds(node) for node in graph.nodes)`
    """
    return (node.op == "call_function" and node.target in _ADDING
            and all(isinstance(arg, fx.Node) for arg in node.args))


def joins(node: fx.Node) -> bool:
    """An addition of two values, a concatenation, an average: a new value, which lies on no grid
    yet.

    Example: `any(kinds.joins(node) for node in graph.nodes)`
    """
    if node.op != "call_function" or node.target not in _JOINING:
        return False
    return adds(node) or node.target not in _ADDING


def passes(node: fx.Node) -> bool:
    """Flattening, slicing, padding by zeros, the largest of several: values on a grid stay on
    it.

    Example: `any(kinds.passes(node) for node in graph.nodes)`
    """
    if node.op != "call_function":
        return False
    zeros = (node.target is aten.pad.default
             and (len(node.args) < 3 or node.args[2] == "constant")
             and not any(isinstance(value, float | int) and value for value in node.args[3:]))
    return zeros or node.target in _PASSING or getattr(node.target, "__name__", "") == "getitem"


def ends(node: fx.Node) -> tuple[float, float] | None:
    """Between which values a ReLU, ReLU6 or clip cuts; None where the node is none.

    Example: `kinds.ends(node) is None`
    """
    if node.op != "call_function" or node.target not in _RELUS | _CLIPS:
        return None
    if node.target in _RELUS:
        return _RELUS[node.target]
    low, high = (*node.args[1:3], *_CLIPS[node.target][len(node.args) - 1:])[:2]
    return (float("-inf") if low is None else float(low)), (float("inf") if high is None
                                                            else float(high))


def is_idle(node: fx.Node, modules: Modules) -> bool:
    """What changes nothing in eval mode: dropout, a copy, zero added to a value of the graph, one
    multiplied with it.

    Example: `not kinds.is_idle(node, modules)`
    """
    if node.op == "call_module":
        return isinstance(modules[node.target], nn.Identity | nn.Dropout)
    if node.op == "call_function" and node.target in _NEUTRAL:
        value, number = node.args
        changes = isinstance(number, fx.Node) or number != _NEUTRAL[node.target]
        return isinstance(value, fx.Node) and is_float(node) and not changes
    return node.op == "call_function" and node.target in _IDLE


def chain(node: fx.Node, modules: Modules) -> list[fx.Node]:
    """The norm and the ReLU behind a layer, each followed by the next alone: what one kernel
    computes with it.

    Example: `[one.name for one in kinds.chain(node, modules)] == ["bn1", "relu"]`
    """
    found: list[fx.Node] = []
    while len(node.users) == 1:
        follower = next(iter(node.users))
        norm = follower.op == "call_module" and isinstance(modules[follower.target], BATCHNORM)
        if (follower.args[:1] != (node,)
            or not (norm or ends(follower) or is_idle(follower, modules))):
            return found
        found.append(node := follower)
        if ends(follower):
            return found
    return found


def last_of(node: fx.Node, modules: Modules) -> fx.Node:
    """The last of what one kernel computes, the node itself where nothing of it follows.

    Example: `kinds.last_of(node, modules).name == "relu"`
    """
    nodes = chain(node, modules)
    while nodes and is_idle(nodes[-1], modules):
        nodes.pop()
    return nodes[-1] if nodes else node


def source(node: fx.Node) -> fx.Node:
    """Where a value that passes reshapes and the like was made.

    Example: `kinds.source(node) is node`
    """
    while passes(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is of floating point; ids and masks are not.

    Example: `kinds.is_float(node)`
    """
    return bool(getattr(node.meta.get("dtype"), "is_floating_point", False))
