"""Static quantisation to 8 bits by each calibrator, ours beside ONNX Runtime's: seconds, peak
memory, accuracy, in one run.

    python benchmarks/calibration.py --data folder:PHOTOS.parquet [--model efficientnet_lite0]
        [--images 50] [--threads 2]

Every candidate runs in a fresh process of its own, on the same images of the float32 model with its
batch norms folded; what it needs before it (the import, the images, ONNX Runtime's preparation of
the file) is done before the clock starts. The clock stops when the scales are known and the weights
are rounded. Accuracy is that of the module (ours) or the file (theirs) on the images that no
candidate was calibrated on. Writes reports/benchmarks/calibration.csv.
"""

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from workbench import machine
from workbench.deployment import onnx
from workbench.measures import accuracy, peers
from workbench.methods import quantization, reparameterization
from workbench.subjects import data, models

CANDIDATES = [(who, name) for name in ("minmax", "percentile", "mse", "entropy")
              for who in ("ours", "onnxruntime")
              if who == "ours" or name in peers.CALIBRATORS]


def split(count: int, options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the images to calibrate on, and of those to judge on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:options.images], order[options.images:options.images + options.judged]


def run(who: str, calibrator: str, options: argparse.Namespace, folder: Path,
        base: accuracy.Accuracy) -> dict:
    """One candidate, in the process that this is."""
    torch.set_num_threads(options.threads)
    task = data.load(options.data, preprocessing=models.preprocessing(options.model))
    model = reparameterization.fold_batchnorm(models.load(options.model, task), task.example)
    seen, rest = (task.test.take(part) for part in split(len(task.test), options))
    seen = list(seen.batches(options.batch))
    made = folder / f"{who}-{calibrator}.onnx"
    if who == "ours":
        before, started = machine.resident(), time.perf_counter()
        made = quantization.quantize(model, seen, calibrator=calibrator)
    else:
        import onnxruntime.quantization  # noqa: F401  (part of the import, not of the work)

        before, started = machine.resident(), time.perf_counter()
        peers.quantize_static(folder / "prepared.onnx", seen, made, calibrator=calibrator,
                              prepared=True)
    seconds, peak = time.perf_counter() - started, machine.resident("VmHWM")
    top = accuracy.evaluate(made, rest)
    return {"candidate": who, "calibrator": calibrator, "seconds": seconds, "own_mb": peak - before,
            **top.row(),
            **accuracy.difference(base, top).row(), "threads": options.threads,
            "images": options.images}


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--judged", type=int, default=200,
                        help="other images, on which accuracy is taken")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks/calibration.csv"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from onnxruntime import quantization as theirs

        task = data.load(options.data, preprocessing=models.preprocessing(options.model))
        model = reparameterization.fold_batchnorm(models.load(options.model, task), task.example)
        theirs.quant_pre_process(onnx.export(model, task.example, folder / "float32.onnx"),
                                 folder / "prepared.onnx")
        base = accuracy.evaluate(model, task.test.take(split(len(task.test), options)[1]))
        for repeat in range(options.repeats):  # in turn, so that a slow minute falls on all
            for who, calibrator in CANDIDATES:
                with ProcessPoolExecutor(1,
                                         mp_context=multiprocessing.get_context("spawn")) as pool:
                    rows.append({"repeat": repeat} | pool.submit(run, who, calibrator, options,
                                                                 folder, base).result())
                print(pd.DataFrame(rows[-1:]).round(4).to_string(header=len(rows) == 1), flush=True)
    frame = pd.DataFrame(rows)
    best = frame.groupby(["candidate", "calibrator"], sort=False).agg(
        {"seconds": "median", "own_mb": "median", "top1": "first", "top1_change": "first",
         "top1_change_low": "first",
         "top1_change_high": "first", "n": "first", "threads": "first",
         "images": "first"}).reset_index()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    best.round(5).to_csv(options.out, index=False)
    print(best.round(4).to_string(), machine.describe(), sep="\n")


if __name__ == "__main__":
    main()
