"""A search that is given only limits: plans are proposed, made, timed and scored until the
evaluations are spent.

Each plan is made once: cut, recovered for a stated number of steps, rounded, exported; the file is
timed against the model as it came, interleaved, while nothing else runs; pictures are added until
all have judged it, or a plan that is as fast and as small is surely better (racing). All of it is
kept under the hash of what made it (`DIR/evaluations`), so that nothing is made twice and a search
that was killed goes on: it is asked the same again and finds the answers. Workers, here or on a
cluster, only make files; this process alone times, scores and writes the journal. The best plans
are then timed again in a process of their own, and the first that keeps its limits there is taken;
the test split, which chooses nothing, says what it loses. Only these figures are results.
"""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from workbench import files, machine
from workbench.graph.depth import blocks as blocks_of
from workbench.measures import accuracy, latency
from workbench.methods import depth
from workbench.numbers.fronts import undominated
from workbench.plans import recipe
from workbench.plans.compress import marked, model_told
from workbench.plans.evaluation import Evaluations, Makers, lost
from workbench.plans.samplers import NAMES
from workbench.plans.samplers import sampler as sampler_of
from workbench.plans.space import Forecast, Plan, Space, plan_of
from workbench.store import Store, code
from workbench.subjects.subject import Subject
from workbench.subjects.tasks import ONE_SPLIT, Split

CONFIRMED = 3  # plans that are judged again, at most
LEAST = 100  # validation examples below which training ones judge


@dataclass(frozen=True)
class Limits:
    """What a plan may at most have: latency and size (of its ONNX file) as shares of the model's as
    it came, and the accuracy lost, a fraction. None: no limit.

    Example: `Limits(latency=0.7)`
    """

    latency: float | None = None
    size: float | None = None
    lost: float | None = None

    def __post_init__(self):
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if all(value is None for value in given.values()):
            raise ValueError("search needs a limit: latency, size or lost")
        for name, value in given.items():
            if (value is not None
                and (isinstance(value, bool) or not isinstance(value, int | float)
                     or not np.isfinite(value))):
                raise ValueError(f"limit {name} is {value!r}, expected a number")
            if value is not None and name != "lost" and not 0 < value < 1:
                raise ValueError(f"limit {name} is {value:g}, expected a share of the model's own, "
                                 "more than 0 and below 1; at 1 it is the model as it came")
        if self.lost is not None and not 0 <= self.lost < 1:
            raise ValueError(f"limit lost is {self.lost:g}, expected a fraction, 0 <= lost < 1")

    def __str__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ", ".join(f"{name} {most:g}" for name, most in given.items() if most is not None)

    def excess(self, row: Mapping[str, float]) -> float:
        """By how much a plan's figures (lost, latency, size) are beyond, summed; 0 where it keeps
        them."""
        given = {name: most for name in ("latency", "size", "lost")
                 if (most := getattr(self, name)) is not None}
        return sum(max(row[name] - most, 0.0) for name, most in given.items())


@dataclass(frozen=True, eq=False)
class Found:
    """What a search leaves. plans: one row a plan in the order of asking; confirmed: the model as
    it came and the best plans, the best first, judged again; plan: the one that is taken; file: its
    ONNX file; base: that of the model as it came; reason: what to say of it; saved: share of the
    scoring that racing spared; forecast: what was expected.

    Example: `search(start, limits, Path("out")).confirmed`
    """

    plans: pd.DataFrame
    confirmed: pd.DataFrame
    plan: Plan
    space: Space
    forecast: Forecast
    reason: str
    saved: float
    file: Path
    base: Path


