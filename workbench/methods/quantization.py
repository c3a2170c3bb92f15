"""Quantisation: a copy of a model whose weights and activations lie on integer grids, as an integer
runtime has them.

The model is traced. A quantiser stands where an integer kernel reads or writes: before each
quantised layer (behind what made its input), behind a convolution with the norm and ReLU that
follow it alone, and behind additions, concatenations and averages of values that lie on grids. What
the runtime computes in float (softmax, GELU, layer norm) is left in float, ids and masks are left
alone; of a large table of embeddings only the rows that are looked up become float. Batch norms are
folded first, as the runtime does.

Sources: Jacob et al. 2018 (arXiv 1712.05877); where the quantisers stand, Krishnamoorthi 2018
(arXiv 1806.08342).
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pandas as pd
import torch
from annotated_types import Ge, Le
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from workbench import files
from workbench.batches import Batch, Inputs, call, pairs
from workbench.graph.kinds import is_convolution, is_float, is_layer, joins, last_of, passes, source
from workbench.graph.layers import WEIGHTED, Change, evaluating, named
from workbench.graph.norms import fold_batchnorm
from workbench.graph.tracing import trace
from workbench.graph.units import round_biases
from workbench.numbers.coding import encode, entropy
from workbench.numbers.grid import GRANULARITIES, LEVELS, Scheme
from workbench.numbers.histograms import CALIBRATORS
from workbench.numbers.quantizers import ActivationQuantizer, WeightQuantizer, quantizers
from workbench.subjects.subject import Count, Globs, Subject
from workbench.subjects.tasks import Split, Task, with_views

INT8_WEIGHTS = Scheme(8, symmetric=True, granularity="channel")
UINT8_ACTIVATIONS = Scheme(8, symmetric=False)
LARGE = 1000  # entries from which a table of embeddings is worth rounding


def quantize(model: nn.Module, batches: Iterable[Batch], *,
             weights: Scheme | Mapping[str, Scheme] | None = INT8_WEIGHTS,
             activations: Scheme | None = UINT8_ACTIVATIONS, calibrator: str = "minmax",
             by: str = "minmax", layers: str | Sequence[str] = "*",
             tables: Scheme | None = INT8_WEIGHTS, example: Inputs | None = None,
             fold: bool = True) -> nn.Module:
    """A copy of `model` with its batch norms folded and fake-quantised weights and activations, in
    eval mode, calibrated on `batches`. Judged by sessions.open and what builds on it, it computes
    with whole numbers, as its ONNX file does.

    batches: of inputs and targets; targets are not looked at. weights, activations: their schemes,
    None for float; weights also by layer (mixed precision): layers that are not listed stay
    float32. An activation is quantised only if a quantised layer reads or writes it. calibrator:
    how the range of activations is read from what passes: "minmax", "moving_average", "percentile",
    "mse" or "entropy" (KL divergence); that of the model's inputs is always min-max. by: how the
    scales of weights are fitted, "minmax" or "mse". layers: globs of the layers whose weights are
    quantised. tables: the scheme of tables of embeddings with 1,000 entries or more, one scale an
    entry, None for float; only where all layers are quantised. example: inputs to trace the model
    with, where `batches` is empty. fold: whether batch norms become part of the layers before them;
    false where they are to be trained or examined. Trained on (training.fit), weights and scales
    learn through straight-through gradients. The ranges of the activations are those of the float
    model: what coarse weights do to them is for repairs to undo.

    Raises UnsupportedModelError where the model cannot be traced; ValueError for an unknown name,
    no examples, NaN, or inputs that are constant.

    Example: `quantization.quantize(model, task.validation.subset(500).batches(100),
    weights=Scheme(4, granularity="channel"))`
    """
    batches = list(pairs(batches))
    if not batches and (activations or example is None):
        raise ValueError("calibration saw no examples; give at least one batch" if activations else
                         "quantize needs a batch, or an example, to trace the model with")
    new = prepare(model, batches[0].inputs if batches else example, weights=weights,
                  activations=activations, by=by, layers=layers, tables=tables, fold=fold)
    if activations:
        calibrate(new, batches, calibrator)
    return round_biases(new)


def prepare(model: nn.Module, example: Inputs, *,
            weights: Scheme | Mapping[str, Scheme] | None = INT8_WEIGHTS,
            activations: Scheme | None = UINT8_ACTIVATIONS, by: str = "minmax",
            layers: str | Sequence[str] = "*", tables: Scheme | None = INT8_WEIGHTS,
            fold: bool = True) -> fx.GraphModule:
    """`quantize` before its calibration: the activation quantisers are in place and pass values on
    as they are.

    example: inputs to trace the model with. Raises as `quantize` does.

    Example: `quantization.calibrate(quantization.prepare(model, task.example), seen)`
    """
    schemes = _schemes(model, weights, by, layers)
    _expect_scheme("activations", activations)
    _expect_scheme("tables", tables)
    traced = trace(model, example)
    new = fold_batchnorm(traced, example) if fold else copy.deepcopy(traced).eval()
    if activations:
        _insert(new, activations, set(named(model)) if schemes is None else set(schemes))
    present = named(new)  # without what eval mode leaves out
    if schemes and tables and layers == "*":
        large = {name: module for name, module in new.named_modules()
                 if isinstance(module, nn.Embedding) and module.num_embeddings >= LARGE}
        present, schemes = present | large, schemes | dict.fromkeys(large, tables)
    for name, scheme in (schemes or {}).items():
        if name in present:
            layer = present[name]
            parametrize.register_parametrization(layer, "weight",
                                                 WeightQuantizer(layer.weight, scheme, by=by,
                                                                 layer=name))
    return new


def _expect_scheme(name: str, scheme) -> None:
    if not isinstance(scheme, Scheme | None):
        given = scheme if scheme in range(2, 9) else 8
        raise TypeError(f"{name} is {scheme!r}, expected a Scheme, say Scheme({given}), or None "
                        "for float")


def _schemes(model: nn.Module, weights: Scheme | Mapping[str, Scheme] | None, by: str,
             layers: str | Sequence[str]) -> dict[str, Scheme] | None:
    """The scheme of each layer that is rounded; None where no weights are."""
    if by not in ("minmax", "mse"):
        raise ValueError(f"unknown way to fit weights {by!r}; expected minmax or mse")
    chosen = named(model, layers)
    for scheme in weights.values() if isinstance(weights, Mapping) else [weights]:
        _expect_scheme("weights", scheme)
    if not isinstance(weights, Mapping):
        return dict.fromkeys(chosen, weights) if weights else None
    odd = [name for name in weights if name not in chosen]
    if odd:
        raise ValueError(f"weights: no layer is called {odd[0]!r}; the layers are "
                         f"{', '.join(list(chosen)[:6])}, ...")
    return {name: scheme for name, scheme in weights.items() if scheme}


def calibrate(model: nn.Module, batches: Iterable[Batch], calibrator: str = "minmax") -> nn.Module:
    """Set the ranges of the activations of a prepared `model`, itself, from `batches`; returns it.
    Raises as `quantize` does.

    Example: `calibrate(prepare(folded, x), seen, "mse")`
    """
    if calibrator not in CALIBRATORS:
        raise ValueError(f"unknown calibrator {calibrator!r}; expected one of "
                         f"{', '.join(CALIBRATORS)}")
    placed = [quantizer for _, quantizer in quantizers(model)]
    if not placed:
        raise ValueError("calibration found no activation quantisers; prepare the model with a "
                         "scheme for its activations")
    for quantizer in placed:
        quantizer.observe(counting=calibrator not in ("minmax", "moving_average"))
    seen = 0
    with evaluating(model):
        for inputs, _ in files.progress(batches, title="calibration", unit="batch"):
            call(model, inputs)
            seen += 1
    if not seen:
        raise ValueError("calibration saw no examples; give at least one batch")
    for quantizer in placed:
        if quantizer.of_input and quantizer.seen.low == quantizer.seen.high:
            raise ValueError(f"calibration: every number of {quantizer.place} is "
                             f"{quantizer.seen.low:g} in every example; give real ones")
        # inputs have a range of their own, nothing to clip
        quantizer.settle("minmax" if quantizer.of_input else calibrator)
    return model


def for_training(model: nn.Module) -> nn.Module:
    """A copy of a quantised model whose activation scales learn too (learned step size); weights'
    scales always do.

    Example: `training.fit(quantization.for_training(quantised), task, recipe=recipe).model`
    """
    new = copy.deepcopy(model)
    for _, quantizer in quantizers(new):
        quantizer.learned = True
    return new


def table(model: nn.Module, reference: nn.Module) -> pd.DataFrame:
    """One row per quantised layer, or table: layer, bits, granularity, scales, sqnr_db of its
    weights, size_bytes, params.

    sqnr_db = 10 log10(sum w^2 / sum (w - w')^2), w from `reference`. size_bytes: the integers
    packed, with a float32 scale and an int8 zero point a row (or the table of levels) and the
    float32 biases.

    Example: `quantization.table(quantised, folded).size_bytes.sum()`
    """
    rows = []
    for name, layer in rounded(model).items():
        quantizer, weight = (layer.parametrizations.weight[0],
                             reference.get_submodule(name).weight.detach())
        scheme, error = quantizer.scheme, (weight - layer.weight.detach()).pow(2).sum().item()
        groups = len(scheme.rows(weight, name))
        overhead = (groups
                    * (4 * 2**scheme.bits if scheme.levels == "kmeans"
                       else 4 + (not scheme.symmetric)))
        bias = getattr(layer, "bias", None)
        size = (weight.numel() * scheme.bits + 7) // 8 + overhead + 4 * (bias.numel()
                                                                         if bias is not None else 0)
        rows.append({"layer": name, "bits": scheme.bits, "granularity": scheme.granularity,
                     "scales": groups,
                     "sqnr_db": 10
                     * torch.tensor(weight.pow(2).sum().item() / max(error, 1e-30)).log10().item(),
                     "size_bytes": size, "params": weight.numel()})
    return pd.DataFrame(rows)


def quantizing(model: nn.Module, *, granularity: str = "channel", by: str = "minmax"):
    """A method for sensitivity.scan: (layer, bits / 8) -> that layer's weights at so many bits,
    alone.

    Levels are fractions of 8 bits: 0.25 is 2 bits, 0.5 is 4.

    Example: `sensitivity.scan(model, task.test, quantization.quantizing(model), levels=[0.25,
    0.375, 0.5, 0.75, 1.0])`
    """
    known = named(model)

    def method(layer: str, level: float) -> Change:
        bits = round(8 * level)
        new = copy.deepcopy(known[layer])
        with torch.no_grad():
            new.weight.copy_(WeightQuantizer(new.weight, Scheme(bits, granularity=granularity),
                                             by=by, layer=layer)(new.weight))
        return Change({layer: new}, removed=8 - bits, of=8, layers=(layer,), note=f"{bits} bits")

    method.layers = list(known)  # type: ignore[attr-defined]  # a function may have attributes
    return method


def coded(model: nn.Module) -> pd.DataFrame:
    """One row per quantised layer: layer, bits, size_bytes (packed), coded_bytes (entropy-coded),
    entropy_bits a weight.

    The integers, or the places of k-means levels, go through numbers.coding, and come back bit for
    bit; scales or levels are added as they are. The size of shared weights is the coded one (Han et
    al. 2016, arXiv 1510.00149).

    Example: `quantization.coded(quantised)`
    """
    rows = []
    for row, (name, values) in zip(table(model, model).itertuples(), integers(model).items(),
                                   strict=True):
        symbols = (values - values.min()).numpy()
        rest = row.size_bytes - (row.params * row.bits + 7) // 8
        # packed, where coding does not pay
        coded_bytes = min(len(encode(symbols)) + rest, row.size_bytes)
        rows.append({"layer": name, "bits": row.bits, "size_bytes": row.size_bytes,
                     "coded_bytes": coded_bytes,
                     "entropy_bits": entropy(symbols), "params": row.params})
    return pd.DataFrame(rows)


def _insert(traced: fx.GraphModule, scheme: Scheme, rounded: set[str]) -> None:
    """Put quantisers into `traced`, itself, wherever an integer kernel of the `rounded` layers
    reads or writes."""
    places = _Places(traced, rounded)
    outputs = next(node for node in traced.graph.nodes if node.op == "output").all_input_nodes
    for place in places.stored_in_order():
        readers = places.readers(place)
        if place in outputs or not readers:
            continue
        name, of_input = f"quantizer_{place.name}", place.op == "placeholder"
        what = f"input {place.target}" if of_input else str(place.target)
        traced.add_submodule(name, ActivationQuantizer(scheme, place=what, of_input=of_input))
        with traced.graph.inserting_after(place):
            new = traced.graph.call_module(name, (place,))
        new.meta = dict(place.meta)
        place.replace_all_uses_with(new, delete_user_cb=readers.__contains__)
    traced.recompile()


class _Places:
    """Which values of a traced graph are stored as integers, and who reads them as such."""

    def __init__(self, traced: fx.GraphModule, rounded: set[str]):
        self.nodes, self.modules = list(traced.graph.nodes), dict(traced.named_modules())
        self.layers = {node for node in self.nodes if is_layer(node, self.modules)
                       and node.target in rounded}
        self.joins: set[fx.Node] = set()  # of integers: computed with integers, and stored as such
        self.written = {last_of(node, self.modules) for node in self.layers
                        if is_convolution(node, self.modules)}
        read = {self._rounded_at(node.args[0]) for node in self.layers}
        mixed = not set(named(traced)) <= rounded
        for node in self.nodes:
            made = last_of(node, self.modules)
            parts = [part for part in node.all_input_nodes if is_float(part)] if joins(node) else []
            known = read | self.written
            if (parts and all(source(part) in self.written for part in parts)
                and (not mixed or made in known)):
                self.joins.add(node)
                self.written.add(made)
        self.stored = read | self.written

    def _rounded_at(self, place: fx.Node) -> fx.Node:
        """Where what a layer reads is put on its grid: where it was made, or behind the reshape
        that it alone reads."""
        while (passes(place)
               and (source(place) in self.written
                    or all(map(self._takes_integers, place.args[0].users)))):
            place = place.args[0]
        return place

    def stored_in_order(self) -> list[fx.Node]:
        """The nodes whose values are stored as integers."""
        return [node for node in self.nodes if node in self.stored and is_float(node)]

    def readers(self, place: fx.Node) -> set[fx.Node]:
        """Who reads the stored integers of a value: everybody where an integer kernel wrote them;
        else, where a float value is rounded for a layer, that layer alone, and the residual
        connection beside it keeps the float value."""
        return {user for user in place.users if place in self.written or place.op == "placeholder"
                or self._takes_integers(user)}

    def _takes_integers(self, node: fx.Node) -> bool:
        ends = node in self.layers or node in self.joins
        return (ends
                or (passes(node) and bool(node.users)
                    and all(map(self._takes_integers, node.users))))


def integers(model: nn.Module) -> dict[str, Tensor]:
    """The integer weights of each quantised layer or table, int32 of the weight's shape, by name.

    Example: `quantization.integers(quantised)["conv1"].dtype == torch.int32`
    """
    return {name: layer.parametrizations.weight[0].integers(layer.parametrizations.weight.original)
            for name, layer in rounded(model).items()}


def rounded(model: nn.Module) -> dict[str, nn.Module]:
    """The layers and tables of a quantised model whose weights lie on a grid, by name.

    Example: `quantization.rounded(quantised).keys()`
    """
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (*WEIGHTED, nn.Embedding))
            and parametrize.is_parametrized(module, "weight")}


@dataclass(frozen=True)
class Quantize:
    """The step of a plan that quantises: weights at `bits` (None: float), activations at
    `activation_bits`, calibrated on `examples` of the validation split. views: further crops of
    each, where there are few pictures.

    Example: `Quantize(bits=8, examples=64).apply(Subject(model, task)).model`
    """

    needs_examples: ClassVar[bool] = True
    bits: Annotated[int, Ge(2), Le(8)] | None = 8
    granularity: Literal[GRANULARITIES] = "channel"  # type: ignore[valid-type]
    group: Count = 0
    symmetric: bool = True
    levels: Literal[LEVELS] = "uniform"  # type: ignore[valid-type]
    activations: bool = True
    activation_bits: Annotated[int, Ge(2), Le(8)] = 8
    activation_symmetric: bool = False
    calibrator: Literal[CALIBRATORS] = "minmax"  # type: ignore[valid-type]
    by: Literal["minmax", "mse"] = "minmax"
    layers: Globs = "*"
    examples: Count = 300
    views: Count = 0
    seed: Count = 0

    def __post_init__(self):
        if self.bits is None and not self.activations:
            raise ValueError("quantize: give bits, or let it quantise the activations; else there "
                             "is nothing to do")

    def apply(self, subject: Subject) -> Subject:
        """The quantised subject; the float model stays in `made["float"]`, for repairs to compare
        with."""
        scheme = (Scheme(self.bits, self.symmetric, self.granularity, self.group, self.levels)
                  if self.bits else None)
        activations = (Scheme(self.activation_bits, self.activation_symmetric) if self.activations
                       else None)
        seen = list(self.calibrating(subject.task).batches(50))
        model = quantize(subject.model, seen, weights=scheme, activations=activations,
                         calibrator=self.calibrator, by=self.by, layers=self.layers)
        return subject.with_model(model, float=subject.model, calibration=seen)

    def calibrating(self, task: Task) -> Split:
        """The examples that calibrate, and their views.

        Example: `len(Quantize(examples=8, views=1).calibrating(task)) == 16`
        """
        chosen = task.validation.subset(self.examples, seed=self.seed)
        return with_views(chosen, self.views, seed=self.seed) if self.views else chosen
