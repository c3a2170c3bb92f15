"""Any model as a callable with the same face: a torch module, an ONNX file, an ONNX Runtime session, a function."""

import copy
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from workbench import layers, machine

FUSIONS = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}
DISABLED = "disabled_optimizers"  # in a file's metadata: what ONNX Runtime is not to do with it, by commas
_PASSED_ON = ("DequantizeLinear", "Transpose", "Cast", "Identity")  # nodes through which a weight keeps its name


class Session:
    """A model that maps a batch, float32 (n, C, H, W), to its output, float32 (n, ...), on a stated runtime.

    Called, it checks the batch and returns a tensor. `prepare` separates what a timing must leave out.
    """

    runtime = "callable"

    def __init__(self, function: Callable[[Tensor], Tensor], *, name: str, threads: int):
        self.function, self.name, self.threads = function, name, threads

    def prepare(self, images: Tensor) -> Callable[[], object]:
        """A call without arguments that runs the model on `images`, already in the runtime's own layout."""
        return lambda: self.function(images)

    def __call__(self, images: Tensor) -> Tensor:
        """Output float32 (n, ...) of a batch. Raises ValueError where the model refuses the batch's shape or type."""
        try:
            output = self.prepare(images)()
        except (RuntimeError, ValueError, *_runtime_errors()) as error:
            raise ValueError(f"{self.name} refuses a batch of shape {tuple(images.shape)} and type {images.dtype}: "
                             f"{layers.reason(error)}") from error
        if isinstance(output, np.ndarray):
            output = torch.from_numpy(output)
        if not isinstance(output, Tensor) or output.shape[:1] != images.shape[:1]:
            raise ValueError(f"{self.name} put out {getattr(output, 'shape', type(output).__name__)} for "
                             f"{len(images)} images; expected a tensor (n, ...)")
        return output.float()

    def activations(self, images: Tensor) -> dict[str, Tensor]:
        """Each weighted layer's output, with the batch norm behind it, by name in order of execution."""
        raise layers.UnsupportedModelError(f"{self.name}: a plain function shows no layers; give a module or an ONNX file")


class TorchSession(Session):
    """A module in eval mode; one that is training is copied first."""

    runtime = "torch"

    def __init__(self, model: nn.Module, *, name: str, threads: int):
        if any(module.training for module in model.modules()):
            model = copy.deepcopy(model).eval()
        self.model = model
        super().__init__(self._run, name=name, threads=threads)

    def _run(self, images: Tensor) -> Tensor:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                return self.model(images)
        finally:
            if before != self.threads:
                torch.set_num_threads(before)

    def activations(self, images: Tensor) -> dict[str, Tensor]:
        with layers.capture(self.model) as outputs:
            self(images)
        return dict(outputs)


class OnnxSession(Session):
    """An ONNX file on ONNX Runtime's CPU provider.

    Its threads stop spinning as soon as a run ends (session.force_spinning_stop); otherwise two sessions side by side
    starve each other.
    """

    runtime = "onnxruntime"

    def __init__(self, source, *, name: str, threads: int, fusion: str = "all"):
        import onnxruntime

        if isinstance(source, onnxruntime.InferenceSession):  # opened elsewhere: it keeps its own threads
            threads = source.get_session_options().intra_op_num_threads or machine.cores()
        else:
            source = _open_onnx(source, name, threads, fusion)
        self.session = source
        self.input_name = source.get_inputs()[0].name
        self._watched: tuple[onnxruntime.InferenceSession, dict[str, str]] | None = None
        super().__init__(self._run, name=name, threads=threads)

    def _run(self, images: Tensor) -> np.ndarray:
        return self.prepare(images)()

    def prepare(self, images: Tensor) -> Callable[[], np.ndarray]:
        feed = {self.input_name: np.ascontiguousarray(images.numpy())}
        return lambda: self.session.run(None, feed)[0]

    def activations(self, images: Tensor) -> dict[str, Tensor]:
        if self._watched is None:
            self._watched = self._watch()
        session, values = self._watched
        found = session.run(list(values.values()), {self.input_name: np.ascontiguousarray(images.numpy())})
        return {layer: torch.from_numpy(value) for layer, value in zip(values, found, strict=True)}

    def _watch(self):
        path = self.session._model_path
        if not path:
            raise layers.UnsupportedModelError(f"{self.name}: a session made from bytes shows no layers; open its file")
        model, values = _with_layer_outputs(path)
        return _open_onnx(model.SerializeToString(), self.name, self.threads), values


