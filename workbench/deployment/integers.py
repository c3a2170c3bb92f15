"""The arithmetic of integer kernels in PyTorch: a quantised model that answers as ONNX Runtime
does, to the last bit.

A fake-quantised module multiplies and adds floats that lie on the grids. Its sums round, a value
between two integers then goes either way, and a deep network carries that on. Integer kernels add
products of integers exactly and round once,

    q = clamp(round(M (sum q_x q_w + q_b)) + z),  M = s_x s_w / s_y in float32, half to even,

and add two values a and b as q = clamp(round(a s_a / s_y + (b s_b / s_y + c))), c what the zero
points come to, each product and sum with one rounding (found by trying all pairs of integers
against the kernel). Here the same is done with integers held in floats, exact below 2^24 in
float32, else in float64.

Source: MLAS, the kernels of ONNX Runtime (requantisation, QLinearAdd). Processors without VNNI or
the like would saturate sums of two products at 16 bits; `sessions.open` opens files so that they do
not.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from workbench.batches import is_cache
from workbench.errors import UnsupportedModelError
from workbench.graph.kinds import adds, ends, is_idle, is_layer, passes
from workbench.numbers.quantizers import ActivationQuantizer, quantizers


def is_quantised(model: nn.Module) -> bool:
    """Whether a model is what quantization.quantize returns, its activations on grids.

    Example: `is_quantised(quantised) and not is_quantised(model)`
    """
    return (isinstance(model, fx.GraphModule)
            and any(quantizer.settled for _, quantizer in quantizers(model)))


def exact(model: nn.Module) -> fx.GraphModule:
    """A copy of a model of quantization.quantize that computes as integer kernels do: the input,
    convolutions and linear layers whose results are quantised, additions. What else there is stays
    fake-quantised, as do layers with group or k-means levels.

    Raises UnsupportedModelError for a model that is not traced or has no quantised activations.

    `sessions.open` does this by itself, so that what is judged is what the exported file will
    answer.

    Example: `integers.exact(quantised)(inputs)`
    """
    if not is_quantised(model):
        raise UnsupportedModelError(f"{type(model).__name__} has no quantised activations; give "
                                    "what quantization.quantize returns")
    new = copy.deepcopy(model).eval()
    for name, module in list(new.named_modules()):
        # rounded once, not in every call
        if isinstance(module, nn.Embedding) and parametrize.is_parametrized(module, "weight"):
            new.set_submodule(name, nn.Embedding.from_pretrained(module.weight.detach()))
    modules, grids = dict(new.named_modules()), {}  # grids: of each node whose values lie on one
    for node in list(new.graph.nodes):
        quantizer = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(quantizer, ActivationQuantizer):
            if node.args and node.args[0] in grids and (passes(node) or is_idle(node, modules)):
                grids[node] = grids[node.args[0]]
            elif (node.target is torch.ops.aten.cat.default and _is_kept(node.args[0][0])
                  and node.args[0][1] in grids):
                grids[node] = grids[node.args[0][1]]
            continue
        kernel, inputs = _kernel(node.args[0], quantizer, modules, grids)
        if kernel:
            modules[name := f"integer_{node.name}"] = kernel
            new.add_submodule(name, kernel)
            with new.graph.inserting_before(node):
                made = new.graph.call_module(name, tuple(inputs))
            node.replace_all_uses_with(made)
        grids[made if kernel else node] = quantizer
    new.graph.eliminate_dead_code()
    new.recompile()
    return new


def _kernel(node: fx.Node, out: ActivationQuantizer, modules: dict,
            grids: dict) -> tuple[nn.Module | None, list[fx.Node]]:
    """What computes the values behind `node` as integers, and of which nodes; None where no integer
    kernel does."""
    if node.op == "placeholder":
        return _Images(out), [node]
    while ends(node) or is_idle(node, modules):
        if ends(node):
            low, high = (round(end / out.scale.item() + out.zero.item()) if math.isfinite(end)
                         else end for end in ends(node))
            if low > out.scheme.limits[0] or high < out.scheme.limits[1]:
                return None, []  # some integers lie beyond where it cuts: it is computed for itself
        node = node.args[0]
    if is_layer(node, modules) and node.args[0] in grids and _whole(modules[node.target]):
        return _Layer(modules[node.target], grids[node.args[0]], out), [node.args[0]]
    if adds(node) and all(part in grids for part in node.args) and not node.kwargs:
        return _Sum(grids[node.args[0]], grids[node.args[1]], out), list(node.args)
    return None, []


def _is_kept(node: fx.Node) -> bool:
    """Whether a stream has kept these values of earlier hops: they lie on the grid of those that
    join them."""
    return node.op == "placeholder" and is_cache(node.target)


def _whole(layer: nn.Module) -> bool:
    """Whether a kernel takes it: a plain layer with uniform levels, one scale for all or one a
    channel."""
    if (not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear)
        or not parametrize.is_parametrized(layer, "weight")):
        return False
    scheme = layer.parametrizations.weight[0].scheme
    return scheme.levels == "uniform" and scheme.granularity != "group"


class _Grid(nn.Module):
    """The grid that a kernel's results lie on."""

    def __init__(self, out: ActivationQuantizer):
        super().__init__()
        self.scale, self.zero = (value.detach().reshape(()) for value in (out.scale, out.zero))
        self.low, self.high = (limit - self.zero for limit in out.scheme.limits)

    def on(self, values: Tensor) -> Tensor:
        """Values in steps from the zero point, clamped and rounded, half to even; they are
        overwritten."""
        return values.clamp_(self.low, self.high).round_().mul_(self.scale)


