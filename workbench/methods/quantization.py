"""Quantisation: a copy of a model whose weights and activations lie on integer grids, as an integer runtime has them.

The graph is traced (torch.fx). A quantiser stands behind every node whose result an integer runtime stores in memory:
the input, a convolution or linear layer with the norm and ReLU that follow it alone, an addition, a concatenation, an
average. What the runtime computes in float (softmax, layer norm, SiLU) is left in float. Fold the batch norms first
(reparameterization.fold_batchnorm), as the runtime does.

Sources: Jacob et al. 2018 (arXiv 1712.05877); where the quantisers stand, Krishnamoorthi 2018 (arXiv 1806.08342).
"""

import copy
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from workbench import files
from workbench.kernels import is_layer, joins, last_of, passes
from workbench.layers import Change, Tracer, UnsupportedModelError, evaluating, named, reason
from workbench.quantizers import CALIBRATORS, ActivationQuantizer, Scheme, WeightQuantizer, quantizers, round_biases

INT8_WEIGHTS = Scheme(8, symmetric=True, granularity="channel")
UINT8_ACTIVATIONS = Scheme(8, symmetric=False)


def quantize(model: nn.Module, batches: Iterable, *, weights: Scheme | Mapping[str, Scheme] | None = INT8_WEIGHTS,
             activations: Scheme | None = UINT8_ACTIVATIONS, calibrator: str = "minmax", by: str = "minmax",
             layers: str | Sequence[str] = "*") -> nn.Module:
    """A copy of `model` with fake-quantised weights and activations, in eval mode, calibrated on `batches`.

    batches: (images, labels) pairs; labels are not looked at. weights, activations: their schemes, None for float; weights
    also by layer (mixed precision): those not named stay float, and so does what no rounded layer reads or puts out.
    calibrator: how the range of activations is read from what passes: "minmax", "moving_average", "percentile", "mse" or
    "entropy" (KL divergence); that of the images is always min-max. by: how the scales of weights are fitted, "minmax" or
    "mse". layers: globs of the layers whose weights are quantised. Trained on (training.fit), weights and scales learn
    through straight-through gradients. The ranges of the activations are those of the float model: what coarse weights do
    to them is for repairs to undo.

    Raises UnsupportedModelError where the model cannot be traced; ValueError for an unknown name, no images, NaN, or
    images that are constant.

    Example: `quantization.quantize(folded, task.validation.subset(500).batches(100), weights=Scheme(4, granularity="channel"))`
    """
    schemes = _schemes(model, weights, by, layers)
    new = _traced(model, activations, schemes)
    if activations:
        calibrate(new, batches, calibrator)
    return round_biases(_round_weights(new, schemes, by))


def prepare(model: nn.Module, *, weights: Scheme | Mapping[str, Scheme] | None = INT8_WEIGHTS,
            activations: Scheme | None = UINT8_ACTIVATIONS, by: str = "minmax",
            layers: str | Sequence[str] = "*") -> fx.GraphModule:
    """`quantize` before its calibration: the activation quantisers are in place and pass values on as they are."""
    schemes = _schemes(model, weights, by, layers)
    return _round_weights(_traced(model, activations, schemes), schemes, by)


def _schemes(model: nn.Module, weights: Scheme | Mapping[str, Scheme] | None, by: str,
             layers: str | Sequence[str]) -> dict[str, Scheme] | None:
    """The scheme of each layer that is rounded; None where no weights are."""
    if by not in ("minmax", "mse"):
        raise ValueError(f"unknown way to fit weights {by!r}; expected minmax or mse")
    chosen = named(model, layers)
    if not isinstance(weights, Mapping):
        return dict.fromkeys(chosen, weights) if weights else None
    odd = [name for name in weights if name not in chosen]
    if odd:
        raise ValueError(f"weights: no layer is called {odd[0]!r}; the layers are {', '.join(list(chosen)[:6])}, ...")
    return {name: scheme for name, scheme in weights.items() if scheme}


