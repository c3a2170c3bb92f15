"""What a plan comes to: its file is made by workers, timed and scored by one process, all of it
kept under the hash of what made it."""

import json
import multiprocessing
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from workbench import files, machine
from workbench.deployment import onnx, sessions
from workbench.measures import accuracy, cost, latency
from workbench.measures.sensitivity import ADDED, Z_OF_LOOKS
from workbench.plans import recipe
from workbench.plans.space import Forecast, Plan, Space, forecast, label
from workbench.store import Store
from workbench.subjects.subject import Subject
from workbench.subjects.tasks import Split

LOOK = 500  # examples between two looks at a race


class Evaluations:
    """What the evaluations of one search share: the model, the examples that judge, the store.
    looked, whole: examples scored so far, and how many they would have been without racing.

    Example: `Evaluations(start, space, store, key, judging, 8, 0).forecast()`
    """

    def __init__(self, start: Subject, space: Space, store: Store, key: dict, judging: Split,
                 blocks: int, seed: int):
        self.start, self.space, self.store, self.key = start, space, store, key
        self.judging, self.blocks, self.seed = judging, blocks, seed
        self.looked, self.whole = 0, 0
        self.base_file = store.kept("base", key,
                                    lambda folder: onnx.export(start.model, start.example,
                                                               folder / "model.onnx"))
        self.base = self._score(self.base_file, None, [])

    def forecast(self) -> Forecast:
        """What the space's options are expected to cost, measured once."""
        key = {**self.key, "space": self.space.told(), "images": len(self.judging)}

        def measure(folder: Path) -> None:
            part = self.judging.take(torch.arange(min(len(self.judging), 500)))
            forecast(self.start, self.space, part, folder=folder).write(folder / "forecast")
            for path in folder.glob("*.onnx"):
                path.unlink()

        return Forecast.read(self.store.kept("forecast", key, measure) / "forecast", self.space)

    def evaluated(self, plans: Sequence[Plan], make: Callable, rows: list[dict]) -> list[dict]:
        """The rows of plans: made by the workers, then timed together, then scored one by one."""
        places = make(plans)
        timed = self._timed(places)
        return [self._row(plan, place, shares, rows)
                for plan, place, shares in zip(plans, places, timed, strict=True)]

    def _timed(self, places: Sequence[Path]) -> list[dict]:
        """Each file's latency as a share of the base's, measured once."""
        key = {"blocks": self.blocks, "machine": machine.describe()}
        stores = [Store(place) for place in places]
        missing = [place for place, store in zip(places, stores, strict=True)
                   if not store.place("latency", key).exists()]
        if missing:
            candidates = ({"base": self.base_file / "model.onnx"}
                          | {str(place): place / "model.onnx" for place in missing})
            table = latency.paired(candidates, self.start.example, threads=1, blocks=self.blocks,
                                   seed=self.seed)
            for row in table.iloc[1:].to_dict("records"):
                told = json.dumps({name: row[name]
                                   for name in ("latency_ms", "ratio", "ratio_low", "ratio_high")})
                Store(row["candidate"]).kept("latency", key,
                                             lambda folder, told=told:  # type: ignore[misc]
                                             (folder / "latency.json").write_text(told))
        return [json.loads((store.place("latency", key) / "latency.json").read_text())
                for store in stores]

    def _row(self, plan: Plan, place: Path, shares: dict, rows: list[dict]) -> dict:
        size = (place / "model.onnx").stat().st_size / (self.base_file
                                                        / "model.onnx").stat().st_size
        rivals = [row for row in rows if row["latency"] <= shares["ratio"] and row["size"] <= size
                  and not row["raced"]]
        score = self._score(place, self.base, [self._known(Path(row["place"])) for row in rivals])
        return {"plan": label(plan), **self.space.chosen(plan),
                **lost(self._first(self.base, score.n), score), "n": score.n,
                "latency": shares["ratio"], "latency_low": shares["ratio_low"],
                "latency_high": shares["ratio_high"],
                "size": size, "raced": score.n < len(self.judging),
                **json.loads((place / "plan.json").read_text()),
                "place": str(place)}

    def _score(self, place: Path, base, rivals: list) -> accuracy.Score:
        """The score of a file, stopped where a rival is surely better; what an earlier search has
        scored is taken up."""
        kept, n = place / f"score-{self.seed}.safetensors", len(self.judging)
        score = _read(kept, self.judging) if kept.exists() else None
        session = None
        while score is None or score.n < n:
            if (base is not None and score is not None
                and any(_behind(score, rival) for rival in rivals)):
                break
            done = score.n if score else 0
            session = session or sessions.open(place / "model.onnx", threads=1)
            new = accuracy.evaluate(session,
                                    self.judging.take(torch.arange(done, min(done + LOOK, n))),
                                    batch_size=50)
            score = _joined(score, new, self.judging)
        if session:
            with files.atomic(kept) as path:
                save_file(_tensors(score), path)
        if base is not None:
            self.looked, self.whole = self.looked + score.n, self.whole + n
        return score

    def _known(self, place: Path) -> accuracy.Score:
        return _read(place / f"score-{self.seed}.safetensors", self.judging)

    def _first(self, score: accuracy.Score, n: int) -> accuracy.Score:
        return _of({name: value[:n] for name, value in _tensors(score).items()}, self.judging)


def lost(base: accuracy.Score, score: accuracy.Score) -> dict[str, float]:
    """What a plan loses against the model as it came, on the same examples: lost, lost_low,
    lost_high. Of perplexity its rise, as a fraction.

    Example: `lost(before, after)["lost"] == 0`
    """
    change = accuracy.difference(base, score)
    by = 1 / base.value if score.objective.metric == "perplexity" else -1
    low, high = sorted((by * change.low, by * change.high))
    return {"lost": by * change.difference, "lost_low": low, "lost_high": high}


