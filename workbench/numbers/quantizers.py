"""What puts weights and activations on a grid.

Sources: straight-through gradients Jacob et al. 2018 (arXiv 1712.05877); learned step Esser et al.
2020 (arXiv 1902.08153).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from workbench.errors import UnsupportedModelError
from workbench.numbers.grid import Scheme, affine, fake_quantize, fit, kmeans, nearest
from workbench.numbers.histograms import Histogram


class WeightQuantizer(nn.Module):
    """A parametrisation of a layer's weight: what the layer computes with lies on the grid.

    scale, zero: (R, 1), or levels (R, 2^bits) for k-means. Where gradients flow, the scale learns
    too (learned step). frozen: integers, scale and zero point for the exporter, or None.

    Example: `WeightQuantizer(model.conv1.weight, Scheme(4))(model.conv1.weight).unique().numel() <=
    15`
    """

    def __init__(self, weight: Tensor, scheme: Scheme, *, by: str = "minmax", layer: str = ""):
        super().__init__()
        self.scheme, self.layer = scheme, layer
        self.frozen: tuple[Tensor, Tensor, Tensor] | None = None
        rows = scheme.rows(weight.detach(), layer)
        if not torch.isfinite(rows).all():
            raise ValueError(f"layer {layer}: its weights hold NaN or infinity; look at them")
        if scheme.levels == "kmeans":
            self.register_buffer("levels", kmeans(rows, scheme.bits))
            return
        scale, zero = fit(rows, scheme, by=by)
        self.scale = nn.Parameter(scale)
        self.register_buffer("zero", zero)

    def forward(self, weight: Tensor) -> Tensor:
        rows = self.scheme.rows(weight, self.layer)
        if self.scheme.levels == "kmeans":
            chosen = self.levels.gather(1, nearest(rows.detach(), self.levels))
            # the levels themselves, to the last bit
            return (chosen + (rows - rows.detach())).reshape(weight.shape)
        if self.frozen:
            return _onnx("DequantizeLinear", self.frozen, weight.shape, torch.float32)
        return fake_quantize(rows, _learned(self.scale, rows.shape[1], self.scheme), self.zero,
                             self.scheme).reshape(weight.shape)

    def integers(self, weight: Tensor) -> Tensor:
        """The integers of a weight, int32 of its shape: its levels' places for k-means."""
        rows = self.scheme.rows(weight.detach(), self.layer)
        if self.scheme.levels == "kmeans":
            return nearest(rows, self.levels).int().reshape(weight.shape)
        return ((rows / self.scale
                 + self.zero).round().clamp(*self.scheme.limits)).int().reshape(weight.shape)

    def freeze(self, weight: Tensor) -> None:
        """Let `forward` stand for ONNX's operators from now on, for the exporter, which takes fewer
        bits in 8 as well.

        Raises UnsupportedModelError for groups, k-means and shifted levels, for which the runtime
        has no kernel.
        """
        if self.scheme.levels != "uniform" or self.scheme.granularity == "group":
            levels = {"kmeans": "k-means levels", "shifted": "shifted levels",
                      "uniform": "uniform levels"}[self.scheme.levels]
            by = (f"groups of {self.scheme.group} inputs" if self.scheme.group
                  else self.scheme.granularity)
            raise UnsupportedModelError(f"layer {self.layer}: the runtime has no kernel for "
                                        f"{levels} by {by}; use levels 'uniform' by channel, or in "
                                        "linear layers 4 or 8 bits by groups of 16, 32, 64, ...")
        shape = (-1,) if self.scheme.granularity == "channel" else ()
        integers, scale, zero = (self.integers(weight), self.scale.detach().reshape(shape),
                                 self.zero.reshape(shape))
        # less its zero point it fits int8, for which kernels are faster
        if not self.scheme.symmetric and self.scheme.bits < 8:
            rows = self.scheme.rows(integers)
            integers, zero = (rows - self.zero.int()).reshape(weight.shape), torch.zeros_like(zero)
        kind = torch.int8 if self.scheme.symmetric or self.scheme.bits < 8 else torch.uint8
        self.frozen = integers.to(kind), scale, zero.to(kind)


