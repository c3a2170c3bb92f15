"""Channel pruning: score channels, silence them in place, or cut them out into a new, smaller,
dense model.

Channels go by groups, those that can only go together: see graph.coupling. In a transformer a group
is the neurons of a feed-forward layer, or the heads of an attention.

Sources of the criteria: l1 Li et al. 2017 (arXiv 1608.08710); bn_gamma Liu et al. 2017 (arXiv
1708.06519); taylor Molchanov et al. 2019 (arXiv 1906.10771), |weight x gradient| instead of its
square; fpgm He et al. 2019 (arXiv 1811.00250), by the sum of distances to all other filters.
"""

import bisect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Literal

import pandas as pd
import torch
from annotated_types import Ge
from torch import nn

from workbench.batches import Batch, Inputs, call
from workbench.errors import UnsupportedModelError, listed
from workbench.graph import cutting
from workbench.graph.coupling import groups
from workbench.graph.criteria import each, gradients, of_filters
from workbench.graph.cutting import blocks, kept_width
from workbench.graph.kinds import BATCHNORM
from workbench.graph.layers import Change, Masked, macs_of, matching
from workbench.graph.norms import reestimate_batchnorm
from workbench.numbers.quantizers import quantizers
from workbench.subjects.objectives import Objective
from workbench.subjects.subject import Count, Globs, Removed, Share, Subject

CRITERIA = ("l1", "l2", "bn_gamma", "taylor", "fpgm", "random")
SCOPES = ("global", "layer")
NEAR = 0.95  # share of the target that blocks must keep; else narrower ones are tried


def score(model: nn.Module, criterion: str, *, example: Inputs,
          batches: Iterable[Batch] | None = None, objective: Objective | None = None,
          seed: int = 0) -> pd.DataFrame:
    """One row per channel of each group: layer (of the group), channel, score, group_size, kept,
    unit; higher is more important.

    A group's score sums those of the layers that make its channels, filter by filter: l1 sum |w|,
    l2 sqrt(sum w^2), fpgm sum of the distances to the other filters; bn_gamma |gamma| of the batch
    norms over it; taylor sum |w dL/dw| with L the loss of `objective` (one class an example) over
    `batches`; random by `seed`, as a control.

    Raises ValueError for an unknown criterion, NaN, or taylor without batches;
    UnsupportedModelError where bn_gamma finds no batch norm.

    Example: `channels.score(model, "l1", example=task.example)`
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; expected one of {', '.join(CRITERIA)}")
    if criterion == "taylor" and batches is None:
        raise ValueError("criterion 'taylor' needs batches=split.batches(), of inputs and targets")
    asked = objective or Objective()
    slopes = gradients(model, batches, lambda work, batch: asked.loss(
        asked.read(call(work, batch.inputs), batch.targets),
        batch.targets)) if criterion == "taylor" else {}
    draw = torch.Generator().manual_seed(seed)
    modules, rows = dict(model.named_modules()), []
    for group in groups(model, example):
        if criterion == "random":
            total = torch.rand(group.channels, generator=draw)
        elif criterion == "bn_gamma":
            scaling = {n: at for n, at in group.normed_by.items() if modules[n].weight is not None}
            if not scaling and not group.kept:
                raise UnsupportedModelError(f"layer {group.layer} has no batch norm with a scale "
                                            "for bn_gamma to rank by; use l1, or taylor")
            total = sum((each(modules[n].weight.detach().abs(), at) for n, at in scaling.items()),
                        torch.zeros(group.channels))
        else:
            total = sum(each(of_filters(modules[n], criterion, slopes.get(n)), at)
                        for n, at in group.made_by.items())
        if not torch.isfinite(total).all():
            raise ValueError(f"layer {group.layer}: criterion {criterion} gives NaN or infinity; "
                             "look at its weights")
        same = {"group_size": group.channels, "kept": group.kept is not None, "unit": group.unit}
        rows += [{"layer": group.layer, "channel": c, "score": float(s), **same}
                 for c, s in enumerate(total)]
    return pd.DataFrame(rows)


def select(scores: pd.DataFrame, ratio: float, *, scope: str = "global",
           multiple: int | Callable[[int], int] = 1,
           keep: str | Sequence[str] = ()) -> dict[str, list[int]]:
    """The channels to remove: the lowest-scored fraction `ratio` (0-1) of those that can go, by
    layer.

    scope "layer" takes the same fraction of each group; "global" ranks all together, each score
    divided by the mean of its group (so that a layer of large weights is not spared for that). At
    least one channel of each group stays, and the number that stays is rounded up to a multiple of
    `multiple`, a number or, heads aside, a function of the group's width (see `blocks`). keep:
    globs of layers left alone.

    Raises ValueError for a ratio outside [0, 1), NaN scores, an unknown scope, or a glob that
    matches nothing.

    Example: `channels.select(scores, 0.3)`
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}, expected 0 <= ratio < 1, the fraction that goes")
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; expected one of {', '.join(SCOPES)}")
    if scores.score.isna().any():
        row = scores[scores.score.isna()].iloc[0]
        raise ValueError(f"the score of channel {row.channel} of layer {row.layer} is NaN")
    free = scores[~scores.kept
                  & ~scores.layer.isin(matching(scores.layer.unique(), keep, what="keep: "))].copy()
    free["rank"] = free.score / free.groupby("layer").score.transform("mean").clip(lower=1e-12)
    if scope == "global":
        lowest = free.nsmallest(round(ratio * len(free)), "rank", keep="first")
        counts = lowest.groupby("layer").size()
    else:
        counts = (free.groupby("layer").size() * ratio).round().astype(int)
    chosen = {}
    for layer, part in free.groupby("layer", sort=False):
        stay = max(len(part) - int(counts.get(layer, 0)), 1)
        whole = (multiple if isinstance(multiple, int) else 1 if part.unit.iloc[0] == "head"
                 else multiple(len(part)))
        stay = min(math.ceil(stay / whole) * whole, len(part))
        lowest = part.score.to_numpy().argsort(kind="stable")[: len(part) - stay]
        chosen[layer] = sorted(part.channel.to_numpy()[lowest].tolist())
    return {layer: places for layer, places in chosen.items() if places}


