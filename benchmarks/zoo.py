"""One model of every torchvision and of many timm families through export, equivalence, cut, eight
bits and scan.

    python benchmarks/zoo.py [NAME ...] [--jobs N] [--limit SECONDS] [--again]

Random weights and small pictures: what is tried is whether the graph, the groups of channels, the
quantisers and the export take the architecture, not how accurate it is. Each model runs in a
process of its own; a step is "ok", or one line why not. Prints what did not go. Each row goes to
reports/benchmarks/zoo.csv when it is there: stopped, the next run goes on with the models that it
lacks; --again measures those anew that it has.
"""

import argparse
import copy
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from workbench import files, machine
from workbench.deployment import onnx
from workbench.errors import UnsupportedModelError, reason
from workbench.graph.kinds import BATCHNORM
from workbench.measures import equivalence, sensitivity
from workbench.methods import channels, quantization, reparameterization
from workbench.subjects import data, models
from workbench.subjects.tasks import Split

STEPS = ("export", "equivalence", "cut", "int8", "scan")
SIZES = {"torchvision:inception_v3": 96, "torchvision:maxvit_t": 224, "torchvision:vit_b_32": 224,
         "timm:inception_v4": 96,
         "timm:levit_128s": 224, "timm:cait_xxs24_224": 224, "timm:xcit_nano_12_p16_224": 224,
         "timm:pit_ti_224": 224,
         "timm:mixer_s32_224": 224, "timm:resmlp_12_224": 224,
         "timm:swin_tiny_patch4_window7_224": 224,
         "timm:twins_svt_small": 224, "timm:vit_tiny_patch16_224": 224,
         "timm:deit_tiny_patch16_224": 224,
         "timm:mobilevit_xxs": 256, "timm:tiny_vit_5m_224": 224}  # pixels, where not 64
TORCHVISION = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s",
               "googlenet", "inception_v3",
               "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf",
               "resnet18", "resnext50_32x4d",
               "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32",
               "wide_resnet50_2")
TIMM = ("resnet18d", "res2net50_14w_8s", "resnest14d", "seresnet18", "ecaresnet26t", "skresnet18",
        "resnetv2_50", "regnetx_002",
        "mobilenetv3_small_050", "mobilenetv4_conv_small", "efficientnet_lite0",
        "tf_efficientnetv2_b0", "ghostnet_050",
        "mnasnet_small", "lcnet_050", "rexnet_100", "convnextv2_atto", "convmixer_768_32",
        "repvgg_a0", "mobileone_s0",
        "fastvit_t8", "hrnet_w18_small", "dla34", "densenet121", "vovnet39a", "cspresnet50",
        "darknet53", "xception41",
        "inception_v4", "dpn48b", "poolformer_s12", "edgenext_xx_small", "mobilevit_xxs",
        "levit_128s", "vit_tiny_patch16_224",
        "deit_tiny_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "pit_ti_224",
        "mixer_s32_224", "resmlp_12_224",
        "swin_tiny_patch4_window7_224", "twins_svt_small", "pvt_v2_b0", "tiny_vit_5m_224",
        "efficientvit_b0", "starnet_s1")
NAMES = (*(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM))


def main() -> None:
    """Run the models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help="as models.load takes them")
    parser.add_argument("--jobs", type=int, default=machine.cores(),
                        help="models at a time, one thread each")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a step may take")
    parser.add_argument("--again", action="store_true", help="also the models that the table has")
    options = parser.parse_args()
    out, lock = Path("reports/benchmarks/zoo.csv"), threading.Lock()
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = {row["model"]: row
            for row in pd.read_csv(out).to_dict("records")} if out.exists() else {}

    def measure(name: str) -> None:
        row = _watched(name, options.limit)
        with lock, files.atomic(out) as new:
            rows[name] = row
            pd.DataFrame(sorted(rows.values(),
                                key=lambda row: place.get(row["model"], len(NAMES)))).to_csv(
                                    new, index=False)

    place = {name: k for k, name in enumerate(NAMES)}
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(measure, [name for name in options.names if options.again
                                or name not in rows]))
    table = pd.read_csv(out)
    lines = table.melt(["model", "pixels"], list(STEPS), "step", "result")
    ok = lines.result == "ok"
    print(machine.describe())
    print(lines[~ok].sort_values("model").to_string(index=False))
    print(f"{len(table)} models: {ok.sum()} of {len(lines)} steps are ok ({ok.mean():.1%}); "
          f"{(table[list(STEPS)] == 'ok').all(axis=1).sum()} models went through all; the "
          "longest step took "
          f"{table.filter(like='_s').max().max():.0f} s")


def _watched(name: str, limit: float) -> dict:
    """The row of a model, from a process that is stopped where it takes longer than all its steps
    may."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(name, limit, theirs), daemon=True)
    process.start()
    theirs.close()
    row = {"model": name, "pixels": SIZES.get(name, 64)} | dict.fromkeys(STEPS, "not reached") | {
        "machine": machine.describe()}
    end = time.monotonic() + limit * len(STEPS) + 60
    try:
        while ours.poll(max(end - time.monotonic(), 0)):
            row |= ours.recv()
    except EOFError:
        pass
    process.kill()
    print({key: row[key] for key in ("model", *STEPS)}, flush=True)
    return row