def open(source, *, threads: int | None = None, name: str | None = None, fusion: str = "all") -> Session:  # noqa: A001  (reads sessions.open)
    """A `Session` of a module, a path to an ONNX file, an onnxruntime.InferenceSession, a function, or a `Session`.

    threads: processors that one run may use; by default as many as torch would (all, or OMP_NUM_THREADS). fusion: how far
    ONNX Runtime may rewrite a file's graph: "none", "basic" (constants, batch norms), "extended" (activations fused,
    integer kernels) or "all" (layouts too).

    Raises TypeError for anything else, FileNotFoundError or ValueError for a missing or damaged file.

    Example: `sessions.open("model.onnx", threads=1)(task.example)`
    """
    if threads is not None and not 1 <= threads <= machine.cores():
        raise ValueError(f"threads is {threads}, expected 1 to {machine.cores()}, the cores of this machine")
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}; expected one of {', '.join(FUSIONS)}")
    threads = threads or min(machine.cores(), torch.get_num_threads())
    if isinstance(source, Session):
        return source
    if isinstance(source, nn.Module):
        return TorchSession(source, name=name or type(source).__name__, threads=threads)
    if isinstance(source, str | Path):
        return OnnxSession(Path(source), name=name or Path(source).name, threads=threads, fusion=fusion)
    if type(source).__name__ == "InferenceSession":
        return OnnxSession(source, name=name or "session", threads=threads)
    if callable(source):
        return Session(source, name=name or getattr(source, "__name__", "function"), threads=threads)
    raise TypeError(f"{source!r} is no model; expected a module, an ONNX file, an ONNX Runtime session or a function")


def _with_layer_outputs(path: str) -> tuple:
    """The model of an ONNX file with every weighted layer's value among its outputs, and those values by layer name.

    A layer is a Conv, ConvTranspose, Gemm or MatMul node whose weight is a stored tensor called "LAYER.weight"; where
    a BatchNormalization directly follows, its output is the one that counts.
    """
    import onnx

    model = onnx.load(path)
    values: dict[str, str] = {}
    for layer, node, behind in _layers_of(model, path):
        normed = len(behind) == 1 and behind[0].op_type == "BatchNormalization"
        values[layer] = (behind[0] if normed else node).output[0]
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values.values() if value not in present)
    return model, values


def _layers_of(model, path: str) -> list[tuple]:
    """Name, node and readers of each weighted layer of an ONNX model. Raises UnsupportedModelError where none has a name."""
    made_by = {value: node for node in model.graph.node for value in node.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    readers: dict[str, list] = {}
    for node in model.graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    named = [(_layer_name(node, made_by, stored), node, readers.get(node.output[0], []))
             for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    found = [entry for entry in named if entry[0]]
    if not found:
        raise layers.UnsupportedModelError(f"{path}: no node has a weight called LAYER.weight, so its layers have no names")
    return found


def times(path: Path | str, images: Tensor, *, threads: int, runs: int) -> dict[str, float]:
    """Milliseconds of each weighted layer in ONNX Runtime's own profile, by name, with the ReLU that its kernel computes;
    under "" all that is no layer's. The sum over a layer's nodes of their medians over `runs`, behind five that warm up."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        session = _open_onnx(_with_layer_names(str(path)).SerializeToString(), str(path), threads, profile=f"{folder}/run")
        feed = {session.get_inputs()[0].name: np.ascontiguousarray(images.numpy())}
        for _ in range(5 + runs):
            session.run(None, feed)
        for event in json.loads(Path(session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                found.setdefault(event["name"], []).append(event["dur"] / 1e3)
    total: dict[str, float] = {"": 0.0}
    for name, every in found.items():
        marked = re.search("layer=(.+?)=", name)
        layer = marked[1] if marked else ""
        total[layer] = total.get(layer, 0.0) + float(np.median(every[5:]))
    return total


def _with_layer_names(path: str):
    """The model of an ONNX file in which "layer=NAME=" stands in the names of each layer's node and of what it and the ReLU
    behind it put out: the runtime names its own nodes after either."""
    import onnx

    model = onnx.load(path)
    fixed, new = {output.name for output in model.graph.output}, {}
    for layer, node, behind in _layers_of(model, path):
        chain = [node, *(behind if len(behind) == 1 and behind[0].op_type in ("Relu", "Clip") else [])]
        for k, link in enumerate(chain):
            link.name = f"layer={layer}={k}"
            new |= {link.output[0]: link.name} if link.output[0] not in fixed else {}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
    return model


def _layer_name(node, made_by: dict, stored: set[str]) -> str | None:
    value = node.input[1]
    while value in made_by and made_by[value].op_type in _PASSED_ON:
        value = made_by[value].input[0]
    layer, _, kind = value.rpartition(".")
    return layer if value in stored and kind.startswith("weight") else None


def _open_onnx(source: Path | bytes, name: str, threads: int, fusion: str = "all", profile: str | None = None):
    import onnxruntime

    if isinstance(source, Path) and not source.exists():
        raise FileNotFoundError(f"ONNX file {source} does not exist")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, FUSIONS[fusion])
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        disabled = session.get_modelmeta().custom_metadata_map.get(DISABLED)
        if disabled:
            del session  # its profile, if it has one, is closed before the next is opened
            session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"],
                                                   disabled_optimizers=disabled.split(","))
        return session
    except _runtime_errors() as error:
        reason = re.sub(r"/onnxruntime_src.*\) ", "", layers.reason(error))  # without its C++ signature
        raise ValueError(f"{name} is not an ONNX file that ONNX Runtime can open ({reason}); export it again") from error


def _runtime_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented, state.NoSuchFile
