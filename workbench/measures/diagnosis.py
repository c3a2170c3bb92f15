"""The accuracy doctor: which layer of a candidate is to blame for what was lost, why, and what
repairs it.

A unit is a layer with the batch norm and the activation quantiser behind it. A unit has a fault
where a repair at the same bits brings its weights nearer to what they were before rounding, or its
own output, on the reference's inputs, nearer to the reference's: by image, paired. With z the
reference's logits and z_l those of the reference in which unit l alone is as the candidate has it,
the effect of a unit is the mean over examples of |z_l - z|^2 / |z|^2, and its blame is the part of
that which the repair removes. What a unit without a fault costs is the price of its bits.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench import files
from workbench.batches import Batch, Inputs, answer, call, count, pairs
from workbench.errors import UnsupportedModelError, listed
from workbench.graph.branching import Branching
from workbench.graph.kinds import is_layer
from workbench.graph.layers import evaluating, named
from workbench.graph.running import Runner
from workbench.graph.units import Unit, units
from workbench.measures import equivalence
from workbench.measures.accuracy import finite
from workbench.numbers.histograms import Histogram
from workbench.numbers.quantizers import WeightQuantizer

REPAIRS = {  # cause: what to try
    "weight scale off": "fit the scale of its weights anew",
    "one scale for all channels": "give it a scale per channel (Scheme(granularity='channel'))",
    "activation range off": "calibrate its range anew (quantization.calibrate)",
    "stale batch norm": "take its statistics anew (reparameterization.reestimate_batchnorm)",
    "weights changed": "put the reference's weights back, or train it",
    "few bits for its weights": "more bits for it, or rounding.descend",
    "few bits for its activations": "more bits for it, or another calibrator",
    "none": "leave it",
}
# repairs that the weights alone can judge
OF_WEIGHTS = ("weight scale off", "one scale for all channels")
FAULTS = ("scale", "range", "per_tensor", "stale_norm")  # that `plant` knows
OFF = 1.5  # a scale that differs by less comes from other images
DRIFT = 0.02  # of a norm, in standard deviations: below it no repair is tried
SURE = 3.0  # standard errors, over images, by which a repair must help


@dataclass
class Diagnosis:
    """What `diagnose` found. table: one row per layer, the first the first suspect; unexplained:
    see there.

    Example: `diagnosis.diagnose(folded, quantised, seen).table.layer.to_list()`
    """

    table: pd.DataFrame
    unexplained: float
    candidate: nn.Module
    repairs: Mapping[str, Unit]

    def __repr__(self) -> str:
        lines = [f"{row.layer}: {row.cause}" for row in self.table.head(3).itertuples()]
        return (f"Diagnosis of {len(self.table)} layers, {len(self.repairs)} with a fault that can "
                "be repaired; first to look at: " + "; ".join(lines))

    def repaired(self, *layers: str) -> nn.Module:
        """A copy of the candidate in which `layers` (by default the first suspect) are repaired.

        Raises ValueError for a layer without a fault, and where no layer has one, naming what to
        try instead.
        """
        if not self.repairs:
            worst = listed(self.table.sort_values("effect", ascending=False).layer, most=3)
            raise ValueError("no layer has a fault to repair: the loss is the price of the bits; "
                             "try scales by channel, reparameterization.equalize before "
                             "quantising, rounding.descend after it, the recipe int8, which tries "
                             f"calibrators as well, or more bits for {worst}")
        new = copy.deepcopy(self.candidate)
        for name in layers or [str(self.table.layer[0])]:
            if name not in self.repairs:
                raise ValueError(f"layer {name} has no fault to repair; those that have: "
                                 f"{listed(self.repairs)}")
            for place, module in self.repairs[name].copy().modules().items():
                new.set_submodule(place, module)
        return new


def diagnose(reference: nn.Module, candidate: nn.Module, batches: Iterable[Batch]) -> Diagnosis:
    """The layers of `candidate` in order of blame, with the likely cause of each and the repair to
    try.

    batches: targets are not looked at; a hundred examples or more. Columns of the table: layer,
    blame and effect (fractions of the logits' energy), flips (share of images whose answer changes
    by this layer alone), own_sqnr_db (of the unit's output on the reference's inputs) and
    passed_sqnr_db (of the layer's output where the candidate runs by itself, so with what came
    before), weight_max, outlier (weight_max over the weights' rms), channel_spread (largest over
    median range of a channel, those of zeros alone left out), clipped (share of activations outside
    the grid), norm_shift and norm_stretch (batch norm against its inputs, in standard deviations),
    fault, cause, repair.
    Faults come first, in order of blame, then the rest in order of effect. `unexplained`: the
    candidate's error in the logits less the sum of the effects, as a share of it; large where the
    fault lies outside the layers, in a joint's range say.

    Raises ValueError where there are no examples or NaN appears, UnsupportedModelError where the
    two have not the same layers and shapes or cannot be traced.

    Example: `diagnosis.diagnose(folded, quantised, task.validation.subset(200).batches(50)).table`
    """
    seen = [finite(inputs, "inputs") for inputs, _ in pairs(batches)]
    if not seen:
        raise ValueError("the diagnosis saw no examples; give at least one batch")
    before, after = Runner(reference, seen[0]), Runner(candidate, seen[0])
    found, originals = units(after), units(before)
    if list(found) != list(originals):
        odd = next(iter([name for name in originals if name not in found]
                        or [name for name in found if name not in originals]), "order")
        raise UnsupportedModelError(f"reference and candidate differ in their layers ({odd}); give "
                                    "the model that was compressed")
    findings = {name: _Finding(name, originals[name], unit) for name, unit in found.items()}
    with evaluating(reference), evaluating(candidate):
        for inputs in files.progress(seen, title="diagnosis: units", unit="batch"):
            values, feed = {}, before.feed(inputs)
            for i, node in enumerate(before.nodes[:-1]):
                if is_layer(node, before.modules):
                    findings[node.target].see(values[node.args[0]])
                before.step(i, values, feed)
    tries = {name: finding.repairs() for name, finding in findings.items()}
    trials = [(name, cause, _in_reference(unit, originals[name]))
              for name, finding in findings.items()
              for cause, unit in ({"": finding.unit} | tries[name]).items()]
    with evaluating(reference), evaluating(candidate):
        helped = _helped(before, findings, tries, seen)
        errors, flips, whole = _effects(reference, candidate, trials, seen)
    passed = equivalence.by_layer(reference, candidate, seen).set_index("layer").sqnr_db
    rows, repairs = [], {}
    for name, finding in findings.items():
        helping = {cause: gain for cause, gain in helped[name].items() if gain > 0}
        best = max(helping, key=helping.get, default="")
        fault = bool(best)
        gain = (errors[name, ""] - errors[name, best]).mean().clamp_min(0).item() if fault else 0.0
        if fault:
            repairs[name] = tries[name][best]
        cause = best if fault else finding.price()
        rows.append({"layer": name, "blame": gain, "effect": errors[name, ""].mean().item(),
                     "flips": flips[name], **finding.row(),
                     "passed_sqnr_db": passed.get(name, float("nan")),
                     "fault": fault, "cause": cause, "repair": REPAIRS[cause]})
    table = pd.DataFrame(rows).sort_values(["fault", "blame", "effect"], ascending=False,
                                           kind="stable").reset_index(drop=True)
    return Diagnosis(table, 1 - table.effect.sum() / whole if whole else 0.0, candidate,
                     {name: repairs[name] for name in table.layer if name in repairs})


def plant(model: nn.Module, layer: str, fault: str, *, example: Inputs | None = None,
          by: float = 8.0, batches: Iterable[Batch] = ()) -> nn.Module:
    """A copy of a quantised `model` with a fault in `layer`, to see whether the doctor finds it.

    fault "scale": the scale of its weights times `by`; "range": that of its activations;
    "per_tensor": one scale for all its channels; "stale_norm": its batch norm has the statistics of
    `batches`, other images than the model's own.

    Raises ValueError for an unknown fault or layer, or a layer without the part that is to be
    damaged.

    Example: `broken = diagnosis.plant(quantised, "layer2.0.conv1", "scale", example=x)`
    """
    if fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}; expected one of {', '.join(FAULTS)}")
    new = copy.deepcopy(model).eval()
    named(new, layer)
    found = units(Runner(new, example))
    if layer not in found:
        raise ValueError(f"layer {layer!r} is not one layer's name; the layers are {listed(found)}")
    unit = found[layer]
    part = {"scale": unit.weights, "per_tensor": unit.weights, "range": unit.quantizer,
            "stale_norm": unit.norm}[fault]
    if part is None or (fault == "scale" and not hasattr(part, "scale")):
        raise ValueError(f"layer {layer} has nothing that fault {fault!r} could damage")
    if fault in ("scale", "range"):
        part.scale.data *= by
    elif fault == "per_tensor":
        unit.requantize(replace(part.scheme, granularity="tensor"))
    else:
        seen: list[Tensor] = []
        handle = part.register_forward_hook(
            lambda _module, arguments, _output: seen.append(arguments[0]))
        with evaluating(new):
            for inputs, _ in batches:
                call(new, inputs)
        handle.remove()
        if not seen:
            raise ValueError("stale_norm needs batches to take the statistics of; give at least "
                             "one")
        values = torch.cat(seen).transpose(0, 1).flatten(1)
        part.running_mean, part.running_var = values.mean(1).clone(), values.var(1).clone()
    return new


class _Finding:
    """What is seen of one unit on the reference's own inputs: sums over batches."""

    def __init__(self, name: str, original: Unit, unit: Unit):
        self.name, self.original, self.unit = name, original, unit
        self.seen, self.energy, self.by_weights, self.by_grid, self.clipped, self.count = (
            Histogram(), 0.0, 0.0, 0.0, 0, 0)
        self.sums: Any = 0.0

    def see(self, inputs: Tensor) -> None:
        """Take a batch of the layer's inputs."""
        _, wanted, _ = self.original.run(inputs)
        raw, values, rounded = self.unit.run(inputs)
        if wanted.shape != values.shape:
            raise UnsupportedModelError(f"layer {self.name} puts out {tuple(values.shape[1:])}, "
                                        f"the reference {tuple(wanted.shape[1:])}; diagnose before "
                                        "channels are removed (channels.mask)")
        finite(values, f"outputs of layer {self.name}")
        self.energy += wanted.pow(2).sum().item()
        self.by_weights += (values - wanted).pow(2).sum().item()
        self.by_grid += (rounded - values).pow(2).sum().item()
        self.seen.add(values, f"layer {self.name}")
        quantizer = self.unit.quantizer
        if quantizer:
            low, high = ((limit - quantizer.zero) * quantizer.scale
                         for limit in quantizer.scheme.limits)
            half = quantizer.scale / 2
            self.clipped += int(((values < low - half) | (values > high + half)).sum())
            self.count += values.numel()
        if self.unit.norm:
            flat = raw.transpose(0, 1).flatten(1).double()
            self.sums = (self.sums
                         + torch.stack([flat.sum(1), flat.pow(2).sum(1),
                                        torch.full((len(flat),), float(flat.shape[1]))]))

    def repairs(self) -> dict[str, Unit]:
        """What could be wrong with the unit, and the unit with that repaired."""
        found = {}
        weights, quantizer = self.unit.weights, self.unit.quantizer
        if weights and weights.scheme.levels == "uniform":
            new = self.unit.copy()
            new.requantize(weights.scheme)
            if _ratio(new.weights.scale, weights.scale) > OFF:
                found["weight scale off"] = new
            if weights.scheme.granularity == "tensor":
                found["one scale for all channels"] = new = self.unit.copy()
                new.requantize(replace(weights.scheme, granularity="channel"))
        if quantizer:
            new = self.unit.copy()
            new.quantizer.seen = self.seen
            new.quantizer.settle("minmax")
            if _ratio(new.quantizer.scale, quantizer.scale) > OFF:
                found["activation range off"] = new
        if self.unit.norm and max(self._drift()) > DRIFT:
            found["stale batch norm"] = new = self.unit.copy()
            mean, var = self._moments()
            new.norm.running_mean, new.norm.running_var = mean.float(), var.float()
        if bool(self.unit.norm) == bool(self.original.norm) and self._changed():
            new = self.unit.copy()
            new.layer = copy.deepcopy(self.original.layer)
            if weights:
                parametrize.register_parametrization(new.layer, "weight",
                                                     WeightQuantizer(new.layer.weight,
                                                                     weights.scheme))
            found["weights changed"] = new
        return found

    def _changed(self) -> bool:
        """Whether weights or bias, before any rounding, are others than the reference's by more
        than a grid's step."""
        unit, original = self.unit, self.original
        source = unit.layer.parametrizations.weight.original if unit.weights else unit.layer.weight
        wanted = original.layer.weight
        # of the largest weight: what rounding moves
        step = 2 / 2 ** unit.weights.scheme.bits if unit.weights else 1e-4
        biases = [layer.bias if layer.bias is not None else torch.zeros(len(wanted))
                  for layer in (unit.layer, original.layer)]
        off = [(source - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)]
        off += ([] if unit.weights
                else [(biases[0] - biases[1]).abs().max() / biases[1].abs().max().clamp_min(1e-6)])
        return bool(max(off) > step)

    def price(self) -> str:
        """Where the error of a unit without a fault comes from."""
        if self.by_weights + self.by_grid < 1e-8 * self.energy:
            return "none"
        if not self.unit.weights and self.by_weights > self.by_grid:
            return "weights changed"
        return ("few bits for its weights" if self.by_weights > self.by_grid
                else "few bits for its activations")

    def row(self) -> dict[str, float]:
        """The measures of the unit by itself."""
        weight = self.unit.layer.weight.detach()
        ranges, largest = weight.flatten(1).abs().amax(1), weight.abs().max().item()
        used = ranges[ranges > 0]
        shift, stretch = self._drift() if self.unit.norm else (float("nan"),) * 2
        error = self.by_weights + self.by_grid
        return {"own_sqnr_db": 10 * torch.tensor(self.energy / max(error, 1e-30)).log10().item(),
                "weight_max": largest,
                "outlier": largest / max(weight.pow(2).mean().sqrt().item(), 1e-30),
                "channel_spread": largest / used.median().item() if len(used) else float("nan"),
                "clipped": self.clipped / self.count if self.count else float("nan"),
                "norm_shift": shift, "norm_stretch": stretch}

    def _moments(self) -> tuple[Tensor, Tensor]:
        total, squares, n = self.sums
        mean = total / n
        return mean, (squares / n - mean**2).clamp_min(1e-12)

    def _drift(self) -> tuple[float, float]:
        (mean, var), norm = self._moments(), self.unit.norm
        std = (norm.running_var + norm.eps).sqrt()
        return (((mean - norm.running_mean).abs() / std).mean().item(),
                ((var + norm.eps).sqrt() / std).log().abs().mean().item())


