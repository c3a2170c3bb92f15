"""Sensitivity of every layer of ResNet-20 at 9 levels: plain loop, exact scan, fast scan, and
fasterai 0.3.2; one run.

    pip install -e '.[peers]'  # fasterai; without it the other three are timed
    python benchmarks/sensitivity.py [--images N] [--tolerance 0.03]

Prints seconds and ratios, whether the exact counts equal the plain loop's at every point, and how
many of the exact values lie inside the fast intervals; writes reports/benchmarks/sensitivity.csv.
The plain loop evaluates each layer and level by itself, as the tools of the field do, with our own
evaluation. fasterai zeroes whole filters of a layer (`SensitivityAnalyzer.sweep`, granularity
"filter") on the same network, images and batches; it knows convolutions only, so its seconds are
also given per point.
"""

import argparse
import copy
import importlib.util
import time
from pathlib import Path

import pandas as pd
import torch

from workbench import machine
from workbench.graph import layers
from workbench.measures import sensitivity
from workbench.methods import channels
from workbench.subjects import data, models
from workbench.subjects.tasks import Split

LEVELS = [round(0.1 * k, 1) for k in range(1, 10)]


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--tolerance", type=float, default=0.03,
                        help="half-width of the fast intervals, fraction")
    parser.add_argument("--orders", type=int, default=5,
                        help="of the images in the fast scan, for its coverage; one is timed")
    options = parser.parse_args()
    task = data.load("fashion_mnist")
    model, test = models.load("resnet20", task), task.test.subset(options.images)
    method = channels.zeroing(model, layers=layers.named(model))
    frames, seconds = {}, {}
    for mode in ("fast", "exact", "plain"):
        started = time.perf_counter()
        frames[mode] = sensitivity.scan(model, test, method, levels=LEVELS, mode=mode,
                                        tolerance=options.tolerance)
        seconds[mode] = time.perf_counter() - started
        print(f"{mode}: {seconds[mode]:.1f} s", flush=True)
    exact, fast, plain = frames["exact"], frames["fast"], frames["plain"]
    if importlib.util.find_spec("fasterai"):
        started = time.perf_counter()
        frames["fasterai"] = fasterai(model, test)
        seconds["fasterai"] = time.perf_counter() - started
    else:
        print("fasterai is not installed: pip install -e '.[peers]'")
    rows = [{"mode": mode, "points": len(frame), "seconds": seconds[mode],
             "ms_per_point": 1000 * seconds[mode] / len(frame),
             "evaluations": frame.attrs.get("evaluations")}
            for mode, frame in frames.items()]
    table = pd.DataFrame(rows).sort_values("seconds", ascending=False)
    for mode in ("exact", "fast"):
        table[f"{mode}_times_faster"] = table.ms_per_point / table.ms_per_point[
            table["mode"] == mode].item()
    orders = [fast] + [sensitivity.scan(model, test, method, levels=LEVELS, mode="fast",
                                        tolerance=options.tolerance, seed=seed)
                       for seed in range(1, options.orders)]
    inside = [((one.top1_change_low <= exact.top1_change)
               & (exact.top1_change <= one.top1_change_high)).mean() for one in orders]
    print(machine.describe())
    print(f"{len(exact)} points on {len(test):,} images")
    print(table.round(2).to_string(index=False))
    print(f"exact equals plain at every point: {exact.top1.equals(plain.top1)}")
    print(f"exact values inside the fast intervals: {sum(inside) / len(inside):.1%} over "
          f"{len(inside)} orders of the images (the "
          "points of one order share its images: "
          f"{', '.join(f'{share:.1%}' for share in inside)}), half-width at most "
          f"{options.tolerance}")
    if "fasterai" in frames:
        both = frames["fasterai"].merge(exact, on=["layer", "level"])
        apart = (both.top1_x - both.top1_y).abs()
        print(f"fasterai and exact: equal at {(apart == 0).sum()} of {len(both)} points, apart by "
              f"{apart.mean():.4f} in the "
              f"mean, at most by {apart.max():.4f}")
    out = Path("reports/benchmarks/sensitivity.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    table.round(3).to_csv(out, index=False)


def fasterai(model: torch.nn.Module, test: Split) -> pd.DataFrame:
    """Its own sweep: columns layer, level, top1."""
    from fasterai.analyze.sensitivity import SensitivityAnalyzer
    from fasterai.core.all import large_final

    batches = list(test.batches(250))
    convolutions = [name for name, layer in layers.named(model).items()
                    if isinstance(layer, torch.nn.Conv2d)]

    @torch.inference_mode()
    def evaluate(candidate: torch.nn.Module) -> float:
        return sum(int((candidate(images).argmax(1) == labels).sum())
                   for images, labels in batches) / len(test)

    analyser = SensitivityAnalyzer(copy.deepcopy(model), batches[0][0][:1], evaluate,
                                   criteria=large_final)
    rows = []
    for level in LEVELS:
        result = analyser.analyze("sparsity", 100 * level, granularity="filter",
                                  layers=convolutions, verbose=False)
        rows += [{"layer": point.name, "level": level, "top1": point.compressed_metric}
                 for point in result.layers]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
