"""Channel pruning: score channels, silence them in place, or cut them out into a new, smaller, dense model.

A group is a set of channels that can only go together: those that a residual addition, a concatenation or a depthwise
convolution couples. The groups come from torch-pruning's dependency graph (Fang et al. 2023, arXiv 2301.12900).

Sources of the criteria: l1 Li et al. 2017 (arXiv 1608.08710); bn_gamma Liu et al. 2017 (arXiv 1708.06519); taylor
Molchanov et al. 2019 (arXiv 1906.10771), |weight x gradient| instead of its square; fpgm He et al. 2019
(arXiv 1811.00250), by the sum of distances to all other filters.
"""

import contextlib
import copy
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pandas as pd
import torch
from torch import Tensor, nn

from workbench.layers import Change, UnsupportedModelError, evaluating

CRITERIA = ("l1", "l2", "bn_gamma", "taylor", "fpgm", "random")
SCOPES = ("global", "layer")
_PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class Group:
    """Coupled channels. layer: the first that makes them; each map goes from a layer's name to the places, within that
    layer, of each of the group's channels, int64 (channels, places).

    made_by: layers whose output channels they are; normed_by: batch norms over them; read_by: layers whose input
    channels they are (several places a channel, where an image was flattened). Where a convolution of g > 1 groups
    makes or reads them, a channel here is one of each of its groups, so that they stay equal. kept: why they cannot be
    removed, or None.
    """

    layer: str
    channels: int
    made_by: Mapping[str, Tensor]
    normed_by: Mapping[str, Tensor]
    read_by: Mapping[str, Tensor]
    kept: str | None = None


def groups(model: nn.Module, example: Tensor) -> list[Group]:
    """The groups of `model` in order of definition, those that cannot be cut among them, with the reason.

    example: float32 (n, C, H, W). Raises UnsupportedModelError where the dependencies cannot be traced.

    Example: `[group.layer for group in channels.groups(model, task.example) if not group.kept]`
    """
    names = {module: name for name, module in model.named_modules()}
    order = {name: place for place, name in enumerate(names.values())}
    graph = _dependencies(model, example)
    found, seen = [], set()
    for name, module in model.named_modules():
        if not isinstance(module, _PRODUCERS) or name in seen or module not in graph.module2node:
            continue  # the last: a layer that eval mode does not run, such as an auxiliary classifier
        group = _group(graph, module, names)
        seen.update(group.made_by)
        first = min(group.made_by, key=order.get)
        made = {maker: group.made_by[maker] for maker in sorted(group.made_by, key=order.get)}
        found.append(Group(first, group.channels, made, group.normed_by, group.read_by, group.kept))
    return found


