"""The grids that numbers are put on, their scales, and fake quantisation.

q = clamp(round(x / s) + z, q_min, q_max), x' = s (q - z); symmetric has z = 0 and q from -2^(b-1),
asymmetric q from 0.

Sources: Jacob et al. 2018 (arXiv 1712.05877); k-means levels Han et al. 2016 (arXiv 1510.00149).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import UnsupportedModelError

GRANULARITIES = ("tensor", "channel", "group")
LEVELS = ("uniform", "kmeans", "shifted")


@dataclass(frozen=True)
class Scheme:
    """How numbers become integers of `bits` bits (2-8).

    granularity: one scale for the "tensor", for each output "channel", or for each "group" of
    `group` consecutive inputs of a channel. levels "uniform"; "kmeans": 2^bits values, fitted to
    each tensor or channel, stored as a table; "shifted": as uniform and not symmetric, but zero
    need not be among them, as in GGUF's Q4_1 (weights alone).

    Example: `Scheme(4).limits == (-8, 7)`
    """

    bits: int = 8
    symmetric: bool = True
    granularity: str = "tensor"
    group: int = 0
    levels: str = "uniform"

    def __post_init__(self):
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"scheme: bits is {self.bits!r}, expected a whole number, 2 to 8")
        for name, known in (("granularity", GRANULARITIES), ("levels", LEVELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"scheme: {name} is {getattr(self, name)!r}, expected one of "
                                 f"{', '.join(known)}")
        if (self.granularity == "group") != (self.group > 0):
            raise ValueError(f"scheme: granularity is {self.granularity!r} and group {self.group}; "
                             "a group of at least 1 input goes with granularity 'group', and only "
                             "with it")
        if self.levels == "shifted" and self.symmetric:
            raise ValueError("scheme: levels 'shifted' lie anywhere; give symmetric=False")

    @property
    def limits(self) -> tuple[int, int]:  # the least and the greatest integer
        return ((-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.symmetric
                else (0, 2**self.bits - 1))

    def rows(self, weight: Tensor, layer: str = "") -> Tensor:
        """The weight (out, ...) as (R, C), each row sharing a scale. Raises UnsupportedModelError
        where groups do not fit."""
        if self.granularity == "tensor":
            return weight.reshape(1, -1)
        if self.granularity == "channel":
            return weight.reshape(len(weight), -1)
        if weight[0].numel() % self.group:
            raise UnsupportedModelError(f"layer {layer} has {weight[0].numel()} inputs a channel, "
                                        f"which groups of {self.group} do not divide; choose "
                                        "another group")
        return weight.reshape(-1, self.group)


def fit(rows: Tensor, scheme: Scheme, *, by: str = "minmax") -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32 (R, 1) each, of values (R, C), row by row.

    by "minmax": the range covers all values; "mse": of 60 ranges from 0.3 of that to all of it, the
    one of least squared error. A row of zeros has scale 1.

    Example: `fit(torch.tensor([[-2.0, 127.0]]), Scheme(8))[0].item() == 1.0`
    """
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if scheme.levels != "shifted":
        low, high = low.clamp(max=0), high.clamp(min=0)
    if by == "minmax":
        return affine(low, high, scheme)
    best = torch.full_like(low, math.inf)
    scale, zero = affine(low, high, scheme)
    for share in torch.linspace(1.0, 0.3, 60).tolist():
        trial_scale, trial_zero = affine(low * share, high * share, scheme)
        rounded = fake_quantize(rows, trial_scale, trial_zero, scheme)
        error = (rows - rounded).pow(2).sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, trial_scale, scale), torch.where(better, trial_zero, zero)
    return scale, zero


def fake_quantize(values: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """s (clamp(round(x / s) + z) - z), with the gradient 1 straight through inside the limits, and
    to s as learned step.

    Example: `fake_quantize(torch.tensor([0.26]), torch.tensor([0.5]), torch.zeros(1),
    Scheme(8)).item() == 0.5`
    """
    low, high = scheme.limits
    scaled = values / scale + zero
    kept = scaled.clamp(low, high)
    rounded = kept.round().detach() + (kept - kept.detach())
    return (rounded - zero) * scale


def kmeans(rows: Tensor, bits: int, *, steps: int = 30) -> Tensor:
    """2^bits sorted levels, float32 (R, 2^bits), of values (R, C): Lloyd's steps from the best
    uniform grid, so never worse.

    Example: `kmeans(torch.randn(4, 100), bits=3).shape == (4, 8)`
    """
    uniform = Scheme(bits)
    levels = (torch.arange(uniform.limits[0], uniform.limits[1] + 1)
              * fit(rows, uniform, by="mse")[0])
    for _ in range(steps):
        chosen = nearest(rows, levels)
        sums = torch.zeros_like(levels).scatter_add_(1, chosen, rows)
        counts = torch.zeros_like(levels).scatter_add_(1, chosen, torch.ones_like(rows))
        levels = torch.where(counts > 0, sums / counts.clamp_min(1), levels).sort(1).values
    return levels


def affine(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges from `low` to `high`, of any shape.

    Example: `affine(torch.tensor([0.0]), torch.tensor([2.55]), Scheme(8,
    symmetric=False))[1].item() == 0`
    """
    least, most = scheme.limits
    if scheme.symmetric:
        scale = torch.maximum(-low, high) / most
        return torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale)
    scale = (high - low) / (most - least)
    scale = torch.where(scale > 0, scale, 1.0)
    zero = least - low / scale
    return scale, zero if scheme.levels == "shifted" else zero.round().clamp(least, most)


def nearest(rows: Tensor, levels: Tensor) -> Tensor:
    """The places (R, C) of the levels (R, L), sorted, that lie nearest to values (R, C).

    Example: `nearest(torch.tensor([[0.9]]), torch.tensor([[0.0, 1.0]])).item() == 1`
    """
    return torch.searchsorted(((levels[:, 1:] + levels[:, :-1]) / 2).contiguous(),
                              rows.contiguous())
