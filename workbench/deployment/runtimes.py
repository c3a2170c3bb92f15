"""Other runtimes with the face of a `Session`: OpenVINO, MNN, torch compiled, torch in bfloat16.
Each is optional.

All open what onnx.export wrote, except the two of torch, which take modules. `available` says which
are installed.
"""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from workbench.batches import Inputs, tensors
from workbench.deployment import sessions
from workbench.errors import UnsupportedModelError

PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "openvino bfloat16": "openvino",
            "mnn": "MNN",
            "torch": "torch", "torch compiled": "torch", "torch bfloat16": "torch"}


def available() -> pd.DataFrame:
    """One row per runtime: runtime, package, version (None where it is missing), note (what to do
    then).

    Example: `"onnxruntime" in list(available().runtime)`
    """
    rows = []
    for runtime, package in PACKAGES.items():
        try:
            version, note = importlib.metadata.version(package), ""
        except importlib.metadata.PackageNotFoundError:
            version, note = None, "pip install 'workbench[runtimes]'"
        if runtime == "torch compiled" and not _compiler():
            note = "needs a C++ compiler (g++ or clang++)"
        rows.append({"runtime": runtime, "package": package, "version": version, "note": note})
    return pd.DataFrame(rows)


def open(source, runtime: str, *, threads: int | None = None,  # noqa: A001
         name: str | None = None) -> sessions.Session:
    """A `Session` of `source` on `runtime`, one of those that `available` lists: an ONNX file, or
    for torch a module.

    Raises ValueError for an unknown runtime, one that is not installed, a source that it does not
    take, or more threads than cores; UnsupportedModelError for an operator that it does not know.

    Example: `runtimes.open("model.onnx", "openvino", threads=1)`
    """
    if runtime not in PACKAGES:
        raise ValueError(f"unknown runtime {runtime!r}; expected one of {', '.join(PACKAGES)}")
    if importlib.util.find_spec(PACKAGES[runtime]) is None:
        raise ValueError(f"runtime {runtime} is not installed; pip install 'workbench[runtimes]' "
                         f"or {PACKAGES[runtime]}")
    if isinstance(source, nn.Module) != runtime.startswith("torch"):
        raise ValueError(f"runtime {runtime} takes "
                         f"{'a module' if runtime.startswith('torch') else 'an ONNX file'}, found "
                         f"{source!r:.60}")
    # checks the threads and that the file is whole
    plain = sessions.open(source, threads=threads, name=name)
    if runtime in ("onnxruntime", "torch"):
        return plain
    make = {"openvino": OpenVinoSession, "openvino bfloat16": OpenVinoSession, "mnn": MnnSession,
            "torch compiled": CompiledSession, "torch bfloat16": Bfloat16Session}[runtime]
    return make(source, runtime=runtime, name=plain.name, threads=plain.threads)


class OpenVinoSession(sessions.Session):
    """An ONNX file on OpenVINO's CPU plugin, float32 products unless `runtime` says bfloat16;
    integers as the file has them.

    Example: `OpenVinoSession("model.onnx", runtime="OpenVINO", name="it", threads=1)(x)`
    """

    def __init__(self, source: Path | str, *, runtime: str, name: str, threads: int):
        import openvino

        self.runtime = runtime
        precision = "bf16" if runtime.endswith("bfloat16") else "f32"
        try:
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(str(source)), "CPU", {
                "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": precision})
        except RuntimeError as error:
            raise UnsupportedModelError(f"{name} cannot be opened by OpenVINO: "
                                        f"{_reason(error)}") from error
        self.request = compiled.create_infer_request()
        super().__init__(self._run, name=name, threads=threads)

    def _run(self, *inputs, **by_name) -> np.ndarray:
        return self.prepare(by_name or inputs)()

    def prepare(self, inputs: Inputs) -> Callable[[], np.ndarray]:
        pairs = inputs.items() if isinstance(inputs, Mapping) else enumerate(tensors(inputs))
        feed = {key: np.ascontiguousarray(value.numpy()) for key, value in pairs}
        return lambda: self.request.infer(feed, share_inputs=True)[0].copy()


class MnnSession(sessions.Session):
    """An ONNX file converted to MNN's own format, on its CPU backend in full precision.

    Example: `MnnSession("model.onnx", runtime="MNN", name="it", threads=1)(x)`
    """

    runtime = "mnn"

    def __init__(self, source: Path | str, *, runtime: str, name: str, threads: int):
        import MNN

        self.mnn, self.numpy = MNN, MNN.numpy
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.mnn"
            # the tool itself, without the report it sends
            convert = "import sys, MNN, _tools; _tools.mnnconvert(sys.argv)"
            command = [sys.executable, "-c", convert, "-f", "ONNX", "--modelFile",
                       str(Path(source).resolve()), "--MNNModel", str(path), "--bizCode",
                       "workbench"]
            # it leaves files about
            found = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            if not path.exists():
                raise UnsupportedModelError(f"{name} cannot be converted to MNN: "
                                            f"{_reason(found.stderr or found.stdout)}")
            manager = MNN.nn.create_runtime_manager(({"backend": 0, "numThread": threads,
                                                      "precision": 1},))
            self.module = MNN.nn.load_module_from_file(str(path), [], [], runtime_manager=manager)
        super().__init__(self._run, name=name, threads=threads)

    def _run(self, images: Tensor) -> np.ndarray:
        return self.prepare(images)()

    def prepare(self, images: Tensor) -> Callable[[], np.ndarray]:
        if not isinstance(images, Tensor):
            raise ValueError("MNN is wrapped for one tensor here; open this file on another "
                             "runtime")
        value = self.mnn.expr.placeholder(list(images.shape), self.mnn.expr.NCHW)
        value.write(np.ascontiguousarray(images.numpy()))

        def run() -> np.ndarray:
            output = self.module.forward([value])[0]
            return np.array(self.mnn.expr.convert(output, self.mnn.expr.NCHW).read())

        return run


class CompiledSession(sessions.TorchSession):
    """A module compiled by torch's inductor, anew for every batch size.

    Example: `CompiledSession(model, runtime="inductor", name="it", threads=1)(x)`
    """

    def __init__(self, model: nn.Module, *, runtime: str, name: str, threads: int):
        if not _compiler():
            raise ValueError("runtime torch compiled needs a C++ compiler; install g++ or clang++")
        super().__init__(model, name=name, threads=threads)
        self.runtime, self.function = runtime, torch.compile(self.function, dynamic=False)


class Bfloat16Session(sessions.TorchSession):
    """A module under torch's autocast to bfloat16.

    Example: `Bfloat16Session(model, runtime="bfloat16", name="it", threads=1)(x)`
    """

    def __init__(self, model: nn.Module, *, runtime: str, name: str, threads: int):
        super().__init__(model, name=name, threads=threads)
        self.runtime = runtime

    def _run(self, inputs: Inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super()._run(inputs)


def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def _reason(error: Exception | str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