def _helped(before: Runner, findings: Mapping, tries: Mapping,
            batches: list[Inputs]) -> dict[str, dict[str, float]]:
    """Per unit and repair: the share of its own error that goes, or 0 where that is not sure over
    the images."""
    helped = {name: {cause: _nearer(findings[name].unit, unit) for cause, unit in found.items()
                     if cause in OF_WEIGHTS}
              for name, found in tries.items()}
    gains: dict[tuple[str, str], list[Tensor]] = {
        (name, cause): [] for name, found in tries.items() for cause in found
        if cause not in OF_WEIGHTS}
    energy = dict.fromkeys(gains, 0.0)
    for batch in batches if gains else ():
        values, feed = {}, before.feed(batch)
        for i, node in enumerate(before.nodes[:-1]):
            for cause, unit in tries.get(node.target,
                                         {}).items() if node.op == "call_module" else ():
                if cause in OF_WEIGHTS:
                    continue
                inputs, whole = values[node.args[0]], cause == "activation range off"
                wanted = findings[node.target].original.run(inputs)[1]
                old, new = ((part.run(inputs)[2 if whole else 1] - wanted).flatten(1).pow(2).sum(1)
                            for part in (findings[node.target].unit, unit))
                gains[node.target, cause].append(old - new)
                energy[node.target, cause] += old.sum().item()
            before.step(i, values, feed)
    for (name, cause), parts in gains.items():
        gain = torch.cat(parts)
        sure = gain.mean() > SURE * gain.std() / len(gain) ** 0.5
        helped[name][cause] = gain.sum().item() / max(energy[name, cause], 1e-30) if sure else 0.0
    return helped


