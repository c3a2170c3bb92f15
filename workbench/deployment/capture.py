"""The graph of a network for the exporter; that of a plain one is not decomposed, which takes half
of the exporter's time.

torch.onnx.export decomposes every graph, because some operators work in place and some are unknown
to ONNX. A plain graph has neither, once each operator in place is replaced by the one that makes a
new tensor.
"""

import contextlib
import copy
import functools
import operator
from collections.abc import Iterator
from unittest import mock

import torch
import torch.onnx.ops
from onnxscript import opset18 as op
from torch import fx, nn
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _constants, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from workbench.numbers.quantizers import ActivationQuantizer, WeightQuantizer

aten = torch.ops.aten
VIEWS = {aten.slice.Tensor, aten.flatten.using_ints, aten.reshape.default, aten.view.default,
         aten.transpose.int, aten.permute.default, aten.expand.default, aten.unsqueeze.default,
         aten.select.int, aten.unbind.int, aten.to.device, aten.to.dtype, aten.to.dtype_layout,
         operator.getitem}
PLAIN = VIEWS | {
    aten.conv1d.default, aten.conv2d.default, aten.batch_norm.default, aten.layer_norm.default,
    aten.linear.default,
    aten.embedding.default, aten.scaled_dot_product_attention.default, aten.matmul.default,
    aten.add.Tensor, aten.mul.Tensor,
    aten.relu.default, aten.hardtanh.default, aten.hardswish.default, aten.hardsigmoid.default,
    aten.sigmoid.default,
    aten.silu.default, aten.gelu.default, aten.tanh.default, aten.mean.dim,
    aten.adaptive_avg_pool2d.default,
    aten.max_pool2d.default, aten.avg_pool2d.default, aten.pad.default, aten.cat.default,
    aten.gather.default,
    aten.index.Tensor, aten.arange.default, aten.gt.Scalar, aten.ge.Scalar, aten.ge.Tensor,
    aten.bitwise_and.Tensor,
    aten.sum.dim_IntList, aten.sub.Tensor, aten.div.Tensor, aten.remainder.Scalar,
    aten.linalg_vector_norm.default,
    aten.clamp_min.default, aten.expand_as.default, aten.upsample_bilinear2d.vec, operator.neg,
    aten.new_ones.default,
    aten._assert_tensor_metadata.default, aten.sym_size.int,
    torch.ops.onnx_symbolic._symbolic.default,
    operator.add, operator.sub, operator.floordiv, aten.pow.Tensor_Scalar, aten.rsqrt.default,
    aten.sqrt.default,
    aten.neg.default, aten.log1p.default, aten.softmax.int, aten.cumsum.default, aten.le.Tensor,
    aten.cos.default,
    aten.sin.default, aten.abs.default, aten.amax.default, aten.round.default, aten.chunk.default,
    aten.squeeze.dim,
    aten.unfold.default, aten.avg_pool1d.default, aten.lstm.input}
IN_PLACE = {aten.relu_.default: aten.relu.default, aten.hardtanh_.default: aten.hardtanh.default,
            aten.hardswish_.default: aten.hardswish.default, aten.silu_.default: aten.silu.default,
            aten.add_.Tensor: aten.add.Tensor}
VALUES = {  # what computes element by element, where torch makes operands one kind of number first
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.remainder.Scalar,
    aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sqrt.default, aten.log1p.default,
    aten.neg.default, aten.sigmoid.default, aten.tanh.default, aten.silu.default,
    aten.gelu.default, aten.relu.default, aten.hardtanh.default, aten.hardswish.default,
    aten.hardsigmoid.default, aten.softmax.int, aten.cos.default, aten.sin.default,
    aten.abs.default, aten.round.default, aten.mean.dim, aten.sum.dim_IntList, aten.cumsum.default,
    aten.amax.default, aten.clamp_min.default, aten.gt.Scalar, aten.ge.Scalar, aten.ge.Tensor,
    aten.le.Tensor, aten.bitwise_and.Tensor, aten.linalg_vector_norm.default}
ALIKE = {aten.__and__.Tensor: aten.bitwise_and.Tensor}
# where they keep the shape they do nothing, in eval mode
SAME = {aten.reshape.default, aten.view.default, aten.contiguous.default, aten.dropout.default,
        aten.dropout_.default, aten.alias.default}
_built = ONNXRegistry.from_torchlib
LEAVES = (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.Linear,
          nn.Embedding, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.SiLU,
          nn.GELU, nn.Tanh, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Flatten,
          nn.Identity, nn.Sequential, nn.ZeroPad2d, nn.Dropout, ActivationQuantizer,
          WeightQuantizer)


