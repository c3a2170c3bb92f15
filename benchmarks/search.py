"""An exact front to judge searches by: ResNet-20 on Fashion-MNIST, every subnet of a space, in float and in 8 bits.

    python benchmarks/search.py accuracy [--workers 2]   # cuts, recovers and scores 512 subnets twice: 70 minutes on two cores
    python benchmarks/search.py latency                  # times their 1,024 files; needs a quiet machine, ten minutes
    python benchmarks/search.py judge                    # every sampler against the true front, 20 seeds

The nine groups of channels inside the blocks are whole or halved; each subnet is cut by L1, distilled for 60 steps of 64
pictures, scored on the 5,000 validation pictures in float and on the first 2,500 in 8 bits. Writes the tables under
reports/benchmarks/search; a run that is stopped goes on.
"""

import argparse
import multiprocessing
import os
from pathlib import Path

import pandas as pd

FOLDER = Path("reports/benchmarks/search")
ROUNDED = 2500  # validation pictures that judge in 8 bits, whose exact arithmetic is slow in torch


def subject_and_space():
    """What is searched."""
    from workbench.plans.space import Space
    from workbench.subjects import data, models
    from workbench.subjects.subject import Subject

    task = data.load("fashion_mnist")
    subject = Subject(models.load("resnet20", task), task)
    return subject, Space.of(subject.model, task.example, shares=(1.0, 0.5), bits=(32, 8), rounding=())


def accuracy_of(plan: tuple[int, ...]) -> list[dict]:
    """A subnet's two rows."""
    import torch

    from workbench.measures import accuracy, cost
    from workbench.subjects.tasks import Split  # noqa: F401

    torch.set_num_threads(1)
    global _KNOWN
    _KNOWN = _KNOWN or subject_and_space()
    start, space = _KNOWN
    rows, subject = [], start
    for name, step in space.steps((*plan, 1)).items():
        if name == "quantize":
            rows.append(_row(plan, 32, accuracy.evaluate(subject.model, start.task.validation), cost.total(subject.model, start.example)))
        subject = step.apply(subject)
    first = start.task.validation.take(torch.arange(ROUNDED))
    rows.append(_row(plan, 8, accuracy.evaluate(subject.model, first), {}))
    return rows


def _row(plan, bits: int, score, total: dict) -> dict:
    return {"plan": "".join(map(str, plan)), "bits": bits, "right": round(score.value * score.n), "n": score.n,
            "params": total.get("params"), "macs": total.get("macs")}


_KNOWN = None


def accuracy_table(workers: int, limit: int = 0) -> None:
    """Score every subnet that is not in the table yet."""
    path = FOLDER / "accuracy.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = set(pd.read_csv(path, dtype={"plan": str}).plan) if path.exists() else set()
    plans = [tuple(int(bit) for bit in f"{k:09b}") for k in range(512)]
    plans = [plan for plan in plans if "".join(map(str, plan)) not in done][:limit or None]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for rows in pool.imap_unordered(accuracy_of, plans):
            pd.DataFrame(rows).to_csv(path, mode="a", header=not path.exists(), index=False)


def main() -> None:
    """Do one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("accuracy", "latency", "judge"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, default=0, help="subnets at most; 0: all")
    options = parser.parse_args()
    if options.part == "accuracy":
        accuracy_table(options.workers, options.limit)


if __name__ == "__main__":
    main()
