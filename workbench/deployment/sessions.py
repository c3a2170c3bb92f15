"""Any model as a callable with the same face: a torch module, an ONNX file, an ONNX Runtime
session, a function.

Inputs are a tensor, a tuple or named tensors; a session answers with one tensor, or with all its
outputs by name.
"""

import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from workbench import machine
from workbench.batches import (
    ANSWERS,
    Inputs,
    answer,
    call,
    check,
    count,
    named,
    outputs_by_name,
    tensors,
)
from workbench.deployment import integers, nodes
from workbench.errors import UnsupportedModelError, listed, reason
from workbench.graph.layers import capture

FUSIONS = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC",
           "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}
# in a file's metadata: what ONNX Runtime is not to do with it, by commas
DISABLED = "disabled_optimizers"


class Session:
    """A model that maps a batch of n examples to its answer, float32 (n, ...), on a stated runtime.

    Called, it checks the batch and returns the answer; `outputs` gives all outputs by name.
    `prepare` separates what a timing must leave out.

    Example: `Session(lambda x: x.flatten(1), name="mine", threads=1)`
    """

    runtime = "callable"

    def __init__(self, function: Callable, *, name: str, threads: int):
        self.function, self.name, self.threads = function, name, threads

    def prepare(self, inputs: Inputs) -> Callable[[], object]:
        """A call without arguments that runs the model on `inputs`, already in the runtime's own
        layout."""
        return lambda: call(self.function, inputs)

    def outputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """All outputs by name. Raises ValueError where the model refuses the batch."""
        try:
            check(inputs)
            made = self.prepare(inputs)()
        except (RuntimeError, ValueError, TypeError, IndexError) + _runtime_errors() as error:
            raise ValueError(self._refusal(inputs, error)) from error
        return outputs_by_name(torch.from_numpy(made) if isinstance(made, np.ndarray) else made)

    def step(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name, for whoever asks a thousand times a second: what is wrong is looked
        for once it goes wrong."""
        return self.outputs(inputs)

    def __call__(self, inputs: Inputs) -> Tensor:
        """The answer, float32 (n, ...), to a batch. Raises ValueError where the model refuses the
        batch."""
        return self.answered(self.outputs(inputs), inputs)

    def answered(self, made: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """The answer among all outputs, float32 (n, ...). Raises ValueError where there is none for
        each example."""
        found = answer(made) if made else None
        if found is None or found.shape[:1] != (count(inputs),):
            raise ValueError(f"{self.name} put out {getattr(found, 'shape', 'no tensor')} for "
                             f"{count(inputs)} examples; expected a tensor (n, ...)")
        return found.float()

    def activations(self, inputs: Inputs) -> dict[str, Tensor]:
        """Each weighted layer's output, with the batch norm behind it, by name in order of
        execution."""
        raise UnsupportedModelError(f"{self.name}: a plain function shows no layers; give a module "
                                    "or an ONNX file")

    def _refusal(self, inputs: Inputs, error: Exception) -> str:
        """What is said where the runtime refuses a batch."""
        shapes = ", ".join(f"{name}{tuple(value.shape)} of type {value.dtype}"
                           for name, value in _labelled(inputs).items())
        shape = (f"a batch of shape {shapes}" if isinstance(inputs, Tensor)
                 else f"the inputs {shapes}")
        # it tells which axis
        said = (" ".join(str(error).split("\n", 3)[:3]) if self.runtime == "onnxruntime"
                else reason(error))
        return f"{self.name} refuses {shape}: {said}"


class TorchSession(Session):
    """A module in eval mode; one that is training is copied first. A quantised one computes as
    integer kernels do, so that it answers as its ONNX file will; where `whole` is false, in floats,
    whose sums round.

    Example: `TorchSession(model, name="ours", threads=1)(x).shape == (len(x), 10)`
    """

    runtime = "torch"

    def __init__(self, model: nn.Module, *, name: str, threads: int, whole: bool = True):
        if any(module.training for module in model.modules()):
            model = copy.deepcopy(model).eval()
        self.model = model
        super().__init__(integers.exact(model) if whole and integers.is_quantised(model) else model,
                         name=name, threads=threads)

    def prepare(self, inputs: Inputs) -> Callable[[], object]:
        return lambda: self._run(inputs)

    def _run(self, inputs: Inputs):
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                return call(self.function, inputs)
        finally:
            if before != self.threads:
                torch.set_num_threads(before)

    def activations(self, inputs: Inputs) -> dict[str, Tensor]:
        # its layers have their names
        floats = TorchSession(self.model, name=self.name, threads=self.threads, whole=False)
        with capture(self.model) as outputs:
            floats(inputs)
        return dict(outputs)

    def _refusal(self, inputs: Inputs, error: Exception) -> str:
        tables = [module for module in self.model.modules() if isinstance(module, nn.Embedding)]
        if isinstance(error, IndexError) and tables:
            ids = [value for value in tensors(inputs)
                   if not value.is_floating_point() and value.numel()]
            largest, rows = (max(int(value.max()) for value in ids),
                             [table.num_embeddings for table in tables])
            if largest >= max(rows):
                return (f"{self.name} refuses the inputs: the largest id is {largest}, its "
                        f"vocabulary has {max(rows)} entries; use the model's own tokenizer")
            return (f"{self.name} refuses the inputs: one of its tables, of {min(rows)} rows, has "
                    f"no row for what it is asked; ids are at most {largest}, inputs "
                    f"{max(value.shape[-1] for value in ids)} long")
        try:
            named(self.model, inputs)
        except ValueError as wrong:
            return f"{self.name} refuses the inputs: {wrong}"
        return super()._refusal(inputs, error)


class OnnxSession(Session):
    """An ONNX file on ONNX Runtime's CPU provider; inputs go in by name, a tensor or tuple in the
    file's order.

    Its threads stop spinning as soon as a run ends (session.force_spinning_stop); otherwise two
    sessions side by side starve each other.

    Example: `OnnxSession("model.onnx", name="file", threads=1)(x).shape == (len(x), 10)`
    """

    runtime = "onnxruntime"

    def __init__(self, source, *, name: str, threads: int, fusion: str = "all"):
        import onnxruntime

        # opened elsewhere: it keeps its own threads
        if isinstance(source, onnxruntime.InferenceSession):
            threads = source.get_session_options().intra_op_num_threads or machine.cores()
        else:
            source = open_file(source, name, threads, fusion)
        self.session = source
        self.inputs = {value.name: value for value in source.get_inputs()}
        self.output_names = [value.name for value in source.get_outputs()]
        self._watched: tuple[onnxruntime.InferenceSession, dict[str, str]] | None = None
        super().__init__(self.session.run, name=name, threads=threads)

    def feed(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """The inputs as ONNX Runtime wants them. Raises ValueError for a name that the file lacks,
        or one that is missing."""
        if isinstance(inputs, Mapping):
            odd = [name for name in (*inputs, *self.inputs) if name not in self.inputs
                   or name not in inputs]
            if odd:
                lacks = "is missing" if odd[0] in self.inputs else "is not among its inputs"
                raise ValueError(f"input {odd[0]!r} {lacks}; it takes {listed(self.inputs)}")
            pairs: Iterable[tuple[str, Tensor]] = inputs.items()
        else:
            values = tensors(inputs)
            if len(values) != len(self.inputs):
                raise ValueError(f"it takes {len(self.inputs)} inputs ({listed(self.inputs)}), "
                                 f"found {len(values)}")
            pairs = zip(self.inputs, values, strict=True)
        return {name: np.ascontiguousarray(value.numpy()) for name, value in pairs}

    def prepare(self, inputs: Inputs) -> Callable[[], np.ndarray]:
        feed = self.feed(inputs)
        first = next((name for name in ANSWERS if name in self.output_names), self.output_names[0])
        return lambda: self.session.run([first], feed)[0]

    def outputs(self, inputs: Inputs) -> dict[str, Tensor]:
        try:
            check(inputs)
            made = self.session.run(None, self.feed(inputs))
        except (RuntimeError, ValueError) + _runtime_errors() as error:
            raise ValueError(self._refusal(inputs, error)) from error
        return {name: torch.from_numpy(value)
                for name, value in zip(self.output_names, made, strict=True)}

    def step(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            made = self.session.run(self.output_names,
                                    {name: value.numpy() for name, value in inputs.items()})
        except (RuntimeError, ValueError) + _runtime_errors():
            return self.outputs(inputs)  # which says what is wrong
        return dict(zip(self.output_names, map(torch.from_numpy, made), strict=True))

    def activations(self, inputs: Inputs) -> dict[str, Tensor]:
        if self._watched is None:
            self._watched = self._watch()
        session, values = self._watched
        found = session.run(list(values.values()), self.feed(inputs))
        return {layer: torch.from_numpy(value) for layer, value in zip(values, found, strict=True)}

    def _watch(self):
        path = self.session._model_path
        if not path:
            raise UnsupportedModelError(f"{self.name}: a session made from bytes shows no layers; "
                                        "open its file")
        model, values = nodes.with_layer_outputs(path)
        return open_file(model.SerializeToString(), self.name, self.threads), values


class Stateful:
    """A session whose state is fed back: called with a step's inputs, it gives the answer and keeps
    the state for the next.

    state: which output goes into which input, such as {"hidden_out": "hidden"}, or "present.0.key":
    "past.0.key". start: the state before the first step, by input name.

    Raises ValueError for names that the model lacks.

    Example: `stream = sessions.Stateful("gru.onnx", {"new_state": "state"}, start={"state":
    torch.zeros(1, 64)}); stream(frame)`
    """

    def __init__(self, model, state: Mapping[str, str], *, start: Mapping[str, Tensor],
                 threads: int | None = None):
        self.session, self.state, self.start = open(model,
                                                    threads=threads), dict(state), dict(start)
        missing = [name for name in self.state.values() if name not in self.start]
        if missing:
            raise ValueError(f"stateful: no start is given for {missing[0]!r}; there are "
                             f"{listed(self.start)}")
        self.now = dict(self.start)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return answer(self.outputs(inputs)).float()

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs of a step by name, but for the state."""
        made = self.session.step({**inputs, **self.now})
        try:
            self.now = {**self.now,
                        **{name: made.pop(output) for output, name in self.state.items()}}
        except KeyError as error:
            raise ValueError(f"{self.session.name} has no output {error} to feed back; it has "
                             f"{listed(made)}") from error
        return made

    def reset(self) -> None:
        """Begin again from the start state."""
        self.now = dict(self.start)


def open(source, *, threads: int | None = None, name: str | None = None, fusion: str = "all",
         whole: bool = True) -> Session:  # noqa: A001  (reads sessions.open)
    """A `Session` of a module, a path to an ONNX file, an onnxruntime.InferenceSession, a function,
    or a `Session`.

    threads: processors that one run may use; by default as many as torch would (all, or
    OMP_NUM_THREADS). fusion: how far ONNX Runtime may rewrite a file's graph: "none", "basic"
    (constants, batch norms), "extended" (activations fused, integer kernels) or "all" (layouts
    too). whole: whether a module of quantization.quantize computes with whole numbers, as its file
    does (`integers.exact`), or else in floats.

    Raises TypeError for anything else, FileNotFoundError or ValueError for a missing or damaged
    file.

    Example: `sessions.open("model.onnx", threads=1)(task.example)`
    """
    if threads is not None and not 1 <= threads <= machine.cores():
        raise ValueError(f"threads is {threads}, expected 1 to {machine.cores()}, the cores of "
                         "this machine")
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}; expected one of {', '.join(FUSIONS)}")
    threads = threads or min(machine.cores(), torch.get_num_threads())
    if isinstance(source, Session):
        return source
    if isinstance(source, nn.Module):
        return TorchSession(source, name=name or type(source).__name__, threads=threads,
                            whole=whole)
    if isinstance(source, str | Path):
        return OnnxSession(Path(source), name=name or Path(source).name, threads=threads,
                           fusion=fusion)
    if type(source).__name__ == "InferenceSession":
        return OnnxSession(source, name=name or "session", threads=threads)
    if callable(source):
        return Session(source, name=name or getattr(source, "__name__", "function"),
                       threads=threads)
    raise TypeError(f"{source!r} is no model; expected a module, an ONNX file, an ONNX Runtime "
                    "session or a function")