class ActivationQuantizer(nn.Module):
    """Stands behind a node of the graph: watches its values while `observing`, then puts them on
    the grid.

    place: which node, for messages; of_input: whether it is an input of the model.

    Example: `ActivationQuantizer(Scheme(8), place="conv1")`
    """

    def __init__(self, scheme: Scheme, *, place: str, of_input: bool = False):
        super().__init__()
        if scheme.granularity != "tensor" or scheme.levels != "uniform":
            raise ValueError("scheme of activations: only granularity 'tensor' with uniform levels")
        self.scheme, self.place, self.of_input = scheme, place, of_input
        self.observing, self.settled = False, False
        self.seen: Histogram | None = None
        self.scale, self.learned = nn.Parameter(torch.ones(1)), False
        self.frozen: tuple[Tensor, Tensor] | None = None
        self.register_buffer("zero", torch.zeros(1))

    def observe(self, *, counting: bool = True) -> None:
        """Begin anew to watch the values that pass, unchanged; not `counting`, only their least and
        greatest."""
        self.observing, self.seen = True, Histogram(counting=counting)

    def settle(self, calibrator: str) -> None:
        """Take the range that `calibrator` reads from what was seen, and quantise from now on."""
        low, high = self.seen.range(calibrator, self.scheme)
        scale, zero = affine(torch.tensor([low]), torch.tensor([high]), self.scheme)
        self.scale.data, self.zero.data, self.observing, self.settled, self.seen = (scale, zero,
                                                                                    False, True,
                                                                                    None)

    def freeze(self) -> None:
        """As WeightQuantizer.freeze. Raises UnsupportedModelError for fewer than 8 bits, or before
        calibration."""
        if not self.settled:
            raise UnsupportedModelError(f"{self.place}: its range is not known yet; call "
                                        "quantization.calibrate first")
        if self.scheme.bits != 8:
            raise UnsupportedModelError(f"{self.place}: the runtime stores activations in 8 bits, "
                                        f"not {self.scheme.bits}")
        kind = torch.int8 if self.scheme.symmetric else torch.uint8
        self.frozen = self.scale.detach().reshape(()), self.zero.reshape(()).to(kind)

    def forward(self, values: Tensor) -> Tensor:
        if self.frozen:
            scale, zero = self.frozen
            integers = _onnx("QuantizeLinear", (values, scale, zero), values.shape, zero.dtype)
            return _onnx("DequantizeLinear", (integers, scale, zero), values.shape, torch.float32)
        if self.observing:
            self.seen.add(values.detach(), self.place)
        if not self.settled or self.observing:
            return values
        if self.learned and torch.is_grad_enabled():
            return fake_quantize(values.float(),
                                 _learned(self.scale, values[0].numel(), self.scheme), self.zero,
                                 self.scheme)
        return torch.fake_quantize_per_tensor_affine(values.float(), self.scale.detach(),
                                                     self.zero.int(), *self.scheme.limits)


def quantizers(model: nn.Module) -> Iterable[tuple[str, ActivationQuantizer]]:
    """The activation quantisers of a model with their names.

    Example: `len(dict(quantizers(quantised))) > 0`
    """
    return ((name, module) for name, module in model.named_modules()
            if isinstance(module, ActivationQuantizer))


def _onnx(kind: str, inputs: tuple[Tensor, ...], shape, dtype: torch.dtype) -> Tensor:
    """The ONNX operator itself, where a graph is exported; scales of channels lie along axis 0."""
    return torch.onnx.ops.symbolic(kind, inputs, {"axis": 0} if inputs[1].dim() else {},
                                   dtype=dtype, shape=shape, version=19)


def _learned(scale: Tensor, values: int, scheme: Scheme) -> Tensor:
    """The scale, its gradient divided by sqrt(values q_max), so that it learns as fast as the
    weights."""
    if not (torch.is_grad_enabled() and scale.requires_grad):
        return scale
    share = 1 / math.sqrt(values * scheme.limits[1])
    return scale * share + (scale * (1 - share)).detach()