def search(start: Subject, limits: Limits, out: Path | str, *, space: Space | None = None,
           sampler: str = "forecast", evaluations: int = 64, minutes: float | None = None,
           batch: int = 4, workers: int = 1, scheduler: str | None = None, images: int = 2000,
           recovery: int = 60, blocks: int = 10, test: Split | None = None, seed: int = 0) -> Found:
    """Look for the plan that loses least within `limits`; leave in `out` model.onnx, recipe.yaml,
    plans.csv and run.json.

    space: by default `Space.of` the model, with the blocks `spared` and `recovery` steps of
    distilling. sampler: see samplers.NAMES. evaluations, minutes: when no more plans are made.
    batch: plans that are asked for at once, so many whatever the workers, so that one worker and
    two give the same trials. workers: processes that make plans, one thread each; scheduler:
    address of a dask.distributed one instead, whose workers see `out` under the same path. images:
    validation examples (training ones where there are too few) that judge; blocks: rounds of each
    timing. test: what the best plans are judged on, by default the task's test split.

    plans.csv has plan, its options, lost with interval (paired, on n examples), latency and size as
    shares, predicted (latency, from the forecast), raced (not scored to the end: another plan was
    surely better), params, macs.

    Raises ValueError for limits or settings out of range, or a journal in `out` of another search,
    OSError where no scheduler answers.

    Example: `search(Subject(model, task), Limits(latency=0.7), "found").confirmed`
    """
    if evaluations < 1 or batch < 1 or workers < 1:
        raise ValueError(f"search: evaluations, batch and workers are {evaluations}, {batch}, "
                         f"{workers}; expected 1 or more")
    if sampler not in NAMES:
        raise ValueError(f"unknown sampler {sampler!r}; expected one of {', '.join(NAMES)}")
    began, out, test = time.monotonic(), Path(out), test or start.task.test
    judging = judged_by(start, images, seed)
    space = (space
             or Space.of(start.model, start.example, blocks=spared(start, judging),
                         recovery=recovery, seed=seed))
    key = {"model": model_told(start.model), "data": marked(start.task), "code": code()}
    asked = {"limits": dataclasses.asdict(limits), "space": space.told(), "sampler": sampler,
             "batch": batch, "seed": seed,
             "images": len(judging), **key}
    store, rows = Store(out / "evaluations"), []
    with Makers(start, space, store, key, workers, scheduler) as make:
        journal = _Journal(out / "journal.jsonl", asked)
        run = Evaluations(start, space, store, key, judging, blocks, seed)
        expected = run.forecast()
        box = (1.0 if limits.lost is None else max(limits.lost, 1e-6), limits.latency or 1.0)
        chooser = sampler_of(sampler, space, forecast=expected, box=box, seed=seed)
        bar = files.progress(total=evaluations, title="search", unit="plan")
        # one batch in any case: without a plan there is nothing to tell
        while not rows or (len(rows) < evaluations
                           and (minutes is None or time.monotonic() - began < 60 * minutes)):
            plans = chooser.ask(min(batch, evaluations - len(rows)))
            if not plans:
                break  # the space is spent
            for plan, row in zip(plans, run.evaluated(plans, make, rows), strict=True):
                rows.append(row | {"predicted": expected.latency(plan)})
                chooser.tell(plan, row["lost"], row["latency"])
                journal.write(row)
            bar.update(len(plans))
        bar.close()
    return _confirmed(run, limits, rows, expected, test, out, asked)


def judged_by(start: Subject, images: int, seed: int) -> Split:
    """The examples that a search judges by: of the validation split, or where it has too few, of
    the training split.

    Example: `len(judged_by(start, 50, 0)) == 50`
    """
    task = start.task
    source = task.validation if len(task.validation) >= LEAST else task.train
    if not len(source):
        raise ValueError(f"search: {task.name} has no validation or training examples, and test "
                         f"examples are not for choosing; {ONE_SPLIT}")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:images]
    return source.take(order)


