"""Sparsity: weights set to zero one by one, n in each m, or in blocks; before training, by a
penalty, or while training.

A layer's weight is seen as a matrix (out channels, kh kw in channels), the input channels
innermost: the order in which a channels-last convolution reads them. A pattern says what goes
together in it: "unstructured" each weight alone; "2:4" two weights stay of every four along a row;
"4x1", "8x8" blocks of rows x columns.

Sources: magnitude Han et al. 2015 (arXiv 1506.02626); n:m Mishra et al. 2021 (arXiv 2104.08378);
blocks Narang et al. 2017 (arXiv 1711.02782); group lasso Wen et al. 2016 (arXiv 1608.03665);
bn_gamma Liu et al. 2017 (arXiv 1708.06519); prune and regrow Evci et al. 2020 (RigL, arXiv
1911.11134), with the rising sparsity of Zhu & Gupta 2017 (arXiv 1710.01878) as in Liu et al. 2021
(GraNet, arXiv 2106.10404).
"""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from workbench.batches import Batch
from workbench.errors import UnsupportedModelError
from workbench.graph.layers import named
from workbench.subjects.objectives import Objective
from workbench.subjects.subject import Count, Globs, Removed, Subject
from workbench.subjects.training import Recipe, few, fit, own_loss

PENALTIES = ("group_lasso", "bn_gamma")
SCOPES = ("layer", "global")
Masks = dict[str, Tensor]  # by layer: bool, of the weight's shape, True where a weight stays


def masks(model: nn.Module, sparsity: float | None = None, *, pattern: str = "unstructured",
          scope: str = "layer", layers: str | Sequence[str] = "*") -> Masks:
    """Which weights stay when the smallest are set to zero: by layer, bool of the weight's shape.

    sparsity: the fraction (0-1) of the weights that go; a pattern n:m fixes it to 1 - n/m. A
    block's size is its mean |w|; blocks at an edge may be smaller. scope "layer" takes the same
    fraction of each layer, "global" ranks all blocks together, each divided by the mean |w| of its
    layer; one block of each layer stays. layers: globs. A layer whose row m does not divide, such
    as the first convolution, stays dense under n:m and is absent from the masks.

    Raises ValueError for a sparsity outside [0, 1), an unknown pattern or scope, NaN weights, or a
    glob that matches nothing; UnsupportedModelError where m divides no layer.

    Example: `sparse = sparsity.apply(model, sparsity.masks(model, 0.75, pattern="4x1"))`
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; expected one of {', '.join(SCOPES)}")
    shape, chosen = _Pattern(pattern), named(model, layers)
    sparsity = shape.sparsity(sparsity)
    scores = {name: shape.scores(layer.weight.detach().abs()) for name, layer in chosen.items()
              if shape.fits(layer.weight)}
    if not scores:
        raise UnsupportedModelError(f"pattern {pattern!r} fits no layer: {shape.each} divides none "
                                    "of their rows of inputs")
    for name, values in scores.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"layer {name}: its weights hold NaN or infinity; look at them")
    kept = {name: shape.keep(values, 1 - sparsity) for name, values in scores.items()}
    if scope == "global" and not shape.each:
        ranks = torch.cat([(values / values.mean().clamp_min(1e-12)).flatten()
                           for values in scores.values()])
        sizes = torch.cat([shape.sizes(chosen[name].weight).flatten() for name in scores])
        order = ranks.sort(stable=True).indices
        stays = torch.ones(len(order), dtype=torch.bool)
        stays[order[sizes[order].cumsum(0) <= round(sparsity * int(sizes.sum()))]] = False
        parts = stays.split([values.numel() for values in scores.values()])
        kept = {name: part.view(scores[name].shape) if part.any() else _largest(scores[name], 1)
                for name, part in zip(scores, parts, strict=True)}
    return {name: shape.spread(blocks, chosen[name].weight) for name, blocks in kept.items()}


def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with the weights outside `masks` zero. Raises ValueError for a layer or
    shape that it lacks.

    Example: `sparsity.table(sparsity.apply(model, sparsity.masks(model, 0.5))).zeros.sum()`
    """
    new = copy.deepcopy(model)
    _zero(_weights(new, masks), masks)
    return new