def fewest(scores: pd.DataFrame, shares: Mapping[str, float], *,
           multiple: int | None = None) -> dict[str, list[int]]:
    """The channels to remove so that of each layer in `shares` that fraction stays, those with the
    highest scores.

    Widths are rounded to the nearest multiple of `multiple`, by default the runtime's own
    (`blocks`), at least one of them.

    Raises ValueError for an unknown layer, one whose channels must stay, or a share outside (0, 1].

    Example: `channels.remove(model, channels.fewest(scores, {"layer1.0.conv1": 0.5}),
    example=task.example)`
    """
    chosen, known = {}, dict(tuple(scores.groupby("layer", sort=False)))
    for layer, share in shares.items():
        if layer not in known or known[layer].kept.any():
            free = listed(name for name, part in known.items() if not part.kept.any())
            raise ValueError(f"shares: {layer!r} is no group of channels that can be cut; there "
                             f"are {free}")
        if not 0 < share <= 1:
            raise ValueError(f"shares: {layer} is {share}, expected a fraction that stays, more "
                             "than 0 and at most 1")
        part = known[layer]
        stay = kept_width(len(part), share, multiple=1 if part.unit.iloc[0] == "head" else multiple)
        lowest = part.score.to_numpy().argsort(kind="stable")[: len(part) - stay]
        chosen[layer] = sorted(part.channel.to_numpy()[lowest].tolist())
    return {layer: places for layer, places in chosen.items() if places}


def mask(model: nn.Module, removed: Mapping[str, Sequence[int]], *, example: Inputs) -> nn.Module:
    """A copy of the same shape in which the channels `removed` (by layer, as `select` gives) reach
    no other layer.

    It computes what `remove` computes: the weights that read a silenced channel are zero.

    Example: `mask(model, channels.select(scores, 0.1), example=x)`
    """
    return cutting.put_in(model,
                          cutting.silenced(model, removed,
                                           {group.layer: group
                                            for group in groups(model, example)}))