def score(model: nn.Module, criterion: str, *, example: Tensor, batches=None, seed: int = 0) -> pd.DataFrame:
    """One row per channel of each group: layer (of the group), channel, score, group_size; higher is more important.

    A group's score sums those of the layers that make its channels, filter by filter: l1 sum |w|, l2 sqrt(sum w^2),
    fpgm sum of the distances to the other filters; bn_gamma |gamma| of the batch norms over it; taylor
    sum |w dL/dw| with L the cross entropy over `batches` of (images, labels); random by `seed`, as a control.

    Raises ValueError for an unknown criterion, NaN, or taylor without batches; UnsupportedModelError where bn_gamma
    finds no batch norm.

    Example: `channels.score(model, "l1", example=task.example)`
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; expected one of {', '.join(CRITERIA)}")
    if criterion == "taylor" and batches is None:
        raise ValueError("criterion 'taylor' needs batches=split.batches(), pairs of images and labels")
    gradients = _gradients(model, batches) if criterion == "taylor" else {}
    draw = torch.Generator().manual_seed(seed)
    modules, rows = dict(model.named_modules()), []
    for group in groups(model, example):
        if criterion == "random":
            total = torch.rand(group.channels, generator=draw)
        elif criterion == "bn_gamma":
            if not group.normed_by and not group.kept:
                raise UnsupportedModelError(f"layer {group.layer} has no batch norm, so bn_gamma cannot rank its channels; "
                                            "use l1, or taylor")
            total = sum((modules[n].weight.detach().abs()[at].sum(1) for n, at in group.normed_by.items()),
                        torch.zeros(group.channels))
        else:
            total = sum(_filter_scores(modules[n], criterion, gradients.get(n))[at].sum(1) for n, at in group.made_by.items())
        if not torch.isfinite(total).all():
            raise ValueError(f"layer {group.layer}: criterion {criterion} gives NaN or infinity; look at its weights")
        rows += [{"layer": group.layer, "channel": c, "score": float(s), "group_size": group.channels,
                  "kept": group.kept is not None} for c, s in enumerate(total)]
    return pd.DataFrame(rows)


def select(scores: pd.DataFrame, ratio: float, *, scope: str = "global", multiple: int = 1,
           keep: str | Sequence[str] = ()) -> dict[str, list[int]]:
    """The channels to remove: the lowest-scored fraction `ratio` (0-1) of those that can go, by layer.

    scope "layer" takes the same fraction of each group; "global" ranks all together, each score divided by the mean
    of its group (so that a layer of large weights is not spared for that). At least one channel of each group stays,
    and the number that stays is rounded up to a multiple of `multiple`. keep: globs of layers left alone.

    Raises ValueError for a ratio outside [0, 1), NaN scores, an unknown scope, or a glob that matches nothing.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}, expected 0 <= ratio < 1, the fraction of the channels to remove")
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; expected one of {', '.join(SCOPES)}")
    if scores.score.isna().any():
        row = scores[scores.score.isna()].iloc[0]
        raise ValueError(f"the score of channel {row.channel} of layer {row.layer} is NaN")
    patterns = [keep] if isinstance(keep, str) else list(keep)
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in scores.layer.unique()):
            raise ValueError(f"keep: no layer matches {pattern!r}; the layers are {', '.join(scores.layer.unique()[:6])}, ...")
    free = scores[~scores.kept & ~scores.layer.map(lambda layer: any(fnmatchcase(layer, p) for p in patterns))].copy()
    free["rank"] = free.score / free.groupby("layer").score.transform("mean").clip(lower=1e-12)
    if scope == "global":
        lowest = free.nsmallest(round(ratio * len(free)), "rank", keep="first")
        counts = lowest.groupby("layer").size()
    else:
        counts = (free.groupby("layer").size() * ratio).round().astype(int)
    chosen = {}
    for layer, part in free.groupby("layer", sort=False):
        stay = max(len(part) - int(counts.get(layer, 0)), 1)
        stay = min(math.ceil(stay / multiple) * multiple, len(part))
        chosen[layer] = sorted(part.nsmallest(len(part) - stay, "score", keep="first").channel)
    return {layer: places for layer, places in chosen.items() if places}


def mask(model: nn.Module, removed: Mapping[str, Sequence[int]], *, example: Tensor) -> nn.Module:
    """A copy of the same shape in which the channels `removed` (by layer, as `select` gives) reach no other layer.

    It computes what `remove` computes: the weights that read a silenced channel are zero.
    """
    new = copy.deepcopy(model)
    for name, layer in _silenced(model, removed, groups(model, example)).items():
        parent, _, child = name.rpartition(".")
        setattr(new.get_submodule(parent), child, layer)
    return new


def remove(model: nn.Module, removed: Mapping[str, Sequence[int]], *, example: Tensor) -> nn.Module:
    """A new, dense, smaller model without the channels `removed` (by layer, as `select` gives), in eval mode.

    Verified by a forward pass: its outputs on `example` equal those of `mask` to 1e-4 of their norm.

    Raises ValueError for an unknown layer or a channel that it lacks; UnsupportedModelError, with the layer's name,
    where the cut model fails or computes something else.
    """
    known = {group.layer: group for group in groups(model, example)}
    _check(removed, known)
    new = copy.deepcopy(model).eval()
    graph = _dependencies(new, example)
    for layer, places in removed.items():
        if places:
            own = known[layer].made_by[layer][list(places)].flatten()
            graph.get_pruning_group(new.get_submodule(layer), _pruner(new.get_submodule(layer)), sorted(own.tolist())).prune()
    expected = mask(model, removed, example=example)
    try:
        with evaluating(expected), evaluating(new):
            a, b = expected(example), new(example)
    except RuntimeError as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot run without these channels of {', '.join(removed)}: "
                                    f"{str(error).splitlines()[0]}; keep that layer") from error
    if (a - b).norm() > 1e-4 * a.norm().clamp_min(1e-6):
        raise UnsupportedModelError(f"{type(model).__name__} without channels of {', '.join(removed)} computes something "
                                    f"else than with them silenced (distance {(a - b).norm():.3g}); keep these layers")
    return new.to(memory_format=torch.channels_last)