def table(model: nn.Module) -> pd.DataFrame:
    """One row per weighted layer: layer, weights, zeros, sparsity, and channels whose weights are
    all zero.

    Example: `sparsity.table(sparsity.apply(model, sparsity.masks(model, 0.5)))`
    """
    rows = []
    for name, layer in named(model).items():
        weight = layer.weight.detach()
        zeros = int((weight == 0).sum())
        rows.append({"layer": name, "weights": weight.numel(), "zeros": zeros,
                     "sparsity": zeros / weight.numel(),
                     "empty_channels": int((weight == 0).flatten(1).all(1).sum())})
    return pd.DataFrame(rows)


def penalised(kind: str, strength: float, *, layers: str | Sequence[str] = "*",
              label_smoothing: float = 0.0) -> Callable[[nn.Module, Batch, Objective, float],
                                                        Tensor]:
    """A loss for training.fit: the objective's own + strength * penalty, which drives whole
    channels towards zero.

    "group_lasso": sum over the output channels of `layers` of sqrt(d) |w_channel|_2, d weights a
    channel; "bn_gamma": sum of |gamma| over all batch norms. What comes near zero is then cut by
    channels.cut_to with l2 or bn_gamma.

    Raises ValueError for an unknown kind or a strength that is not positive; UnsupportedModelError,
    at the first batch, where bn_gamma finds no batch norm.

    Example: `training.fit(model, task, recipe=recipe, loss=sparsity.penalised("bn_gamma", 1e-4))`
    """
    if kind not in PENALTIES:
        raise ValueError(f"unknown penalty {kind!r}; expected one of {', '.join(PENALTIES)}")
    if not strength > 0:
        raise ValueError(f"strength is {strength}, expected more than 0")

    plain = own_loss(Recipe(label_smoothing=label_smoothing))

    def loss(model: nn.Module, batch: Batch, objective: Objective, progress: float) -> Tensor:
        return (plain(model, batch, objective, progress) + strength
                * penalty(model, kind, layers=layers))

    marks = [kind, strength, layers if isinstance(layers, str) else list(layers), label_smoothing]
    loss.identity = marks  # type: ignore[attr-defined]  # a function may have attributes
    return loss


def penalty(model: nn.Module, kind: str, *, layers: str | Sequence[str] = "*") -> Tensor:
    """The penalty of `penalised`, a scalar that can be differentiated. Raises as it does.

    Example: `sparsity.penalty(model, "bn_gamma")`
    """
    if kind == "group_lasso":
        weights = [layer.weight.flatten(1) for layer in named(model, layers).values()]
        return sum(math.sqrt(weight.shape[1]) * weight.norm(dim=1).sum() for weight in weights)
    gammas = [m.weight for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
              and m.affine]
    if not gammas:
        raise UnsupportedModelError(f"{type(model).__name__} has no batch norm for bn_gamma; use "
                                    "group_lasso")
    return sum(gamma.abs().sum() for gamma in gammas)


