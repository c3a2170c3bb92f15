"""Cutting a transformer without training it: which heads and neurons go is read from gradients,
what stays is rescaled.

The channels of each group (heads of an attention, neurons of a feed-forward layer, channels of a
convolution) get a mask m, one number each, all ones. To second order, setting some of them to zero
raises the loss by (1 - m)^T F (1 - m) / 2, F the Fisher information of the mask, from gradients of
single examples. Three parts: the channels with the least F_ii for the multiply-accumulates that
they cost go; within a group they are exchanged while that lowers the sum with the terms between
channels; and what stays is scaled, layer after layer, so that the layer behind it puts out what it
did (least squares).

Source: Kwon et al. 2022 (arXiv 2204.09656).
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from workbench import files
from workbench.batches import Batch, Inputs, call, count
from workbench.errors import UnsupportedModelError
from workbench.graph import cutting
from workbench.graph.coupling import groups
from workbench.graph.group import Group
from workbench.graph.layers import evaluating, matching
from workbench.graph.running import Runner, load
from workbench.subjects.objectives import Objective
from workbench.subjects.subject import Count, Globs, Share, Subject

# a scale beyond which the least squares are not believed; the channel then stays as it is
FARTHEST = 10.0
RIDGE = 1e-3  # of the mean diagonal, added to it


def prune(model: nn.Module, batches: Iterable[Batch], *, macs: float, example: Inputs,
          objective: Objective | None = None, keep: str | Sequence[str] = (), multiple: int = 16,
          exchange: bool = True, rescale: bool = True,
          known_slopes: Mapping[str, Tensor] | None = None) -> nn.Module:
    """`model` without the heads, neurons and channels whose loss the Fisher information says is
    least, nothing trained.

    batches: examples with what is right for them, a few hundred or more. macs: fraction of the
    multiply-accumulates that may stay. objective: whose loss it is, one class an example where not
    given. keep: globs of groups left whole. multiple: of the widths of neurons and channels that
    stay, heads aside. exchange, rescale: the second and the third part. known_slopes: what `slopes`
    found for this model, these batches and this objective, where several fractions are tried.

    Raises ValueError for a fraction outside (0, 1] or one that cannot be reached,
    UnsupportedModelError where nothing can go.

    Example: `small = fisher.prune(model, list(task.train.batches(32)), macs=0.7,
    example=task.example)`
    """
    if not 0 < macs <= 1:
        raise ValueError(f"macs is {macs}, expected a fraction that stays, more than 0 and at most "
                         "1")
    seen = list(batches)
    known = _free(model, example)
    for name in matching(known, keep, what="keep: ") if keep else ():
        del known[name]
    if not known:
        raise UnsupportedModelError(f"{type(model).__name__} has no heads, neurons or channels "
                                    "that can go")
    found = known_slopes or gradients(model, seen, known, objective or Objective())
    removed = chosen(model, known, found, macs=macs, example=example, multiple=multiple)
    if exchange:
        removed = {name: exchanged(found[name], places) for name, places in removed.items()}
    source = rescaled(model, removed, known, seen, example) if rescale else model
    return cutting.verified(source, cutting.without(source, removed, known), removed, known,
                            example)


def slopes(model: nn.Module, batches: Iterable[Batch], *, example: Inputs,
           objective: Objective | None = None) -> dict[str, Tensor]:
    """The slope of each example's loss along the mask of each channel that may go, float32
    (examples, channels), by group.

    Example: `prune(model, batches, macs=0.7, example=task.example, known_slopes=slopes(model,
    batches, example=task.example))`
    """
    return gradients(model, list(batches), _free(model, example), objective or Objective())


def _free(model: nn.Module, example: Inputs) -> dict[str, Group]:
    """The groups whose channels may go, by name."""
    return {group.layer: group for group in groups(model, example) if not group.kept}


def gradients(model: nn.Module, batches: Sequence[Batch], known: Mapping[str, Group],
              objective: Objective) -> dict[str, Tensor]:
    """The slope of each example's loss along each channel's mask, float32 (examples, channels), by
    group.

    Example: `gradients(model, batches, {group.layer: group for group in coupling.groups(model,
    x)[:1]}, task.train.objective)`
    """
    found: dict[str, list[Tensor]] = {name: [] for name in known}
    work = copy.deepcopy(model).eval().requires_grad_(False)
    for batch in files.progress(batches, title="Fisher information", unit="batch"):
        size = count(batch.inputs)
        masks = {name: torch.ones(size, group.channels, requires_grad=True)
                 for name, group in known.items()}
        with ExitStack() as hooks, torch.enable_grad():
            for name, group in known.items():
                hooks.enter_context(_masked(work, group, masks[name]))
            logits = objective.read(call(work, batch.inputs), batch.targets)
            slopes = torch.autograd.grad(size * objective.loss(logits, batch.targets),
                                         list(masks.values()))
        for name, slope in zip(masks, slopes, strict=True):
            found[name].append(slope)
    return {name: torch.cat(parts) for name, parts in found.items()}


def chosen(model: nn.Module, known: Mapping[str, Group], slopes: Mapping[str, Tensor], *,
           macs: float, example: Inputs, multiple: int = 16) -> dict[str, list[int]]:
    """The channels to remove, by group: those of the least information for their cost, until `macs`
    of the whole is left.

    Raises ValueError where so little cannot be reached.

    Example: `chosen(model, known, slopes(model, batches, example=x, objective=task.objective),
    macs=0.8, example=x)`
    """
    counts = cutting.costs(model, example, of_macs=True)
    whole = sum(both for _, both in counts.values())

    def left(removed: Mapping[str, Sequence[int]]) -> float:
        kept = cutting.shares(model, [(known[name], places) for name, places in removed.items()])
        return (sum(both * out * inward for name, (_, both) in counts.items()
                    for out, inward in [kept.get(name, (1, 1))]) / whole)

    rows = []
    for name in known:
        price = max(1 - left({name: [0]}), 1e-12)
        rows += [(float(worth) / price, name, place)
                 for place, worth in enumerate(slopes[name].pow(2).mean(0))]
    order = sorted(rows)

    def first(number: int) -> dict[str, list[int]]:
        taken: dict[str, list[int]] = {}
        for _, name, place in order[:number]:
            taken.setdefault(name, []).append(place)
        return {name: _rounded(places, known[name], multiple) for name, places in taken.items()}

    low, high = 0, len(order)
    if left(first(high)) > macs:
        raise ValueError(f"{macs:.0%} of the multiply-accumulates cannot be reached: "
                         f"{left(first(high)):.0%} stay when all that may go is gone; raise macs, "
                         "or keep fewer layers")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left(first(middle)) <= macs else (middle + 1, high)
    return {name: places for name, places in first(low).items() if places}


def _rounded(places: list[int], group: Group, multiple: int) -> list[int]:
    """As many of these, which are in the order of their information, as leave a multiple of
    `multiple`, or one head."""
    whole = 1 if group.unit == "head" else min(multiple, group.channels)
    stay = -(-max(group.channels - len(places), 1) // whole) * whole
    return places[:max(group.channels - stay, 0)]


def exchanged(slopes: Tensor, places: Sequence[int]) -> list[int]:
    """As many channels as `places`, one after the other exchanged for one that stays where that
    lowers the sum of F over all pairs that go, F = slopes^T slopes / examples.

    Example: `exchanged(torch.randn(100, 8), [0, 3])`
    """
    information = (slopes.T @ slopes / len(slopes)).double().numpy()
    gone = np.zeros(len(information), dtype=bool)
    gone[list(places)] = True
    pull = information[:, gone].sum(1)  # of all that go on each channel
    for out in places:
        change = (2 * (pull - information[:, out]) + information.diagonal() - 2 * pull[out]
                  + information[out, out])
        change[gone] = 0.0
        best = int(change.argmin())
        if change[best] < 0:
            gone[out], gone[best] = False, True
            pull += information[:, best] - information[:, out]
    return np.flatnonzero(gone).tolist()


def rescaled(model: nn.Module, removed: Mapping[str, Sequence[int]], known: Mapping[str, Group],
             batches: Sequence[Batch], example: Inputs) -> nn.Module:
    """A copy in which what reads a group's channels scales those that stay so that it puts out what
    it did before any went.

    Group after group, in the order of execution, each seeing what those before it leave. The scales
    lie in the weights that read the channels. Where one is beyond 10, the group stays as it was.

    Example: `rescaled(model, {}, known, batches, x)`
    """
    new = cutting.put_in(model, cutting.silenced(model, removed, known))
    readers = {name: next(iter(known[name].read_by.items())) for name, places in removed.items()
               if places and len(known[name].read_by) == 1}
    readers = {name: pair for name, pair in readers.items()
               if isinstance(model.get_submodule(pair[0]), nn.Linear)}
    before = _reads(model, [reader for reader, _ in readers.values()], batches)
    walk = _Walk(new, example, batches)
    for name, (reader, at) in sorted(readers.items(),
                                     key=lambda pair: walk.graph.place[pair[1][0]]):
        gone = set(removed[name])
        stay = at[[channel for channel in range(len(at)) if channel not in gone]]
        seen, wanted = walk.to(reader), before.pop(reader) @ model.get_submodule(reader).weight.T
        scales = _scales(seen[:, stay.flatten()], wanted,
                         new.get_submodule(reader).weight[:, stay.flatten()], len(stay))
        if scales is not None:
            new.get_submodule(reader).weight.data[:,
                                                  stay.flatten()] *= scales.repeat_interleave(
                                                      at.shape[1])
    restored = {name: module for name, module in new.named_modules()
                if any(name in group.read_by for group in known.values())}
    # what is silent stays in the copy, for `without` to take out
    for name, layer in restored.items():
        silent = layer.weight == 0
        layer.weight.data = torch.where(silent, model.get_submodule(name).weight, layer.weight)
    return new


@torch.no_grad()
def _scales(seen: Tensor, wanted: Tensor, weight: Tensor, channels: int) -> Tensor | None:
    """The scale of each channel, float32 (channels,), with which `seen` (rows, columns) times
    `weight` (outputs, columns) comes nearest to `wanted` (rows, outputs); columns lie channel by
    channel. None where the scales are not to be believed."""
    parts = seen.shape[1] // channels
    square = ((seen.T @ seen) * (weight.T @ weight)).double().view(channels, parts, channels,
                                                                   parts).sum((1, 3))
    product = (seen * (wanted @ weight)).sum(0).double().view(channels, parts).sum(1)
    drawn = RIDGE * square.diagonal().mean()  # towards 1
    scales = torch.linalg.solve(square + drawn * torch.eye(channels, dtype=torch.float64),
                                product + drawn)
    return scales.float() if scales.abs().max() <= FARTHEST else None


@torch.no_grad()
def _reads(model: nn.Module, layers: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """What these linear layers read, (rows, features) each, where there is a token."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [model.get_submodule(name)
               .register_forward_pre_hook(lambda _module, given, name=name: seen[name]
                                          .append(given[0]))
               for name in seen]
    try:
        with evaluating(model):
            for batch in batches:
                call(model, batch.inputs)
                for rows in seen.values():
                    rows[-1] = _there(rows[-1], batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def _there(rows: Tensor, inputs: Inputs) -> Tensor:
    """What a layer reads as (rows, features), without what stands for padding."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return rows[mask.bool()] if mask is not None and rows.dim() == 3 else rows.flatten(0, -2)


class _Walk:
    """A model walked through once, from layer to layer, with all batches side by side; behind where
    it stands, its weights may still change."""

    def __init__(self, model: nn.Module, example: Inputs, batches: Sequence[Batch]):
        self.graph, self.batches, self.now = Runner(model, example), batches, 0
        self.layers = {name: module for name, module in model.eval().named_modules()
                       if isinstance(module, nn.Linear)}
        self.values: list[dict] = [{} for _ in batches]

    @torch.no_grad()
    def to(self, layer: str) -> Tensor:
        """What this layer reads, (rows, features), once all before it are computed."""
        place, rows = self.graph.place[layer], []
        for batch, values in zip(self.batches, self.values, strict=True):
            feed = self.graph.feed(batch.inputs)
            for i in range(self.now, place):
                self.graph.step(i, values, feed, self.layers)
            rows.append(_there(load(self.graph.nodes[place].args[0], values), batch.inputs))
        self.now = place
        return torch.cat(rows)


@contextmanager
def _masked(model: nn.Module, group: Group, mask: Tensor):
    """The model with what reads the group's channels seeing them times `mask` (examples,
    channels)."""
    handles = []
    for name, at in group.read_by.items():
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(_times(mask, at,
                                                              isinstance(layer, nn.Linear))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _times(mask: Tensor, at: Tensor, linear: bool) -> Callable:
    def hook(_module: nn.Module, given: tuple) -> tuple:
        inputs, axis = given[0], given[0].dim() - 1 if linear else 1
        channels, parts = at.shape
        there = at.flatten() >= 0
        every = torch.ones(len(inputs), inputs.shape[axis]).index_copy(
            1, at.flatten()[there], mask.repeat_interleave(parts, 1)[:, there])
        shape = [len(inputs), *[1] * (inputs.dim() - 1)]
        shape[axis] = inputs.shape[axis]
        return (inputs * every.view(shape), *given[1:])

    return hook


@dataclass(frozen=True)
class Fisher:
    """The step of a plan that cuts by Fisher information: `macs` stay, `examples` training examples
    tell (all where 0).

    keep: globs of layers left whole. exchange, rescale: as `prune` has them.

    Example: `Fisher(macs=0.7, examples=64).apply(Subject(model, task)).model`
    """

    needs_examples: ClassVar[bool] = True
    macs: Share
    examples: Count = 512
    keep: Globs = ()  # type: ignore[assignment]  # a default can be no list
    multiple: Count = 16
    exchange: bool = True
    rescale: bool = True
    seed: Count = 0
    batch_size: Count = field(default=32)

    def apply(self, subject: Subject) -> Subject:
        """The subject with its model cut."""
        train = subject.task.train
        if not len(train):
            raise ValueError(f"{subject.task.name} has no training {subject.task.objective.unit}s, "
                             "whose gradients fisher reads")
        few = train.subset(self.examples, seed=self.seed) if self.examples else train
        model = prune(subject.model, few.batches(self.batch_size), macs=self.macs,
                      example=subject.example, objective=subject.task.objective, keep=self.keep,
                      multiple=max(self.multiple, 1), exchange=self.exchange, rescale=self.rescale)
        return subject.with_model(model)
