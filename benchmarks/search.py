"""An exact front to judge searches by: ResNet-20 on Fashion-MNIST, every subnet of a space, in
float and in 8 bits.

    python benchmarks/search.py accuracy [--workers 2]  # 512 subnets twice: an hour on two cores
    python benchmarks/search.py latency  # their 1,024 files: three minutes of a quiet machine
    python benchmarks/search.py judge  # every sampler, 20 seeds: a quarter of an hour

The nine groups of channels inside the blocks are whole or halved; each subnet is cut by L1,
distilled for 60 steps of 64 pictures, scored on the 5,000 validation pictures in float and on the
first 2,500 in 8 bits. Writes the tables under reports/benchmarks/search; a run that is stopped goes
on.
"""

import argparse
import multiprocessing
import os
from pathlib import Path

import pandas as pd

FOLDER = Path("reports/benchmarks/search")
ROUNDED = 2500  # validation pictures that judge in 8 bits, whose exact arithmetic is slow in torch
# seconds that making and scoring a plan took, measured on two cores: 7.2 a subnet, which is two
# plans
PLAN_S = 3.6


def subject_and_space():
    """What is searched."""
    from workbench.plans.space import Space
    from workbench.subjects import data, models
    from workbench.subjects.subject import Subject

    task = data.load("fashion_mnist")
    subject = Subject(models.load("resnet20", task), task)
    return subject, Space.of(subject.model, task.example, shares=(1.0, 0.5), bits=(32, 8),
                             rounding=())


def accuracy_of(plan: tuple[int, ...]) -> list[dict]:
    """A subnet's two rows."""
    import torch

    from workbench.measures import accuracy, cost

    torch.set_num_threads(1)
    global _KNOWN
    _KNOWN = _KNOWN or subject_and_space()
    start, space = _KNOWN
    rows, subject = [], start
    for name, step in space.steps((*plan, 1)).items():
        if name == "quantize":
            score = accuracy.evaluate(subject.model, start.task.validation)
            rows.append(_row(plan, 32, score, cost.total(subject.model, start.example)))
        subject = step.apply(subject)
    first = start.task.validation.take(torch.arange(ROUNDED))
    rows.append(_row(plan, 8, accuracy.evaluate(subject.model, first), {}))
    return rows


def _row(plan, bits: int, score, total: dict) -> dict:
    return {"plan": "".join(map(str, plan)), "bits": bits, "right": round(score.value * score.n),
            "n": score.n,
            "params": total.get("params"), "macs": total.get("macs")}


_KNOWN = None


def accuracy_table(workers: int, limit: int = 0) -> None:
    """Score every subnet that is not in the table yet."""
    path = FOLDER.parent / "search_accuracy.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = set(pd.read_csv(path, dtype={"plan": str}).plan) if path.exists() else set()
    plans = [tuple(int(bit) for bit in f"{k:09b}") for k in range(512)]
    plans = [plan for plan in plans if "".join(map(str, plan)) not in done][:limit or None]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for rows in pool.imap_unordered(accuracy_of, plans):
            pd.DataFrame(rows).to_csv(path, mode="a", header=not path.exists(), index=False)


def latency_table(blocks: int) -> None:
    """Time every subnet's file in both formats, all of them interleaved. Weights do not change what
    a file takes, so each is the whole network's file with rows and columns left out."""
    import onnx as onnx_library
    from onnx import numpy_helper

    from workbench import machine
    from workbench.deployment import onnx
    from workbench.measures import latency
    from workbench.methods.quantization import quantize

    subject, space = subject_and_space()
    seen = list(subject.task.validation.subset(300).batches(50))
    folder = FOLDER / "files"
    folder.mkdir(parents=True, exist_ok=True)
    whole = {32: onnx.export(subject.model, subject.example, folder / "whole-32.onnx"),
             8: onnx.export(quantize(subject.model, seen), subject.example,
                            folder / "whole-8.onnx")}
    paths = {}
    for bits, path in whole.items():
        proto = onnx_library.load(path)
        values = {value.name: numpy_helper.to_array(value) for value in proto.graph.initializer}
        makers = {node.output[0]: node for node in proto.graph.node}
        convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
        for k in range(512):
            plan, new = f"{k:09b}", dict(values)
            for block, halved in enumerate(plan):
                if halved == "1":
                    half = values[_stored(convolutions[1 + 2 * block].input[1],
                                          makers)[0]].shape[0] // 2
                    # weight and bias of the first convolution: its rows
                    for slot in convolutions[1 + 2 * block].input[1:]:
                        for name in _stored(slot, makers):
                            new[name] = new[name][:half] if new[name].ndim else new[name]
                    reader = _stored(convolutions[2 + 2 * block].input[1], makers)[0]
                    new[reader] = new[reader][:, :half]
            cut = onnx_library.ModelProto()
            cut.CopyFrom(proto)
            del cut.graph.initializer[:], cut.graph.value_info[:]
            cut.graph.initializer.extend(numpy_helper.from_array(value.copy(), name)
                                         for name, value in new.items())
            paths[f"{plan} {bits}"] = folder / f"{plan}-{bits}.onnx"
            onnx_library.save(cut, paths[f"{plan} {bits}"])
    candidates = {f"{'0' * 9} 32": paths[f"{'0' * 9} 32"]} | paths
    timed = latency.paired(candidates, subject.example, threads=1, blocks=blocks, block_ms=10)
    timed["plan"], timed["bits"] = timed.candidate.str[:9], timed.candidate.str[10:].astype(int)
    timed["size_bytes"] = [paths[name].stat().st_size for name in timed.candidate]
    timed[["plan", "bits", "latency_ms", "ratio", "ratio_low", "ratio_high", "size_bytes"]].assign(
        machine=machine.describe()).to_csv(FOLDER.parent / "search_latency.csv", index=False)


