"""The layers of an ONNX file: its nodes whose weight is a stored tensor called LAYER.weight."""

from collections import defaultdict
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from workbench.errors import UnsupportedModelError

# nodes through which a weight keeps its name
_PASSED_ON = ("DequantizeLinear", "Transpose", "Cast", "Identity", "Reshape")


def with_layer_outputs(path: str) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model of an ONNX file with every weighted layer's value among its outputs, and those
    values by layer name.

    A layer is a Conv, ConvTranspose, Gemm or MatMul node whose weight is a stored tensor called
    "LAYER.weight"; where a BatchNormalization, or the addition of a stored bias, directly follows,
    its output is the one that counts.

    Example: `with_layer_outputs("model.onnx")`
    """
    model = onnx.load(path)
    values: dict[str, str] = {}
    stored = {tensor.name for tensor in model.graph.initializer}
    for layer, node, behind in _layers_of(model, path):
        normed = len(behind) == 1 and behind[0].op_type == "BatchNormalization"
        biased = len(behind) == 1 and behind[0].op_type == "Add" and set(behind[0].input) & stored
        values[layer] = (behind[0] if normed or biased else node).output[0]
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values.values()
                              if value not in present)
    return model, values


def with_own_weights(source: Path | bytes) -> bytes | None:
    """The file with a copy of each stored tensor, and of what dequantises it, for every node that
    reads it; None where it cannot be read, or where nothing that is dequantised is read twice.

    Example: `with_own_weights(Path("model.onnx"))`
    """
    try:
        model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    except (DecodeError, OSError):
        return None
    stored, seen, ordered = {tensor.name: tensor
                             for tensor in model.graph.initializer}, defaultdict(int), []
    widened = {node.output[0]: node for node in model.graph.node
               if node.op_type == "DequantizeLinear" and node.input[0] in stored}
    for node in model.graph.node:
        for place, value in enumerate(node.input):
            seen[value] += value in widened
            if seen[value] > 1:
                node.input[place] = f"{value}.{seen[value]}"
                ordered.append(onnx.NodeProto.FromString(widened[value].SerializeToString()))
                ordered[-1].name, ordered[-1].output[
                    0] = f"{ordered[-1].name}.{seen[value]}", node.input[place]
        ordered.append(onnx.NodeProto.FromString(node.SerializeToString()))
    if len(ordered) == len(model.graph.node):
        return None
    for node in ordered:
        for place, value in enumerate(node.input):
            seen[value] += value in stored
            if value in stored and seen[value] > 1:
                node.input[place] = f"{value}.{seen[value]}"
                model.graph.initializer.add().CopyFrom(stored[value])
                model.graph.initializer[-1].name = node.input[place]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    return model.SerializeToString()


def _layers_of(model, path: str) -> list[tuple]:
    """Name, node and readers of each weighted layer of an ONNX model. Raises UnsupportedModelError
    where none has a name."""
    made_by = {value: node for node in model.graph.node for value in node.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    readers: dict[str, list] = defaultdict(list)
    for node in model.graph.node:
        for value in node.input:
            readers[value].append(node)
    named = [(_layer_name(node, made_by, stored), node, readers[node.output[0]])
             for node in model.graph.node
             if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    found = [entry for entry in named if entry[0]]
    if not found:
        raise UnsupportedModelError(f"{path}: no node has a weight called LAYER.weight, so its "
                                    "layers have no names")
    return found


def with_layer_names(path: str) -> onnx.ModelProto:
    """The model of an ONNX file in which "layer=NAME=" stands in the names of each layer's node and
    of what it and the ReLU behind it put out: the runtime names its own nodes after either.

    Example: `with_layer_names("model.onnx")`
    """
    model = onnx.load(path)
    fixed, new = {output.name for output in model.graph.output}, {}
    for layer, node, behind in _layers_of(model, path):
        chain = [node,
                 *(behind if len(behind) == 1 and behind[0].op_type in ("Relu", "Clip") else [])]
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
