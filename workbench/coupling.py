"""Which channels of a network can only go together: those that an addition, a concatenation or a grouped convolution
couples.

Source: the dependency graph of torch-pruning (Fang et al. 2023, arXiv 2301.12900), which is asked for each layer's
group. What it cannot know is settled here: padded shortcuts, layer norms, attention heads, grouped convolutions.
"""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.layers import WEIGHTED, UnsupportedModelError, evaluating, reason


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
        if not isinstance(module, WEIGHTED) or name in seen or module not in graph.module2node:
            continue  # the last: a layer that eval mode does not run, such as an auxiliary classifier
        group = _group(graph, module, names)
        seen.update(group.made_by)
        first = min(group.made_by, key=order.get)
        made = {maker: group.made_by[maker] for maker in sorted(group.made_by, key=order.get)}
        found.append(Group(first, group.channels, made, group.normed_by, group.read_by, group.kept))
    return found


def cut(model: nn.Module, places: Mapping[str, Tensor], example: Tensor) -> None:
    """Cut output channels, int64 (n,) by layer, and all that is coupled to them, out of `model` itself."""
    graph = _dependencies(model, example)
    for name, own in places.items():
        layer = model.get_submodule(name)
        graph.get_pruning_group(layer, _pruner(layer), sorted(own.tolist())).prune()


def _dependencies(model: nn.Module, example: Tensor):
    import torch_pruning

    try:
        with contextlib.redirect_stdout(io.StringIO()), evaluating(model), torch.inference_mode(False), torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)
    except Exception as error:  # it runs the model and walks autograd's graph; either may raise anything
        raise UnsupportedModelError(f"the channels of {type(model).__name__} cannot be traced: "
                                    f"{reason(error)}") from error


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
        if isinstance(target, nn.ConvTranspose2d):
            kept = "a layer among them is a transposed convolution, which this does not cut"
        if isinstance(target, nn.LayerNorm | nn.GroupNorm):
            kept = "a layer norm takes its mean over them"
        if name is None:
            continue
        outwards = dependency.handler in (function.prune_conv_out_channels, function.prune_linear_out_channels,
                                          function.prune_depthwise_conv_out_channels)
        if isinstance(target, nn.modules.batchnorm._BatchNorm):
            normed[name] = at
        elif isinstance(target, WEIGHTED) and outwards:
            made[name] = at
        elif isinstance(target, WEIGHTED):
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