class Regrow:
    """Keeps a model sparse through training.fit(after_step=...), and moves its zeros: prune and
    regrow.

    Every `every` steps, and a last time at the fraction `until` of training, p being the share of
    that which is over, a layer keeps K(p) = (1 - s(p)) of its blocks, s(p) = sparsity (1 - (1 -
    p)^3) where `gradual`, else sparsity. Of these the f(p) = exchange (1 + cos(pi p)) / 2 smallest
    by mean |w| go as well, and as many of all that are out come in, at zero where they were zero:
    those of the largest mean |dL/dw|, which the update and its momentum do not see. In each group
    of an n:m pattern at most one weight is exchanged, in the fraction f(p) of groups whose smallest
    kept weight is smallest. exchange=0 keeps the first masks, `masks`, which the model should start
    with: sparsity.apply(model, regrow.masks).

    Raises ValueError for values outside their ranges, n:m with gradual, and as `masks` does.

    Example: `training.fit(model, task, recipe=recipe, after_step=sparsity.Regrow(model, 0.9,
    pattern="4x1"))`
    """

    def __init__(self, model: nn.Module, sparsity: float | None = None, *,
                 pattern: str = "unstructured", exchange: float = 0.3, every: int = 100,
                 until: float = 0.75, gradual: bool = False, layers: str | Sequence[str] = "*"):
        if not 0 <= exchange < 1 or not 0 < until <= 1 or every < 1:
            raise ValueError(f"regrow: exchange is {exchange}, until {until}, every {every}; "
                             "expected 0 <= exchange < 1, 0 < until <= 1 and every >= 1")
        self.shape = _Pattern(pattern)
        if gradual and self.shape.each:
            raise ValueError(f"regrow: pattern {pattern!r} fixes its sparsity, so it cannot rise; "
                             "leave gradual out")
        self.sparsity = self.shape.sparsity(sparsity)
        self.exchange, self.every, self.until, self.gradual = exchange, every, until, gradual
        self._slopes: dict[str, Tensor] = {}
        self.masks = masks(model, 0.0 if gradual else sparsity, pattern=pattern, layers=layers)
        self.identity = [pattern, self.sparsity, exchange, every, until, gradual,
                         sorted(self.masks)]

    def before_step(self, model: nn.Module) -> None:
        """Keep the dense gradients aside and leave the update, and its momentum, those of the
        weights that stay."""
        self._slopes = {}
        for name, weight in _weights(model, self.masks).items():
            if weight.grad is None:  # of a part that the loss does not read, or that is frozen
                self._slopes[name] = torch.zeros_like(weight)
                continue
            self._slopes[name] = weight.grad.detach().clone()
            weight.grad.mul_(self.masks[name].to(weight.device))

    def __call__(self, model: nn.Module, step: int, steps: int) -> None:
        """After step `step` (from 1) of `steps`: the zeros are zero again, and move where it is
        time."""
        weights, last = _weights(model, self.masks), max(int(steps * self.until), 1)
        _zero(weights, self.masks)
        if step == last or (step < last and step % self.every == 0):
            self.masks = {name: self._moved(name, weight, step / last)
                          for name, weight in weights.items()}
            _zero(weights, self.masks)

    def state_dict(self) -> Masks:
        """The masks, as they stand: what a training that goes on needs."""
        return dict(self.masks)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up masks that `state_dict` gave."""
        self.masks = dict(state)

    def _moved(self, name: str, weight: Tensor, progress: float) -> Tensor:
        size = self.shape.scores(weight.detach().abs())
        slope = self.shape.scores(self._slopes[name].abs())
        old = self.shape.scores(self.masks[name].to(weight.device, torch.float32)) > 0
        share = self.exchange * (1 + math.cos(math.pi * progress)) / 2
        if self.shape.each:  # size (groups, m)
            smallest, at = size.masked_fill(~old, math.inf).min(1)
            steepest = slope.masked_fill(old, -1.0).argmax(1)
            chosen = smallest.argsort(stable=True)[: round(share * len(old))]
            new = old.clone()
            new[chosen, at[chosen]], new[chosen, steepest[chosen]] = False, True
            return self.shape.spread(new, weight)
        rising = self.sparsity * (1 - (1 - progress) ** 3) if self.gradual else self.sparsity
        stay = max(round((1 - rising) * old.numel()), 1)  # as `masks` leaves one block
        moved = min(round(share * stay), int((~old).sum()))
        kept = _largest(size.masked_fill(~old, -1.0), stay - moved)
        return self.shape.spread(kept | _largest(slope.masked_fill(kept, -1.0), moved), weight)


class _Pattern:
    """What goes together in a weight: from text such as "unstructured", "2:4", "4x1" to blocks and
    back.

    each, of: n and m of n:m, or None. rows, columns: the block's size.
    """

    def __init__(self, text: str):
        found = re.fullmatch(r"(\d+)([:x])(\d+)", "1x1" if text == "unstructured" else str(text))
        first, second = (int(found[1]), int(found[3])) if found else (0, 0)
        if first < 1 or second < 1 or (found[2] == ":" and first >= second):
            raise ValueError(f"unknown pattern {text!r}; expected \"unstructured\", \"n:m\" with n "
                             "< m such as \"2:4\", or "
                             "\"ROWSxCOLUMNS\" such as \"4x1\"")
        self.text = text
        self.stay, self.each = (first, second) if found[2] == ":" else (None, None)
        self.rows, self.columns = (1, 1) if self.each else (first, second)

    def sparsity(self, asked: float | None) -> float:
        """The fraction that goes. Raises ValueError where it is missing, impossible, or not what
        n:m fixes."""
        if self.each:
            fixed = 1 - self.stay / self.each
            if asked is not None and not math.isclose(asked, fixed, abs_tol=1e-9):
                raise ValueError(f"pattern {self.text!r} has sparsity {fixed:g}, not {asked}; "
                                 "leave it out")
            return fixed
        if asked is None or not 0 <= asked < 1:
            raise ValueError(f"sparsity is {asked}, expected 0 <= sparsity < 1, the fraction of "
                             "the weights that go")
        return asked

    def fits(self, weight: Tensor) -> bool:
        """Whether every row divides into groups of m, which do not cross from one place of the
        kernel to the next."""
        return not self.each or weight.shape[1] % self.each == 0

    def scores(self, values: Tensor) -> Tensor:
        """Mean of values (out, in, ...) by block (R, C); under n:m each by itself, in groups (out
        kh kw in / m, m)."""
        matrix = _matrix(values)
        if self.each:
            return matrix.reshape(-1, self.each)
        return self._summed(matrix) / self._summed(torch.ones_like(matrix))

    def sizes(self, weight: Tensor) -> Tensor:
        """How many weights each block has, (R, C)."""
        return self._summed(torch.ones_like(_matrix(weight)))

    def keep(self, scores: Tensor, share: float) -> Tensor:
        """True for the largest scores: n of each m, or `share` of the blocks, at least one."""
        if self.each:
            kept = torch.zeros_like(scores, dtype=torch.bool)
            return kept.scatter(1, scores.topk(self.stay, dim=1).indices, True)
        return _largest(scores, max(round(share * scores.numel()), 1))

    def spread(self, blocks: Tensor, weight: Tensor) -> Tensor:
        """bool per block or group -> bool of the weight's shape."""
        rows, columns = len(weight), weight.numel() // len(weight)
        if self.each:
            matrix = blocks.view(rows, columns)
        else:
            matrix = blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns,
                                                                              1)[:rows, :columns]
        inputs, *kernel = weight.shape[1:]
        return matrix.view(rows, *kernel, inputs).movedim(-1, 1).contiguous()

    def _summed(self, matrix: Tensor) -> Tensor:
        rows, columns = (math.ceil(side / block)
                         for side, block in zip(matrix.shape, (self.rows, self.columns),
                                                strict=True))
        padding = (0, columns * self.columns - matrix.shape[1], 0,
                   rows * self.rows - matrix.shape[0])
        return F.pad(matrix, padding).view(rows, self.rows, columns, self.columns).sum((1, 3))


