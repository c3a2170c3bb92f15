"""How much each channel of a network matters, by what stands in its weights or by what the loss says.

Sources of the criteria: l1 Li et al. 2017 (arXiv 1608.08710); bn_gamma Liu et al. 2017 (arXiv 1708.06519); taylor
Molchanov et al. 2019 (arXiv 1906.10771), |weight x gradient| instead of its square; fpgm He et al. 2019
(arXiv 1811.00250), by the sum of distances to all other filters.
"""

import copy
from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from workbench.batches import Batch, Inputs, call, count
from workbench.errors import UnsupportedModelError
from workbench.graph.coupling import groups
from workbench.graph.layers import WEIGHTED
from workbench.subjects.objectives import Objective

CRITERIA = ("l1", "l2", "bn_gamma", "taylor", "fpgm", "random")


def score(model: nn.Module, criterion: str, *, example: Inputs, batches: Iterable[Batch] | None = None,
          objective: Objective | None = None, seed: int = 0) -> pd.DataFrame:
    """One row per channel of each group: layer (of the group), channel, score, group_size, kept, unit; higher is more important.

    A group's score sums those of the layers that make its channels, filter by filter: l1 sum |w|, l2 sqrt(sum w^2),
    fpgm sum of the distances to the other filters; bn_gamma |gamma| of the batch norms over it; taylor
    sum |w dL/dw| with L the loss of `objective` (one class an example) over `batches`; random by `seed`, as a control.

    Raises ValueError for an unknown criterion, NaN, or taylor without batches; UnsupportedModelError where bn_gamma
    finds no batch norm.

    Example: `channels.score(model, "l1", example=task.example)`
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; expected one of {', '.join(CRITERIA)}")
    if criterion == "taylor" and batches is None:
        raise ValueError("criterion 'taylor' needs batches=split.batches(), of inputs and targets")
    gradients = _gradients(model, batches, objective or Objective()) if criterion == "taylor" else {}
    draw = torch.Generator().manual_seed(seed)
    modules, rows = dict(model.named_modules()), []
    for group in groups(model, example):
        if criterion == "random":
            total = torch.rand(group.channels, generator=draw)
        elif criterion == "bn_gamma":
            if not group.normed_by and not group.kept:
                raise UnsupportedModelError(f"layer {group.layer} has no batch norm, so bn_gamma cannot rank its channels; "
                                            "use l1, or taylor")
            total = sum((_each(modules[n].weight.detach().abs(), at) for n, at in group.normed_by.items()),
                        torch.zeros(group.channels))
        else:
            total = sum(_each(_filter_scores(modules[n], criterion, gradients.get(n)), at) for n, at in group.made_by.items())
        if not torch.isfinite(total).all():
            raise ValueError(f"layer {group.layer}: criterion {criterion} gives NaN or infinity; look at its weights")
        rows += [{"layer": group.layer, "channel": c, "score": float(s), "group_size": group.channels,
                  "kept": group.kept is not None, "unit": group.unit} for c, s in enumerate(total)]
    return pd.DataFrame(rows)


def _each(scores: Tensor, at: Tensor) -> Tensor:
    """The sum of a layer's scores over the places of each channel, (channels,); -1 is no place."""
    return (scores[at.clamp_min(0)] * (at >= 0)).sum(1)


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


def _gradients(model: nn.Module, batches: Iterable[Batch], objective: Objective) -> dict[str, Tensor]:
    """sum |w dL/dw| per output channel of each layer, the gradient being that of the mean loss over the batches."""
    work, seen = copy.deepcopy(model).eval(), 0
    for inputs, targets in batches:
        size = count(inputs)
        (size * objective.loss(objective.read(call(work, inputs), targets), targets)).backward()
        seen += size
    if not seen:
        raise ValueError("criterion 'taylor' found no examples in its batches")
    return {name: (layer.weight.detach() * layer.weight.grad / seen).abs().flatten(1).sum(1)
            for name, layer in work.named_modules() if isinstance(layer, WEIGHTED) and layer.weight.grad is not None}
