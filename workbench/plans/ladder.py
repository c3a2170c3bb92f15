"""Many plans from one model, each judged on the same examples and kept, so that a run that was
killed goes on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from workbench import files, machine, store
from workbench.measures import accuracy
from workbench.measures.accuracy import Score
from workbench.plans.compress import marked, model_told, step_told
from workbench.subjects.subject import Step, Subject


def climb(start: Subject, rungs: Mapping[str, Sequence[Step]], *, base: Score,
          folder: Path | str) -> pd.DataFrame:
    """One row a rung: rung, seconds, the task's metric with interval, and the paired change from
    `base`.

    rungs: the steps of each, by name, all from `start`. base: what a model scored on
    start.task.test. folder: where each row is kept under the hash of its steps, the model, the data
    and the code; what stands there is not made again.

    Raises what the steps raise.

    Example: `ladder.climb(start, {"int8": [Quantize(8)], "int4": [Quantize(4), Repair()]},
    base=score, folder="kept")`
    """
    kept = store.Store(folder)
    shared = {"model": model_told(start.model), "data": marked(start.task),
              "against": files.fingerprint([base.statistics]), "code": store.code()}
    rows = []
    for name, steps in files.progress(list(rungs.items()), title="ladder", unit="rung"):
        def make(place: Path, steps: Sequence[Step] = steps) -> None:
            (place / "row.json").write_text(json.dumps(_judged(start, steps, base)))

        told = [step_told(step, start) for step in steps]
        result = kept.kept("rung", {"steps": told, **shared}, make)
        rows.append({"rung": name, **json.loads((result / "row.json").read_text())})
    return pd.DataFrame(rows)


def _judged(start: Subject, steps: Sequence[Step], base: Score) -> dict:
    started = machine.clock()
    for step in steps:
        start = step.apply(start)
    seconds = round(machine.clock() - started, 2)
    score = accuracy.evaluate(start.model, start.task.test)
    return {"seconds": seconds, **score.row(), **accuracy.difference(base, score).row()}
