"""The whole way from a model to a file: the steps of a recipe one by one, each stage measured,
timed and kept.

`DIR/stages/` keeps each stage under the hash of all that made it (model, data, steps so far, code,
seed). A run that was killed takes the stages that are there, and a training goes on between two of
its steps.
"""

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench import files, machine
from workbench.batches import tensors
from workbench.deployment import onnx
from workbench.errors import UnsupportedModelError
from workbench.measures import accuracy, cost, equivalence, latency
from workbench.numbers.quantizers import quantizers
from workbench.plans.recipe import STEPS, written
from workbench.plans.steps import by_name
from workbench.store import Store, code
from workbench.subjects.subject import Step, Subject
from workbench.subjects.tasks import ONE_SPLIT, Split, Task

COMPARED = 1000  # examples behind the verdict on module and file


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` leaves. stages: one row a stage; verdict: the last module against its file;
    file: that file; base: that of the model as it came; subject: the last stage.

    Example: `compress(start, steps, Path("out")).stages`
    """

    stages: pd.DataFrame
    verdict: equivalence.Equivalence
    file: Path
    base: Path
    subject: Subject


def compress(start: Subject, steps: Mapping[str, Step] | Sequence[Step], out: Path | str, *,
             stages: Path | str | None = None, test: Split | None = None, threads: int = 1,
             blocks: int = 20, seed: int = 0) -> Compressed:
    """Take `start` through the steps and leave in `out`: model.onnx, model.safetensors, stages.csv
    and run.json.

    steps: by name, or one behind the other, named by their classes. stages.csv has a row a stage,
    the first being the model as it came: stage, the task's metric
    with interval, its paired change, params, macs, size_bytes of the ONNX file, latency_ms and its
    ratio to the first (interleaved, on `threads`), took_s. stages: where they are kept, by default
    `out`/stages; recipes that share it make what they share once. test: the examples that judge, by
    default the task's test split. seed: of the order of timing.

    Raises UnsupportedModelError where a step or the export cannot be done, naming the stage;
    ValueError as the steps do, before any is taken where one needs examples and there are none but
    the test's.

    Example: `compress(Subject(model, task), recipe.load("int8").steps, "out").stages`
    """
    steps = by_name(steps)
    learning = [name for name, step in steps.items() if getattr(step, "needs_examples", False)]
    if learning and not len(start.task.train) and not len(start.task.validation):
        raise ValueError(f"{learning[0]} needs examples other than the test's, and "
                         f"{start.task.name} has none; {ONE_SPLIT}")
    out, test = Path(out), test or start.task.test
    store, made, old = Store(stages or out / "stages"), [], []
    key: dict[str, Any] = {"model": model_told(start.model), "data": marked(start.task),
                           "judged": test.fingerprint, "code": code(), "steps": []}
    subject = start.with_model(start.model, folder=str(out))
    for name, step in files.progress([("start", None), *steps.items()], title="compress",
                                     unit="stage"):
        if step:
            key = key | {"steps": [*key["steps"], step_told(step, subject)]}
        numbered = f"{len(made)} {name}"
        try:
            subject = _stage(store, numbered, key, subject, step, test)
        except (UnsupportedModelError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        made.append((name, store.place(numbered, key)))
        old += [path.name for path in store.stale(numbered, key)]
    if old and stages is None:
        print(f"stale, of another model, recipe, data or state of the code: {', '.join(old)} in "
              f"{store.folder}; not used")
    return _told(out, made, subject, test, {"steps": key["steps"], "data": start.task.name},
                 threads, blocks, seed)


def _stage(store: Store, name: str, key: Mapping, before: Subject, step: Step | None,
           test: Split) -> Subject:
    """The subject after a step, made and measured, or as an earlier run left it."""
    place, after = store.place(name, key), None

    def make(folder: Path) -> None:
        nonlocal after
        began = machine.clock()
        after = _applied(before, step, store.folder / f"{place.name}.state")
        took = machine.clock() - began
        onnx.export(after.model, after.example, folder / "model.onnx")
        score = accuracy.evaluate(folder / "model.onnx", test)
        known = {"statistics": score.statistics, "labels": score.labels,
                 "predictions": score.predictions}
        save_file({part: value.contiguous() for part, value in known.items() if value is not None},
                  folder / "score.safetensors")
        save_file(_tensors(after.model), folder / "model.safetensors",
                  metadata=getattr(after.model, "origin", None))
        (folder
         / "stage.json").write_text(json.dumps({"took_s": took,
                                                **cost.total(after.model, after.example)}))

    store.kept(name, key, make)
    (store.folder / f"{place.name}.state").unlink(missing_ok=True)
    if after is not None:
        return after
    if step is None:
        return before
    # quick, and the same again: what follows needs its module
    if not getattr(step, "keeps_shape", False):
        return _applied(before, step, None)
    return before.with_model(_filled(before.model, load_file(place / "model.safetensors")))


def _applied(before: Subject, step: Step | None, state: Path | None) -> Subject:
    if step is None:
        return before
    goes_on = state and dataclasses.is_dataclass(step) and hasattr(step, "state")
    return (dataclasses.replace(step, state=str(state)) if goes_on else step).apply(before)


def _told(out: Path, made: list[tuple[str, Path]], subject: Subject, test: Split, told: Mapping,
          threads: int, blocks: int, seed: int) -> Compressed:
    """Time the stages' files against each other, judge the last one, and write what is left."""
    rows, base = [], None
    for name, place in made:
        known = load_file(place / "score.safetensors")
        score = accuracy.scored(known.pop("statistics"), test.objective, units=test.units, **known)
        base = base or score
        stage = json.loads((place / "stage.json").read_text())
        rows.append({"stage": name, **score.row(), **accuracy.difference(base, score).row(),
                     "params": stage["params"],
                     "macs": stage["macs"], "size_bytes": (place / "model.onnx").stat().st_size,
                     "took_s": stage["took_s"]})
    frame = pd.DataFrame(rows)
    timed = latency.paired({name: place / "model.onnx" for name, place in made}, subject.example,
                           threads=threads, blocks=blocks, seed=seed)
    columns = ["latency_ms", "ratio", "ratio_low", "ratio_high"]
    frame[columns] = timed[columns].to_numpy()
    last = made[-1][1]
    limits = equivalence.QUANTISED if any(quantizers(subject.model)) else equivalence.Limits()
    verdict = equivalence.compare(subject.model, last / "model.onnx",
                                  test.subset(COMPARED, seed=seed), limits=limits)
    for file in ("model.onnx", "model.safetensors"):
        with files.atomic(out / file) as new:
            shutil.copy(last / file, new)
    with files.atomic(out / "stages.csv") as new:
        frame.to_csv(new, index=False)
    with files.atomic(out / "run.json") as new:
        new.write_text(json.dumps({**told, "threads": threads, "seed": seed,
                                   "checks": verdict.checks(), "time": time.time(),
                                   "versions": machine.versions(), "hardware": machine.hardware()},
                                  indent=1))
    frame.attrs["machine"] = timed.attrs["machine"]
    return Compressed(frame, verdict, out / "model.onnx", made[0][1] / "model.onnx", subject)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().clone()
            for name, tensor in model.state_dict().items()}


def _filled(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy with these tensors in the place of its own."""
    new = copy.deepcopy(model).eval()
    new.load_state_dict(tensors)
    return new


def marked(task: Task) -> str:
    """What tells one set of data from another: its name, how many examples each split has, what
    they are, and how the first is prepared.

    Example: `marked(task)`
    """
    parts = [part for part in (task.train, task.validation, task.test) if len(part)]
    told = [*(part.fingerprint for part in parts), *tensors(parts[-1].batch(slice(0, 1)).inputs)]
    sizes = " ".join(str(len(part)) for part in parts)
    return f"{task.name} {sizes} {files.fingerprint(told)[:12]}"


def model_told(model: nn.Module) -> str:
    """What tells one model from another: its modules by name and kind, and its tensors.

    Example: `model_told(torch.nn.ReLU()) != model_told(torch.nn.Tanh())`
    """
    kinds = [f"{name} {type(module).__qualname__}\n" for name, module in model.named_modules()]
    return files.fingerprint([*kinds, *model.state_dict().values()])


def step_told(step: Step, subject: Subject) -> dict:
    """What tells one step from another that takes this subject: its kind, its fields (of a schedule
    nine values) and a hash of the weights of its teacher or checkpoint, where it has one.

    Example: `step_told(Prune(macs=0.5), subject)["type"] == "prune"`
    """
    kinds = (kind for kind, known in STEPS.items() if type(step) is known)
    fields = written(step) if dataclasses.is_dataclass(step) else vars(step)
    told: dict[str, object] = {"type": next(kinds, type(step).__qualname__)}
    told |= {name: [value(place / 8) for place in range(9)] if callable(value) else value
             for name, value in fields.items()}
    if hasattr(step, "teacher"):
        told["weights"] = model_told(step.teacher or subject.reference)
    elif (checkpoint := Path(getattr(step, "checkpoint", ""))).is_file():
        told["weights"] = files.sha256(checkpoint)
    return json.loads(json.dumps(told, default=repr))
