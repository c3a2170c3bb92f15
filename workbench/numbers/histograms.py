"""The range that activations need, read from what passes.

Source: entropy calibration Migacz 2017, "8-bit inference with TensorRT".
"""

import math

import numpy as np
import torch
from torch import Tensor

from workbench.numbers.grid import Scheme, affine, fake_quantize

CALIBRATORS = ("minmax", "moving_average", "percentile", "mse", "entropy")
BINS = 4096  # of a histogram at most; when a batch needs more, neighbours merge two by two
# values of a batch that a histogram counts at most, evenly spread; the least and greatest are of
# all
COUNTED = 2**18
# of the values that the percentile calibrator keeps, a half of the rest cut on either side
PERCENTILE = 0.9999
CLIPPED = 1e-3  # of the values that the entropy calibrator may clip
MOMENTUM = 0.9  # of the moving average, per batch


class Histogram:
    """Counts of values in bins of equal width, as many as come: the width doubles when they no
    longer fit.

    Bins lie on multiples of the width, a power of two, so that merging two by two is exact and
    memory does not grow with the images. Not `counting`, it keeps the least and greatest value
    only, which is what "minmax" and "moving_average" need.

    Example: `histogram = Histogram(); histogram.add(a); histogram.range("entropy", Scheme(8))`
    """

    def __init__(self, *, counting: bool = True):
        self.counting, self.counts, self.first, self.width = (counting,
                                                              torch.zeros(0, dtype=torch.int64), 0,
                                                              0.0)
        self.low, self.high, self.averages, self.zeros = math.inf, -math.inf, None, 0

    def add(self, values: Tensor, place: str = "") -> None:
        """Count a batch. Raises ValueError for NaN or infinity."""
        if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1)  # in the order of memory: no copy
        values = values.flatten().float()
        low, high = (v.item() for v in values.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"calibration: the values of {place or 'a node'} hold NaN or "
                             "infinity; look at the images and the weights")
        now = torch.tensor([low, high])
        self.averages = (now if self.averages is None
                         else MOMENTUM * self.averages + (1 - MOMENTUM) * now)
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not self.counting:
            return
        step = -(-len(values) // COUNTED) | 1
        # else it would meet the same channels or columns again and again
        while math.gcd(step, len(values)) > 1:
            step += 2
        values = values[::step]
        self.zeros += int(np.count_nonzero((values == 0).numpy()))
        if not self.width:
            self.width = 2.0 ** math.ceil(math.log2(max(high - low, abs(high), abs(low), 1e-30)
                                                    / (BINS // 2)))
        while math.floor(self.high / self.width) - math.floor(self.low / self.width) >= BINS:
            self._merge()
        first, last = math.floor(self.low / self.width), math.floor(self.high / self.width)
        grown = torch.zeros(last - first + 1, dtype=torch.int64)
        start = self.first - first
        grown[start:start + len(self.counts)] = self.counts
        for part in values.split(2**23):  # histc counts in float32, exact to 2^24
            grown += torch.histc(part, len(grown), first * self.width,
                                 (last + 1) * self.width).to(torch.int64)
        self.counts, self.first = grown, first

    def range(self, calibrator: str, scheme: Scheme) -> tuple[float, float]:
        """The least and greatest value that the grid is to hold, with 0 between them.

        Raises ValueError for an unknown calibrator, or where nothing was seen.
        """
        if calibrator not in CALIBRATORS:
            raise ValueError(f"unknown calibrator {calibrator!r}; expected one of "
                             f"{', '.join(CALIBRATORS)}")
        if self.averages is None:
            raise ValueError("calibration saw no images; give at least one batch")
        ways = {"minmax": lambda: (self.low, self.high), "moving_average": self.averages.tolist,
                "percentile": self._percentile,
                "mse": lambda: self._least_error(scheme), "entropy": lambda: self._entropy(scheme)}
        chosen = ways[calibrator]()
        return min(chosen[0], 0.0), max(chosen[1], 0.0)

    def _merge(self) -> None:
        odd = self.first % 2
        padded = torch.cat([torch.zeros(odd, dtype=torch.int64), self.counts])
        padded = torch.cat([padded, torch.zeros(len(padded) % 2, dtype=torch.int64)])
        self.counts, self.first, self.width = (padded.view(-1, 2).sum(1), (self.first - odd) // 2,
                                               2 * self.width)

    def _centres(self) -> Tensor:
        return (self.first + torch.arange(len(self.counts)) + 0.5) * self.width

    def _percentile(self) -> tuple[float, float]:
        share, cut, one_sided = (self.counts.cumsum(0) / self.counts.sum(), (1 - PERCENTILE) / 2,
                                 self.low >= 0)
        low = self.low if one_sided else float(self._centres()[int((share < cut).sum())])
        top = int((share < (PERCENTILE if one_sided else 1 - cut)).sum())
        return low, float(self._centres()[min(top, len(self.counts) - 1)])

    def _least_error(self, scheme: Scheme) -> tuple[float, float]:
        shares = torch.linspace(1.0, 0.1, 91)[:, None]
        low, high = (shares * self.low).clamp(max=0), (shares * self.high).clamp(min=0)
        centres = self._centres()[None]
        off = centres - fake_quantize(centres, *affine(low, high, scheme), scheme)
        best = (off.pow(2) * self.counts).sum(1).argmin()
        return low[best].item(), high[best].item()

    def _entropy(self, scheme: Scheme) -> tuple[float, float]:
        """The threshold t on |x| at which KL(p || q) is least: p the counts with all beyond t in
        its last bin, q the same without those, spread evenly over what is not empty within each of
        the grid's levels. Zeros, which any grid holds and a ReLU makes by the half, are left out;
        else they would be spread with their level. Other spikes, which a plain background makes,
        would still drive t down to where they stand alone: it clips one value in a thousand at
        most."""
        reach = max(self.first + len(self.counts), -self.first)
        sizes = torch.zeros(reach, dtype=torch.float64)  # counts by |x|
        where = self.first + torch.arange(len(self.counts))
        sizes.scatter_add_(0, torch.where(where >= 0, where, -where - 1), self.counts.double())
        sizes[0] -= self.zeros
        levels = (2**scheme.bits if self.low >= 0 and not scheme.symmetric
                  else 2 ** (scheme.bits - 1))
        mass, filled, logs = (torch.cat([torch.zeros(1, dtype=torch.float64), v.cumsum(0)])
                              for v in (sizes, (sizes > 0).double(),
                                        torch.special.xlogy(sizes, sizes)))
        # the thresholds, in bins
        bins = torch.arange(min(levels, reach), reach + 1, max(reach // 1024, 1))
        edges = (bins[:, None]
                 * torch.linspace(0, 1, levels + 1, dtype=torch.float64)).round().long()
        m, n = mass[edges].diff(dim=1), filled[edges].diff(dim=1)
        inside, beyond, last = mass[bins], mass[-1] - mass[bins], sizes[bins - 1]
        spread = m[:, -1] / n[:, -1].clamp_min(1)  # what q has in the last bin
        own = (logs[bins] - torch.special.xlogy(last, last)
               + torch.special.xlogy(last + beyond, last + beyond))
        cross = (torch.special.xlogy(m, m / n.clamp_min(1)).sum(1)
                 + torch.special.xlogy(beyond, spread))
        divergence = (own - cross) / (inside + beyond) - (inside + beyond).log() + inside.log()
        possible = (inside > 0) & ((beyond == 0) | (spread > 0)) & (beyond <= CLIPPED
                                                                    * float(self.counts.sum()))
        found = (int(bins[torch.where(possible, divergence, math.inf).argmin()]) if possible.any()
                 else reach)
        threshold = found * self.width
        return max(self.low, -threshold), min(self.high, threshold)