def silencing(model: nn.Module, *, example: Tensor, criterion: str = "l1", batches=None, seed: int = 0):
    """A method for sensitivity.scan: (layer, level) -> the change that silences that fraction of a group's channels.

    Example: `sensitivity.scan(model, task.test, channels.silencing(model, example=task.example), levels=[.3, .5])`
    """
    table = score(model, criterion, example=example, batches=batches, seed=seed)
    known = {group.layer: group for group in groups(model, example)}
    ranked = {layer: part.sort_values("score", kind="stable").channel.tolist() for layer, part in table.groupby("layer")}

    def method(layer: str, level: float) -> Change:
        if layer not in known:
            raise ValueError(f"no group of channels is called {layer!r}; there are {', '.join(known)}")
        group = known[layer]
        if group.kept:
            return Change({}, removed=0, of=group.channels, layers=tuple(group.made_by), note=group.kept)
        places = ranked[layer][: min(round(level * group.channels), group.channels - 1)]
        shares = dict.fromkeys((*group.made_by, *group.normed_by), 1 - len(places) / group.channels)
        for name, at in group.read_by.items():
            inputs = model.get_submodule(name).weight.shape[1]
            shares[name] = shares.get(name, 1.0) * (1 - len(places) * at.shape[1] / inputs)
        note = "" if places else "nothing was removed at this level"
        return Change(_silenced(model, {layer: places}, [group]), removed=len(places), of=group.channels,
                      layers=tuple(group.made_by), left=shares, note=note)

    method.layers = list(known)
    return method


def zeroing(model: nn.Module, *, layers: Mapping[str, nn.Module]):
    """A method for sensitivity.scan as in Li et al. 2017: a layer's smallest filters by L1 are set to zero, alone.

    What a residual connection adds to these channels stays, so nothing can really be cut there; use `silencing` for
    the effect of a real removal. layers: those of layers.named(model, ...).
    """
    order = {name: layer.weight.detach().abs().flatten(1).sum(1).argsort(stable=True) for name, layer in layers.items()}

    def method(layer: str, level: float) -> Change:
        count = round(level * len(order[layer]))
        new = copy.deepcopy(layers[layer])
        with torch.no_grad():
            new.weight[order[layer][:count]] = 0
            if new.bias is not None:
                new.bias[order[layer][:count]] = 0
        return Change({layer: new} if count else {}, removed=count, of=len(order[layer]), layers=(layer,),
                      left={layer: 1 - count / len(order[layer])}, note="" if count else "nothing was removed at this level")

    method.layers = list(layers)
    return method


def _silenced(model: nn.Module, removed: Mapping[str, Sequence[int]], known: Sequence[Group]) -> dict[str, nn.Module]:
    """New layers, by name, for all that read a removed channel, with the weights that read it zero."""
    by_layer = {group.layer: group for group in known}
    _check(removed, by_layer)
    new: dict[str, nn.Module] = {}
    for layer, places in removed.items():
        group = by_layer[layer]
        for name, at in group.read_by.items() if places else ():
            reader = new.setdefault(name, copy.deepcopy(model.get_submodule(name)))
            with torch.no_grad():
                reader.weight[:, at[list(places)].flatten()] = 0
    return new


def _check(removed: Mapping[str, Sequence[int]], known: Mapping[str, Group]) -> None:
    for layer, places in removed.items():
        if layer not in known:
            raise ValueError(f"no group of channels is called {layer!r}; there are {', '.join(known)}")
        group = known[layer]
        if group.kept and places:
            raise UnsupportedModelError(f"channels of layer {layer} cannot be removed: {group.kept}")
        if any(not 0 <= place < group.channels for place in places) or len(set(places)) >= group.channels:
            raise ValueError(f"layer {layer} has channels 0 to {group.channels - 1}, of which one must stay; "
                             f"found {list(places)}")


