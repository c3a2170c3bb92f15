"""What is changed in an exported ONNX graph so that ONNX Runtime finds its integer kernels, and
layers keep their names.

Each function changes a model of onnx_ir, itself. Padding is folded, and metadata cleared, by
onnxscript and onnx_ir.
"""

import ast
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization
from onnxscript.rewriter.rules.common import fuse_pad_into_conv_rule
from torch import Tensor

from workbench.errors import UnsupportedModelError

PACKED = 512  # integers below which a Cast costs more bytes than it saves
BLOCKS = (16, 32, 64, 128, 256)  # inputs that share a scale in ONNX Runtime's kernel of groups
# integers (rows, inputs), scales, zero points (None: in the middle), bits
Grouped = tuple[Tensor, Tensor, Tensor | None, int]


def finish(model: ir.Model, packed: Mapping[str, Grouped], *, quantised: bool) -> ir.Model:
    """The exported model, ready for the runtime. packed: layers for the kernel of groups, by name.

    Raises UnsupportedModelError, naming the layer, where that kernel has no place.

    Example: `finish(program.model, {}, quantised=False)`
    """
    _name_weights(model)
    ClearMetadataAndDocStringPass()(model)
    model = rewrite(model, [fuse_pad_into_conv_rule])
    _fuse_norms(model)
    _plain_recurrence(model)
    _grouped_bits(model, packed)
    if quantised:
        _look_up_integers(model)
        _own_zeros(model)
        _reshape_integers(model)
        _transpose_integers(model)
        _integer_biases(model)
        _fold_clips(model)
        _pack_integers(model)
    RemoveUnusedNodesPass()(model)
    return model


def _plain_recurrence(model: ir.Model) -> None:
    """Take out what the exporter writes around an LSTM or GRU of one layer in one direction for the
    case that it has more: a shape computed anew at each run, and slices of all there is."""
    for cell in _nodes(model, "LSTM", "GRU"):
        if "direction" in cell.attributes and cell.attributes.get_string("direction") != "forward":
            continue
        for place in (5, 6):  # the first hidden state, and a cell's
            cut = _maker(cell.inputs[place] if place < len(cell.inputs) else None, "Slice")
            if cut and cut.inputs[0].shape is not None and cut.inputs[0].shape[0] == 1:
                replace(model, cut, ir.node("Identity", [cut.inputs[0]]))
        turned = [use.node for use in cell.outputs[0].uses() if use.node.op_type == "Transpose"]
        if (len(turned) == 1 == len(cell.outputs[0].uses())
            and list(turned[0].attributes.get_ints("perm")) == [0, 2, 1, 3]):
            for flat in [use.node for use in turned[0].outputs[0].uses()
                         if use.node.op_type == "Reshape"]:
                axis = _stored(model, f"{flat.outputs[0].name}_axis", np.array([1], np.int64))
                replace(model, flat, ir.node("Squeeze", [cell.outputs[0], axis]))


def _fuse_norms(model: ir.Model) -> None:
    """Root mean square norms behind a sum as the runtime's one operator for both; the others as
    they were, in operators that ONNX knows."""
    if not any(_nodes(model, "Pow")):
        return
    fuse_rms_normalization(model)
    fuse_skip_rms_normalization(model)
    for norm in _nodes(model, "SimplifiedLayerNormalization"):
        values, weight = norm.inputs
        square = ir.node("Mul", [values, values])
        last = _stored(model, f"{weight.name}_axis", np.array([-1], np.int64))
        mean = ir.node("ReduceMean", [square.outputs[0], last], attributes={"keepdims": 1})
        least = _stored(model, f"{weight.name}_epsilon",
                        np.array(norm.attributes.get_float("epsilon", 1e-5), np.float32))
        above = ir.node("Add", [mean.outputs[0], least])
        root = ir.node("Sqrt", [above.outputs[0]])
        scaled = ir.node("Div", [values, root.outputs[0]])
        for node in (square, mean, above, root, scaled):
            model.graph.insert_before(norm, node)
        replace(model, norm, ir.node("Mul", [scaled.outputs[0], weight]))


def _nodes(model: ir.Model, *kinds: str) -> Iterator[ir.Node]:
    return iter([node for node in model.graph if node.op_type in kinds])


