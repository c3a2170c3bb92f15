"""A network without some of its channels: in a copy that is smaller, or in one of the same shape
that computes the same."""

import copy
import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from workbench.batches import Inputs, answer, call
from workbench.errors import UnsupportedModelError, listed, reason
from workbench.graph.group import Group
from workbench.graph.layers import WEIGHTED, evaluating, own_macs

# channels that ONNX Runtime's convolutions take at a time (8 without AVX-512); what is no multiple
# goes a slow way
BLOCK = 16


def kept_width(width: int, share: float, *, multiple: int | None = None) -> int:
    """How many of `width` channels stay where the fraction `share` of them may.

    Example: `[kept_width(32, share) for share in (1.0, 0.6, 0.25, 0.01)] == [32, 16, 8, 8]`
    """
    whole = multiple or blocks(width, parts=4)
    return min(max(round(share * width / whole), 1) * whole, width)


def blocks(width: int, *, parts: int = 2) -> int:
    """The multiple that the runtime likes in a group of `width` channels: 16, or where that is more
    than one of `parts` of it, the largest power of two that is not.

    Example: `[blocks(width) for width in (16, 24, 320)] == [8, 8, 16]`
    """
    return min(BLOCK, 2 ** int(math.log2(max(width // parts, 1))))


def without(model: nn.Module, removed: Mapping[str, Sequence[int]],
            known: Mapping[str, Group]) -> nn.Module:
    """A copy without these channels.

    Example: `without(model, {"layer1.0.conv1": [0]}, {group.layer: group for group in
    coupling.groups(model, x)})`
    """
    _check(removed, known)
    new = copy.deepcopy(model).eval()
    numbers = cut(new, [(known[layer], places) for layer, places in removed.items() if len(places)])
    if removed and hasattr(model, "origin"):  # so that its checkpoint is read by its own shapes
        earlier = json.loads(model.origin.get("attributes", "{}"))
        new.origin = model.origin | {"cut": "true", "attributes": json.dumps(earlier | numbers)}
    return new.to(memory_format=torch.channels_last)


def verified(model: nn.Module, new: nn.Module, removed: Mapping[str, Sequence[int]],
             known: Mapping[str, Group], example: Inputs) -> nn.Module:
    """`new`, once it is seen to compute what `model` computes with the channels silenced.

    Example: `verified(model, copy.deepcopy(model), {}, known, x)`
    """
    expected = put_in(model, silenced(model, removed, known))
    try:
        with evaluating(expected), evaluating(new):
            a, b = (answer(call(candidate, example)) for candidate in (expected, new))
    except Exception as error:  # of the model's own forward, which may raise anything
        raise UnsupportedModelError(f"{type(model).__name__} cannot run without these channels of "
                                    f"{listed(removed)}: {reason(error)}; keep that "
                                    "layer") from error
    # so that NaN does not pass
    if a.shape != b.shape or not (a - b).norm() <= 1e-4 * a.norm().clamp_min(1e-6):
        raise UnsupportedModelError(f"{type(model).__name__} without channels of {listed(removed)} "
                                    "computes something else than with them silenced; keep these "
                                    "layers")
    return new


def put_in(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """A copy with these layers in the place of those of the same names.

    Example: `put_in(model, {"conv1": nn.Identity()})`
    """
    new = copy.deepcopy(model)
    for name, layer in layers.items():
        new.set_submodule(name, layer)
    return new


def silenced(model: nn.Module, removed: Mapping[str, Sequence[int]],
             known: Mapping[str, Group]) -> dict[str, nn.Module]:
    """New layers, by name, for all that read a removed channel, with the weights that read it
    zero.

    Example: `list(silenced(model, {"layer1.0.conv1": [0]}, {group.layer: group for group in
    coupling.groups(model, x)}))`
    """
    _check(removed, known)
    new: dict[str, nn.Module] = {}
    for layer, places in removed.items():
        group = known[layer]
        for name in group.read_by if places else ():
            reader = new.setdefault(name, copy.deepcopy(model.get_submodule(name)))
            with torch.no_grad():
                reader.weight[:, group.places("read_by", name, places)] = 0
    return new


def _check(removed: Mapping[str, Sequence[int]], known: Mapping[str, Group]) -> None:
    for layer, places in removed.items():
        if layer not in known:
            raise ValueError(f"no group of channels is called {layer!r}; there are {listed(known)}")
        group = known[layer]
        if group.kept and places:
            raise UnsupportedModelError(f"channels of layer {layer} cannot be removed: "
                                        f"{group.kept}")
        if (any(not 0 <= place < group.channels for place in places)
            or len(set(places)) >= group.channels):
            raise ValueError(f"layer {layer} has channels 0 to {group.channels - 1}, of which one "
                             f"must stay; found {list(places)}")


def cut(model: nn.Module, removed: Sequence[tuple[Group, Sequence[int]]]) -> dict[str, int]:
    """Take channels, by group, out of `model` itself. Returns the attributes of modules that were
    set, by dotted name.

    Example: `cut(copy.deepcopy(model), [(known["layer1.0.conv1"], [0, 1])]) == {}`
    """
    # what goes, by layer: places of outputs, of norms, of inputs
    rows, norms, columns, numbers = {}, {}, {}, {}
    for group, places in removed:
        for gone, kind in ((rows, "made_by"), (norms, "normed_by"), (columns, "read_by")):
            for name in getattr(group, kind):
                gone.setdefault(name, []).append(group.places(kind, name, places))
        numbers |= {name: size // group.channels * (group.channels - len(places))
                    for name, size in group.numbers.items()}
    for name, gone in rows.items():
        _without_outputs(model.get_submodule(name), torch.cat(gone))
    for name, gone in norms.items():
        _without_features(model.get_submodule(name), torch.cat(gone))
    for name, gone in columns.items():
        _without_inputs(model.get_submodule(name), torch.cat(gone))
    for name, value in numbers.items():
        holder, _, key = name.rpartition(".")
        setattr(model.get_submodule(holder), key, value)
    return numbers


def shares(model: nn.Module,
           removed: Sequence[tuple[Group, Sequence[int]]]) -> dict[str, tuple[float, float]]:
    """Which fractions of its outputs and of its inputs each layer and norm keeps, by name; those
    left whole are not named.

    Example: `shares(model, [(group, [0]) for group in coupling.groups(model, x)[:1]])`
    """
    outputs: dict[str, float] = {}
    inputs: dict[str, float] = {}
    for group, places in removed:
        for kind, axis, kept in (("made_by", 0, outputs), ("normed_by", 0, outputs),
                                 ("read_by", 1, inputs)):
            for name in getattr(group, kind):
                module = model.get_submodule(name)
                width = (module.num_features if kind == "normed_by"
                         and hasattr(module, "num_features") else module.weight.shape[axis])
                kept[name] = kept.get(name, 1.0) - len(group.places(kind, name, places)) / width
        for name in group.numbers:
            outputs.setdefault(name.rpartition(".")[0], 1 - len(places) / group.channels)
    return {name: (outputs.get(name, 1.0), inputs.get(name, 1.0)) for name in {*outputs, *inputs}}


def costs(model: nn.Module, example: Inputs, *, of_macs: bool) -> dict[str, tuple[float, float]]:
    """By module what of its parameters or multiply-accumulates goes with its outputs alone, and
    what with outputs and inputs alike: with `shares`, the cost of a network before it is cut.

    Example: `sum(own for own, _ in costs(model, x, of_macs=False).values()) > 0`
    """
    if of_macs:
        return {name: (0.0, macs) for name, macs in own_macs(model, example).items()}
    counts, seen = {}, set()
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen.update(map(id, own.values()))
        both = own["weight"].numel() if "weight" in own and isinstance(module, WEIGHTED) else 0
        counts[name] = sum(p.numel() for p in own.values()) - both, both
    return counts


def _kept(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero()[:, 0]


def _chosen(module: nn.Module, key: str, index: Tensor, axis: int) -> None:
    old = getattr(module, key)
    if old is not None:
        new = old.detach().index_select(axis, index.to(old.device)).clone()
        setattr(module, key,
                nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter)
                else new)


def _without_outputs(layer: nn.Module, gone: Tensor) -> None:
    stays = _kept(len(layer.weight), gone)
    for key in ("weight", "bias"):
        _chosen(layer, key, stays, 0)
    if isinstance(layer, nn.Linear):
        layer.out_features = len(stays)
        return
    if layer.groups == layer.out_channels == layer.in_channels:  # depthwise: it reads what it makes
        layer.groups = layer.in_channels = len(stays)
    layer.out_channels = len(stays)


def _without_inputs(layer: nn.Module, gone: Tensor) -> None:
    stays = _kept(layer.weight.shape[1], gone)
    _chosen(layer, "weight", stays, 1)
    if isinstance(layer, nn.Linear):
        layer.in_features = len(stays)
    else:
        layer.in_channels = len(stays) * layer.groups


def _without_features(norm: nn.Module, gone: Tensor) -> None:
    stays = _kept(norm.num_features, gone)
    for key in ("weight", "bias", "running_mean", "running_var"):
        _chosen(norm, key, stays, 0)
    norm.num_features = len(stays)
