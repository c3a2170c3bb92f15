"""Export to ONNX with a dynamic batch axis, and the names of torch's layers found again in the file.

Source: torch.onnx.export (the torch.export based exporter), which folds each batch norm into its convolution.
"""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from workbench import files, layers
from workbench.deployment import sessions

TOLERANCE = 1e-3  # largest relative L2 distance between torch and the export, per image, before `export` refuses
_PASSED_ON = ("DequantizeLinear", "Transpose", "Cast", "Identity")  # nodes through which a weight keeps its name


def export(model: nn.Module, example: Tensor, path: Path | str) -> Path:
    """Write `model` as an ONNX file that takes any batch size; return its path.

    The file is written once onnx.checker accepts it and batches of 1 and 7 (the example, repeated with noise) run on
    ONNX Runtime to torch's outputs; otherwise nothing is. example: float32 (n, C, H, W).

    Raises UnsupportedModelError where the model cannot be exported or the export computes something else.

    Example: `onnx.export(model, task.example, "resnet20.onnx")`
    """
    path = Path(path)
    session = sessions.open(model)
    batch = torch.export.Dim.DYNAMIC
    noise = torch.randn(7, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    probe = example[:1] + 0.1 * noise
    try:
        with _quietly():
            program = torch.onnx.export(session.model, (probe[:2],), dynamo=True, dynamic_shapes=({0: batch},),
                                        input_names=["images"], output_names=["logits"], verbose=False)
        proto = program.model_proto
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the exporter raises a dozen kinds, all of them about this model
        reason = str(error).strip().splitlines()[0]
        raise layers.UnsupportedModelError(f"{session.name} cannot be exported to ONNX: {reason}") from error
    with files.atomic(path) as new:
        onnx.save(proto, new)
        exported = sessions.open(new)
        for size in (1, 7):
            _check(session(probe[:size]), exported(probe[:size]), f"{path} at batch {size}")
    return path


def with_layer_outputs(path: Path | str) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model of an ONNX file with every weighted layer's value among its outputs, and those values by layer name.

    A layer is a Conv, ConvTranspose, Gemm or MatMul node whose weight is a stored tensor called "LAYER.weight"; where
    a BatchNormalization directly follows, its output is the one that counts.

    Raises UnsupportedModelError where the file names no layer so.
    """
    model = onnx.load(str(path))
    made_by = {value: node for node in model.graph.node for value in node.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    used_by: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for value in node.input:
            used_by.setdefault(value, []).append(node)
    values: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            layer = _layer_name(node, made_by, stored)
            if layer:
                behind = used_by.get(node.output[0], [])
                normed = len(behind) == 1 and behind[0].op_type == "BatchNormalization"
                values[layer] = (behind[0] if normed else node).output[0]
    if not values:
        raise layers.UnsupportedModelError(f"{path}: no node has a weight called LAYER.weight, so its layers have no names")
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values.values() if value not in present)
    return model, values


def _layer_name(node: onnx.NodeProto, made_by: dict[str, onnx.NodeProto], stored: set[str]) -> str | None:
    value = node.input[1]
    while value in made_by and made_by[value].op_type in _PASSED_ON:
        value = made_by[value].input[0]
    layer, _, kind = value.rpartition(".")
    return layer if value in stored and kind.startswith("weight") else None


def _check(expected: Tensor, found: Tensor, where: str) -> None:
    distance = (expected - found).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-12)
    if not np.isfinite(distance.max().item()) or distance.max() > TOLERANCE:
        raise layers.UnsupportedModelError(f"{where} puts out something else than the model: relative L2 distance "
                                           f"{distance.max():.3g}, at most {TOLERANCE} allowed")


@contextlib.contextmanager
def _quietly():
    """The exporter narrates on stdout and warns of its own internals; what matters is checked above."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("torch.onnx").setLevel(level)
