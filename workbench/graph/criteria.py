"""How much each output channel of a layer matters by its weights, or by what a loss says of
them."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from workbench.batches import Batch, count, pairs
from workbench.graph.layers import WEIGHTED, is_transposed


def each(scores: Tensor, at: Tensor) -> Tensor:
    """The sum of a layer's scores over the places of each channel, (channels,); -1 is no place.

    Example: `each(torch.tensor([1.0, 2.0]), torch.tensor([[0, 1], [1, -1]])).tolist() == [3.0,
    2.0]`
    """
    return (scores[at.clamp_min(0)] * (at >= 0)).sum(1)


# -> (out channels,)
def of_filters(layer: nn.Module, criterion: str, gradient: Tensor | None) -> Tensor:
    """The score of each filter of a layer by its weights; of taylor what its gradient gave.

    Example: `of_filters(nn.Linear(3, 2), "l1", None).shape == (2,)`
    """
    filters = _filters(layer, layer.weight.detach())
    if criterion == "l1":
        return filters.abs().sum(1)
    if criterion == "l2":
        return filters.norm(dim=1)
    if criterion == "fpgm":
        return torch.cdist(filters, filters).sum(1)
    return gradient


def gradients(model: nn.Module, batches: Iterable[Batch],
              loss: Callable[[nn.Module, Batch], Tensor]) -> dict[str, Tensor]:
    """sum |w dL/dw| per output channel of each layer, the gradient being that of the mean loss over
    the batches.

    Example: `gradients(model, seen, lambda m, part: nn.functional.cross_entropy(m(part[0]),
    part[1]))`
    """
    work, seen = copy.deepcopy(model).eval().requires_grad_(True), 0
    for batch in pairs(batches):
        size = count(batch[0])
        (size * loss(work, batch)).backward()
        seen += size
    if not seen:
        raise ValueError("criterion 'taylor' found no examples in its batches")
    found = {}
    for name, layer in work.named_modules():
        if isinstance(layer, WEIGHTED):
            slope = layer.weight.grad  # None where the loss does not read the layer
            change = layer.weight.detach() * (0.0 if slope is None else slope / seen)
            found[name] = _filters(layer, change).abs().sum(1)
    return found


def _filters(layer: nn.Module, weight: Tensor) -> Tensor:  # (outputs, all else)
    return (weight.transpose(0, 1) if is_transposed(layer) else weight).flatten(1)