def spared(start: Subject, judging: Split) -> list[str]:
    """The blocks that a search may leave out, half of those that can go at most, those that matter
    least first.

    Example: `len(spared(start, task.validation.subset(32))) == 3`
    """
    known = blocks_of(start.model, start.example)
    few = judging.take(torch.arange(min(len(judging), 200)))
    return (list(depth.order(start.model, few.batches(100), among=known,
                             count=len(known) // 2).block) if known else [])


class _Journal:
    """What was asked and told, line by line; the first line says of which search."""

    def __init__(self, path: Path, asked: dict):
        self.path, told = path, json.dumps(asked, sort_keys=True)
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[0] != told:
            theirs, ours = (json.loads(lines[0]) if lines[0].startswith("{")
                            else {}), json.loads(told)
            odd = next((name for name in ours if theirs.get(name) != ours[name]), "header")
            raise ValueError(f"journal {path} is of another search (its {odd} is "
                             f"{json.dumps(theirs.get(odd))[:80]}); give another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        # a search that goes on tells again what is kept, from the first plan on
        path.write_text(told + "\n")

    def write(self, row: Mapping) -> None:
        """One evaluation."""
        with open(self.path, "a") as file:
            file.write(json.dumps({name: row[name]
                                   for name in ("plan", "lost", "latency", "size", "n")}) + "\n")


def _confirmed(run: Evaluations, limits: Limits, rows: list[dict], expected: Forecast, test: Split,
               out: Path, asked: dict) -> Found:
    """Time the best plans again in a process of their own, take the first that keeps latency and
    size there, judge on `test`, which chooses nothing, and write what is left."""
    table = pd.DataFrame(rows)
    table["excess"] = [limits.excess(row) for row in rows]
    by = "lost" if limits.latency or limits.size else "latency"
    order = table.sort_values(["excess", by, "latency"], kind="stable").head(CONFIRMED)
    paths = {"as it came": run.base_file / "model.onnx"}
    paths |= {row.plan: Path(row.place) / "model.onnx" for row in order.itertuples()}
    timed = _timed_alone(paths, run.start.example, max(2 * run.blocks, 5), run.seed)
    scores = {name: accuracy.evaluate(path, test) for name, path in paths.items()}
    first = scores["as it came"]
    judged = pd.DataFrame([{"plan": name, **score.row(), **accuracy.difference(first, score).row(),
                            **lost(first, score)}
                           for name, score in scores.items()])
    judged["size_bytes"] = [path.stat().st_size for path in paths.values()]
    judged["size"] = judged.size_bytes / judged.size_bytes[0]
    judged[["latency_ms", "latency", "latency_low", "latency_high"]] = timed[["latency_ms", "ratio",
                                                                              "ratio_low",
                                                                              "ratio_high"]]
    # the first of equals
    best = min(judged.iloc[1:].to_dict("records"),
               key=lambda row: limits.excess({**row, "lost": 0.0}))
    reason = "within the limits" if limits.excess(best) == 0 else _nearest(limits, best, len(rows))
    source, plan = paths[best["plan"]].parent, plan_of(best["plan"])
    for name in ("model.onnx", "model.safetensors"):
        with files.atomic(out / name) as new:
            shutil.copy(source / name, new)
    with files.atomic(out / "recipe.yaml") as new:
        new.write_text(recipe.dump(run.space.steps(plan), name=f"found within {limits}"))
    with files.atomic(out / "plans.csv") as new:
        table.drop(columns=["place", "took_s"]).to_csv(new, index=False)
    with files.atomic(out / "confirmed.csv") as new:
        judged.to_csv(new, index=False)
    saved = 1 - run.looked / max(run.whole, 1)
    with files.atomic(out / "run.json") as new:
        new.write_text(json.dumps({**asked, "plan": best["plan"], "reason": reason, "saved": saved,
                                   "hardware": machine.hardware(), "versions": machine.versions()},
                                  indent=1))
    return Found(table, judged, plan, run.space, expected, reason, saved, out / "model.onnx",
                 paths["as it came"])


def _timed_alone(paths: Mapping[str, Path], example, blocks: int, seed: int) -> pd.DataFrame:
    """latency.paired in a process of its own, which knows nothing of the caller's script."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given", Path(folder) / "made"
        given.write_bytes(pickle.dumps((paths, example, blocks, seed)))
        code = "import sys; from workbench.plans import search; search._time_file(*sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", code, given, made], text=True, check=False,
                              stderr=subprocess.PIPE)
        if done.returncode:
            raise RuntimeError("the plans found could not be timed in a process of their own: "
                               f"{done.stderr.strip().splitlines()[-1:]}")
        return pickle.loads(made.read_bytes())


def _time_file(given: str, made: str) -> None:
    """In that process: time what one file asks for, into the other."""
    paths, example, blocks, seed = pickle.loads(Path(given).read_bytes())
    table = latency.paired(paths, example, threads=1, blocks=blocks, seed=seed)
    Path(made).write_bytes(pickle.dumps(table))


def _nearest(limits: Limits, row: Mapping, tried: int) -> str:
    parts = [f"{name} {row[name]:.3f} of at most {most:g}" for name in ("latency", "size", "lost")
             if (most := getattr(limits, name)) is not None and row[name] > most]
    return f"no plan of {tried} keeps the limits; the nearest has {', '.join(parts)}"


def front(plans: pd.DataFrame) -> pd.DataFrame:
    """The rows of Found.plans that no other beats in both lost and latency, by latency.

    Example: `len(front(pd.DataFrame({"lost": [0.0, 0.1], "latency": [0.5, 0.6]}))) == 1`
    """
    return plans[undominated(plans[["lost", "latency"]].to_numpy())].sort_values("latency")
