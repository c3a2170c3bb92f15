"""Steps in a row, and their stages in one table.

A step is a frozen dataclass with one `apply`, which stands beside the method that it is:
channels.Prune, training.Train, quantization.Quantize, ...
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pandas as pd
from annotated_types import Gt

from workbench.deployment import onnx
from workbench.files import progress
from workbench.measures import accuracy, cost, latency
from workbench.subjects.checkpoints import fill
from workbench.subjects.subject import Step, Subject
from workbench.subjects.tasks import Split

Stages = dict[str, Subject]


@dataclass(frozen=True)
class Export:
    """The step of a plan that writes the subject as it is then to an ONNX file, in `made["folder"]`
    where there is one.

    Example: `Export(tolerance=0.01)`
    """

    file: str = "model.onnx"
    tolerance: Annotated[float, Gt(0)] | None = None

    def apply(self, subject: Subject) -> Subject:
        """The subject, the file's path in `made["file"]`."""
        path = Path(str(subject.made.get("folder", "."))) / self.file
        return subject.with_model(subject.model,
                                  file=onnx.export(subject.model, subject.example, path,
                                                   tolerance=self.tolerance))


@dataclass(frozen=True)
class Load:
    """The step of a plan that takes the weights which an earlier run of the same plan has trained,
    in the place of training.

    Example: `Load("mine.safetensors")`
    """

    keeps_shape: ClassVar[bool] = True
    checkpoint: str

    def apply(self, subject: Subject) -> Subject:
        """The subject with these weights. Raises FileNotFoundError or ValueError where they are
        missing, damaged or of another shape."""
        new = copy.deepcopy(subject.model)
        fill(new, Path(self.checkpoint), "the model that the plan has come to")
        return subject.with_model(new)


def plan(start: Subject, steps: Iterable[Step] | Mapping[str, Step]) -> Stages:
    """The subject after each step, by the step's name: "start", then its own or the name of its
    class.

    Example: `stages = steps.plan(start, [Prune(macs=0.5), Train(Recipe(epochs=1)), Fold(),
    Quantize(bits=8)])`
    """
    stages: Stages = {"start": start}
    for name, step in progress(list(by_name(steps).items()), title="plan", unit="step"):
        stages[name] = step.apply(list(stages.values())[-1])
    return stages


def by_name(steps: Iterable[Step] | Mapping[str, Step]) -> dict[str, Step]:
    """Steps by their own names, or by those of their classes.

    Example: `list(by_name([Fold(), Quantize()])) == ["fold", "quantize"]`
    """
    if isinstance(steps, Mapping):
        return dict(steps)
    return numbered((type(step).__name__.lower(), step) for step in steps)


def numbered(named: Iterable[tuple[str, Step]]) -> dict[str, Step]:
    """Steps by name; the second of one name has a 2 behind it.

    Example: `list(numbered([("fold", Fold()), ("fold", Fold())])) == ["fold", "fold 2"]`
    """
    made: dict[str, Step] = {}
    times: Counter[str] = Counter()
    for name, step in named:
        times[name] += 1
        made[name if times[name] == 1 else f"{name} {times[name]}"] = step
    return made


def compare(stages: Mapping[str, Subject], test: Split | None = None, *, folder=None,
            threads: int = 1, blocks: int = 10, seed: int = 0) -> pd.DataFrame:
    """One row per stage, each against the first on the same examples: stage, the task's metric with
    interval, its paired change, params, macs and, where `folder` is given, size_bytes, latency_ms
    and ratio of its ONNX file there.

    test: the examples, by default the task's test split. Files are timed interleaved, one example,
    on `threads`.

    Raises UnsupportedModelError where a stage cannot be exported.

    Example: `steps.compare(steps.plan(start, [Prune(macs=0.5)]), folder="exports")`
    """
    first = next(iter(stages.values()))
    test, example = test or first.task.test, first.example
    scores = {name: accuracy.evaluate(subject.model, test) for name, subject in stages.items()}
    base = next(iter(scores.values()))
    frame = pd.DataFrame([{"stage": name, **score.row(), **accuracy.difference(base, score).row(),
                           **cost.total(stages[name].model, example)}
                          for name, score in scores.items()])
    if folder is None:
        return frame
    paths = {name: onnx.export(subject.model, example, f"{folder}/{place}.onnx")
             for place, (name, subject) in enumerate(stages.items())}
    timed = latency.paired(paths, example, threads=threads, blocks=blocks, seed=seed)
    frame["size_bytes"] = [path.stat().st_size for path in paths.values()]
    frame[["latency_ms", "ratio", "ratio_low", "ratio_high"]] = timed[["latency_ms", "ratio",
                                                                       "ratio_low", "ratio_high"]]
    frame.attrs["machine"] = timed.attrs["machine"]
    return frame
