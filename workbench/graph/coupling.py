"""Which channels of a network can only go together: those that an addition, a concatenation, a grouped convolution or the
heads of an attention couple; and a network without some of them.

Source: the dependency graph of torch-pruning (Fang et al. 2023, arXiv 2301.12900), which is asked for each layer's
group. What it cannot know is settled here: padded shortcuts, layer norms, attention heads, grouped convolutions.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor, nn

from workbench.batches import Inputs, call
from workbench.errors import UnsupportedModelError, reason
from workbench.graph.attention import Heads, attentions
from workbench.graph.kinds import BATCHNORM
from workbench.graph.layers import WEIGHTED, evaluating, own_macs


class Kept(StrEnum):
    """Why channels cannot be removed."""

    PADDED = "they run through a shortcut padded with zero channels, whose places are fixed"
    TRANSPOSED = "a layer among them is a transposed convolution, which this does not cut"
    NORMED = "a layer norm takes its mean over them"
    OUTPUT = "they are the network's output"
    SPLIT = "a layer that makes or reads them splits them, as attention does with its heads"
    OTHER = "a parameter or module that this does not cut holds one number for each of them"
    GROUPED = "they run through convolutions of groups that do not divide each other"


ALONE = (Kept.TRANSPOSED, Kept.NORMED, Kept.SPLIT, Kept.OTHER)  # then what is coupled is not known in full


@dataclass(frozen=True)
class Group:
    """Coupled channels. layer: the first that makes them; each map goes from a layer's name to the places, within that
    layer, of each of the group's channels, int64 (channels, places).

    unit: what one of them is, "channel", "neuron" (of a linear layer) or "head". made_by: layers whose output channels they
    are; normed_by: batch norms over them; read_by: layers whose input channels they are (several places a channel, where an
    image was flattened or a head has several numbers). With a grouped convolution, one "channel" means one from each group,
    so that groups keep equal sizes. kept: why they cannot be removed, or None. numbers: attributes of modules that count
    them, by dotted name.
    """

    layer: str
    channels: int
    made_by: Mapping[str, Tensor]
    normed_by: Mapping[str, Tensor]
    read_by: Mapping[str, Tensor]
    kept: Kept | None = None
    unit: str = "channel"
    numbers: Mapping[str, int] = field(default_factory=dict)


def groups(model: nn.Module, example: Inputs) -> list[Group]:
    """The groups of `model` in order of definition, those that cannot be cut among them, with the reason.

    Raises UnsupportedModelError where the dependencies cannot be traced.

    Example: `[group.layer for group in coupling.groups(model, task.example) if not group.kept]`
    """
    names = {module: name for name, module in model.named_modules()}
    order = {name: place for place, name in enumerate(names.values())}
    graph = _dependencies(model, example)
    heads = attentions(model, example)
    by_layer = {layer: head for head in heads for layer in head.made_by}
    known, seen = [], set()
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHTED) or name in seen or module not in graph.module2node:
            continue  # the last: a layer that eval mode does not run, such as an auxiliary classifier
        group = _of_heads(by_layer[name]) if name in by_layer else _group(graph, module, names, order)
        seen.update(group.made_by)
        known.append(group)
    return known


def cut(model: nn.Module, removed: Mapping[Group, Sequence[int]] | Sequence[tuple[Group, Sequence[int]]]) -> dict[str, int]:
    """Take channels, by group, out of `model` itself. Returns the attributes of modules that were set, by dotted name."""
    pairs = removed.items() if isinstance(removed, Mapping) else removed
    rows, norms, columns, numbers = {}, {}, {}, {}  # what goes, by layer: places of outputs, of norms, of inputs
    for group, places in pairs:
        for kind, here in ((rows, group.made_by), (norms, group.normed_by), (columns, group.read_by)):
            for name, at in here.items():
                kind.setdefault(name, []).append(at[list(places)].flatten())
        numbers |= {name: size // group.channels * (group.channels - len(places)) for name, size in group.numbers.items()}
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


def shares(model: nn.Module, removed: Sequence[tuple[Group, Sequence[int]]]) -> dict[str, tuple[float, float]]:
    """Which fractions of its outputs and of its inputs each layer and norm keeps, by name; those left whole are not named."""
    outputs: dict[str, float] = {}
    inputs: dict[str, float] = {}
    for group, places in removed:
        left = 1 - len(places) / group.channels
        for name in (*group.made_by, *group.normed_by):
            outputs[name] = outputs.get(name, 1.0) * left
        for name, at in group.read_by.items():
            width = model.get_submodule(name).weight.shape[1]
            inputs[name] = inputs.get(name, 1.0) - len(places) * at.shape[1] / width
        for name in group.numbers:
            outputs.setdefault(name.rpartition(".")[0], left)
    return {name: (outputs.get(name, 1.0), inputs.get(name, 1.0)) for name in {*outputs, *inputs}}


def costs(model: nn.Module, example: Inputs, *, of_macs: bool) -> dict[str, tuple[float, float]]:
    """By module what of its parameters or multiply-accumulates goes with its outputs alone, and what with outputs and inputs
    alike: with `shares`, the cost of a network before it is cut."""
    if of_macs:
        return {name: (0.0, macs) for name, macs in own_macs(model, example).items()}
    counts, seen = {}, set()
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen.update(map(id, own.values()))
        both = own["weight"].numel() if "weight" in own and isinstance(module, WEIGHTED) else 0
        counts[name] = sum(p.numel() for p in own.values()) - both, both
    return counts


def _dependencies(model: nn.Module, example: Inputs):
    import torch_pruning

    try:
        with contextlib.redirect_stdout(io.StringIO()), evaluating(model), torch.inference_mode(False), torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example, forward_fn=call, verbose=False)
    except Exception as error:  # it runs the model and walks autograd's graph; either may raise anything
        raise UnsupportedModelError(f"the channels of {type(model).__name__} cannot be traced: "
                                    f"{reason(error)}") from error


def _pruner(layer: nn.Module):
    from torch_pruning import function

    if isinstance(layer, nn.Linear):
        return function.prune_linear_out_channels
    depthwise = layer.groups == layer.out_channels > 1
    return function.prune_depthwise_conv_out_channels if depthwise else function.prune_conv_out_channels


def _of_heads(head: Heads) -> Group:
    return Group(head.layer, head.count, head.made_by, {}, head.read_by, Kept.SPLIT if head.fixed else None, "head", head.numbers)


def _group(graph, module: nn.Module, names: Mapping[nn.Module, str], order: Mapping[str, int]) -> Group:
    """What torch-pruning couples with the outputs of a layer, as places within each layer."""
    from torch_pruning import function

    outwards = (function.prune_conv_out_channels, function.prune_linear_out_channels, function.prune_depthwise_conv_out_channels)
    channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    made, normed, read, reasons = {}, {}, {}, set()
    for dependency, places in graph.get_pruning_group(module, _pruner(module), list(range(channels))):
        target, at = dependency.target.module, torch.tensor(places)
        name = names.get(target) if isinstance(target, nn.Module) else None
        if isinstance(target, BATCHNORM) and name is not None:
            normed[name] = at
        elif isinstance(target, WEIGHTED) and name is not None:
            (made if dependency.handler in outwards else read)[name] = at
        reasons |= _reasons(dependency.target, name)
    if not read:
        reasons.add(Kept.OUTPUT)
    if any(len(at) % channels for at in (*made.values(), *normed.values(), *read.values())):
        reasons.add(Kept.SPLIT)
    alone = [why for why in ALONE if why in reasons]
    if alone:
        made, normed, read = {names[module]: torch.arange(channels)}, {}, {}
    layers = sorted(made, key=order.get)
    unit = "neuron" if isinstance(module, nn.Linear) else "channel"
    kept = next(iter([*alone, *(why for why in Kept if why in reasons)]), None)
    return _regrouped(graph.model, layers, channels, made, normed, read, kept, unit)


def _reasons(target, name: str | None) -> set[Kept]:
    """Why the channels that reach a node of the dependency graph have to stay."""
    module = target.module
    if "ConstantPad" in str(getattr(target, "name", "")):
        return {Kept.PADDED}
    if isinstance(module, nn.ConvTranspose2d):
        return {Kept.TRANSPOSED}
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return {Kept.NORMED}
    other = isinstance(module, nn.Parameter) or (name is not None and not isinstance(module, (*WEIGHTED, BATCHNORM))
                                                 and any(True for _ in module.parameters(recurse=False)))
    return {Kept.OTHER} if other else set()


def _regrouped(model: nn.Module, layers: list[str], channels: int, made: dict, normed: dict, read: dict, kept: Kept | None,
               unit: str) -> Group:
    """The group, its channels one of each group of the convolutions that make or read them."""
    parts = {name: model.get_submodule(name).groups for name in (*made, *read)
             if 1 < getattr(model.get_submodule(name), "groups", 1) < channels}
    parted = max(parts.values(), default=1)
    if any(parted % g for g in parts.values()) or channels % parted:
        kept, parted = kept or Kept.GROUPED, 1
    channels //= parted

    def places(at: Tensor) -> Tensor:  # (parted * channels * k,) -> (channels, parted * k)
        return at.view(parted, channels, -1).transpose(0, 1).reshape(channels, -1)

    made, normed, read = ({name: places(at) for name, at in part.items()} for part in (made, normed, read))
    for name in parts.keys() & read.keys():  # its weight sees one of its groups only
        read[name] = read[name][:, : read[name].shape[1] // parted]
    return Group(layers[0], channels, {name: made[name] for name in layers}, normed, read, kept, unit)


def _kept(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero()[:, 0]


def _chosen(module: nn.Module, key: str, index: Tensor, axis: int) -> None:
    old = getattr(module, key)
    if old is not None:
        new = old.detach().index_select(axis, index.to(old.device)).clone()
        setattr(module, key, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)


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
