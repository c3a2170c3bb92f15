"""Which layer gets which number format: the least harm within a budget of bytes or milliseconds, by
an integer programme.

The harm of each layer's own error is measured (sensitivity.scan with quantization.quantizing). A
budget of time also has to pay where formats meet: what passes between a layer in 8 bits and one in
float is converted, and laid out anew.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from workbench.batches import Inputs, rows
from workbench.graph.kinds import is_float, is_layer
from workbench.graph.layers import named
from workbench.graph.norms import fold_batchnorm
from workbench.graph.running import Runner
from workbench.measures import sensitivity
from workbench.methods.quantization import CALIBRATORS, quantize, quantizing
from workbench.numbers.grid import Scheme
from workbench.subjects.subject import Count, Share, Subject

FLOAT = 32  # the bits of a layer that is not rounded


def choices(curves: pd.DataFrame, model: nn.Module) -> pd.DataFrame:
    """What `allocate` chooses from: layer, bits, loss, size_bytes (of the packed weights), one row
    per layer and width.

    curves: sensitivity.scan with `quantization.quantizing` as its method. loss: the distance of the
    logits that the layer alone causes; errors of many layers add up nearly, which lost answers do
    not.

    Example: `choices(curves, model)`
    """
    sizes = {name: layer.weight.numel() for name, layer in named(model).items()}
    bits = (8 * curves.level).round().astype(int)
    return pd.DataFrame({"layer": curves.layer, "bits": bits, "loss": curves.distance,
                         "size_bytes": curves.layer.map(sizes) * bits / 8})


def borders(model: nn.Module, example: Inputs) -> pd.DataFrame:
    """What passes from layer to layer for one example: layer, reader, numbers, one row per pair,
    readers in their order.

    Besides layers there are "(inputs)" and the nodes where several values meet, "(add)", "(add_1)",
    ....

    Raises UnsupportedModelError where the model cannot be traced.

    Example: `borders(model, x)`
    """
    graph = Runner(model, example)
    feed = graph.feed(rows(example, slice(0, 1)))
    # made_by: of each tensor the layer or joint that it comes from
    values, made_by, lines = {}, {}, []
    with torch.no_grad():
        for i, node in enumerate(graph.nodes[:-1]):
            inputs = {read: values[read].numel() for read in node.all_input_nodes
                      if read in made_by}
            graph.step(i, values, feed)
            layer = is_layer(node, graph.modules)
            if layer or len(inputs) > 1:
                made_by[node] = node.target if layer else f"({node.name})"
                lines += [(made_by[read], made_by[node], numbers)
                          for read, numbers in inputs.items()]
            elif node.op == "placeholder" and is_float(node):
                made_by[node] = "(inputs)"
            elif inputs and isinstance(values.get(node), Tensor):
                made_by[node] = made_by[next(iter(inputs))]
    return pd.DataFrame(lines, columns=["layer", "reader", "numbers"])


def crossing(borders: pd.DataFrame, rounded: Collection[str]) -> int:
    """How many numbers change format for one example where the layers `rounded` are in 8 bits and
    the others float.

    What a rounded layer puts out or reads is stored as integers, as quantization.quantize has it;
    several values meet as integers where they and their result are stored so.

    Example: `crossing(allocation.borders(model, x), ["conv1"]) > 0`
    """
    rounded = set(rounded)
    # what lies in memory as integers
    stored = rounded | set(borders.layer[borders.reader.isin(rounded)])
    joints = {name: set(part.layer) for name, part in borders.groupby("reader") if _joint(name)}
    # what computes with them
    integer = rounded | {name for name, inputs in joints.items() if {name, *inputs} <= stored}
    made = borders[borders.layer.isin(stored - integer)].groupby("layer").numbers.max().sum()
    read = borders[borders.layer.isin(stored) & ~borders.reader.isin(integer)].numbers.sum()
    return int(made + read)


def allocate(choices: pd.DataFrame, budget: float, *, cost: str = "size_bytes",
             borders: pd.DataFrame | None = None) -> dict[str, int]:
    """Bits per layer: the least sum of `loss` whose sum of `cost` is at most `budget`, by an
    integer programme (HiGHS).

    choices: layer, bits, loss and the column `cost` (bytes, or milliseconds measured), one row per
    layer and width; 32 bits are float. borders: those of the model, with the same column for what
    it costs to convert what passes; counted where it is converted, as `crossing` does. On a tie the
    costlier format wins: a measured loss of zero is only an estimate.

    Raises ValueError where the budget is below the cheapest choice, or a loss or cost is NaN.

    Example: `bits = allocation.allocate(allocation.choices(curves, model), budget=140_000)`
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    empty = choices[choices[["loss", cost]].isna().any(axis=1)]
    if len(empty):
        raise ValueError(f"allocate: the loss or {cost} of layer {empty.layer.iloc[0]} is NaN")
    least = choices.groupby("layer")[cost].min().sum()
    if budget < least:
        raise ValueError(f"allocate: budget is {budget:g} {cost}, the cheapest widths need "
                         f"{least:g}; give at least that")
    layers = list(dict.fromkeys(choices.layer))
    one_each = np.array([(choices.layer == name).to_numpy(float) for name in layers])
    converting, prices = _converting(choices, borders, cost)
    extra = len(prices)
    share = [choices[column].to_numpy() / max(choices[column].max(), 1e-300)
             for column in ("loss", cost)]
    # far above the solver's absolute tolerances, small losses too
    objective = 1e6 * (share[0] - 1e-7 * share[1])
    spent = np.concatenate([choices[cost].to_numpy(), prices])
    found = milp(np.pad(objective, (0, extra)),
                 integrality=np.repeat([1, 0], [len(choices), extra]), bounds=Bounds(0, 1),
                 options={"mip_rel_gap": 0.0},
                 constraints=[LinearConstraint(np.pad(one_each, ((0, 0), (0, extra))), 1, 1),
                              LinearConstraint(spent[None], 0, budget), *converting])
    if found.x is None:
        raise ValueError(f"allocate: no choice of formats stays within {budget:g} {cost} "
                         f"({found.message}); give more")
    chosen = choices[np.round(found.x[:len(choices)]) == 1]
    return dict(zip(chosen.layer, chosen.bits.astype(int), strict=True))


