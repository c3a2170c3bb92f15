"""ResNet-20 in int8 by everyone else, and without four of its blocks by us: accuracy, latency and
bytes in one table.

    python benchmarks/ahead.py [TABLE.csv]

The plan of ours is drop, distil, quantise, at three seeds of the distillation; its networks are
kept in data/checkpoints with their recipe, and everything is measured anew: all 10,000 test images,
differences paired, files timed interleaved on one thread.
"""

import sys
import tempfile
from pathlib import Path

import pandas as pd

from workbench import files, machine
from workbench.deployment import onnx
from workbench.measures import accuracy, latency, peers
from workbench.plans import recipe
from workbench.plans.steps import plan
from workbench.subjects import data, models
from workbench.subjects.subject import Subject

CHECKPOINTS = Path(__file__).parent.parent / "data" / "checkpoints"
OURS = """
compression:
  - {{type: drop, params: {{blocks: [layer1.1, layer2.1, layer3.1, layer3.2]}}}}
  - {{type: load, params: {{checkpoint: {checkpoint}}}}}
  - {{type: quantize, params: {{bits: 8, examples: 500}}}}
"""


def main(table: Path) -> None:
    """Measure and write the table."""
    task = data.load("fashion_mnist")
    model, folder = models.load("resnet20", task), Path(tempfile.mkdtemp())
    seen = list(task.validation.subset(500).batches(50))
    float32 = onnx.export(model, task.example, folder / "float32.onnx")
    paths = {"float32": float32}
    for name in ("minmax", "percentile", "entropy"):
        paths[f"ONNX Runtime {name}"] = peers.quantize_static(float32, seen,
                                                              folder / f"{name}.onnx",
                                                              calibrator=name)
    paths["ONNX Runtime dynamic"] = peers.quantize_dynamic(float32, folder / "dynamic.onnx")
    try:
        paths["NNCF"] = peers.quantize_nncf(float32, seen, folder / "nncf.onnx")
    except ValueError as error:
        print(f"left out: {error}")
    for seed in range(3):
        steps = recipe.parse(OURS.format(checkpoint=CHECKPOINTS
                                         / f"recipe-short-resnet20-{seed}.safetensors")).steps
        small = list(plan(Subject(model, task), steps).values())[-1]
        paths[f"ours, seed {seed}"] = onnx.export(small.model, task.example,
                                                  folder / f"ours-{seed}.onnx")
    scores = {name: accuracy.evaluate(path, task.test) for name, path in paths.items()}
    timed = latency.paired(paths, task.example, threads=1, blocks=40).set_index("candidate")
    rows = [{"candidate": name, **score.row(),
             **accuracy.difference(scores["float32"], score).row(),
             **timed.loc[name, ["latency_ms", "ratio", "ratio_low", "ratio_high"]],
             "size_bytes": paths[name].stat().st_size,
             "machine": machine.describe()} for name, score in scores.items()]
    frame = pd.DataFrame(rows).round(5)
    with files.atomic(table) as new:
        frame.to_csv(new, index=False)
    print(frame.drop(columns="machine").to_string(index=False))
    ours, theirs = (frame[frame.candidate.str.startswith(word)]
                    for word in ("ours", ("ONNX Runtime", "NNCF")))
    best = theirs.loc[theirs.latency_ms.idxmin()]
    faster = best.latency_ms / ours.latency_ms.max()
    smaller = ours.size_bytes.max() / best.size_bytes
    print(f"the fastest peer, {best.candidate}, takes {faster:.2f}x the time of our slowest; ours "
          f"has {smaller:.0%} of its "
          f"bytes and loses at most {-100 * ours.top1_change.min():.2f} points")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "reports/benchmarks/ahead.csv"))