def remove(model: nn.Module, removed: Mapping[str, Sequence[int]], *, example: Inputs) -> nn.Module:
    """A new, dense, smaller model without the channels `removed` (by layer, as `select` gives), in
    eval mode.

    Verified by a forward pass: its outputs on `example` equal those of `mask` to 1e-4 of their
    norm.

    Raises ValueError for an unknown layer or a channel that it lacks; UnsupportedModelError, with
    the layer's name, where the cut model fails or computes something else.

    Example: `channels.remove(model, {"layer1.0.conv1": [0, 3]},
    example=x).layer1[0].conv1.out_channels == 14`
    """
    known = {group.layer: group for group in groups(model, example)}
    return cutting.verified(model, cutting.without(model, removed, known), removed, known, example)


def cut_to(model: nn.Module, scores: pd.DataFrame, *, example: Inputs, macs: float | None = None,
           params: float | None = None, share: float | None = None,
           cost: Callable[[nn.Module], float] | None = None, scope: str = "global",
           multiple: int | None = None, keep: str | Sequence[str] = (),
           batches: Iterable[Batch] | None = None) -> nn.Module:
    """`model` without as many of the lowest-scored channels as it takes to keep at most that share
    of its cost.

    macs, params: the fraction (0-1) of the multiply-accumulates of one example, or of the
    parameters, that may stay; share: that of `cost`, any function of a model, such as its measured
    latency. Exactly one of the three is given. The ratio of `select` is found by bisection to
    1/256; the cut model is built once, or once a step where `cost` wants one. multiple: of the
    widths that stay. By default the runtime's own, as far as they come near the target: blocks of
    16 channels, of at most half a group, or else of a quarter, an eighth, ...; 1 comes closest, and
    may be no faster than the whole model. batches: its batch norms take the statistics of these;
    without them they keep those of the whole network, with which it may answer no better than
    chance, and a warning says so.

    Raises ValueError where no selection reaches the target, for not exactly one target, and as
    `select` does.

    Example: `channels.cut_to(model, channels.score(model, "l1", example=x), macs=0.5, example=x,
    batches=seen)`
    """
    new = _cut_to(model, scores, example=example, macs=macs, params=params, share=share, cost=cost,
                  multiple=multiple, scope=scope, keep=keep)
    return _renormed(new, batches)


def _renormed(new: nn.Module, batches: Iterable[Batch] | None) -> nn.Module:
    """A cut model with the statistics of its own batch norms, or a warning that they are not."""
    if not any(isinstance(module, BATCHNORM) for module in new.modules()):
        return new
    if batches is not None:
        return reestimate_batchnorm(new, batches)
    warnings.warn("the batch norms of the cut model still hold the statistics of the whole one; "
                  "before it is judged give batches=, train it, or call "
                  "reparameterization.reestimate_batchnorm", stacklevel=3)
    return new


def _others(scores: pd.DataFrame, layers: str | Sequence[str],
            keep: str | Sequence[str]) -> list[str]:
    """The layers that stay whole: those that match `keep`, and those that `layers` do not name."""
    names = list(scores.layer.unique())
    chosen = set(matching(names, layers)) - set(matching(names, keep, what="keep: "))
    return [name for name in names if name not in chosen]


