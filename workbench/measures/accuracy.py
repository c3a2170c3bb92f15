"""Top-1 accuracy with its interval, and the paired difference of two models on the same images.

Sources: Wilson 1927 for the interval of a proportion; McNemar 1947, exact binomial form; Agresti & Min 2005,
"Simple improved confidence intervals for comparing matched proportions", for the paired difference.
"""

from dataclasses import dataclass
from math import sqrt

import pandas as pd
import torch
from scipy.special import bdtr, stdtrit  # scipy.stats takes 0.7 s to import
from torch import Tensor

from workbench import files
from workbench.deployment import sessions
from workbench.subjects.data import Split

_Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of n images, fraction, with its 95 % Wilson interval.

    predictions: int64 (n,), the chosen classes; labels: int64 (n,); correct: bool (n,), image by image.
    """

    top1: float
    top1_low: float
    top1_high: float
    n: int
    predictions: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        return self.predictions == self.labels

    def row(self) -> dict[str, float | int]:
        """The figures for a table: top1, top1_low, top1_high, n."""
        return {"top1": self.top1, "top1_low": self.top1_low, "top1_high": self.top1_high, "n": self.n}

    def __str__(self) -> str:
        return f"{self.top1:.2%} [{self.top1_low:.2%}, {self.top1_high:.2%}] of n = {self.n:,}"


@dataclass(frozen=True)
class Difference:
    """Top-1 of the candidate minus the reference's, on the same n images, with a 95 % interval.

    gained: images that only the candidate has right; lost: that only the reference has; p_value: McNemar, exact.
    """

    difference: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int
    n: int

    def row(self) -> dict[str, float | int]:
        """The figures for a table: top1_change with its interval, p_value, gained, lost."""
        return {"top1_change": self.difference, "top1_change_low": self.low, "top1_change_high": self.high,
                "p_value": self.p_value, "gained": self.gained, "lost": self.lost}

    def __str__(self) -> str:
        return (f"{100 * self.difference:+.2f} points [{100 * self.low:+.2f}, {100 * self.high:+.2f}], "
                f"p = {self.p_value:.2g} ({self.gained} gained, {self.lost} lost of {self.n:,})")


def evaluate(model, split: Split, *, batch_size: int = 64) -> Accuracy:
    """Top-1 of anything that sessions.open takes, on all images of `split`.

    Raises ValueError for an empty split, for NaN in the images or in the outputs, and for a batch the model refuses.

    Example: `accuracy.evaluate(model, task.test).row()`
    """
    session, chosen, labels = sessions.open(model), [], []
    with files.progress(total=len(split), title=f"accuracy of {session.name}", unit="image") as bar:
        for images, answers in split.batches(batch_size):
            outputs = session(finite(images, f"images of {split.name}"))
            chosen.append(finite(outputs, f"outputs of {session.name}").argmax(1))
            labels.append(answers)
            bar.update(len(answers))
    return from_predictions(torch.cat(chosen), torch.cat(labels))


def from_predictions(predictions: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of chosen classes int64 (n,) against labels int64 (n,)."""
    hits, n = int((predictions == labels).sum()), len(labels)
    return Accuracy(hits / n, *wilson(hits, n), n, predictions, labels)


def difference(reference: Accuracy, candidate: Accuracy) -> Difference:
    """Paired difference, candidate minus reference: with b lost, c gained of n images, d = (c - b) / n.

    Interval of Agresti & Min: half an image is added to each of the four cells, then Wald's. p: the exact McNemar
    test, a binomial of b + c throws at 1/2. Raises ValueError where the two were not measured on the same images.

    Example: `accuracy.difference(before, after).low`
    """
    if reference.n != candidate.n or not torch.equal(reference.labels, candidate.labels):
        raise ValueError(f"a paired difference needs the same images: the reference saw {reference.n}, "
                         f"the candidate {candidate.n}, and their labels must agree")
    gained = int((candidate.correct & ~reference.correct).sum())
    lost = int((reference.correct & ~candidate.correct).sum())
    p_value = min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))
    low, high = paired_interval(gained, lost, reference.n)
    return Difference((gained - lost) / reference.n, low, high, p_value, gained, lost, reference.n)


def over_seeds(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean top1 and top1_change over the rows of each group (its seeds), with runs and the mean's 95 % interval.

    The interval is Student's t over the runs; NaN where there is a single one. Needs columns top1 and top1_change.
    """
    rows = []
    for key, part in table.groupby(by, sort=False):
        n, row = len(part), dict(zip(by, key, strict=True))
        for column in ("top1", "top1_change"):
            mean = part[column].mean()
            half = stdtrit(n - 1, 0.975) * part[column].std() / sqrt(n) if n > 1 else float("nan")
            row |= {column: mean, f"{column}_low": mean - half, f"{column}_high": mean + half}
        rows.append(row | {"runs": n})
    return pd.DataFrame(rows)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of p = hits / n: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    share, more = hits / n, _Z**2 / n
    half = _Z * sqrt(share * (1 - share) / n + more / (4 * n))
    low, high = ((share + more / 2 + sign * half) / (1 + more) for sign in (-1, 1))
    return (low if hits else 0.0), (high if hits < n else 1.0)


def paired_interval(gained: int, lost: int, n: int, *, z: float = _Z, population: int | None = None) -> tuple[float, float]:
    """95 % interval of (gained - lost) / n, after Agresti & Min: half an image more in each of the four cells.

    z: the normal quantile, for another level. population: where the n images are drawn without replacement from that
    many and the interval is for the difference over those, its half-width shrinks by sqrt(1 - n / population).
    """
    rest = 1 - n / population if population else 1.0
    n += 2
    middle, both = (gained - lost) / n, gained + lost + 1
    half = z * sqrt(max(both - (gained - lost) ** 2 / n, 0) * rest) / n
    return max(middle - half, -1.0), min(middle + half, 1.0)


def finite(values: Tensor, what: str) -> Tensor:
    """`values`, unless NaN or infinity is among them: then ValueError names the first such row."""
    if not values.isfinite().all():
        row = int((~values.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{what} hold NaN or infinity (first in row {row} of a batch of {len(values)}); "
                         "look at the data or the weights there")
    return values