def _child(name: str, limit: float, pipe) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for part in through(name, Path(folder), limit):
            pipe.send(part)
    pipe.close()


def through(name: str, folder: Path, limit: float):
    """Each step's part of the row: its result, and its seconds as STEP_s."""
    task = _task(SIZES.get(name, 64))
    model = _usual(models.load(name, task, pretrained=False), task)
    example, few, made = task.example, task.test, {}

    def export() -> None:
        made["file"] = onnx.export(model, example, folder / "model.onnx")

    def same() -> None:
        if "file" not in made:
            raise UnsupportedModelError("there is no export")
        try:
            _expect(equivalence.compare(model, made["file"], few))
        except ValueError as error:
            raise ValueError(f"{error}; of the module in float64 from itself in float32: "
                             f"{_own_rounding(model, few):.6g}") from error

    def cut() -> None:
        removed = channels.select(channels.score(model, "l1", example=example), 0.3, scope="layer")
        if not removed:
            raise UnsupportedModelError("no group of channels can be cut")
        channels.remove(model, removed, example=example)

    def int8() -> None:
        rounded = quantization.quantize(model, list(task.validation.batches(8)))
        path = onnx.export(rounded, example, folder / "int8.onnx")
        _expect(equivalence.compare(rounded, path, few,
                                    limits=equivalence.Limits(cosine=0.99, l2=float("inf"),
                                                              agreement=0.0)))

    def scan() -> None:
        sensitivity.scan(model, few.subset(8), channels.silencing(model, example=example),
                         levels=[0.5])

    for step, run in zip(STEPS, (export, same, cut, int8, scan), strict=True):
        started = time.perf_counter()
        result = _result(run)
        seconds = time.perf_counter() - started
        if seconds > limit and result == "ok":
            result = f"took {seconds:.0f} s"
        yield {step: result, f"{step}_s": round(seconds, 1)}


def _result(run: Callable[[], None]) -> str:
    try:
        run()
        return "ok"
    except (UnsupportedModelError, ValueError) as error:
        return reason(error)
    except Exception as error:  # a crash is what this looks for
        return f"CRASH {type(error).__name__}: {reason(error)}"


def _expect(verdict: equivalence.Equivalence) -> None:
    odd = [check for check in verdict.checks() if not check["passed"]]
    if odd:
        raise ValueError(", ".join(f"{check['name']} is {check['value']:.6g}, expected "
                                   f"{check['limit']}" for check in odd))


def _own_rounding(model: nn.Module, few: Split) -> float:
    """The largest relative distance of any example between a network in float32 and the same in
    float64: what its own rounding moves."""
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        return equivalence.compare(lambda inputs: exact(inputs.double()), model, few).l2_max


def _task(size: int) -> data.Task:
    """Noise with some structure: 48 pictures of 10 classes."""
    draw = torch.Generator().manual_seed(0)
    pictures = torch.nn.functional.interpolate(torch.randn(48, 3, 8, 8, generator=draw), size,
                                               mode="bilinear")
    return data.of((pictures + 0.1 * torch.randn(pictures.shape, generator=draw),
                    torch.arange(48) % 10), name="noise")


def _usual(model: nn.Module, task: data.Task) -> nn.Module:
    """The model with batch norms that have seen some data, as a trained one's have."""
    if any(isinstance(module, BATCHNORM) for module in model.modules()):
        return reparameterization.reestimate_batchnorm(model, list(task.train.batches(8)))
    return model


if __name__ == "__main__":
    main()
