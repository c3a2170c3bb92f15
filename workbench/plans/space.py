"""What a search chooses from: genes with their options, the recipe that a choice stands for, and
what it is expected to cost.

A gene is a group of channels, with the shares of it that may stay, or a setting of the whole: how
many blocks are left out, the bits that weights take on average (32 is float), and whether rounded
weights are repaired. A plan gives each gene one of its options; as a recipe it is cut, recovered
for a stated number of steps, rounded.

What a plan is expected to cost comes from a few measurements: the harm of each option alone
(sensitivity.scan, rounded copies of the whole model) and the time of each layer at each share, in
float and in 8 bits (ONNX Runtime's own profile of evenly cut copies).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from workbench import files
from workbench.batches import answer, call
from workbench.deployment import onnx
from workbench.graph.coupling import groups
from workbench.graph.depth import without_blocks
from workbench.graph.layers import evaluating, named
from workbench.measures import latency, sensitivity
from workbench.methods import channels
from workbench.methods.channels import Prune
from workbench.methods.depth import Drop
from workbench.methods.distillation import Distil
from workbench.methods.quantization import Quantize, quantize
from workbench.methods.rounding import Repair
from workbench.numbers.grid import Scheme
from workbench.plans.allocation import Mix
from workbench.subjects.subject import Step, Subject
from workbench.subjects.tasks import Split
from workbench.subjects.training import Recipe

FLOAT = 32
# the genes of the whole, between brackets as no layer is
DEPTH, BITS, ROUNDING = "(depth)", "(bits)", "(rounding)"
Plan = tuple[int, ...]  # of each gene, in their order, the place of its option


def label(plan: Plan) -> str:
    """A plan for a table. Example: `label((0, 2, 1)) == "0-2-1"`"""
    return "-".join(map(str, plan))


def plan_of(label: str) -> Plan:
    """The plan of a label. Example: `plan_of("0-2-1") == (0, 2, 1)`"""
    return tuple(map(int, label.split("-")))


@dataclass(frozen=True)
class Space:
    """Genes by name, each with its options; the first option of each leaves the model as it is.

    blocks: those that may be left out, in the order in which they go, each with the genes that go
    with it.

    Example: `Space.of(model, task.example, shares=(1.0, 0.5), bits=(32, 8))`
    """

    genes: Mapping[str, tuple]
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    recovery: int = 60  # steps of distilling behind a cut, of `batch_size` examples
    batch_size: int = 64
    learning_rate: float = 0.01
    calibrator: str = "minmax"
    seed: int = 0

    @classmethod
    def of(cls, model: nn.Module, example, *, shares: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
           bits: Sequence[int] = (32, 8, 6, 4), rounding: Sequence[str] = ("nearest", "descend"),
           blocks: Sequence[str] = (), **settings) -> "Space":
        """The genes that a model has: each group of channels that can be cut, with the shares that
        give different widths.

        blocks: that may be left out, the first first (depth.order).

        Raises ValueError for shares or bits out of range, UnsupportedModelError where the model
        cannot be traced.
        """
        if (not all(0 < share <= 1 for share in shares)
            or not all(bit == FLOAT or 2 <= bit <= 8 for bit in bits)):
            raise ValueError(f"space: shares are {list(shares)}, bits {list(bits)}; expected "
                             f"shares above 0 and at most 1, bits from 2 to 8, or {FLOAT} for "
                             "float")
        genes: dict[str, tuple] = {}
        within: dict[str, tuple[str, ...]] = dict.fromkeys(blocks, ())
        for group in groups(model, example):
            multiple = 1 if group.unit == "head" else None
            widths = {channels.kept_width(group.channels, share, multiple=multiple): share
                      for share in sorted({*shares, 1.0}, reverse=True)}
            if not group.kept and len(widths) > 1:
                genes[group.layer] = tuple(width / group.channels for width in widths)
                for block in blocks:
                    if all(layer.startswith(f"{block}.") for layer in group.made_by):
                        within[block] = (*within[block], group.layer)
        if blocks:
            genes[DEPTH] = tuple(range(len(blocks) + 1))
        if len(set(bits)) > 1 or tuple(bits) != (FLOAT,):
            genes[BITS] = tuple(sorted({*bits, FLOAT}, reverse=True))
            if len(set(rounding)) > 1:
                genes[ROUNDING] = tuple(rounding)
        return cls(genes, within, **settings)

    @property
    def names(self) -> list[str]:
        """The genes in their order."""
        return list(self.genes)

    @property
    def inner(self) -> dict[str, tuple]:
        """The genes that are groups of channels."""
        return {name: options for name, options in self.genes.items()
                if name not in (DEPTH, BITS, ROUNDING)}

    @property
    def sizes(self) -> list[int]:
        """How many options each gene has."""
        return [len(options) for options in self.genes.values()]

    def __len__(self) -> int:
        return int(np.prod(self.sizes))

    def every(self) -> list[Plan]:
        """All plans."""
        return [self.reduced(plan) for plan in product(*map(range, self.sizes))]

    def reduced(self, plan: Sequence[int]) -> Plan:
        """The same plan in the one way of writing it: what is left out is not cut, what is not
        rounded has no way of rounding."""
        plan, names = list(plan), self.names
        for gene in (gene for block in self.left_out(plan) for gene in self.blocks[block]):
            plan[names.index(gene)] = 0
        if ROUNDING in names and plan[names.index(BITS)] == 0:
            plan[names.index(ROUNDING)] = 0
        return tuple(plan)

    def left_out(self, plan: Sequence[int]) -> list[str]:
        """The blocks that a plan leaves out."""
        return list(self.blocks)[:plan[self.names.index(DEPTH)]] if DEPTH in self.genes else []

    def chosen(self, plan: Plan) -> dict[str, Any]:
        """The option of each gene."""
        return {name: options[place]
                for (name, options), place in zip(self.genes.items(), plan, strict=True)}

    def steps(self, plan: Plan) -> dict[str, Step]:
        """The plan as named steps, which recipe.dump writes and `compress` runs.

        Example: `recipe.dump(space.steps(found.plan))`
        """
        chosen = self.chosen(plan)
        steps: dict[str, Step] = {}
        shares = {name: chosen[name] for name in self.inner if chosen[name] < 1}
        if shares:
            steps["prune"] = Prune(shares=shares, seed=self.seed)
        if left_out := self.left_out(plan):
            steps["drop"] = Drop(left_out)
        if steps and self.recovery:
            steps["distil"] = Distil(Recipe(epochs=1, batch_size=self.batch_size,
                                            learning_rate=self.learning_rate),
                                     examples=self.recovery * self.batch_size, validation=1,
                                     seed=self.seed)
        bits = chosen.get(BITS, FLOAT)
        if bits != FLOAT:
            steps["quantize"] = (Quantize(bits=8, calibrator=self.calibrator, seed=self.seed)
                                 if bits == 8 else
                                 Mix(bytes=bits / 8, widths=(4, 8) if bits >= 4 else (2, 4, 8),
                                     calibrator=self.calibrator, seed=self.seed))
            if chosen.get(ROUNDING, "nearest") != "nearest":
                steps["repair"] = Repair(chosen[ROUNDING])
        return steps

    def told(self) -> dict:
        """What tells one space from another, as JSON holds it."""
        return (asdict(self)
                | {"genes": {name: list(options) for name, options in self.genes.items()}})


@dataclass(frozen=True, eq=False)
class Forecast:
    """What each option is expected to cost, measured on the model as it came.

    harm: gene, option, distance (of the outputs) of each option alone. times: share, bits, layer,
    latency_ms. genes_of: of each layer the genes that its time depends on.

    Example: `Forecast.read("out/forecast", space).latency(plan)`
    """

    space: Space
    harm: pd.DataFrame
    times: pd.DataFrame
    genes_of: Mapping[str, tuple[str, ...]]

    def write(self, path: Path | str) -> None:
        """Leave PATH_harm.csv, PATH_times.csv and PATH_genes.json, which `read` takes."""
        self.harm.to_csv(f"{path}_harm.csv", index=False)
        self.times.to_csv(f"{path}_times.csv", index=False)
        Path(f"{path}_genes.json").write_text(json.dumps(self.genes_of, indent=1))

    @classmethod
    def read(cls, path: Path | str, space: Space) -> "Forecast":
        """What `write` left. Raises FileNotFoundError where a file is missing."""
        genes = {layer: tuple(names)
                 for layer, names in json.loads(Path(f"{path}_genes.json").read_text()).items()}
        return cls(space, pd.read_csv(f"{path}_harm.csv"), pd.read_csv(f"{path}_times.csv"), genes)

    @cached_property
    def harms(self) -> list[np.ndarray]:
        """Gene by gene the distance that each option alone causes."""
        known = self.harm.set_index(["gene", "option"]).distance
        return [np.array([float(known.get((name, place), 0.0)) for place in range(len(options))])
                for name, options in self.space.genes.items()]

    def lost(self, plan: Plan) -> float:
        """The sum of the distances that the plan's options cause: an order of plans, no
        accuracy."""
        return float(sum(harm[place] for harm, place in zip(self.harms, plan, strict=True)))

    def latency(self, plan: Plan) -> float:
        """The time of a plan's file as a share of the model's as it came, layer by layer from the
        table."""
        layers = self._layers[self._rounded(self.space.chosen(plan).get(BITS, FLOAT))]
        places, gone = (dict(zip(self.space.names, plan, strict=True)),
                        tuple(f"{block}." for block in self.space.left_out(plan)))
        return float(sum(fixed + sum(times[places[gene]] for gene, times in parts.items())
                         for layer, (fixed, parts) in layers.items()
                         if not (gone and layer.startswith(gone))))

    def parts(self, bits: int) -> tuple[float, dict[str, np.ndarray]]:
        """The time at so many bits as a sum: what no gene changes, and of each gene's options its
        part of the layers' times, that of depth as if nothing was cut."""
        return self._parts[self._rounded(bits)]

    def _rounded(self, bits: int) -> int:
        return FLOAT if bits == FLOAT else 8

    @cached_property
    def _parts(self) -> dict[int, tuple[float, dict[str, np.ndarray]]]:
        made = {}
        for bits, layers in self._layers.items():
            parts = {name: np.zeros(len(options)) for name, options in self.space.genes.items()
                     if name not in (BITS, ROUNDING)}
            for layer, (alone, own) in layers.items():
                for gene, times in own.items():
                    parts[gene] += times
                for place, block in enumerate(self.space.blocks):
                    if layer.startswith(f"{block}."):
                        parts[DEPTH][place + 1:] -= alone + sum(times[0] for times in own.values())
            made[bits] = sum(alone for alone, _ in layers.values()), parts
        return made

    @cached_property
    def _layers(self) -> dict[int, dict[str, tuple[float, dict[str, np.ndarray]]]]:
        """By bits and layer, as shares of the whole model's time: what no gene changes, and each
        gene's options' part."""
        table = self.times.set_index(["bits", "layer", "share"]).latency_ms.sort_index()
        whole = table[FLOAT].xs(1.0, level="share").sum()
        made: dict[int, dict] = {}
        for (bits, layer), curve in table.groupby(level=["bits", "layer"]):
            genes = self.genes_of.get(layer, ()) if layer != "(rest)" else tuple(self.space.inner)
            shares, times = (curve.index.get_level_values("share").to_numpy(),
                             curve.to_numpy() / whole)
            made.setdefault(bits, {})[layer] = (0.0 if genes else float(times[shares == 1.0][0]), {
                gene: np.interp(self.space.genes[gene], shares, times) / len(genes)
                for gene in genes})
        return made


