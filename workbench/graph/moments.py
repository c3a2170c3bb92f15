"""Second moments of what a layer reads, in a float model and in its quantised copy, and the best
weights between the two.

With x the input of a layer in the float model, x' that in the quantised one so far, E|W x - W'
x'|^2, the bias chosen best, is the quadratic form (W' - W*) G (W' - W*)^T plus a constant, with G =
Cov(x'), W* = W Cov(x, x') G^-1. So a layer's rounding is found on K x K matrices, K inputs a
channel, and memory does not grow with the examples. Convolutions give patches at places drawn at
random. Where K is large and examples are few, W* would fit those examples and no others: a ridge
draws it back to W, as far as examples held out ask for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.graph.layers import patches

PLACES = (16, 256)  # patches of each image that a convolution's moments take, least and most
# patches in all for each input of a channel: with fewer, second moments fit the images and not the
# data
ROWS = 10
# every fifth image is held out to choose, by layer, the ridge of W* from these shares of the mean
# variance
FOLDS = 5
SHARES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# of each variance (or the share, if less) and of their mean: added to Cov(x') to round with
SHRINKAGE, DAMPING = 0.2, 1e-2


@dataclass
class Moments:
    """Per group of a layer's inputs: means (g, K) of x and x', target W* (g, out / g, K) and
    Cov(x') (g, K, K).

    Example: `moments(nn.Linear(256, 4), [a], [a], seed=0).loss(torch.zeros(1, 4, 256)).shape == (1,
    4)`
    """

    mean: Tensor
    mean_quantised: Tensor
    target: Tensor
    covariance: Tensor

    def loss(self, weight: Tensor) -> Tensor:
        """The quadratic form, per output channel (g, out / g), with the gradient 2 (W' - W*) G at
        no further product."""
        apart = weight - self.target
        pull = (apart @ self.covariance).detach()
        half = (apart * pull).sum(2)
        return 2 * half - half.detach()


def moments(layer: nn.Module, inputs: list[Tensor], inputs_quantised: list[Tensor], *,
            seed: int) -> Moments:
    """The moments of a layer of the float model, from what it reads there and what its copy reads,
    batch by batch.

    Example: `moments(nn.Linear(256, 4), [a], [a], seed=0).target.shape == (1, 4, 256)`
    """
    fitted, apart, seen = None, None, sum(map(len, inputs))
    for x, y, held_out in _read(layer, inputs, inputs_quantised, seed):
        fitted = _added(fitted, x[:, ~held_out], y[:, ~held_out])
        apart = _added(apart, x[:, held_out], y[:, held_out])
    weight = layer.weight.detach().double().reshape(len(fitted[1]), -1, layer.weight[0].numel())
    share, both = 1.0, fitted
    if seen >= FOLDS:  # each share's target from four fifths of the images, judged on the fifth
        (_, _, *few), (_, _, cross, own) = _centred(fitted), _centred(apart)
        targets = {share: _target(weight, few[0], few[1], share) for share in SHARES}
        share = min(SHARES,
                    key=lambda share: float(((targets[share] @ own - 2 * weight @ cross)
                                             * targets[share]).sum()))
        both = [a + b for a, b in zip(fitted, apart, strict=True)]
    mean, mean_quantised, cross, own = _centred(both)
    variances = own.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(min(share, SHRINKAGE) * variances + DAMPING
                             * variances.mean(1, keepdim=True).clamp_min(1e-12))
    return Moments(mean.float(), mean_quantised.float(), _target(weight, cross, own, share).float(),
                   (own + ridge).float())


def means(layer: nn.Module, inputs: list[Tensor], inputs_quantised: list[Tensor], *,
          seed: int) -> tuple[Tensor, Tensor]:
    """The means (g, K) alone of `moments`, without its products of K x K.

    Example: `means(nn.Linear(256, 4), [a], [a], seed=0)[0].shape == (1, 256)`
    """
    sums, count = torch.zeros(2, 2, 1, 1).double(), 0  # of x and x', examples fitted and held out
    for *pair, held_out in _read(layer, inputs, inputs_quantised, seed):
        # in the parts in which moments adds, so that the last bit is the same
        sums = sums + torch.stack([torch.stack([values[:, part].flatten(1, 2).sum(1).double()
                                                for part in (~held_out, held_out)])
                                   for values in pair])
        count += pair[0].shape[1] * pair[0].shape[2]
    mean, mean_quantised = (sums.sum(1) / count).float()
    return mean, mean_quantised


def _read(layer: nn.Module, inputs: list[Tensor], inputs_quantised: list[Tensor],
          seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of the products of each batch, x and x' (g, n, P, K), and which of its n examples are
    held out."""
    rows, seen = ROWS * layer.weight[0].numel(), 0
    places = min(max(-(-rows // sum(map(len, inputs))), PLACES[0]), PLACES[1])
    for k, pair in enumerate(zip(inputs, inputs_quantised, strict=True)):
        x, y = (patches(layer, values, seed=1000 * seed + k, places=places)
                .unflatten(1, (len(values), -1)) for values in pair)
        yield x, y, torch.arange(seen, seen + len(pair[0])) % FOLDS == FOLDS - 1
        seen += len(pair[0])


def _added(sums: list | None, x: Tensor, y: Tensor) -> list:
    """Sums with those of x and y (g, n, P, K) added: how many rows, x, y, x y^T, y y^T."""
    x, y = x.flatten(1, 2), y.flatten(1, 2)
    found = [x.shape[1],
             *(v.double()
               for v in (x.sum(1), y.sum(1), x.transpose(1, 2) @ y, y.transpose(1, 2) @ y))]
    return found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]


def _centred(sums: list) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of x and x', Cov(x, x') and Cov(x')."""
    mean, mean_quantised, cross, own = (value / sums[0] for value in sums[1:])
    return (mean, mean_quantised, cross - mean[:, :, None] * mean_quantised[:, None],
            own - mean_quantised[:, :, None] * mean_quantised[:, None])


def _target(weight: Tensor, cross: Tensor, own: Tensor, share: float) -> Tensor:
    """W* = (W Cov(x, x') + d W) (Cov(x') + d I)^-1, d = share of the mean variance: W itself where
    d is large."""
    ridge = (share * own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)[:, None, None]
             * torch.eye(own.shape[1]).double())
    return torch.linalg.solve(own + ridge, (weight @ (cross + ridge)).transpose(1, 2)).transpose(1,
                                                                                                 2)