def _cut_to(model: nn.Module, scores: pd.DataFrame, *, example: Inputs, macs: float | None = None,
            params: float | None = None, share: float | None = None,
            cost: Callable[[nn.Module], float] | None = None, multiple: int | None = None,
            **chosen_by) -> nn.Module:
    targets = [target for target in (macs, params, share) if target is not None]
    if len(targets) != 1 or (share is None) != (cost is None):
        raise ValueError("give exactly one of macs, params, and share with cost: the fraction of "
                         "that cost which may stay")
    target = targets[0]
    if not 0 < target <= 1:
        raise ValueError(f"the fraction that stays is {target}, expected more than 0 and at most 1")
    known = {group.layer: group for group in groups(model, example)}
    counts = None if share is not None else cutting.costs(model, example, of_macs=macs is not None)
    whole = (cost(model) if counts is None
             else sum(outward + both for outward, both in counts.values()))

    def left(removed: Mapping[str, Sequence[int]]) -> float:
        if counts is None:
            return cost(cutting.without(model, removed, known)) / whole
        kept = cutting.shares(model, [(known[layer], places) for layer, places in removed.items()])
        return sum((outward + both * kept.get(name, (1, 1))[1]) * kept.get(name, (1, 1))[0]
                   for name, (outward, both) in counts.items()) / whole

    best: tuple[float, dict[str, list[int]] | None] = (0.0, None)
    least, sizes = 1.0, [partial(blocks, parts=parts) for parts in (2, 4, 8, 16)]
    for widths in (multiple,) if multiple else (*sizes, 1):
        chosen = cache(lambda step, widths=widths: select(scores, step / 256, multiple=widths,
                                                          **chosen_by))
        kept = cache(lambda step, chosen=chosen: left(chosen(step)))
        step = bisect.bisect_left(
            range(256), True,
            key=lambda step, kept=kept: kept(step) <= target)  # type: ignore[misc]
        if step == 256:
            least = min(least, kept(255))
            continue
        best = max(best, (kept(step), chosen(step)), key=lambda found: found[0])
        if counts is None or kept(step) >= NEAR * target:
            break
    if best[1] is None:
        raise ValueError(f"{100 * target:.2g}% of the cost cannot be reached: {100 * least:.2g}% "
                         "stay when all that may go is gone; raise it, or keep fewer layers")
    return cutting.verified(model, cutting.without(model, best[1], known), best[1], known, example)


