"""A task's metric with its interval, and the paired difference of two models on the same examples.

Each example gives a row of numbers (objectives.Objective.statistics), whose sums make the metric.
For one class an example the intervals are closed formulas; for F1 and perplexity, and where
examples belong together (sentences of a speaker), they are percentiles of 1,000 bootstrap samples
of the units, paired where two models are compared.

Sources: Wilson 1927 for the interval of a proportion; McNemar 1947, exact binomial form; Agresti &
Min 2005, "Simple improved confidence intervals for comparing matched proportions", for the paired
difference; bootstrap Efron & Tibshirani 1993.
"""

from dataclasses import dataclass, field, replace
from math import sqrt
from typing import TypeVar, cast

import numpy as np
import pandas as pd
import torch
from scipy.special import bdtr, stdtrit  # scipy.stats takes 0.7 s to import
from torch import Tensor

from workbench import files
from workbench.batches import Inputs, mapped
from workbench.deployment import sessions
from workbench.subjects.objectives import Objective
from workbench.subjects.tasks import Split, expect_split

SAMPLES = 1000  # of the bootstrap
_Z = 1.959964  # two-sided 95 %
Given = TypeVar("Given", bound=Inputs)


@dataclass(frozen=True)
class Score:
    """A metric over n examples with its 95 % interval.

    value, low, high: of the objective's metric. statistics: float64 (n, columns), example by
    example. labels: what was right, int64 (n,) for one class an example; predictions: what was
    answered. units: which examples belong together, or None.

    Example: `score.row()["n"] == len(task.test)`
    """

    value: float
    low: float
    high: float
    n: int
    objective: Objective = field(repr=False)
    statistics: Tensor = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    predictions: Tensor | None = field(default=None, repr=False)
    units: Tensor | None = field(default=None, repr=False)

    @property
    def top1(self) -> float:
        """The value, by its usual name where it is a top-1 accuracy."""
        return self.value

    @property
    def correct(self) -> Tensor:
        """bool (n,), for one class an example."""
        return self.statistics[:, 0] > 0.5

    def row(self) -> dict[str, float | int]:
        """The figures for a table: METRIC, METRIC_low, METRIC_high, n."""
        name = self.objective.metric
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high, "n": self.n}

    def __str__(self) -> str:
        if self.objective.metric == "perplexity":
            return (f"perplexity {self.value:.3f} [{self.low:.3f}, {self.high:.3f}] of n = "
                    f"{self.n:,}")
        kind = "" if self.objective.metric == "top1" else f"{self.objective.metric} "
        return f"{kind}{self.value:.2%} [{self.low:.2%}, {self.high:.2%}] of n = {self.n:,}"


@dataclass(frozen=True)
class Difference:
    """The candidate's metric minus the reference's, on the same n examples, with a 95 % interval.

    gained: examples that only the candidate has right; lost: that only the reference has (for other
    metrics than top-1: is better and worse at); p_value: McNemar, exact, of these two.

    Example: `accuracy.difference(before, after).row()["gained"] == 0`
    """

    difference: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int
    n: int
    metric: str = "top1"

    @property
    def value(self) -> float:
        """The difference, under the name that every figure with an interval has."""
        return self.difference

    def row(self) -> dict[str, float | int]:
        """The figures for a table: METRIC_change with its interval, p_value, gained, lost."""
        name = f"{self.metric}_change"
        return {name: self.difference, f"{name}_low": self.low, f"{name}_high": self.high,
                "p_value": self.p_value,
                "gained": self.gained, "lost": self.lost}

    def __str__(self) -> str:
        unit, by = ("", 1) if self.metric == "perplexity" else (" points", 100)
        return (f"{by * self.difference:+.2f}{unit} [{by * self.low:+.2f}, {by * self.high:+.2f}], "
                f"p = {self.p_value:.2g} ({self.gained} gained, {self.lost} lost of {self.n:,})")