def _traced(model: nn.Module, activations: Scheme | None, schemes: Mapping[str, Scheme] | None) -> fx.GraphModule:
    """A traced copy with the activation quantisers that these layers need; all there can be, where no weights are rounded."""
    source = copy.deepcopy(model).eval()
    try:
        traced = fx.GraphModule(source, Tracer().trace(source))
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise UnsupportedModelError(f"{type(model).__name__} cannot be traced to place quantisers "
                                    f"({reason(error)}); write its forward without branches on values") from error
    if activations:
        _insert(traced, activations, set(named(model)) if schemes is None else set(schemes))
    if hasattr(model, "origin"):
        traced.origin = model.origin
    return traced.eval()


def _round_weights(traced: fx.GraphModule, schemes: Mapping[str, Scheme] | None, by: str) -> fx.GraphModule:
    """Put quantisers before the weights of `traced`, itself."""
    present = named(traced)  # without what eval mode leaves out
    for name, scheme in (schemes or {}).items():
        if name in present:
            layer = present[name]
            parametrize.register_parametrization(layer, "weight", WeightQuantizer(layer.weight, scheme, by=by, layer=name))
    return traced


def calibrate(model: nn.Module, batches: Iterable, calibrator: str = "minmax") -> nn.Module:
    """Set the ranges of the activations of a prepared `model`, itself, from `batches`; returns it."""
    if calibrator not in CALIBRATORS:
        raise ValueError(f"unknown calibrator {calibrator!r}; expected one of {', '.join(CALIBRATORS)}")
    found = dict(quantizers(model))
    if not found:
        raise ValueError("calibration found no activation quantisers; prepare the model with a scheme for its activations")
    for quantizer in found.values():
        quantizer.observe(counting=calibrator not in ("minmax", "moving_average"))
    with evaluating(model):
        for images, _ in files.progress(batches, title="calibration", unit="batch"):
            model(images)
    first = next(iter(found.values())).seen
    if first.low == first.high:
        raise ValueError(f"calibration: every pixel of every image is {first.low:g}; give real images")
    for place, quantizer in enumerate(found.values()):
        quantizer.settle(calibrator if place else "minmax")  # pixels have a range of their own, and nothing to clip
    return model


def for_training(model: nn.Module) -> nn.Module:
    """A copy of a quantised model whose activation scales learn too (learned step size); weights' scales always do."""
    new = copy.deepcopy(model)
    for _, quantizer in quantizers(new):
        quantizer.learned = True
    return new


def table(model: nn.Module, reference: nn.Module) -> pd.DataFrame:
    """One row per quantised layer: layer, bits, granularity, scales, sqnr_db of its weights, size_bytes, params.

    sqnr_db = 10 log10(sum w^2 / sum (w - w')^2), w from `reference`. size_bytes: the integers packed, with a float32 scale
    and an int8 zero point a row (or the table of levels) and the float32 biases.
    """
    known, rows = named(reference), []
    for name, layer in named(model).items():
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        quantizer, weight = layer.parametrizations.weight[0], known[name].weight.detach()
        scheme, error = quantizer.scheme, (weight - layer.weight.detach()).pow(2).sum().item()
        groups = len(scheme.rows(weight, name))
        overhead = groups * (4 * 2**scheme.bits if scheme.levels == "kmeans" else 4 + (not scheme.symmetric))
        size = (weight.numel() * scheme.bits + 7) // 8 + overhead + 4 * (layer.bias.numel() if layer.bias is not None else 0)
        rows.append({"layer": name, "bits": scheme.bits, "granularity": scheme.granularity, "scales": groups,
                     "sqnr_db": 10 * torch.tensor(weight.pow(2).sum().item() / max(error, 1e-30)).log10().item(),
                     "size_bytes": size, "params": weight.numel()})
    return pd.DataFrame(rows)


