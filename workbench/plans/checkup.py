"""One model looked over from end to end: accuracy, cost, export, eight bits, latency, where it
parts, what it is sensitive to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workbench.deployment import onnx
from workbench.measures import accuracy, cost, equivalence, latency, sensitivity
from workbench.methods import channels, quantization
from workbench.subjects.subject import Subject
from workbench.subjects.tasks import ONE_SPLIT, Split


@dataclass(frozen=True)
class Checkup:
    """What `checkup` found. row: one row of a table; files: the float32 and the int8 file;
    by_layer: where the int8 file parts from the float model; scan: sensitivity of each group of
    channels, neurons or heads.

    Example: `checkup(start, folder=Path("files")).row["int8_ratio"]`
    """

    row: dict
    files: dict[str, Path]
    by_layer: pd.DataFrame
    scan: pd.DataFrame

    def __repr__(self) -> str:
        told = (f"{key} {value}" for key, value in self.row.items() if isinstance(value, str | int))
        return f"Checkup({', '.join(told)})"


def checkup(subject: Subject, *, folder: Path | str, name: str | None = None,
            test: Split | None = None, compared: int = 200, scanned: int = 100,
            levels: Sequence[float] = (0.5,), calibration: int = 100, calibrator: str = "minmax",
            batch: int = 1, threads: int = 1, blocks: int = 10, seed: int = 0) -> Checkup:
    """Take the subject through everything, and leave its float32 and int8 ONNX files in `folder`.

    test: examples of the accuracies, the task's test split by default; compared, scanned: how many
    of them for the equivalence and the scan; calibration: validation examples behind the ranges.
    The row: model, its metric with interval, params, macs, size_bytes; cosine_min and agreement of
    the float32 file with the module; the metric's change in int8 (the file, paired) and
    int8_agreement with the int8 module; latency_ms, int8_ratio with interval; parts_at, the layer
    whose output the int8 file first moves beyond a cosine of 0.995, or its own most moved;
    most_sensitive, of the scan.

    Raises UnsupportedModelError where a step cannot be done, naming the layer or the operator.

    Example: `checkup(Subject(model, task), folder="exports").row`
    """
    model, task, example = subject.model, subject.task, subject.example
    test, folder = test or task.test, Path(folder)
    name = name or type(model).__name__
    few = test.subset(compared, seed=seed)
    source = task.validation if len(task.validation) else task.train
    if not len(source):
        raise ValueError(f"{task.name} has no validation or training examples to calibrate on, and "
                         f"test examples are not for that; {ONE_SPLIT}")
    seen = list(source.subset(calibration, seed=seed).batches(32))
    rounded = quantization.quantize(model, seen, calibrator=calibrator)
    files = {kind: onnx.export(made, example, folder / f"{name}-{kind}.onnx")
             for kind, made in (("float32", model), ("int8", rounded))}
    scores = {kind: accuracy.evaluate(path, test) for kind, path in files.items()}
    same = equivalence.compare(model, files["float32"], few, batch_size=32)
    quantised = equivalence.compare(rounded, files["int8"], few, batch_size=32)
    timed = latency.paired(files, task.test.batch(slice(0, batch)).inputs, threads=threads,
                           blocks=blocks, seed=seed)
    by_layer = equivalence.by_layer(model, files["int8"], few, batch_size=32)
    method = channels.silencing(model, example=example)
    scan = sensitivity.scan(model, test.subset(scanned, seed=seed), method, levels=levels,
                            batch_size=64)
    change = accuracy.difference(scores["float32"], scores["int8"])
    slow = timed.set_index("candidate").loc["int8"]
    row = {"model": name, "unit": task.objective.unit, **scores["float32"].row(),
           **cost.total(model, example),
           "cosine_min": same.cosine_min, "agreement": same.agreement,
           **{f"int8_{key}": value for key, value in change.row().items()},
           "int8_agreement": quantised.agreement,
           "int8_size_bytes": files["int8"].stat().st_size, "latency_ms": timed.latency_ms[0],
           "int8_ratio": slow.ratio,
           "int8_ratio_low": slow.ratio_low, "int8_ratio_high": slow.ratio_high,
           "parts_at": _parting(by_layer),
           "most_sensitive": _most_sensitive(scan)}
    return Checkup(row, files, by_layer, scan)


def _parting(by_layer: pd.DataFrame) -> str:
    """The first layer that parts, else the one whose output moved most."""
    first = by_layer[by_layer["first"]]
    if len(first):
        return str(first.layer.iloc[0])
    most = by_layer.loc[by_layer.cosine.idxmin()]
    return f"none; least cosine {most.cosine:.4f} at {most.layer}"


def _most_sensitive(scan: pd.DataFrame) -> str:
    """The group whose loss moves the answers most, by the distance of the logits, which tells apart
    what accuracy cannot."""
    free = scan[scan.removed > 0]
    if free.empty:
        return "nothing can be cut"
    worst = free.loc[free.distance.idxmax()]
    return f"{worst.layer} at {worst.level:.0%}"