def iteratively(model: nn.Module, *, macs: float, steps: int,
                score: Callable[[nn.Module], pd.DataFrame],
                recover: Callable[[nn.Module, int], nn.Module], example: Inputs,
                **options) -> nn.Module:
    """`model` cut to the fraction `macs` in `steps` equal ratios, the channels scored anew and
    recovered after each.

    score(model) gives the table that `cut_to` takes, recover(model, step) the model trained again;
    options: scope, multiple, keep. Source: Han et al. 2015 (arXiv 1506.02626), prune and retrain by
    turns.

    Raises ValueError for fewer than one step, and as `cut_to` does.

    Example: `iteratively(model, macs=0.7, steps=2, score=lambda m: channels.score(m, "l1",
    example=x), recover=lambda m, turn: m, example=x)`
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    whole = macs_of(model, example)
    for step in range(1, steps + 1):
        part = min(whole * macs ** (step / steps) / macs_of(model, example), 1.0)
        model = recover(_cut_to(model, score(model), macs=part, example=example, **options), step)
    return model


def silencing(model: nn.Module, *, example: Inputs, criterion: str = "l1",
              batches: Iterable[Batch] | None = None, objective: Objective | None = None,
              seed: int = 0):
    """A method for sensitivity.scan: (layer, level) -> the change that silences that fraction of a
    group's channels.

    Example: `sensitivity.scan(model, task.test, channels.silencing(model, example=task.example),
    levels=[.3, .5])`
    """
    known = {group.layer: group for group in groups(model, example)}
    scores = score(model, criterion, example=example, batches=batches, objective=objective,
                   seed=seed).sort_values("score", kind="stable")
    ranked = scores.groupby("layer").channel.agg(list)

    def method(layer: str, level: float) -> Change:
        if layer not in known:
            raise ValueError(f"no group of channels is called {layer!r}; there are {listed(known)}")
        group = known[layer]
        if group.kept:
            return Change({}, removed=0, of=group.channels, layers=tuple(group.made_by),
                          note=str(group.kept))
        places = ranked[layer][: min(round(level * group.channels), group.channels - 1)]
        left = {name: outputs * inputs
                for name, (outputs, inputs) in cutting.shares(model, [(group, places)]).items()}
        return Change(cutting.silenced(model, {layer: places}, {layer: group}), removed=len(places),
                      of=group.channels, layers=tuple(group.made_by), left=left,
                      note="" if places else "nothing was removed at this level")

    method.layers = list(known)  # type: ignore[attr-defined]  # a function may have attributes
    return method


def zeroing(model: nn.Module, *, layers: Mapping[str, nn.Module]):
    """A method for sensitivity.scan as in Li et al. 2017: a layer's smallest filters by L1 become
    zero, alone. What a residual connection adds stays; `silencing` is the effect of a removal.
    layers: by name, of layers.named(model, ...).

    Example: `channels.zeroing(model, layers={"conv1": model.conv1})("conv1", 0.5).removed == 8`
    """
    order = {name: layer.weight.detach().abs().flatten(1).sum(1).argsort(stable=True)
             for name, layer in layers.items()}

    def method(layer: str, level: float) -> Change:
        gone = order[layer][: round(level * len(order[layer]))]
        return Change({layer: Masked(layers[layer], gone)} if len(gone) else {}, removed=len(gone),
                      of=len(order[layer]), layers=(layer,),
                      left={layer: 1 - len(gone) / len(order[layer])},
                      note="" if len(gone) else "nothing was removed at this level")

    method.layers = list(layers)  # type: ignore[attr-defined]  # a function may have attributes
    return method


@dataclass(frozen=True)
class Prune:
    """The step of a plan that cuts channels until at most the fraction `macs` or `params` of the
    subject stays, or that takes the fraction `ratio` of the channels, or leaves of each group the
    share that `shares` has for it.

    criterion: as `score` has them; taylor looks at `examples` of the validation split, and so do
    the batch norms, which take their statistics anew. layers, keep: globs of the layers that are
    cut and of those that are not. scope, multiple: as `cut_to`.

    Example: `Prune(macs=0.7, examples=64).apply(Subject(model, task)).model`
    """

    macs: Share | None = None
    params: Share | None = None
    ratio: Removed | None = None
    shares: dict[str, Share] | None = None
    criterion: Literal[CRITERIA] = "l1"  # type: ignore[valid-type]
    scope: Literal[SCOPES] = "global"  # type: ignore[valid-type]
    multiple: Annotated[int, Ge(1)] | None = None
    layers: Globs = "*"
    keep: Globs = ()  # type: ignore[assignment]  # a default can be no list
    examples: Count = 500
    seed: Count = 0

    def __post_init__(self):
        if [self.macs, self.params, self.ratio, self.shares].count(None) != 3:
            raise ValueError("prune: give exactly one of macs, params, shares (what stays) and "
                             "ratio (which channels go)")

    @property
    def needs_examples(self) -> bool:
        """Whether the criterion reads examples."""
        return self.criterion == "taylor"

    def apply(self, subject: Subject) -> Subject:
        """The cut subject. Raises UnsupportedModelError for one that is quantised."""
        if any(quantizers(subject.model)):
            raise UnsupportedModelError("prune: the model is quantised, its scales belong to the "
                                        "channels that it has; put prune before quantize")
        few = subject.task.validation.subset(self.examples, seed=self.seed)
        seen = list(few.batches(100)) if len(few) else None
        scores = score(subject.model, self.criterion, example=subject.example, batches=seen,
                       objective=subject.task.objective, seed=self.seed)
        keep = _others(scores, self.layers, self.keep)
        if self.macs or self.params:
            model = cut_to(subject.model, scores, example=subject.example, macs=self.macs,
                           params=self.params, scope=self.scope, multiple=self.multiple, keep=keep,
                           batches=seen)
        else:
            removed = (fewest(scores, self.shares, multiple=self.multiple)
                       if self.shares is not None else
                       select(scores, self.ratio, scope=self.scope, multiple=self.multiple or 1,
                              keep=keep))
            model = _renormed(remove(subject.model, removed, example=subject.example), seen)
        return subject.with_model(model, scores=scores)