def _matrix(weight: Tensor) -> Tensor:  # (out, in, ...) -> (out, ... in)
    return weight.movedim(1, -1).flatten(1)


def _largest(scores: Tensor, count: int) -> Tensor:  # exactly so many, even where scores are equal
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return kept.view(scores.shape)


def _weights(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    known = named(model)
    for name, mask in masks.items():
        if name not in known:
            raise ValueError(f"masks: no layer {name!r} in {type(model).__name__}; it has "
                             f"{', '.join(list(known)[:6])}, ...")
        if mask.shape != known[name].weight.shape:
            raise ValueError(f"masks: layer {name} has weights {tuple(known[name].weight.shape)}, "
                             f"the mask {tuple(mask.shape)}")
    return {name: known[name].weight for name in masks}


@torch.no_grad()
def _zero(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.mul_(masks[name].to(weight.device))


@dataclass(frozen=True)
class Sparsify:
    """The step of a plan that sets weights to zero, and trains with them where a recipe is given.

    exchange: the share of the zeros that move while it trains, as `Regrow` has it; 0 keeps them
    where they are. examples: of the training split, all where 0.

    Example: `Sparsify(sparsity=0.5).apply(Subject(model, task)).model`
    """

    keeps_shape: ClassVar[bool] = True
    sparsity: Removed | None = None
    pattern: str = "unstructured"
    recipe: Recipe | None = None
    exchange: Removed = 0.0
    every: Annotated[int, Ge(1)] = 100
    layers: Globs = "*"
    examples: Count = 0
    seed: Count = 0
    state: str | None = None

    @property
    def needs_examples(self) -> bool:
        """Whether it trains."""
        return self.recipe is not None

    def apply(self, subject: Subject) -> Subject:
        """The sparse subject."""
        hook = Regrow(subject.model, self.sparsity, pattern=self.pattern, exchange=self.exchange,
                      every=self.every, layers=self.layers)
        sparse = apply(subject.model, hook.masks)
        if self.recipe is None:
            return subject.with_model(sparse)
        task = few(subject.task, self.examples, seed=self.seed)
        return subject.with_model(fit(sparse, task, recipe=self.recipe, seed=self.seed,
                                      after_step=hook, state=self.state).model)