def _maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of this kind that makes the value."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _number(value: ir.Value | None) -> np.ndarray | None:
    """The array of a stored value, None for one that is computed."""
    return (value.const_value.numpy() if value is not None and value.const_value is not None
            else None)


def _stored(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer."""
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
    model.graph.register_initializer(value)
    return value


def _name_weights(model: ir.Model) -> None:
    """Call the stored weight of a layer LAYER.weight, by the modules that the exporter tells of;
    constants that it folded and integers have other names."""
    for node in _nodes(model, "Conv", "Gemm", "MatMul"):
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        value = node.inputs[1]
        while _maker(value, "DequantizeLinear") or _maker(value, "Transpose"):
            value = value.producer().inputs[0]
        if (not scopes or value.name not in model.graph.initializers
            or value.name.endswith(".weight")):
            continue
        name = f"{ast.literal_eval(scopes)[-2]}.weight"
        if name != ".weight" and name not in model.graph.initializers:
            model.graph.initializers.pop(value.name)
            value.name = name
            model.graph.register_initializer(value)


def _grouped_bits(model: ir.Model, packed: Mapping[str, Grouped]) -> None:
    """Put MatMulNBits in the place of these layers' products: of 4 bits two weights a byte, the
    first in the lower half."""
    sums: dict[str, ir.Value] = {}
    for layer, (integers, scale, zero, bits) in packed.items():
        node = next((node for node in _nodes(model, "Gemm", "MatMul")
                     if node.inputs[1].name == f"{layer}.weight"), None)
        if node is None:
            raise UnsupportedModelError(f"layer {layer} did not become a Gemm or MatMul node, "
                                        "which groups need; use granularity 'channel'")
        rows, inputs = integers.shape
        block = integers.numel() // len(scale)
        # where the kernel has its zero if it is not told one
        middle = 2 ** (bits - 1) if zero is None else 0
        blocks = _bytes((integers + middle).reshape(rows, -1, block), bits)
        parts, rest = {"integers": blocks, "scale": scale.reshape(rows, -1).numpy()}, None
        if zero is not None:
            whole = zero.round().clamp(0, 2**bits - 1)
            parts["zero"] = _bytes(whole.reshape(rows, -1), bits)
            # what a group's zero point leaves, the same for all its weights
            rest = ((whole - zero) * scale).reshape(rows, -1)
        stored = [_stored(model, f"{layer}.weight_{name}", part) for name, part in parts.items()]
        bias = ([None] * (4 - len(stored)) + [node.inputs[2]] if node.op_type == "Gemm"
                and len(node.inputs) == 3 else [])
        new = ir.node("MatMulNBits", [node.inputs[0], *stored, *bias], domain="com.microsoft",
                      name=node.name, version=1,
                      attributes={"K": inputs, "N": rows, "bits": bits, "block_size": block,
                                  "accuracy_level": 4})
        if rest is not None and rest.any():
            made = _with_sums(model, node, new, rest, sums, layer, block)
            model.graph.insert_before(node, new)
            replace(model, node, made)
        else:
            replace(model, node, new)
    if packed:
        model.graph.opset_imports["com.microsoft"] = 1


def _with_sums(model: ir.Model, before: ir.Node, product: ir.Node, rest: Tensor,
               sums: dict[str, ir.Value], layer: str, block: int) -> ir.Node:
    """The node that adds to a product of groups what their zero points leave: rest (rows, groups)
    times the sum of each group's inputs. sums: those that are there already, by the name of what is
    summed."""
    source = product.inputs[0]
    if source.name not in sums:
        axes = len(source.shape) - 1 if source.shape is not None else 2
        shape = _stored(model, f"{layer}.groups", np.array([0] * axes + [-1, block], np.int64))
        last = _stored(model, f"{layer}.last", np.array([-1], np.int64))
        split = ir.node("Reshape", [source, shape])
        added = ir.node("ReduceSum", [split.outputs[0], last], attributes={"keepdims": 0})
        for node in (split, added):
            model.graph.insert_before(before, node)
        sums[source.name] = added.outputs[0]
    times = ir.node("MatMul", [sums[source.name], _stored(model, f"{layer}.rest", rest.T.numpy())])
    model.graph.insert_before(before, times)
    return ir.node("Add", [product.outputs[0], times.outputs[0]])


def _bytes(integers: Tensor, bits: int) -> np.ndarray:
    """Whole numbers from 0 as uint8 along the last axis, two a byte where they have 4 bits."""
    values = integers.to(torch.uint8)
    if bits == 8:
        return values.numpy()
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    pairs = values.reshape(*values.shape[:-1], -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).numpy()


def replace(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Let `new`, of one output, stand where `old` stood; its output keeps the name.

    Example: `replace(model, old, new)`
    """
    name, value = old.outputs[0].name, old.outputs[0]
    model.graph.insert_after(old, new)
    new.outputs[0].shape, new.outputs[0].dtype = value.shape, value.dtype
    value.replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
    new.outputs[0].name = name


def _look_up_integers(model: ir.Model) -> None:
    """Look up integers in a table, and then make those found float: the runtime would make the
    whole table float in every run."""
    for look in _nodes(model, "Gather"):
        source = _maker(look.inputs[0], "DequantizeLinear")
        integers, scale, zero = (_number(value)
                                 for value in source.inputs[:3]) if source is not None else [
                                     None] * 3
        if (integers is None or zero is None or scale.ndim != 1 or zero.any()
            or look.attributes.get_int("axis", 0)):
            continue
        name = f"{source.inputs[0].name}_scale"  # of a table that is looked up twice there is one
        column = model.graph.initializers.get(name) or _stored(model, name, scale[:, None])
        found = [ir.node("Gather", [table, look.inputs[1]]) for table in (source.inputs[0], column)]
        cast = ir.node("Cast", [found[0].outputs[0]], attributes={"to": ir.DataType.FLOAT})
        for node in (*found, cast):
            model.graph.insert_before(look, node)
        replace(model, look, ir.node("Mul", [cast.outputs[0], found[1].outputs[0]]))


def _own_zeros(model: ir.Model) -> None:
    """Give each layer's integers a zero point of their own: the exporter lets layers share one, and
    ONNX Runtime, where it makes weights unsigned for processors that would saturate, replaces each
    only once."""
    for node in _nodes(model, "DequantizeLinear"):
        zero = _number(node.inputs[2]) if len(node.inputs) > 2 else None
        if (zero is not None and _number(node.inputs[0]) is not None
            and len(node.inputs[2].uses()) > 1):
            node.replace_input_with(2, _stored(model, f"{node.inputs[0].name}_zero", zero))


def _reshape_integers(model: ir.Model) -> None:
    """Flatten integers, not what they stand for: a linear layer that does not find them next to it
    has its weights made float anew in every run."""
    for view in _nodes(model, "Reshape", "Flatten"):
        source = _maker(view.inputs[0], "DequantizeLinear")
        if (source is None or len(view.inputs[0].uses()) > 1 or _number(source.inputs[1]) is None
                or _number(source.inputs[1]).ndim):
            continue
        moved = ir.node(view.op_type, [source.inputs[0], *view.inputs[1:]],
                        attributes={name: kept.value for name, kept in view.attributes.items()})
        model.graph.insert_before(view, moved)
        replace(model, view, ir.node("DequantizeLinear", [moved.outputs[0], *source.inputs[1:]]))


def _transpose_integers(model: ir.Model) -> None:
    """Store the integers of a matrix product the way round that it wants them, for the same
    reason."""
    for turn in _nodes(model, "Transpose"):
        source = _maker(turn.inputs[0], "DequantizeLinear")
        integers = _number(source.inputs[0]) if source is not None else None
        if integers is None or integers.ndim != 2:
            continue
        value = source.inputs[0]
        name = value.name
        model.graph.initializers.pop(name)
        value.name = f"{name}_as_trained"
        turned = _stored(model, name, integers.T)
        axis = 1 if _number(source.inputs[1]).ndim else 0
        replace(model, turn,
                ir.node("DequantizeLinear", [turned, *source.inputs[1:]],
                        attributes={"axis": axis}))
        if not source.outputs[0].uses():
            model.graph.remove(source, safe=True)


def _integer_biases(model: ir.Model) -> None:
    """Store biases as int32 at the scale of the products that they join, as integer kernels want
    them."""
    found = []
    for node in _nodes(model, "Conv", "Gemm"):
        bias = _number(node.inputs[2]) if len(node.inputs) == 3 else None
        sources = [_maker(value, "DequantizeLinear") for value in node.inputs[:2]]
        if bias is None or None in sources:
            continue
        step = _number(sources[0].inputs[1])
        _hold_bias(model, sources[1], np.abs(bias) / step / 2**30)
        found.append((node, bias, step, sources[1]))
    for place, (node, bias, step, weights) in enumerate(found):
        scale = (step * _number(weights.inputs[1])).astype(np.float32)
        parts = {"integers": np.rint(bias / scale).clip(-(2**31) + 1, 2**31 - 1).astype(np.int32),
                 "scale": scale,
                 "zero": np.zeros_like(scale, np.int32)}
        name = node.inputs[2].name
        # a layer used again, on inputs of another scale
        if f"{name}_integers" in model.graph.initializers:
            name = f"{name}_{place}"
        stored = [_stored(model, f"{name}_{kind}", part) for kind, part in parts.items()]
        made = ir.node("DequantizeLinear", stored, attributes={"axis": 0})
        model.graph.insert_before(node, made)
        made.outputs[0].name = f"{name}_dequantized"
        node.replace_input_with(2, made.outputs[0])
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(name)


def _hold_bias(model: ir.Model, weights: ir.Node, least: np.ndarray) -> None:
    """Raise the scale of channels whose weights are next to nothing, so that their biases fit 32
    bits at that scale."""
    integers, old, zero = (_number(value) for value in weights.inputs)
    new = np.maximum(old, least if old.ndim else least.max()).astype(np.float32)
    if (new <= old).all():
        return
    shape, zero = (-1, *[1] * (integers.ndim - 1)) if old.ndim else (), zero.astype(np.int32)
    rounded = (np.rint((integers - zero.reshape(shape)) * (old / new).reshape(shape))
               + zero.reshape(shape))
    for value, array in zip(weights.inputs, (rounded.astype(integers.dtype), new), strict=False):
        value.const_value = ir.tensor(array, name=value.name)


def _fold_clips(model: ir.Model) -> None:
    """Leave out a ReLU or ReLU6 whose result is only quantised, to a range that does not go beyond
    it: the integers end where it would cut. ONNX Runtime does so too, but not where 255 * scale is
    6 and a rounding error more."""
    for clip in _nodes(model, "Relu", "Clip"):
        after = [use.node for use in clip.outputs[0].uses()]
        ends = ([_number(value) for value in clip.inputs[1:3]] if clip.op_type == "Clip"
                else [np.zeros(1), np.full(1, np.inf)])
        if (len(after) != 1 or after[0].op_type != "QuantizeLinear" or len(ends) < 2
            or any(end is None for end in ends)):
            continue
        scale, zero = (_number(value) for value in after[0].inputs[1:3])
        if scale is None or zero is None:
            continue
        step, whole = scale.astype(np.float64), np.iinfo(zero.dtype)
        low, high = ((end - zero.astype(np.float64)) * step for end in (whole.min, whole.max))
        if (low >= ends[0] - 1e-6 * step).all() and (high <= ends[1] + 1e-3 * step).all():
            after[0].replace_input_with(0, clip.inputs[0])
            model.graph.remove(clip, safe=True)


def _pack_integers(model: ir.Model) -> None:
    """Store integers of four bits or fewer as such; the runtime unpacks them by a Cast when it
    opens the file, and its kernels are those of 8 bits."""
    for node in _nodes(model, "DequantizeLinear"):
        value, integers = node.inputs[0], _number(node.inputs[0])
        if (integers is None or integers.dtype != np.int8 or integers.size < PACKED
            or integers.min() < -8 or integers.max() > 7
                or len(value.uses()) > 1):
            continue
        name = value.name
        model.graph.initializers.pop(name)
        value.name = f"{name}_in_8_bits"
        cast = ir.node("Cast", [_stored(model, name, integers.astype(ml_dtypes.int4))],
                       attributes={"to": ir.DataType.INT8})
        model.graph.insert_before(node, cast)
        cast.outputs[0].name = f"{name}_unpacked"
        node.replace_input_with(0, cast.outputs[0])
        # the first with integers of four bits
        model.graph.opset_imports[""] = max(model.graph.opset_imports[""], 21)
        model.ir_version = max(model.ir_version, 10)