class _Images(_Grid):
    def forward(self, images: Tensor) -> Tensor:
        return self.on(images / self.scale)


class _Layer(_Grid):
    def __init__(self, layer: nn.Module, source: ActivationQuantizer, out: ActivationQuantizer):
        super().__init__(out)
        quantizer, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
        rows = quantizer.scheme.rows(quantizer.integers(weight))
        integers = (rows - quantizer.zero).reshape(weight.shape)
        step = (source.scale * quantizer.scale.flatten()).detach()
        shape = (-1, *[1] * (weight.dim() - 2))
        bias = (layer.bias.detach()
                / step).round() if layer.bias is not None else torch.zeros(len(rows))
        most = 2 ** source.scheme.bits * integers.abs().flatten(1).sum(1).max()
        self.kind = torch.float32 if most < 2**24 else torch.float64
        self.layer, self.source = layer, source.scale.detach().reshape(())
        self.integers, self.factor = integers.to(self.kind), (step / self.scale).reshape(shape)
        small = most + bias.abs().max() < 2**24
        self.bias, self.later = (bias, None) if small else (None, bias.double().reshape(shape))

    def forward(self, values: Tensor) -> Tensor:
        counted = (values / self.source).round_().to(self.kind)
        layer = F.linear if isinstance(self.layer, nn.Linear) else self.layer._conv_forward
        sums = layer(counted, self.integers, self.bias)
        sums = sums if self.later is None else sums.double().add_(self.later)
        return self.on(sums.float().mul_(self.factor))


class _Sum(_Grid):
    def __init__(self, first: ActivationQuantizer, second: ActivationQuantizer,
                 out: ActivationQuantizer):
        super().__init__(out)
        self.scales, self.zeros = ([v.detach().reshape(()) for v in pair]
                                   for pair in ((first.scale, second.scale),
                                                (first.zero, second.zero)))
        self.factors = [scale / self.scale for scale in self.scales]
        self.fixed = (self.zero
                      - _fused(self.zeros[0], self.factors[0], self.factors[1] * self.zeros[1]))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        total = self.fixed
        for values, scale, zero, factor in zip((second, first), self.scales[::-1], self.zeros[::-1],
                                               self.factors[::-1], strict=True):
            total = _fused((values / scale).round_().add_(zero), factor, total)
        return total.round_().sub_(self.zero).clamp_(self.low, self.high).mul_(self.scale)


def _fused(value: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """value * factor + added in float32, multiplied and added with one rounding."""
    return value.double().mul_(factor.double()).add_(added.double()).float()
