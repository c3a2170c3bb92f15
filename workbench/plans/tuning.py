"""Quantisation that looks for itself: which calibrator and which repairs bring the answers nearest
to the float model's."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pandas as pd
import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from workbench import files
from workbench.batches import Batch, answer, call
from workbench.errors import UnsupportedModelError
from workbench.graph.layers import evaluating
from workbench.graph.norms import fold_batchnorm
from workbench.methods.quantization import quantize
from workbench.methods.reparameterization import equalize
from workbench.methods.rounding import REPAIRS
from workbench.numbers.grid import GRANULARITIES, Scheme
from workbench.numbers.histograms import CALIBRATORS
from workbench.subjects.subject import Count, Removed, Subject
from workbench.subjects.tasks import ONE_SPLIT, Split, Task, with_views

WINS = 0.98  # of the least distance so far: what a further repair has to stay below
# (the model so far, the batches that calibrate) -> the next
Change = Callable[[nn.Module | None, list[Batch]], nn.Module]


@dataclass(frozen=True)
class Tune:
    """The step of a plan that quantises by what helps: each calibrator, equalised ranges, then each
    of `repairs` on the best so far; it stops where none brings the answers nearer. What was chosen
    is fitted once more, to all examples.

    Near is the mean relative L2 distance of the outputs from the float model's, on `judged`
    examples other than the `examples` that calibrate, of the validation split and, where it has too
    few, the training split; labels are not looked at. views: further crops of each example that
    calibrates, where they are pictures.

    Example: `Tune(bits=4)`
    """

    needs_examples: ClassVar[bool] = True
    bits: Annotated[int, Ge(2), Le(8)] = 8
    granularity: Literal[GRANULARITIES] = "channel"  # type: ignore[valid-type]
    group: Count = 0
    calibrators: tuple[str, ...] | list[str] = CALIBRATORS
    repairs: tuple[str, ...] | list[str] = ("bias", "descend", "adaround")
    examples: Annotated[int, Ge(1)] = 100
    judged: Annotated[int, Ge(1)] = 60
    views: Count = 0
    enough: Removed = 0.0
    seed: Count = 0

    def __post_init__(self):
        for name, known in (("calibrators", CALIBRATORS), ("repairs", tuple(REPAIRS))):
            odd = [value for value in getattr(self, name) if value not in known]
            if odd or (name == "calibrators" and not self.calibrators):
                raise ValueError(f"tune: {name} holds {odd[0] if odd else 'nothing'!r}, expected "
                                 f"some of {', '.join(known)}")

    def apply(self, subject: Subject) -> Subject:
        """The quantised subject; what was tried stands in `made["tried"]`: what, distance, seconds,
        kept."""
        drawn, first = _drawn(subject.task, self.examples, self.judged, self.seed)
        places = torch.arange(len(drawn))
        folded = fold_batchnorm(subject.model, subject.example)
        calibrating, judging = drawn.take(places[:first]), drawn.take(places[first:])
        trial = _Trial(folded, self._seen(calibrating), judging)
        even = Scheme(self.bits, granularity=self.granularity, group=self.group)
        for name in files.progress(self.calibrators, title="calibrators"):
            trial.attempt(name, _quantising(folded, even, name), folded)
        chosen = pd.DataFrame(trial.rows).set_index("what").distance.idxmin()
        with contextlib.suppress(UnsupportedModelError):  # no two layers with only a ReLU between
            equal = equalize(folded, subject.example)
            trial.attempt("equalised", _quantising(equal, even, chosen), equal, WINS)
        for name in files.progress(self.repairs, title="repairs"):
            if trial.distance > self.enough:
                trial.attempt(name, _repairing(trial.reference, name, self.seed), trial.reference,
                              WINS, further=True)
        seen = self._seen(drawn)
        return subject.with_model(trial.again(seen), float=trial.reference, calibration=seen,
                                  tried=pd.DataFrame(trial.rows))

    def _seen(self, calibrating: Split) -> list[Batch]:
        """The batches that calibrate."""
        if self.views and calibrating.are_pictures:
            calibrating = with_views(calibrating, self.views, seed=self.seed)
        return list(calibrating.batches(50))


class _Trial:
    """What was tried, and the best of it: how near it comes, the steps to it, the model that they
    made and the float model that it stands for."""

    def __init__(self, folded: nn.Module, seen: list[Batch], judging: Split):
        self.seen, self.judging = seen, list(judging.batches(50))
        self.expected = _answers(folded, self.judging)
        self.rows: list[dict] = []
        self.distance, self.reference = float("inf"), folded
        self.steps: list[Change] = []
        self.model: nn.Module | None = None

    def attempt(self, what: str, change: Change, reference: nn.Module, share: float = 1.0, *,
                further: bool = False) -> None:
        """Try a change, kept where it stays below `share` of the least distance; `further`: of the
        best so far."""
        began = time.perf_counter()
        try:
            made = change(self.model, self.seen)
        except UnsupportedModelError:
            return
        distance = _distance(_answers(made, self.judging), self.expected)
        kept = distance < share * self.distance
        self.rows.append({"what": what, "distance": distance,
                          "seconds": time.perf_counter() - began, "kept": kept})
        if kept:
            self.steps = [*(self.steps if further else []), change]
            self.distance, self.model, self.reference = distance, made, reference

    def again(self, seen: list[Batch]) -> nn.Module | None:
        """The best, fitted to other examples."""
        began, model = time.perf_counter(), None
        for change in self.steps:
            model = change(model, seen)
        self.rows.append({"what": "again, on all examples", "distance": float("nan"),
                          "seconds": time.perf_counter() - began, "kept": True})
        return model


def _quantising(reference: nn.Module, weights: Scheme, calibrator: str) -> Change:
    return lambda _, seen: quantize(reference, seen, weights=weights, calibrator=calibrator)


def _repairing(reference: nn.Module, name: str, seed: int) -> Change:
    return lambda model, seen: REPAIRS[name](model, reference, seen, seed=seed)


def _drawn(task: Task, examples: int, judged: int, seed: int) -> tuple[Split, int]:
    """Examples, and how many of them calibrate, the first; the others judge. Half and half where
    there are fewer than both."""
    source = (task.validation if len(task.validation) >= min(examples + judged, len(task.train))
              else task.train)
    if len(source) < 2:
        raise ValueError(f"{task.name} has {len(source)} validation or training examples, and test "
                         f"examples are not for tuning; {ONE_SPLIT}")
    drawn = source.subset(min(examples + judged, len(source)), seed=seed)
    return drawn, min(examples, len(drawn) - len(drawn) * judged // (examples + judged),
                      len(drawn) - 1)


def _answers(model: nn.Module, batches: list) -> Tensor:
    with evaluating(model), torch.inference_mode():
        return torch.cat([answer(call(model, inputs)).flatten(1) for inputs, _ in batches])


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-12)).mean().item()
