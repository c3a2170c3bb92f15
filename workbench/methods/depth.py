"""Shallower networks: whole blocks left out, those first without which the answers change least.

A network of residual blocks, or of transformer layers, still runs without some of them (Veit et al.
2016, arXiv 1605.06431; Fan et al. 2019, arXiv 1909.11556; Sajjad et al. 2020, arXiv 2004.03844).
Fewer layers are faster where narrower ones may not be: in int8 on ONNX Runtime a ResNet-20 with
half its multiply-accumulates takes as long as the whole one (`42_search`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from workbench import files
from workbench.batches import Batch, Inputs, answer, call, pairs
from workbench.errors import UnsupportedModelError, listed
from workbench.graph.depth import blocks, shape_without, without_blocks
from workbench.graph.layers import evaluating, matching
from workbench.subjects.subject import Count, Globs, Share, Subject


def drop(model: nn.Module, names: Sequence[str], *, example: Inputs) -> nn.Module:
    """A copy of `model` without these blocks, seen to run.

    Raises ValueError for a name that is no block, UnsupportedModelError where the network does not
    run without them.

    Example: `small = depth.drop(model, ["layer1.2", "layer2.2"], example=task.example)`
    """
    if shape_without(model, names, example) != shape_without(model, [], example):
        raise UnsupportedModelError(f"{type(model).__name__} does not run without {listed(names)}, "
                                    "or answers in another shape; keep one of them")
    return without_blocks(model, names).to(memory_format=torch.channels_last)


def order(model: nn.Module, batches: Iterable[Batch], *, among: Sequence[str] | None = None,
          count: int | None = None) -> pd.DataFrame:
    """Which blocks to leave out, one after the other: each time the one whose absence moves the
    answers least.

    One row a step: block, distance (relative L2 of the answers without it and those before it, to
    the whole network's), params (of the block). batches: of inputs; labels are not looked at.
    among: the blocks to choose from, all that can go by default. count: how many steps, by default
    until one block is left. It costs the blocks times the steps passes over `batches`.

    Raises UnsupportedModelError where no block can go.

    Example: `depth.order(model, task.validation.subset(200).batches(), count=3)`
    """
    seen = [inputs for inputs, _ in pairs(batches)]
    left = list(among if among is not None else blocks(model, seen[0]))
    if not left:
        raise UnsupportedModelError(f"no block of {type(model).__name__} can be left out: without "
                                    "any of them it does not run, or answers in another shape; cut "
                                    "channels instead")
    whole, gone, rows = _answers(model, seen), [], []
    steps = range(min(count if count is not None else len(left) - 1, len(left)))
    for _ in files.progress(steps, title="blocks to leave out", unit="block"):
        distances = {name: _distance(model, [*gone, name], seen, whole) for name in left}
        best = min(distances, key=distances.get)
        if distances[best] == float("inf"):
            break
        rows.append({"block": best, "distance": distances[best],
                     "params": sum(p.numel() for p in model.get_submodule(best).parameters())})
        gone, left = [*gone, best], [name for name in left if name != best]
    return pd.DataFrame(rows, columns=["block", "distance", "params"])


def _answers(model: nn.Module, seen) -> torch.Tensor:
    with evaluating(model):
        return torch.cat([answer(call(model, inputs)).flatten(1) for inputs in seen])


def _distance(model: nn.Module, names: Sequence[str], seen, whole: torch.Tensor) -> float:
    try:
        found = _answers(without_blocks(model, names, shared=True), seen)
    # of the model's own forward, which may raise anything, or a list that would be empty
    except Exception:
        return float("inf")
    return ((found - whole).norm() / whole.norm().clamp_min(1e-12)).item()


@dataclass(frozen=True)
class Drop:
    """The step of a plan that leaves out whole blocks: those that match `blocks`, or, where `share`
    of them stays, those without which the answers on `examples` validation examples change least.
    Training behind it wins back what that costs.

    Example: `Drop(blocks="layer2.2").apply(Subject(model, task)).model`
    """

    blocks: Globs = ()  # type: ignore[assignment]  # a default can be no list
    share: Share | None = None
    examples: Count = 200
    seed: Count = 0

    def __post_init__(self):
        if bool(self.blocks) == (self.share is not None):
            raise ValueError("drop: give either blocks, names of what goes, or share, the fraction "
                             "of the blocks that stays")

    @property
    def needs_examples(self) -> bool:
        """Whether examples say which blocks go."""
        return self.share is not None

    def apply(self, subject: Subject) -> Subject:
        """The subject without these blocks, the order in which they went in `made["order"]`."""
        known = blocks(subject.model, subject.example)
        if self.blocks:
            names = matching(known, self.blocks, what="drop: ")
            return subject.with_model(drop(subject.model, names, example=subject.example))
        seen = subject.task.validation.subset(self.examples, seed=self.seed).batches(100)
        count = len(known) - max(round(self.share * len(known)), 1)
        found = order(subject.model, seen, among=known, count=count)
        if len(found) < count:
            raise UnsupportedModelError(f"drop: without {listed(found.block)} no other block can "
                                        "go; give a larger share")
        return subject.with_model(drop(subject.model, list(found.block), example=subject.example),
                                  order=found)