def times(path: Path | str, inputs: Inputs, *, threads: int, runs: int) -> dict[str, float]:
    """Milliseconds of each weighted layer in ONNX Runtime's own profile, by name, with the ReLU
    that its kernel computes; under "" all that is no layer's. The sum over a layer's nodes of their
    medians over `runs`, behind five that warm up.

    Example: `sum(times("model.onnx", x, threads=1, runs=3).values()) > 0`
    """
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        session = open_file(nodes.with_layer_names(str(path)).SerializeToString(), str(path),
                            threads, profile=f"{folder}/run")
        feed = OnnxSession(session, name=str(path), threads=threads).feed(inputs)
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


def open_file(source: Path | bytes, name: str, threads: int, fusion: str = "all",
              profile: str | None = None):
    """An ONNX Runtime session of a file or of its bytes, its time profiled into files that begin
    with `profile`.

    Example: `open_file(Path("model.onnx"), "model", 1).get_inputs()[0].name`
    """
    import onnxruntime

    if isinstance(source, Path) and not source.exists():
        raise FileNotFoundError(f"ONNX file {source} does not exist")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, FUSIONS[fusion])
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not machine.sums_integers():  # else sums of two products of 8 bits saturate at 16
        options.add_session_config_entry("session.x64quantprecision", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    try:
        try:
            session = onnxruntime.InferenceSession(source, options,
                                                   providers=["CPUExecutionProvider"])
        except _runtime_errors():
            copied = None if machine.sums_integers() else nodes.with_own_weights(source)
            if copied is None:
                raise
            # with that option ONNX Runtime opens no file in which two nodes read one weight
            source = copied
            session = onnxruntime.InferenceSession(source, options,
                                                   providers=["CPUExecutionProvider"])
        disabled = session.get_modelmeta().custom_metadata_map.get(DISABLED)
        if disabled:
            del session  # its profile, if it has one, is closed before the next is opened
            session = onnxruntime.InferenceSession(source, options,
                                                   providers=["CPUExecutionProvider"],
                                                   disabled_optimizers=disabled.split(","))
        return session
    except _runtime_errors() as error:
        said = re.sub(r"/onnxruntime_src.*\) ", "", reason(error))  # without its C++ signature
        raise ValueError(f"{name} is not an ONNX file that ONNX Runtime can open ({said}); export "
                         "it again") from error


def _runtime_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf,
            state.NotImplemented, state.NoSuchFile)


def _labelled(inputs: Inputs) -> dict[str, Tensor]:
    """Inputs for a message: by name, or with their place."""
    if isinstance(inputs, Tensor):
        return {"": inputs}
    return (dict(inputs) if isinstance(inputs, Mapping)
            else {f"{place}: ": value for place, value in enumerate(inputs)})