def quantizing(model: nn.Module, *, granularity: str = "channel", by: str = "minmax"):
    """A method for sensitivity.scan: (layer, bits / 8) -> that layer's weights at so many bits, alone.

    Levels are fractions of 8 bits: 0.25 is 2 bits, 0.5 is 4.

    Example: `sensitivity.scan(model, task.test, quantization.quantizing(model), levels=[0.25, 0.375, 0.5, 0.75, 1.0])`
    """
    known = named(model)

    def method(layer: str, level: float) -> Change:
        bits = round(8 * level)
        new = copy.deepcopy(known[layer])
        with torch.no_grad():
            new.weight.copy_(WeightQuantizer(new.weight, Scheme(bits, granularity=granularity), by=by, layer=layer)(new.weight))
        return Change({layer: new}, removed=8 - bits, of=8, layers=(layer,), note=f"{bits} bits")

    method.layers = list(known)
    return method


def coded(model: nn.Module) -> pd.DataFrame:
    """One row per quantised layer: layer, bits, size_bytes (packed), coded_bytes (Huffman-coded), entropy_bits a weight.

    The integers, or the places of k-means levels, go through Deflate's Huffman coder (zlib, Z_HUFFMAN_ONLY), each once, and
    are decoded to see that they come back; scales or levels are added as they are. C10: shared weights, the size as coded.
    """
    rows = []
    for row, (name, values) in zip(table(model, model).itertuples(), integers(model).items(), strict=True):
        symbols = (values - values.min()).to(torch.uint8).numpy().tobytes()
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        stream = coder.compress(symbols) + coder.flush()
        if zlib.decompress(stream, -15) != symbols:
            raise ValueError(f"layer {name}: its coded weights do not decode to themselves")
        share = np.bincount(np.frombuffer(symbols, np.uint8)) / len(symbols)
        rest = row.size_bytes - (row.params * row.bits + 7) // 8
        coded_bytes = min(len(stream) + rest, row.size_bytes)  # packed, where coding does not pay
        rows.append({"layer": name, "bits": row.bits, "size_bytes": row.size_bytes, "coded_bytes": coded_bytes,
                     "entropy_bits": float(-(share[share > 0] * np.log2(share[share > 0])).sum()), "params": row.params})
    return pd.DataFrame(rows)


def _insert(traced: fx.GraphModule, scheme: Scheme, rounded: set[str]) -> None:
    """Put quantisers behind all that an integer runtime stores; where some layers stay float, only behind what a rounded layer
    puts out or reads, for each change of format takes time and precision."""
    modules, graph = dict(traced.named_modules()), traced.graph
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    behind: dict[fx.Node, fx.Node] = {}
    needed = set()
    for node in list(graph.nodes):
        if is_layer(node, modules) or joins(node, modules) or node.op == "placeholder":
            behind.setdefault(last_of(node, modules), node)
    for node in list(graph.nodes):  # what else a layer reads
        if is_layer(node, modules):
            source = node.args[0]
            while source not in behind and passes(source, modules):
                source = source.args[0]
            behind.setdefault(source, source)
            needed |= {source, last_of(node, modules)} if node.target in rounded else set()
    mixed = not set(named(traced)) <= rounded
    for place, node in behind.items():
        if place is result or (mixed and place not in needed):
            continue
        name = f"quantizer_{node.name}"
        what = "the images" if node.op == "placeholder" else str(node.target)
        traced.add_submodule(name, ActivationQuantizer(scheme, place=what))
        with graph.inserting_after(place):
            new = graph.call_module(name, (place,))
        place.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    traced.recompile()


def integers(model: nn.Module) -> dict[str, Tensor]:
    """The integer weights of each quantised layer, int32 of the weight's shape, by name."""
    return {name: layer.parametrizations.weight[0].integers(layer.parametrizations.weight.original)
            for name, layer in named(model).items() if parametrize.is_parametrized(layer, "weight")}