def evaluate(model, split: Split, *, batch_size: int = 32) -> Score:
    """The metric of the split's objective for anything that sessions.open takes, on all its
    examples.

    Raises ValueError for an empty split, NaN in inputs or outputs, a batch that the model refuses,
    and outputs that the objective cannot read.

    Example: `accuracy.evaluate(model, task.test).row()`
    """
    expect_split(split)
    session, asked = sessions.open(model), split.objective
    rows, labels, answers = [], [], []
    with files.progress(total=len(split), title=f"accuracy of {session.name}",
                        unit=asked.unit) as bar:
        for inputs, targets in split.batches(batch_size):
            outputs = session(finite(inputs, f"{asked.unit}s of {split.name}"))
            logits = asked.read(finite(outputs, f"outputs of {session.name}"), targets)
            rows.append(asked.statistics(logits, targets))
            if targets.dim() == 1:
                labels.append(targets)
                answers.append(asked.answers(logits))
            bar.update(len(targets))
    seen = (torch.cat(labels), torch.cat(answers)) if labels else (None, None)
    return scored(torch.cat(rows), asked, labels=seen[0], predictions=seen[1], units=split.units)


def labelled_by(model, split: Split, *, batch_size: int = 32) -> Split:
    """`split` with what a model answers in the place of its labels, so that the accuracy of another
    is agreement with it.

    Raises ValueError where the answer is no single class, and as `evaluate` does.

    Example: `accuracy.evaluate(small, accuracy.labelled_by(model, task.test))`
    """
    answers = evaluate(model, split, batch_size=batch_size).predictions
    if answers is None:
        raise ValueError(f"{split.name} asks for more than one class an example; only classes can "
                         "be labelled by a model")
    return replace(split, targets=answers)


def by(score: Score, metric: str) -> Score:
    """The same examples by another metric of their objective. Raises ValueError where it has none
    of that name.

    Example: `accuracy.by(accuracy.evaluate(model, commands.test), "f1")`
    """
    return scored(score.statistics, replace(score.objective, metric=metric), labels=score.labels,
                  predictions=score.predictions, units=score.units)


def from_predictions(predictions: Tensor, labels: Tensor) -> Score:
    """The top-1 accuracy of chosen classes int64 (n,) against labels int64 (n,).

    Example: `from_predictions(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0])).value ==
    0.75`
    """
    return scored((predictions == labels).double()[:, None], Objective(), labels=labels,
                  predictions=predictions)


def scored(statistics: Tensor, objective: Objective, *, labels: Tensor | None = None,
           predictions: Tensor | None = None, units: Tensor | None = None, seed: int = 0) -> Score:
    """The score of statistics float64 (n, columns).

    Example: `scored(torch.tensor([[1.0], [0.0]]).double(), task.test.objective).value == 0.5`
    """
    n = len(statistics)
    value = float(objective.value(statistics.sum(0), n))
    if _counted(objective, units):
        low, high = wilson(int(statistics.sum()), n)
    else:
        low, high = np.percentile(_resampled(objective, [statistics], units, seed)[0], [2.5, 97.5])
    return Score(value, float(low), float(high), n, objective, statistics, labels, predictions,
                 units)


def difference(reference: Score, candidate: Score, *, seed: int = 0) -> Difference:
    """Paired difference, candidate minus reference.

    For one class an example, with b lost, c gained of n, d = (c - b) / n; interval of Agresti &
    Min: half an example is added to each of the four cells, then Wald's. Otherwise the interval is
    that of a paired bootstrap over units. p: the exact McNemar test, a binomial of b + c throws at
    1/2. Raises ValueError where the two were not measured on the same examples.

    Example: `accuracy.difference(before, after).low`
    """
    same = ((reference.labels is None) == (candidate.labels is None)
            and reference.objective.metric == candidate.objective.metric)
    if reference.n != candidate.n or not same or (reference.labels is not None
                                                  and
                                                  not torch.equal(reference.labels,
                                                                  candidate.labels)):
        raise ValueError(f"a paired difference needs the same {reference.objective.unit}s: the "
                         f"reference saw {reference.n}, the candidate {candidate.n}, and their "
                         "labels must agree")
    asked, both = reference.objective, [reference.statistics, candidate.statistics]
    better = _each(asked, candidate.statistics) - _each(asked, reference.statistics)
    gained, lost = int((better > 0).sum()), int((better < 0).sum())
    p_value = min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))
    change = candidate.value - reference.value
    if _counted(asked, reference.units):
        low, high = paired_interval(gained - lost, gained + lost, reference.n)
    else:
        one, other = _resampled(asked, both, reference.units, seed)
        low, high = np.percentile(other - one, [2.5, 97.5])
    return Difference(change, float(low), float(high), p_value, gained, lost, reference.n,
                      asked.metric)