def _filter_scores(layer: nn.Module, criterion: str, gradient: Tensor | None) -> Tensor:  # -> (out channels,)
    weight = layer.weight.detach()
    filters = (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight).flatten(1)
    if criterion == "l1":
        return filters.abs().sum(1)
    if criterion == "l2":
        return filters.norm(dim=1)
    if criterion == "fpgm":
        return torch.cdist(filters, filters).sum(1)
    return gradient


def _gradients(model: nn.Module, batches: Iterator) -> dict[str, Tensor]:
    """sum |w dL/dw| per output channel of each layer, the gradient being that of the mean loss over the batches."""
    work = copy.deepcopy(model).eval()
    count = 0
    for images, labels in batches:
        nn.functional.cross_entropy(work(images), labels, reduction="sum").backward()
        count += len(labels)
    if not count:
        raise ValueError("criterion 'taylor' found no images in its batches")
    return {name: (layer.weight.detach() * layer.weight.grad / count).abs().flatten(1).sum(1)
            for name, layer in work.named_modules() if isinstance(layer, _PRODUCERS) and layer.weight.grad is not None}


def _dependencies(model: nn.Module, example: Tensor):
    import torch_pruning

    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)
    except Exception as error:  # it runs the model and walks autograd's graph; either may raise anything
        raise UnsupportedModelError(f"the channels of {type(model).__name__} cannot be traced: "
                                    f"{str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def _pruner(layer: nn.Module):
    from torch_pruning import function

    if isinstance(layer, nn.Linear):
        return function.prune_linear_out_channels
    depthwise = layer.groups == layer.out_channels > 1
    return function.prune_depthwise_conv_out_channels if depthwise else function.prune_conv_out_channels


def _group(graph, module: nn.Module, names: Mapping[nn.Module, str]) -> Group:
    from torch_pruning import function

    channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    made, normed, read, kept = {}, {}, {}, None
    for dependency, places in graph.get_pruning_group(module, _pruner(module), list(range(channels))):
        target, name, at = dependency.target.module, names.get(dependency.target.module), torch.tensor(places)
        if "ConstantPad" in str(getattr(dependency.target, "name", "")):
            kept = "they run through a shortcut padded with zero channels, whose places are fixed"
        if isinstance(target, nn.LayerNorm | nn.GroupNorm):
            kept = "a layer norm takes its mean over them"
        if name is None:
            continue
        outwards = dependency.handler in (function.prune_conv_out_channels, function.prune_linear_out_channels,
                                          function.prune_depthwise_conv_out_channels)
        if isinstance(target, nn.modules.batchnorm._BatchNorm):
            normed[name] = at
        elif isinstance(target, _PRODUCERS) and outwards:
            made[name] = at
        elif isinstance(target, _PRODUCERS):
            read[name] = at
    if not read:
        kept = "they are the network's output"
    if any(len(at) % channels for at in (*made.values(), *normed.values(), *read.values())):
        kept = "a layer that makes or reads them splits them, as attention does with its heads"
    if kept and kept.startswith("a layer"):
        made, normed, read = {names[module]: torch.arange(channels)}, {}, {}
    parts = {name: graph.model.get_submodule(name).groups for name in (*made, *read)
             if 1 < getattr(graph.model.get_submodule(name), "groups", 1) < channels}
    parted = max(parts.values(), default=1)
    if any(parted % g for g in parts.values()) or channels % parted:
        kept = f"they run through convolutions of {sorted(set(parts.values()))} groups, which do not divide each other"
        parted = 1
    channels //= parted

    def places(at: Tensor) -> Tensor:  # (parted * channels * k,) -> (channels, parted * k)
        return at.view(parted, channels, -1).transpose(0, 1).reshape(channels, -1)

    made, normed, read = ({name: places(at) for name, at in part.items()} for part in (made, normed, read))
    for name in parts.keys() & read.keys():  # its weight sees one of its groups only
        read[name] = read[name][:, : read[name].shape[1] // parted]
    return Group(names[module], channels, made, normed, read, kept)