def forecast(subject: Subject, space: Space, judging: Split, *, folder: Path,
             runs: int = 30) -> Forecast:
    """Measure what each option of `space` alone does to the answers on `judging` and to the time of
    each layer.

    folder: for the ONNX files that are timed. Raises as sensitivity.scan and onnx.export do.

    Example: `space.forecast(subject, genes, task.validation.subset(500), folder=Path("exports"))`
    """
    model, example = subject.model, subject.example
    method, rows = channels.silencing(model, example=example), []
    inner = space.inner
    for share in sorted({option for options in inner.values() for option in options if option < 1}):
        layers = [name for name, options in inner.items() if share in options]
        curves = sensitivity.scan(model, judging, method, levels=[1 - share], layers=layers)
        rows += [{"gene": row.layer, "option": inner[row.layer].index(share),
                  "distance": row.distance}
                 for row in curves.itertuples()]
    seen = list(subject.task.validation.subset(100, seed=space.seed).batches(50))
    changed = {(DEPTH, place + 1): without_blocks(model, list(space.blocks)[:place + 1],
                                                  shared=True)
               for place in range(len(space.blocks))}
    changed |= {(BITS, place): quantize(model, seen, weights=Scheme(bits, granularity="channel"),
                                        calibrator=space.calibrator)
                for place, bits in enumerate(space.genes.get(BITS, ())) if bits != FLOAT}
    expected = _answers(model, judging)
    for (gene, place), other in files.progress(changed.items(), title="options", unit="option"):
        apart = (_answers(other, judging)
                 - expected).square().sum(1) / expected.square().sum(1).clamp_min(1e-12)
        rows.append({"gene": gene, "option": place, "distance": apart.mean().item()})
    harm = pd.DataFrame(rows, columns=["gene", "option", "distance"])
    return Forecast(space, harm, _times(model, example, space, folder, seen, runs),
                    _genes_of(model, example, inner))


