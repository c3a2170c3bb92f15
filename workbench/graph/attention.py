"""Attention in a traced graph: which layers make the queries, keys and values of each head, and
which reads its result."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from workbench.batches import Inputs
from workbench.errors import UnsupportedModelError
from workbench.graph.kinds import aten, is_layer
from workbench.graph.running import Runner

WIDTHS = ("all_head_size", "attn_dim", "inner_dim")  # attributes that hold heads times their width


@dataclass(frozen=True)
class Heads:
    """The heads of one attention; with grouped queries, one of `count` is a key with the queries
    that share it.

    made_by, read_by: from a layer's name to the places of each head's numbers in its outputs or
    inputs, int64 (count, numbers). numbers: attributes of modules that count the heads or their
    width, by dotted name. fixed: whether the module has its width and its heads tied, so that none
    can go.

    Example: `Heads("attention", 4, {}, {}, {}).count == 4`
    """

    layer: str
    count: int
    made_by: Mapping[str, Tensor]
    read_by: Mapping[str, Tensor]
    numbers: Mapping[str, int]
    fixed: bool = False


def attentions(model: nn.Module, example: Inputs) -> list[Heads]:
    """The heads of each attention of `model`, in order of execution; those in a form that is not
    known are left out.

    An attention is `scaled_dot_product_attention`, or a softmax between two matrix products. A
    model that cannot be traced has none.

    Example: `attention.attentions(models.load("resnet20", task), task.example) == []`
    """
    # what makes its heads, and what reads them
    if sum(isinstance(module, nn.Linear) for module in model.modules()) < 2:
        return []
    try:
        graph = Runner(model, example)
    except UnsupportedModelError:
        return []
    products = [node for node in graph.nodes
                if node.target is aten.scaled_dot_product_attention.default]
    found = [heads for node in products if (heads := _heads(model, graph, node, node.args[:3]))]
    for node in graph.nodes:
        if node.target in (aten.softmax.int, aten._softmax.default) and (spelled := _spelled(node)):
            heads = _heads(model, graph, *spelled)
            found += [heads] if heads else []
    return found


def _spelled(softmax: fx.Node) -> tuple[fx.Node, tuple] | None:
    """The product behind a softmax and what plays queries, keys and values; None where it is no
    attention."""
    before, behind = softmax.args[0], softmax
    while isinstance(before, fx.Node) and before.target not in _PRODUCTS and before.all_input_nodes:
        before = before.all_input_nodes[0]
    while len(behind.users) == 1 and behind.target not in _PRODUCTS:
        behind = next(iter(behind.users))
    if behind.target not in _PRODUCTS or before.target not in _PRODUCTS:
        return None
    return behind, (*before.args[:2], behind.args[1])


_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def _heads(model: nn.Module, graph: Runner, node: fx.Node, parts: tuple) -> Heads | None:
    """The heads behind a product, where its queries, keys and values come from one layer each and
    one reads its result."""
    made = [_layers_before(part, graph.modules) for part in parts]
    read = _layers_behind(node, graph.modules)
    shape = parts[0].meta.get("shape", ())
    if (any(len(layers) != 1 for layers in (*made, read)) or len(shape) != 4
        or not all(isinstance(n, int) for n in shape[1::2])):
        return None
    queries, keys, values = (layers[0] for layers in made)
    count, width = shape[1], shape[3]
    rows = {name: len(graph.modules[name].weight) for name in (queries, keys, values, read[0])}
    reads = graph.modules[read[0]].weight.shape[1]
    if queries == keys == values:
        if rows[queries] != 3 * count * width or reads != count * width:
            return None
        packed = torch.arange(rows[queries]).view(3, count, width).transpose(0, 1).reshape(count,
                                                                                           -1)
        made_by = {queries: packed}
    else:
        few = rows[keys] // width  # keys may be fewer than queries
        if (rows[queries] != count * width or rows[values] != rows[keys] or not few or count % few
            or reads != count * width):
            return None
        count = few
        made_by = {name: torch.arange(rows[name]).view(count, -1)
                   for name in (queries, keys, values)}
    holder = _common(list(made_by) if len(made_by) > 1 else [queries, read[0]])
    numbers = _numbers(model, holder, {shape[1], count}, shape[1] * width)
    fixed = isinstance(model.get_submodule(holder), nn.MultiheadAttention)
    return Heads(queries, count, made_by, {read[0]: torch.arange(reads).view(count, -1)}, numbers,
                 fixed)


def _layers_before(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[str]:
    """The nearest layers whose values reach the node."""
    return _nearest(node, modules, lambda here: here.all_input_nodes)


def _layers_behind(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[str]:
    """The nearest layers that the node's value reaches."""
    found = [name for user in node.users
             for name in _nearest(user, modules, lambda here: list(here.users))]
    return list(dict.fromkeys(found))


def _nearest(node: fx.Node, modules: Mapping[str, nn.Module], onwards) -> list[str]:
    found, waiting, seen = [], [node], set()
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        if is_layer(here, modules):
            found.append(here.target)
        elif here.op != "call_module" and len(seen) < 200:  # norms and embeddings end the way too
            waiting += onwards(here)
    return list(dict.fromkeys(found))


def _common(names: list[str]) -> str:
    """The innermost module that holds all of these."""
    split = [name.split(".")[:-1] for name in names]
    shared = [parts[0] for parts in zip(*split, strict=False) if len(set(parts)) == 1]
    return ".".join(shared)


def _numbers(model: nn.Module, holder: str, counts: set[int], width: int) -> dict[str, int]:
    """Attributes of the attention's module that count its heads or their numbers."""
    module, prefix = model.get_submodule(holder), f"{holder}." if holder else ""
    held = {key: value for key, value in vars(module).items() if isinstance(value, int)
            and not isinstance(value, bool)}
    found = {key: value for key, value in held.items()
             if (value in counts and "head" in key and "dim" not in key and "size" not in key
                 and "groups" not in key)
             or (value == width and key in WIDTHS)}
    return {f"{prefix}{key}": value for key, value in found.items()}