def _stored(value: str, makers: dict) -> list[str]:
    """The initializers that a convolution's input is made of: itself, or what a DequantizeLinear
    reads."""
    return list(makers[value].input) if value in makers else [value]


def exact():
    """The whole table as plan -> (lost, latency), its space, and how lost is counted: against the
    whole network in float on the same pictures."""
    import torch

    from workbench.measures import accuracy

    subject, space = subject_and_space()
    scores = pd.read_csv(FOLDER.parent / "search_accuracy.csv", dtype={"plan": str})
    times = pd.read_csv(FOLDER.parent / "search_latency.csv", dtype={"plan": str})
    table = scores.merge(times, on=["plan", "bits"])
    few = accuracy.evaluate(subject.model,
                            subject.task.validation.take(torch.arange(ROUNDED))).value
    base = scores[(scores.plan == "0" * 9) & (scores.bits == 32)].iloc[0]
    table["lost"] = [(base.right / base.n if row.bits == 32 else few) - row.right / row.n
                     for row in table.itertuples()]
    known = {(*map(int, row.plan), int(row.bits == 8)): (row.lost, row.ratio)
             for row in table.itertuples()}
    return subject, space, known, table


def judge(seeds: int, evaluations: int) -> None:
    """Every sampler on the table: the share of the exact front's area after each evaluation, and
    what asking took."""
    import numpy as np

    from workbench import files, machine
    from workbench.numbers.fronts import dominated_area, undominated
    from workbench.plans.samplers import NAMES, replayed
    from workbench.plans.search import judged_by
    from workbench.plans.space import forecast

    subject, space, known, table = exact()
    points = np.array(list(known.values()))
    corner = tuple(points.max(0) + 1e-9)
    whole = dominated_area(points, corner)
    # from other pictures each
    expected = [forecast(subject, space, judged_by(subject, 500, seed), folder=FOLDER / "forecast")
                for seed in files.progress(range(seeds), title="forecasts")]
    expected[0].write(FOLDER.parent / "search_forecast")
    rows, reached = [], []
    for name, seed in files.progress([(name, seed) for name in NAMES for seed in range(seeds)],
                                     title="samplers"):
        asked = replayed(name, space, known, forecast=expected[seed], evaluations=evaluations,
                         seed=seed)
        reached.append(asked[["lost", "latency"]].assign(sampler=name, seed=seed))
        for count in range(4, len(asked) + 1, 4):
            area = dominated_area(asked[["lost", "latency"]].to_numpy()[:count], corner)
            asking = asked.asking_s[count - 1]
            rows.append({"sampler": name, "seed": seed, "evaluations": count, "asking_s": asking,
                         "seconds": asking + count * PLAN_S, "share": area / whole})
    curves = pd.DataFrame(rows)
    curves.to_csv(FOLDER.parent / "search_curves.csv", index=False)
    attainment(pd.concat(reached)).to_csv(FOLDER.parent / "search_attainment.csv", index=False)
    table = table.rename(columns={"ratio": "latency"})
    columns = ["plan", "bits", "lost", "n", "latency", "latency_ms", "size_bytes"]
    table[columns].to_csv(FOLDER.parent / "search_table.csv", index=False)
    front = table[undominated(table[["lost", "latency"]].to_numpy())].sort_values("latency")
    print(front[["plan", "bits", "lost", "latency", "size_bytes"]].to_string(index=False))
    last = curves[curves.evaluations == evaluations].groupby("sampler").share
    # what asking at random takes, to a hundredth
    in_time = curves[curves.seconds <= evaluations * PLAN_S * 1.01]
    in_time = in_time.groupby(["sampler", "seed"]).share.last().groupby("sampler").mean()
    draws = np.random.default_rng(0)
    lines = []
    for name, shares in last:
        means = draws.choice(shares.to_numpy(), (2000, len(shares))).mean(1)
        low, high = np.percentile(means, [2.5, 97.5])
        lines.append({"sampler": name, "share": shares.mean(), "low": low, "high": high,
                      "seeds": len(shares),
                      "share_in_time": in_time[name],
                      "asking_s": curves[curves.sampler == name].groupby(
                          "seed").asking_s.max().mean()})
    made = pd.DataFrame(lines).sort_values("share",
                                           ascending=False).assign(evaluations=evaluations,
                                                                   machine=machine.describe())
    made.to_csv(FOLDER.parent / "search.csv", index=False)
    print(made.drop(columns="machine").round(4).to_string(index=False))


def attainment(reached: pd.DataFrame) -> pd.DataFrame:
    """What a quarter, a half and three quarters of a sampler's seeds attain: the corners of its
    attainment surfaces.

    reached: sampler, seed, lost, latency, of every plan asked for."""
    import moocore

    parts = []
    for name, part in reached.groupby("sampler", sort=False):
        corners = moocore.eaf(part[["lost", "latency"]].to_numpy(), part.seed.to_numpy(),
                              percentiles=[25, 50, 75])
        parts.append(pd.DataFrame(corners, columns=["lost", "latency",
                                                    "percentile"]).assign(sampler=name))
    return pd.concat(parts, ignore_index=True)[["sampler", "percentile", "lost", "latency"]]


def main() -> None:
    """Do one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("accuracy", "latency", "judge"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, default=0, help="subnets at most; 0: all")
    parser.add_argument("--blocks", type=int, default=7, help="rounds of the timing")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=64)
    options = parser.parse_args()
    if options.part == "accuracy":
        accuracy_table(options.workers, options.limit)
    elif options.part == "latency":
        latency_table(options.blocks)
    else:
        judge(options.seeds, options.evaluations)


if __name__ == "__main__":
    main()