def over_seeds(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean top1 and top1_change over the rows of each group (its seeds), with runs and the mean's
    95 % interval.

    The interval is Student's t over the runs; NaN where there is a single one. Needs columns top1
    and top1_change.

    Example: `over_seeds(pd.DataFrame({"rung": ["a", "a"], "top1": [0.9, 0.8], "top1_change": [0.0,
    0.1]}), ["rung"])`
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
    """95 % Wilson interval of p = hits / n: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) /
    (1 + z^2 / n).

    Example: `[round(end, 2) for end in wilson(8, 10)] == [0.49, 0.94]`
    """
    share, more = hits / n, _Z**2 / n
    half = _Z * sqrt(share * (1 - share) / n + more / (4 * n))
    low, high = ((share + more / 2 + sign * half) / (1 + more) for sign in (-1, 1))
    return (low if hits else 0.0), (high if hits < n else 1.0)


def paired_interval(total: float, squares: float, n: int, *, z: float = _Z,
                    population: int | None = None, added: float = 2) -> tuple[float, float]:
    """95 % interval of total / n, the mean change of an example, after Agresti & Min: half an
    example more in each of four cells.

    total: the sum of the changes, gained less lost; squares: that of their squares, gained and
    lost, where each is -1, 0 or 1. z: the normal quantile, for another level. population: where the
    n examples are drawn without replacement from that many and the interval is for the difference
    over those, its half-width shrinks by sqrt(1 - n / population), and what is added by 1 - n /
    population. added: the examples that are added, 2 in Agresti & Min.

    Example: `paired_interval(-10, 30, 1000)`
    """
    rest = 1 - n / population if population else 1.0
    size = n + added * rest
    middle = total / size
    half = z * sqrt(max(squares + added * rest / 2 - total**2 / size, 0) * rest) / size
    return max(middle - half, -1.0), min(middle + half, 1.0)


def finite(values: Given, what: str) -> Given:
    """`values`, unless NaN or infinity is among them: then ValueError names the first such row.

    Example: `torch.equal(finite(a, "values"), a)`
    """
    def one(value: Tensor) -> Tensor:
        if value.is_floating_point() and not value.isfinite().all():
            row = int((~value.isfinite()).reshape(len(value), -1).any(1).nonzero()[0])
            raise ValueError(f"{what} hold NaN or infinity (first in row {row} of a batch of "
                             f"{len(value)}); look at the data or the weights there")
        return value

    return cast(Given, mapped(one, values))


def _counted(objective: Objective, units: Tensor | None) -> bool:
    """Whether each example is right or wrong by itself, so that closed formulas hold."""
    return objective.metric == "top1" and units is None


def _each(objective: Objective, statistics: Tensor) -> Tensor:
    """How well each example by itself was done: higher is better."""
    sign = -1 if objective.metric == "perplexity" else 1
    return sign * objective.value(statistics, 1)


def _resampled(objective: Objective, statistics: list[Tensor], units: Tensor | None,
               seed: int) -> list[np.ndarray]:
    """The metric of each of the statistics on SAMPLES draws of the units, the same draws for
    all."""
    place = (np.arange(len(statistics[0])) if units is None
             else np.unique(units.numpy(), return_inverse=True)[1])
    size = place.max() + 1
    weights = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size),
                                                      SAMPLES)[:, place]
    drawn = torch.from_numpy(weights).double()
    return [objective.value(drawn @ rows, drawn.sum(1)).numpy() for rows in statistics]