def _converting(choices: pd.DataFrame, borders: pd.DataFrame | None,
                cost: str) -> tuple[list, np.ndarray]:
    """The programme's further variables, their prices and what binds them: for each value whether
    it is stored as integers and whether it is converted to them, for each joint whether it computes
    with them, for each border whether what passes is converted back. Given the layers' formats they
    can only be 0 or 1, as in `crossing`."""
    if borders is None or borders.empty:
        return [], np.zeros(0)
    from scipy.optimize import LinearConstraint

    layers, names = set(choices.layer), list(dict.fromkeys([*borders.layer, *borders.reader]))
    unknown = [name for name in names if not _joint(name) and name not in layers]
    if unknown:
        raise ValueError(f"allocate: borders name the layer {unknown[0]}, for which there is no "
                         "choice")
    n, v, rows = len(choices), len(names), []
    size = n + 3 * v + len(borders)
    one = np.eye(size)
    stored, made, joint = ({name: one[n + k * v + i] for i, name in enumerate(names)}
                           for k in range(3))
    rounded = {name: np.pad(((choices.layer == name) & (choices.bits < FLOAT)).to_numpy(float),
                            (0, size - n)) for name in names}
    integer = {name: joint[name] if _joint(name) else rounded[name] for name in names}
    prices = np.zeros(size - n)
    for i, name in enumerate(names):
        readers = borders.reader[borders.layer == name]
        reasons = [rounded[name], *(rounded[reader] for reader in readers)]
        rows += [stored[name] - reason for reason in reasons] + [sum(reasons) - stored[name]]
        rows += [made[name] - stored[name] + integer[name], stored[name] - joint[name]]
        rows += [-joint[name]] if name == "(inputs)" else []
        prices[v + i] = borders[cost][borders.layer == name].max() if len(readers) else 0.0
    for i, (layer, reader,
            price) in enumerate(zip(borders.layer, borders.reader, borders[cost], strict=True)):
        rows += [one[n + 3 * v + i] - stored[layer] + integer[reader],
                 stored[layer] - joint[reader]]
        prices[3 * v + i] = price
    return [LinearConstraint(np.array(rows), 0, np.inf)], prices


def _joint(name: str) -> bool:
    return name.startswith("(")


@dataclass(frozen=True)
class Mix:
    """The step of a plan that gives each layer's weights a width of their own, so that they take
    the share `bytes` of what they take at 8 bits; activations at 8 bits.

    The harm of each layer at each of `widths` is measured on `examples` of the validation split,
    which also calibrate.

    Example: `Mix(bytes=0.5, widths=[4, 8])`
    """

    needs_examples: ClassVar[bool] = True
    bytes: Share = 0.5
    widths: tuple[int, ...] | list[int] = (2, 3, 4, 6, 8)
    calibrator: Literal[CALIBRATORS] = "minmax"  # type: ignore[valid-type]
    examples: Count = 300
    seed: Count = 0

    def __post_init__(self):
        if not self.widths or not all(2 <= bits <= 8 for bits in self.widths):
            raise ValueError(f"mix: widths are {list(self.widths)}, expected numbers of bits from "
                             "2 to 8")

    def apply(self, subject: Subject) -> Subject:
        """The quantised subject; in `made` the float model and what calibrated, for repairs, and
        the widths as `bits`."""
        validation = subject.task.validation.subset(self.examples, seed=self.seed)
        folded, seen = fold_batchnorm(subject.model, subject.example), list(validation.batches(50))
        curves = sensitivity.scan(folded, validation, quantizing(folded),
                                  levels=[bits / 8 for bits in sorted({*self.widths, 8})])
        options = choices(curves, folded)
        bits = allocate(options, self.bytes * options[options.bits == 8].size_bytes.sum())
        made = quantize(folded, seen,
                        weights={name: Scheme(b, granularity="channel")
                                 for name, b in bits.items()}, calibrator=self.calibrator)
        return subject.with_model(made, float=folded, calibration=seen, bits=bits)
