"""Quantisation that looks for itself: which calibrator and which repairs bring the answers nearest
to the float model's."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import pandas as pd
import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from workbench import files
from workbench.batches import answer, call
from workbench.errors import UnsupportedModelError
from workbench.graph.layers import evaluating
from workbench.graph.norms import fold_batchnorm
from workbench.methods.quantization import quantize
from workbench.methods.reparameterization import equalize
from workbench.methods.rounding import REPAIRS
from workbench.numbers.grid import GRANULARITIES, Scheme
from workbench.numbers.histograms import CALIBRATORS
from workbench.subjects.subject import Count, Removed, Subject
from workbench.subjects.tasks import ONE_SPLIT, Split, Task

WINS = 0.98  # of the least distance so far: what a further repair has to stay below


@dataclass(frozen=True)
class Tune:
    """The step of a plan that quantises by what helps: each calibrator, equalised ranges, then each
    of `repairs` on the best so far; it stops where none brings the answers nearer.

    Near is the mean relative L2 distance of the outputs from the float model's, on `judged`
    examples other than the `examples` that calibrate, of the validation split and, where it has too
    few, the training split; labels are not looked at.

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
        calibrating, judging = _drawn(subject.task, self.examples, self.judged, self.seed)
        seen, batches = list(calibrating.batches(50)), list(judging.batches(50))
        folded = fold_batchnorm(subject.model, subject.example)
        expected, rows = _answers(folded, batches), []
        weights = Scheme(self.bits, granularity=self.granularity, group=self.group)
        best: tuple[float, nn.Module | None, nn.Module] = (float("inf"), None, folded)

        def attempt(what: str, make: Callable[[], nn.Module], reference: nn.Module,
                    share: float = 1.0) -> None:
            nonlocal best
            began = time.perf_counter()
            try:
                made = make()
            except UnsupportedModelError:
                return  # no pair to equalise, say
            distance = _distance(_answers(made, batches), expected)
            rows.append({"what": what, "distance": distance, "seconds": time.perf_counter() - began,
                         "kept": distance < share * best[0]})
            if distance < share * best[0]:
                best = distance, made, reference

        for name in files.progress(self.calibrators, title="calibrators"):
            attempt(name, partial(quantize, folded, seen, weights=weights, calibrator=name), folded)
        chosen = pd.DataFrame(rows).set_index("what").distance.idxmin()
        try:
            even = equalize(folded, subject.example)
            attempt("equalised", lambda: quantize(even, seen, weights=weights, calibrator=chosen),
                    even, WINS)
        except UnsupportedModelError:  # no two layers with only a ReLU between them
            pass
        for name in files.progress(self.repairs, title="repairs"):
            if best[0] > self.enough:
                attempt(name, partial(REPAIRS[name], best[1], best[2], seen, seed=self.seed),
                        best[2], WINS)
        return subject.with_model(best[1], float=best[2], calibration=seen,
                                  tried=pd.DataFrame(rows))


def _drawn(task: Task, examples: int, judged: int, seed: int) -> tuple[Split, Split]:
    """Examples to calibrate on and others to judge by; half and half where there are fewer than
    both."""
    source = (task.validation if len(task.validation) >= min(examples + judged, len(task.train))
              else task.train)
    if len(source) < 2:
        raise ValueError(f"{task.name} has {len(source)} validation or training examples, and test "
                         f"examples are not for tuning; {ONE_SPLIT}")
    drawn = source.subset(min(examples + judged, len(source)), seed=seed)
    first = min(examples, len(drawn) - len(drawn) * judged // (examples + judged), len(drawn) - 1)
    return drawn.take(torch.arange(first)), drawn.take(torch.arange(first, len(drawn)))


def _answers(model: nn.Module, batches: list) -> Tensor:
    with evaluating(model), torch.inference_mode():
        return torch.cat([answer(call(model, inputs)).flatten(1) for inputs, _ in batches])


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-12)).mean().item()
