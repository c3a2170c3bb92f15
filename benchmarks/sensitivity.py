"""Sensitivity of every layer of ResNet-20 at 9 levels: the plain loop, the exact scan, the fast scan; one run.

    python benchmarks/sensitivity.py [--images N] [--tolerance 0.02]

Prints seconds and ratios, whether the exact counts equal the plain loop's at every point, and how many of the exact
values lie inside the fast intervals; writes reports/benchmarks/sensitivity.csv. The plain loop evaluates each layer
and level by itself, as the tools of the field do, with our own evaluation.
"""

import argparse
import time
from pathlib import Path

import pandas as pd

from workbench import layers, machine
from workbench.measures import sensitivity
from workbench.methods import channels
from workbench.subjects import data, models

LEVELS = [round(0.1 * k, 1) for k in range(1, 10)]


def main() -> None:
    """Run the three and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--tolerance", type=float, default=0.03, help="half-width of the fast intervals, fraction")
    options = parser.parse_args()
    task = data.load("fashion_mnist")
    model, test = models.load("resnet20", task), task.test.subset(options.images)
    method = channels.zeroing(model, layers=layers.named(model))
    frames, seconds = {}, {}
    for mode in ("fast", "exact", "plain"):
        started = time.perf_counter()
        frames[mode] = sensitivity.scan(model, test, method, levels=LEVELS, mode=mode, tolerance=options.tolerance)
        seconds[mode] = time.perf_counter() - started
    exact, fast, plain = frames["exact"], frames["fast"], frames["plain"]
    inside = (fast.top1_change_low <= exact.top1_change) & (exact.top1_change <= fast.top1_change_high)
    rows = [{"mode": mode, "seconds": seconds[mode], "times_faster": seconds["plain"] / seconds[mode],
             "evaluations": frames[mode].attrs["evaluations"]} for mode in ("plain", "exact", "fast")]
    table = pd.DataFrame(rows).round(2)
    print(machine.describe())
    print(f"{len(exact)} points on {len(test):,} images")
    print(table.to_string(index=False))
    print(f"exact equals plain at every point: {exact.top1.equals(plain.top1)}")
    print(f"exact values inside the fast intervals: {inside.sum()} of {len(inside)} ({inside.mean():.1%}), "
          f"half-width at most {options.tolerance}")
    out = Path("reports/benchmarks/sensitivity.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)


if __name__ == "__main__":
    main()