def captured(model: nn.Module, args: tuple, kwargs: dict | None, shapes) -> ExportedProgram | None:
    """The exported program of a plain network, which the exporter takes as it is, with
    TRANSLATIONS; None for any other, which the exporter has to read itself: it sets more about the
    axes that are free than torch.export.export does.

    args, kwargs: example inputs; shapes: which of their axes are free, as torch.export.export has
    it.

    Example: `captured(model, (inputs,), None, ({0: torch.export.Dim.AUTO},)) is not None`
    """
    if not all(_known(module) for module in model.modules()):
        return None
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception:  # the exporter tries other ways, and says why none works
        return None
    if not _plain(program.graph):
        return None
    program.run_decompositions = lambda _table=None: program
    return program


@contextlib.contextmanager
def as_typed(program: ExportedProgram | None) -> Iterator[None]:
    """Spare the exporter its search for operands of different kinds of numbers, a fifth of its
    time, in a captured program that has none.

    Example: `with as_typed(program): torch.onnx.export(program, dynamo=True)`
    """
    if program is None or any(map(_mixes, program.graph.nodes)):
        yield
        return
    with mock.patch.object(_fx_passes, "insert_type_promotion_nodes", return_value=None):
        yield


def _mixes(node: fx.Node) -> bool:
    """Whether an operator takes numbers of several kinds, or gives another kind than it takes."""
    if node.target not in VALUES:
        return False
    values = [value.meta["val"] for value in node.all_input_nodes
              if isinstance(value.meta.get("val"), torch.Tensor)]
    kinds, made = {value.dtype for value in values}, node.meta["val"].dtype
    fractions = (any(isinstance(value, float) for value in node.args)
                 and not all(kind.is_floating_point for kind in kinds))
    return len(kinds) != 1 or fractions or made not in (*kinds, torch.bool)


@functools.cache
def table_of_operators(version: int = _constants.TORCHLIB_OPSET) -> ONNXRegistry:
    """The exporter's table of operators, which it otherwise builds anew for each file, in a third
    of a small one's time.

    Example: `capture.table_of_operators()`
    """
    return _built(version)


@contextlib.contextmanager
def remembered_operators() -> Iterator[None]:
    """Let the exporter take a copy of a table that is built once.

    Example: `with remembered_operators(): torch.onnx.export(model, (x,), dynamo=True)`
    """
    def known(opset_version: int = _constants.TORCHLIB_OPSET) -> ONNXRegistry:
        table = copy.copy(table_of_operators(opset_version))
        # a file adds its own
        table.functions = {target: list(ways) for target, ways in table.functions.items()}
        return table

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(known)):
        yield


def _known(module: nn.Module) -> bool:
    # that only holds, in a traced network
    known = isinstance(module, LEAVES) or _is_rms(module) or type(module) is nn.Module
    return next(module.children(), None) is not None or known or not (
        next(module.parameters(recurse=False), None) is not None
        or type(module).__module__.startswith("torch.nn"))


def _is_rms(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _plain(graph: fx.Graph) -> bool:
    """Whether it has plain operators only: those in place are written anew where nothing else sees
    what they change, and what does nothing is taken out."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if (node.target in SAME and node.meta["val"].shape == node.args[0].meta["val"].shape
            and True not in node.args[1:]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if node.target in IN_PLACE:
            changed = node.args[0]
            if changed.op != "call_function" or changed.target in VIEWS or len(changed.users) > 1:
                return False
        node.target = IN_PLACE.get(node.target) or ALIKE.get(node.target) or node.target
        if node.target not in PLAIN or _unlike_onnx(node):
            return False
    return True


def _unlike_onnx(node: fx.Node) -> bool:
    """Whether ONNX's operator of that name, as it is written here, does something else."""
    if node.target is aten.batch_norm.default:
        return None in node.args[3:5] or node.args[5]
    return node.target is aten.adaptive_avg_pool2d.default and list(node.args[1]) != [1, 1]


def _batch_norm(x, weight, bias, mean, var, _training=False, _momentum=0.1, eps=1e-5, _cudnn=True):
    """torch.batch_norm in eval mode, with a scale and a shift of its own or without."""
    zero = op.Sub(mean, mean)
    weight, bias = (op.Add(zero, op.Constant(value_float=1.0)) if weight is None else weight,
                    zero if bias is None else bias)
    return op.BatchNormalization(x, weight, bias, mean, var, epsilon=eps)


def _average(x, _size):
    """An adaptive average pool to one place, as the mean over both axes that the exporter writes
    for it."""
    return op.ReduceMean(x, op.Constant(value_ints=[-1, -2]), keepdims=1)


def _silu(x):
    """x sigmoid(x)."""
    return op.Mul(x, op.Sigmoid(x))


def _cast(x, dtype, *_more):
    """A tensor's `to` another type."""
    return op.Cast(x, to=dtype)


def _cast_on(x, _device=None, dtype=None, *_more, **_layout):
    """A tensor's `to` another type, where a device is named as well."""
    return x if dtype is None else op.Cast(x, to=dtype)


TRANSLATIONS = {aten.batch_norm.default: _batch_norm, aten.adaptive_avg_pool2d.default: _average,
                aten.silu.default: _silu, aten.to.dtype: _cast, aten.to.device: _cast_on,
                aten.to.dtype_layout: _cast_on}