def _answers(model: nn.Module, split: Split) -> torch.Tensor:
    with evaluating(model), torch.inference_mode():
        return torch.cat([answer(call(model, inputs)).flatten(1).float()
                          for inputs, _ in split.batches(100)])


def _times(model: nn.Module, example, space: Space, folder: Path, seen: list,
           runs: int) -> pd.DataFrame:
    """Each layer's time in copies whose groups are all cut to one share, in float and, where the
    space rounds, in 8 bits."""
    inner = space.inner
    shares = sorted({option for options in inner.values() for option in options} | {1.0},
                    reverse=True)
    scores, rows = channels.score(model, "l1", example=example), []
    for share in files.progress(shares, title="times", unit="share"):
        removed = channels.fewest(scores,
                                  {name: min(options, key=lambda option: abs(option - share))
                                   for name, options in inner.items()} if share < 1 else {})
        small = channels.remove(model, removed, example=example) if removed else model
        copies = {FLOAT: small} | ({8: quantize(small, seen)} if BITS in space.genes else {})
        for bits, copied in copies.items():
            path = onnx.export(copied, example, Path(folder) / f"{share:.3f}-{bits}.onnx")
            found = latency.by_layer({"": path}, example, runs=runs)
            rows += [{"share": share, "bits": bits, "layer": row.layer,
                      "latency_ms": row.latency_ms}
                     for row in found.itertuples()]
    return pd.DataFrame(rows)


def _genes_of(model: nn.Module, example, inner: Mapping) -> dict[str, tuple[str, ...]]:
    """Of each layer the genes whose channels it makes or reads."""
    known: dict[str, set[str]] = {name: set() for name in named(model)}
    for group in groups(model, example):
        for layer in (*group.made_by, *group.read_by):
            if group.layer in inner:
                known.setdefault(layer, set()).add(group.layer)
    return {layer: tuple(sorted(genes)) for layer, genes in known.items()}