def _nearer(old: Unit, new: Unit) -> float:
    """The share of the rounding error of the weights that goes."""
    source = old.layer.parametrizations.weight.original
    before, after = ((unit.layer.weight - source).pow(2).sum().item() for unit in (old, new))
    return max(1 - after / before, 0.0) if before else 0.0


def _in_reference(unit: Unit, original: Unit) -> dict[str, nn.Module]:
    """The unit as modules to stand in the reference; what clips to the range of a ReLU may as well
    stand before it."""
    parts = [part for part in (unit.layer, unit.norm, unit.quantizer) if part is not None]
    modules: dict[str, nn.Module] = {original.names[0]: nn.Sequential(*parts)}
    return modules | ({original.names[1]: nn.Identity()} if original.names[1] else {})


def _effects(reference: nn.Module, candidate: nn.Module, trials: list, batches: list[Inputs]):
    """Per trial the error of the logits by example (N,), per layer the share of answers it changes,
    the candidate's error."""
    run = Branching(reference, batches[0])
    errors: dict[tuple[str, str], list[Tensor]] = {(name, cause): [] for name, cause, _ in trials}
    flips, whole, seen = dict.fromkeys((name for name, _, _ in trials), 0), 0.0, 0
    for batch in files.progress(batches, title="diagnosis: effects", unit="batch"):
        logits, changed = run(batch, [modules for *_, modules in trials])
        energy = logits.flatten(1).pow(2).sum(1).clamp_min(1e-30)
        for (name, cause, _), found in zip(trials, changed, strict=True):
            errors[name, cause].append((found - logits).flatten(1).pow(2).sum(1) / energy)
            flips[name] += 0 if cause else int((found.flatten(1)
                                                .argmax(1) != logits.flatten(1).argmax(1)).sum())
        whole += ((answer(call(candidate, batch)) - logits).flatten(1).pow(2).sum(1)
                  / energy).sum().item()
        seen += count(batch)
    return ({key: torch.cat(parts) for key, parts in errors.items()},
            {name: value / seen for name, value in flips.items()}, whole / seen)


def _ratio(new: Tensor, old: Tensor) -> float:
    return (new / old).log().abs().max().exp().item()
