"""Export to ONNX with a dynamic batch axis; a quantised model with its own integers and scales.

Source: torch.onnx.export (the torch.export based exporter), which folds each batch norm into its convolution and writes
each fake quantisation as QuantizeLinear and DequantizeLinear.
"""

import ast
import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench import files, layers
from workbench.deployment import sessions
from workbench.quantizers import ActivationQuantizer, WeightQuantizer

TOLERANCE = 1e-3  # largest relative L2 distance between torch and the export, per image, before `export` refuses
CALIBRATORS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}  # ours: onnxruntime's
BLOCKS = (16, 32, 64, 128, 256)  # inputs that share a scale in ONNX Runtime's 4-bit kernel
QUANTISED_TOLERANCE = 0.2  # the same where both round: a value that lies between two integers may go either way


def export(model: nn.Module, example: Tensor, path: Path | str) -> Path:
    """Write `model` as an ONNX file that takes any batch size; return its path.

    The file is written once onnx.checker accepts it and batches of 1 and 7 (the example, repeated with noise) run on
    ONNX Runtime to torch's outputs; otherwise nothing is. example: float32 (n, C, H, W), or int64 tokens (n, L), whose length is
    then free as well. The weights of a model of
    quantization.quantize are stored as int8, fewer bits in the same, its biases as int32, its scales as they are; those of
    a linear layer with 4 bits by groups of 16, 32, 64, ... inputs really as 4 bits (ONNX Runtime's MatMulNBits, which also
    rounds what it multiplies them with to 8 bits, by groups). Where only some layers are quantised, ONNX Runtime would round the
    float weights of the others itself, coarsely, and say nothing: the file tells `sessions.open` to leave them, and anyone else
    opens it with InferenceSession(path, disabled_optimizers=["WeightBiasQuantization"]).

    Raises UnsupportedModelError where the model cannot be exported or the export computes something else.

    Example: `onnx.export(model, task.example, "resnet20.onnx")`
    """
    path = Path(path)
    session = sessions.open(model)
    whole, quantised = session.model, [m for m in session.model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]
    packed: dict[str, tuple[Tensor, Tensor]] = {}
    if quantised:
        whole = copy.deepcopy(whole)
        packed = _freeze(whole)
    batch = torch.export.Dim.DYNAMIC
    tokens = not example.is_floating_point()  # of any length, too
    noise = torch.randn(7, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    probe = example[:1].repeat(7, 1) if tokens else example[:1] + 0.1 * noise
    try:
        with _quietly():
            program = torch.onnx.export(whole, (probe[:2],), dynamo=True,
                                        dynamic_shapes=({0: batch, 1: batch} if tokens else {0: batch},),
                                        input_names=["tokens" if tokens else "images"],
                                        output_names=["logits"], verbose=False)
        proto = program.model_proto
        if tokens:
            del proto.graph.value_info[:]  # the exporter's own shapes are wrong behind shared weights
        _name_weights(proto)
        _strip(proto)
        _fold_padding(proto)
        _four_bits(proto, packed)
        if quantised:
            _reshape_integers(proto)
            _integer_biases(proto)
            _fold_clips(proto)
            if any(not parametrize.is_parametrized(layer, "weight") for layer in layers.named(whole).values()):
                onnx.helper.set_model_props(proto, {sessions.DISABLED: "WeightBiasQuantization"})
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the exporter raises a dozen kinds, all of them about this model
        raise layers.UnsupportedModelError(f"{session.name} cannot be exported to ONNX: {layers.reason(error)}") from error
    with files.atomic(path) as new:
        onnx.save(proto, new)
        exported = sessions.open(new)
        for size in (1, 7):
            _check(session(probe[:size]), exported(probe[:size]), f"{path} at batch {size}",
                   QUANTISED_TOLERANCE if quantised else TOLERANCE)
    return path


def quantize_static(source: Path | str, batches: Iterable, path: Path | str, *, calibrator: str = "minmax",
                    per_channel: bool = True, prepared: bool = False) -> Path:
    """Write a copy of the float32 ONNX file `source`, quantised to 8 bits by ONNX Runtime's own tool; return its path.

    A peer of quantization.quantize. batches: (images, labels) pairs for its calibration, "minmax", "entropy" or "percentile".
    prepared: `source` has been through its quant_pre_process, which is otherwise run first.

    Raises ValueError for an unknown calibrator or no images, and as sessions.open does.

    Example: `onnx.quantize_static("resnet20.onnx", task.validation.subset(200).batches(50), "static.onnx")`
    """
    from onnxruntime import quantization

    if calibrator not in CALIBRATORS:
        raise ValueError(f"unknown calibrator {calibrator!r}; ONNX Runtime has {', '.join(CALIBRATORS)}")
    feeds = [{sessions.open(source).input_name: images.numpy()} for images, _ in batches]
    if not feeds:
        raise ValueError("calibration saw no images; give at least one batch")
    reader = type("Reader", (quantization.CalibrationDataReader,), {"get_next": lambda self: feeds.pop(0) if feeds else None})()
    with files.atomic(Path(path)) as new, tempfile.TemporaryDirectory() as folder, _quietly():
        ready = Path(source) if prepared else Path(folder) / "prepared.onnx"
        if not prepared:
            quantization.quant_pre_process(source, ready)
        quantization.quantize_static(ready, new, reader, per_channel=per_channel,
                                     activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
                                     calibrate_method=quantization.CalibrationMethod[CALIBRATORS[calibrator]])
        sessions.open(new)
    return Path(path)


def quantize_dynamic(source: Path | str, path: Path | str) -> Path:
    """Write a copy of the float32 ONNX file `source` with uint8 weights, its activations quantised as they come, by ONNX
    Runtime's own tool; return its path. Raises as sessions.open does.
    """
    from onnxruntime import quantization

    words = sessions.open(source).input_name == "tokens"  # its symbolic shapes end at a text's free length
    with files.atomic(Path(path)) as new, tempfile.TemporaryDirectory() as folder, _quietly():
        prepared = Path(folder) / "prepared.onnx"
        quantization.quant_pre_process(source, prepared, skip_symbolic_shape=words)
        quantization.quantize_dynamic(prepared, new, weight_type=quantization.QuantType.QUInt8)
        sessions.open(new)
    return Path(path)


def quantize_nncf(source: Path | str, batches: Iterable, path: Path | str) -> Path:
    """Write a copy of the float32 ONNX file `source`, quantised to 8 bits by NNCF with its own defaults; return its path.

    A peer, and optional. batches: (images, labels) pairs. Raises ValueError where NNCF is not installed or there are no
    images, and as sessions.open does.
    """
    try:
        import nncf
    except ImportError as error:
        raise ValueError("NNCF is not installed; pip install 'workbench[runtimes]'") from error

    name = sessions.open(source).input_name
    feeds = [{name: image[None]} for images, _ in batches for image in images.numpy()]
    if not feeds:
        raise ValueError("calibration saw no images; give at least one batch")
    with files.atomic(Path(path)) as new, _quietly():
        made = nncf.quantize(onnx.load(source), nncf.Dataset(feeds), subset_size=len(feeds))
        onnx.save(made, new)
        sessions.open(new)
    return Path(path)


def _check(expected: Tensor, found: Tensor, where: str, tolerance: float) -> None:
    distance = (expected - found).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-12)
    if not np.isfinite(distance.max().item()) or distance.max() > tolerance:
        raise layers.UnsupportedModelError(f"{where} puts out something else than the model: relative L2 distance "
                                           f"{distance.max():.3g}, at most {tolerance} allowed")


