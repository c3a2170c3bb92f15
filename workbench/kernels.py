"""Ground floor: which nodes of a traced graph one integer kernel computes, and which leave values on the grid they lie on."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from workbench.layers import WEIGHTED

_FOLLOWING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.Hardtanh)  # one node with its layer
_JOINING = {operator.add, operator.iadd, torch.add, torch.cat, torch.mean, F.adaptive_avg_pool2d, F.avg_pool2d}
_RELUS = {F.relu, F.relu6, F.hardtanh, torch.relu}
_RELU_METHODS, _JOINING_METHODS = {"relu", "relu_", "clamp"}, {"add", "add_", "mean"}
_PASSING = (nn.Flatten, nn.MaxPool2d, nn.Identity, nn.Dropout, nn.ZeroPad2d)  # values on a grid stay on it
_PASSING_FUNCTIONS = {torch.flatten, F.max_pool2d, F.pad, operator.getitem, F.dropout}
_PASSING_METHODS = {"flatten", "view", "reshape", "permute", "transpose", "contiguous", "size"}

Modules = dict[str, nn.Module]


def is_layer(node: fx.Node, modules: Modules) -> bool:
    """A convolution or linear layer."""
    return node.op == "call_module" and isinstance(modules[node.target], WEIGHTED)


def joins(node: fx.Node, modules: Modules) -> bool:
    """An addition, a concatenation, an average: what it puts out lies on no grid yet."""
    return (node.op == "call_function" and node.target in _JOINING) or \
           (node.op == "call_method" and node.target in _JOINING_METHODS) or \
           (node.op == "call_module" and isinstance(modules[node.target], nn.AvgPool2d | nn.AdaptiveAvgPool2d))


def passes(node: fx.Node, modules: Modules) -> bool:
    """Flattening, padding, the largest of several: values on a grid stay on it."""
    return (node.op == "call_module" and isinstance(modules[node.target], _PASSING)) or \
           (node.op == "call_function" and node.target in _PASSING_FUNCTIONS) or \
           (node.op == "call_method" and node.target in _PASSING_METHODS)


def cuts(node: fx.Node, modules: Modules) -> bool:
    """A ReLU of some kind."""
    return (node.op == "call_function" and node.target in _RELUS) or \
           (node.op == "call_method" and node.target in _RELU_METHODS) or \
           (node.op == "call_module" and isinstance(modules[node.target], nn.ReLU | nn.ReLU6 | nn.Hardtanh))


def last_of(node: fx.Node, modules: Modules) -> fx.Node:
    """The last of the chain that one kernel computes: each followed by the next alone, up to a ReLU."""
    while len(node.users) == 1:
        follower = next(iter(node.users))
        module = modules.get(follower.target) if follower.op == "call_module" else None
        if not (isinstance(module, _FOLLOWING) or cuts(follower, modules)) or follower.args[0] is not node:
            return node
        node = follower
        if cuts(node, modules):
            return node
    return node