def _tensors(score: accuracy.Score) -> dict:
    known = {"statistics": score.statistics, "labels": score.labels,
             "predictions": score.predictions}
    return {name: value.contiguous() for name, value in known.items() if value is not None}


def _of(tensors: Mapping, split: Split) -> accuracy.Score:
    tensors = dict(tensors)
    units = None if split.units is None else split.units[:len(tensors["statistics"])]
    return accuracy.scored(tensors.pop("statistics"), split.objective, units=units, **tensors)


def _read(path: Path, split: Split) -> accuracy.Score:
    return _of({name: value[:len(split)] for name, value in load_file(path).items()}, split)


def _joined(score, new: accuracy.Score, split: Split) -> accuracy.Score:
    if score is None:
        return _of(_tensors(new), split)
    before, after = _tensors(score), _tensors(new)
    return _of({name: torch.cat([before[name], after[name]]) for name in before}, split)


def _behind(score: accuracy.Score, rival: accuracy.Score) -> bool:
    """Whether a rival is surely better: the interval of its gain over this plan, which holds over
    all looks, is above zero."""
    if score.objective.metric != "top1" or rival.n < score.n:
        return False
    gained = rival.statistics[:score.n, 0] - score.statistics[:, 0]
    low, _ = accuracy.paired_interval(float(gained.sum()), float(gained.square().sum()), score.n,
                                      z=Z_OF_LOOKS, added=ADDED)
    return low > 0


def made(start: Subject, space: Space, plan: Plan, store: Store, key: dict) -> Path:
    """The folder of a plan, made here where it is not there yet: model.onnx, model.safetensors,
    plan.json.

    Example: `made(start, space, plan, store, key) / "model.onnx"`
    """
    torch.set_num_threads(1)  # so that one worker and many round alike

    def make(folder: Path) -> None:
        began, subject = time.perf_counter(), start
        for step in space.steps(plan).values():
            subject = step.apply(subject)
        onnx.export(subject.model, subject.example, folder / "model.onnx")
        save_file({name: value.detach().contiguous().clone()
                   for name, value in subject.model.state_dict().items()},
                  folder / "model.safetensors")
        total = cost.total(subject.model, subject.example)
        (folder
         / "plan.json").write_text(json.dumps({"params": total["params"], "macs": total["macs"],
                                               "took_s": round(time.perf_counter() - began, 2)}))

    steps = [{"type": name, **recipe.written(step)} for name, step in space.steps(plan).items()]
    return store.kept("plan", {**key, "steps": steps}, make)


class Makers:
    """make(plans) -> their folders: in this process, in processes here, or on a cluster.

    A cluster's workers get what they need as bytes: a module that one of its threads traces cannot
    be sent from another.

    Example: `with Makers(start, space, store, key, 2, None) as make: make(plans)`
    """

    # times that plans are sent anew, where the scheduler or the last worker that had the bytes was
    # lost
    AGAIN = 20

    def __init__(self, start: Subject, space: Space, store: Store, key: dict, workers: int,
                 scheduler: str | None):
        self.arguments = start, space, store, key
        self.workers, self.scheduler = workers, scheduler
        self.pool: ProcessPoolExecutor | None = None
        self.client: Any = None

    def __enter__(self) -> Callable[[Sequence[Plan]], list[Path]]:
        if self.scheduler:
            self.packed = pickle.dumps(self.arguments)
            self.client = self._connected(5)
        elif self.workers > 1:
            self.pool = ProcessPoolExecutor(self.workers,
                                            mp_context=multiprocessing.get_context("spawn"),
                                            initializer=_remember, initargs=self.arguments)
        return self.make

    def make(self, plans: Sequence[Plan]) -> list[Path]:
        start, space, store, key = self.arguments
        if self.pool:
            return list(self.pool.map(_made, plans))
        if self.client:
            return self._on_cluster(plans)
        before = torch.get_num_threads()
        try:
            return [made(start, space, plan, store, key) for plan in plans]
        finally:
            torch.set_num_threads(before)

    def _on_cluster(self, plans: Sequence[Plan]) -> list[Path]:
        from distributed import KilledWorker
        from distributed.comm import CommClosedError

        for _ in range(self.AGAIN):
            try:
                packed = self.client.scatter(self.packed, broadcast=True)
                return self.client.gather(self.client.map(_made_of, plans, packed=packed,
                                                          pure=False, retries=20))
            except (CancelledError, CommClosedError, KilledWorker, TimeoutError) as error:
                lost = error
                self.client.close(timeout=5)
                self.client = self._connected(60)
        raise OSError(f"the cluster at {self.scheduler} lost the same plans {self.AGAIN} times "
                      f"({lost}); look at its workers")

    def _connected(self, seconds: float):
        from distributed import Client

        try:
            return Client(self.scheduler, timeout=seconds, set_as_default=False)
        except (OSError, ValueError) as error:
            raise OSError(f"no scheduler at {self.scheduler} ({error}); start one with `dask "
                          "scheduler`") from error

    def __exit__(self, *_error) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        if self.client:
            self.client.close()


_here: tuple = ()


def _remember(*arguments) -> None:
    global _here
    machine.end_with_parent()
    _here = arguments


def _made(plan: Plan) -> Path:
    start, space, store, key = _here
    return made(start, space, plan, store, key)


def _made_of(plan: Plan, packed: bytes) -> Path:
    start, space, store, key = pickle.loads(packed)
    return made(start, space, plan, store, key)