def _freeze(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Let quantisers stand for ONNX's operators; the integers and scales of linear layers with a 4-bit kernel, by name."""
    packed = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, ActivationQuantizer):
            module.freeze()
        elif parametrize.is_parametrized(module, "weight"):
            quantizer, source = module.parametrizations.weight[0], module.parametrizations.weight.original
            scheme = quantizer.scheme
            if isinstance(module, nn.Linear) and scheme.granularity == "group" and scheme.group in BLOCKS and \
                    (scheme.bits, scheme.symmetric, scheme.levels) == (4, True, "uniform"):
                packed[name] = quantizer.integers(source), quantizer.scale.detach()
                plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                plain.load_state_dict({key: value for key, value in (("weight", module.weight), ("bias", module.bias))
                                       if value is not None})
                model.set_submodule(name, plain)  # a parametrisation cannot be taken off a copy alone
            else:
                quantizer.freeze(source)
    return packed


def _four_bits(proto: onnx.ModelProto, packed: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Put MatMulNBits in the place of these layers' Gemm: two weights a byte, the first in the lower half, zero at 8."""
    graph = proto.graph
    for layer, (integers, scale) in packed.items():
        node = next((node for node in graph.node if node.op_type == "Gemm" and node.input[1] == f"{layer}.weight"), None)
        if node is None:
            raise layers.UnsupportedModelError(f"layer {layer} did not become a Gemm node, which 4-bit groups need; "
                                               "use granularity 'channel'")
        rows, inputs = integers.shape
        block = integers.numel() // len(scale)
        halves = (integers + 8).to(torch.uint8).reshape(rows, -1, block // 2, 2)
        parts = {"integers": (halves[..., 0] | halves[..., 1] << 4).numpy(), "scale": scale.reshape(rows, -1).numpy()}
        graph.initializer.extend(onnx.numpy_helper.from_array(part, f"{layer}.weight_{name}") for name, part in parts.items())
        bias = ["", "", *node.input[2:]] if len(node.input) == 3 else []
        new = onnx.helper.make_node("MatMulNBits", [node.input[0], *(f"{layer}.weight_{name}" for name in parts), *bias],
                                    list(node.output), node.name, domain="com.microsoft", K=inputs, N=rows, bits=4,
                                    block_size=block, accuracy_level=4)
        place = list(graph.node).index(node)
        graph.node.remove(node)
        graph.node.insert(place, new)
    if packed:
        proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def _reshape_integers(proto: onnx.ModelProto) -> None:
    """Flatten integers, not what they stand for: a linear layer that does not find them next to it has its weights made float
    anew in every run."""
    graph = proto.graph
    made_by = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    scalars = {constant.name for constant in graph.initializer if not constant.dims}
    for view in [node for node in graph.node if node.op_type in ("Reshape", "Flatten")]:
        source = made_by.get(view.input[0])
        if source is None or source.op_type != "DequantizeLinear" or readers[view.input[0]] > 1 or source.input[1] not in scalars:
            continue
        name = view.output[0]
        view.input[0], view.output[0] = source.input[0], f"{name}_integers"
        source.input[0], source.output[0] = view.output[0], name
        graph.node.remove(source)
        graph.node.insert(list(graph.node).index(view) + 1, source)


def _integer_biases(proto: onnx.ModelProto) -> None:
    """Store biases as int32 at the scale of the products that they join, as integer kernels want them."""
    graph = proto.graph
    values = {constant.name: onnx.numpy_helper.to_array(constant) for constant in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in [node for node in graph.node if node.op_type in ("Conv", "Gemm") and len(node.input) == 3]:
        sources, bias = [made_by.get(name) for name in node.input[:2]], values.get(node.input[2])
        if bias is None or any(source is None or source.op_type != "DequantizeLinear" for source in sources):
            continue
        _hold_bias(graph, values, sources[1].input, np.abs(bias) / values[sources[0].input[1]] / 2**30)
        scale = (values[sources[0].input[1]] * values[sources[1].input[1]]).astype(np.float32)
        names = [f"{node.input[2]}_{part}" for part in ("integers", "scale", "zero", "dequantized")]
        parts = (np.rint(bias / scale).clip(-(2**31) + 1, 2**31 - 1).astype(np.int32), scale, np.zeros_like(scale, np.int32))
        graph.initializer.extend(onnx.numpy_helper.from_array(part, name) for part, name in zip(parts, names, strict=False))
        graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", names[:3], names[3:], axis=0))
        node.input[2] = names[3]
    used = {name for node in graph.node for name in node.input}
    for constant in [constant for constant in graph.initializer if constant.name not in used]:
        graph.initializer.remove(constant)


def _fold_padding(proto: onnx.ModelProto) -> None:
    """Let a convolution pad by itself where zeros are put around its input alone: one operator less, a copy less."""
    graph = proto.graph
    values = {constant.name: onnx.numpy_helper.to_array(constant) for constant in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    for conv in [node for node in graph.node if node.op_type == "Conv"]:
        pad = made_by.get(conv.input[0])
        if pad is None or pad.op_type != "Pad" or readers[conv.input[0]] > 1 or pad.input[1] not in values or len(pad.input) > 3:
            continue
        around, ranks = values[pad.input[1]], len(values[pad.input[1]]) // 2
        filled = values.get(pad.input[2], np.ones(1)) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
        mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
        if mode != b"constant" or filled.any() or (around < 0).any() or around[:2].any() or around[ranks:ranks + 2].any():
            continue
        own = next((a for a in conv.attribute if a.name == "pads"), None)
        wide = [*around[2:ranks], *around[ranks + 2:]]
        new = [int(a + b) for a, b in zip(wide, own.ints if own else [0] * len(wide), strict=True)]
        if own:
            conv.attribute.remove(own)
        conv.attribute.append(onnx.helper.make_attribute("pads", new))
        conv.input[0] = pad.input[0]
        graph.node.remove(pad)


def _fold_clips(proto: onnx.ModelProto) -> None:
    """Leave out a ReLU or ReLU6 whose result is only quantised, to a range that does not go beyond it: the integers end where it
    would cut. ONNX Runtime does so too, but not where 255 * scale is 6 and a rounding error more."""
    graph = proto.graph
    values = {constant.name: onnx.numpy_helper.to_array(constant) for constant in graph.initializer}
    readers: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for clip in [node for node in graph.node if node.op_type in ("Relu", "Clip")]:
        after = readers.get(clip.output[0], [])
        ends = [values.get(name) for name in clip.input[1:3]] if clip.op_type == "Clip" else [np.zeros(1), np.full(1, np.inf)]
        known = all(n.op_type == "QuantizeLinear" and {*n.input[1:]} <= values.keys() and len(n.input) == 3 for n in after)
        if not after or not known or len(ends) < 2 or any(end is None for end in ends):
            continue
        scale, zero = (values[after[0].input[k]].astype(np.float64) for k in (1, 2))
        whole = np.iinfo(values[after[0].input[2]].dtype)
        low, high = (whole.min - zero) * scale, (whole.max - zero) * scale
        if len(after) == 1 and (low >= ends[0] - 1e-6 * scale).all() and (high <= ends[1] + 1e-3 * scale).all():
            after[0].input[0] = clip.input[0]
            graph.node.remove(clip)


def _hold_bias(graph, values: dict[str, np.ndarray], names, least: np.ndarray) -> None:
    """Raise the scale of channels whose weights are next to nothing, so that their biases fit 32 bits at that scale."""
    old, zero = values[names[1]], values[names[2]].astype(np.int32)
    new = np.maximum(old, least if old.ndim else least.max()).astype(np.float32)
    if (new <= old).all():
        return
    integers, shape = values[names[0]], (-1, *[1] * (values[names[0]].ndim - 1)) if old.ndim else ()
    rounded = np.rint((integers - zero.reshape(shape)) * (old / new).reshape(shape)) + zero.reshape(shape)
    for name, array in ((names[0], rounded.astype(integers.dtype)), (names[1], new)):
        values[name] = array
        stored = next(constant for constant in graph.initializer if constant.name == name)
        stored.CopyFrom(onnx.numpy_helper.from_array(array, name))


def _name_weights(proto: onnx.ModelProto) -> None:
    """Call the stored integers of a layer LAYER.weight, as its floats would be, by the modules that the exporter tells of."""
    made_by = {output: node for node in proto.graph.node for output in node.output}
    stored = {constant.name: constant for constant in proto.graph.initializer}
    for node in proto.graph.node:
        told = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
        source = made_by.get(node.input[1]) if len(node.input) > 1 else None
        if not told or node.op_type not in ("Conv", "Gemm") or source is None or source.op_type != "DequantizeLinear":
            continue
        name = f"{ast.literal_eval(told)[-2]}.weight"
        if source.input[0] in stored and name not in stored:
            stored[name] = stored.pop(source.input[0])
            stored[name].name = source.input[0] = name


def _strip(proto: onnx.ModelProto) -> None:
    """Take out what the exporter tells of itself, stack traces above all: a third of a small quantised file."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.doc_string = ""


@contextlib.contextmanager
def _quietly():
    """The exporter narrates on stdout and warns of its own internals; what matters is checked above."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
