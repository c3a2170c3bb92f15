"""Repairs of a quantised model without labels or training: bias correction, AdaRound, AdaQuant,
coordinate descent.

All go through the layers in their order and lower E|W x - W' x'|^2, x a layer's input in the float
model, x' that in the quantised one so far; graph.moments says how.

Sources: bias correction Nagel et al. 2019 (arXiv 1906.04721); AdaRound Nagel et al. 2020 (arXiv
2004.10568), here without the ReLU behind the layer; AdaQuant Hubara et al. 2020 (arXiv 2006.10518);
coordinate descent Behdin et al. 2023 (QuantEase, arXiv 2309.01885), here with the target W*.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench import files
from workbench.batches import Batch, Inputs, pairs
from workbench.errors import UnsupportedModelError, listed
from workbench.graph.kinds import BATCHNORM, is_layer
from workbench.graph.layers import WEIGHTED, named
from workbench.graph.moments import Moments, means
from workbench.graph.moments import moments as second_moments
from workbench.graph.norms import fold_batchnorm
from workbench.graph.running import Runner
from workbench.graph.tracing import trace
from workbench.graph.units import round_biases
from workbench.numbers.grid import affine, fake_quantize
from workbench.numbers.quantizers import WeightQuantizer
from workbench.subjects.subject import Count, Subject

STRETCH = (-0.1, 1.1)  # of AdaRound's rectified sigmoid
STEPS = 1000
SWEEPS = 8  # of coordinate descent at most; it ends where none of a layer's weights moves any more


def correct_bias(model: nn.Module, reference: nn.Module, batches: Iterable[Batch], *,
                 seed: int = 0) -> nn.Module:
    """A copy of the quantised `model` in which each layer's mean output equals that of the float
    `reference`.

    b' = b + W E[x] - W' E[x'], layer by layer. Raises ValueError where there are no examples,
    UnsupportedModelError where the two models have other layers.

    Example: `rounding.correct_bias(quantised, model, list(task.validation.subset(500).batches()))`
    """
    return _repair(model, reference, batches, None, "bias correction", seed)


def adaround(model: nn.Module, reference: nn.Module, batches: Iterable[Batch], *,
             steps: int = STEPS, seed: int = 0) -> nn.Module:
    """A copy of the quantised `model` whose weights are rounded up or down so that each layer's
    output errs least.

    The scales are first chosen for the same. Then W' = s clamp(floor(W* / s) + h(V)), h the
    rectified sigmoid, V by Adam on the quadratic form plus a term that drives h to 0 or 1; where
    plain rounding errs less in a channel, that is kept. The biases are corrected. Raises as
    `correct_bias`.

    Example: `rounding.adaround(quantised, model, list(task.validation.subset(500).batches()))`
    """
    return _repair(model, reference, batches, partial(_adaround, steps=steps), "AdaRound", seed)


def adaquant(model: nn.Module, reference: nn.Module, batches: Iterable[Batch], *,
             steps: int = STEPS, seed: int = 0) -> nn.Module:
    """A copy of the quantised `model` whose weights and scales move, straight through the rounding,
    to where each layer's output errs least; the best step is kept. The biases are corrected. Raises
    as `correct_bias`.

    Example: `rounding.adaquant(quantised, folded, seen, steps=2)`
    """
    return _repair(model, reference, batches, partial(_adaquant, steps=steps), "AdaQuant", seed)


def descend(model: nn.Module, reference: nn.Module, batches: Iterable[Batch], *,
            sweeps: int = SWEEPS, seed: int = 0) -> nn.Module:
    """A copy of the quantised `model` whose weights were put, one input of a channel after the
    other, where each layer's output errs least given all others, until none moves: AdaRound's
    problem over the whole grid, and no steps of training.

    The scales (and zero points) are first chosen as by `adaround`. With P = (W' - W*) G, weight k
    goes to the level nearest to w'_k - P_k / G_kk. The biases are corrected. Raises as
    `correct_bias`.

    Example: `rounding.descend(quantised, model, list(task.validation.subset(500).batches()))`
    """
    return _repair(model, reference, batches, partial(_descended, sweeps=sweeps),
                   "coordinate descent", seed)


def _repair(model: nn.Module, reference: nn.Module, batches: Iterable[Batch],
            change: Callable[[WeightQuantizer, Tensor, Moments], Tensor] | None, title: str,
            seed: int) -> nn.Module:
    seen = [inputs for inputs, _ in pairs(batches)]
    if not seen:
        raise ValueError(f"{title} saw no examples; give at least one batch")
    new, reference = copy.deepcopy(model).eval(), copy.deepcopy(trace(reference, seen[0])).eval()
    if not any(isinstance(module, BATCHNORM) for module in new.modules()):  # quantising folded them
        reference = fold_batchnorm(reference, seen[0])
    known, layers = named(reference), named(new)
    if list(known) != list(layers):
        raise UnsupportedModelError(f"the quantised model has the layers {listed(layers, most=4)}, "
                                    f"the reference {listed(known, most=4)}; give the float model "
                                    "that was quantised")
    # both stop before each layer
    walks = zip(_walk(reference, seen), _walk(new, seen), strict=True)
    for (name, inputs), (_, inputs_quantised) in files.progress(walks, total=len(layers),
                                                                title=title, unit="layer"):
        layer = layers[name]
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        quantizer, source = layer.parametrizations.weight[0], layer.parametrizations.weight.original
        if quantizer.scheme.levels == "kmeans":
            raise UnsupportedModelError(f"layer {name}: {title} needs uniform levels, not k-means")
        read = known[name], inputs, inputs_quantised
        try:
            moments = second_moments(*read, seed=seed) if change else None
            mean, mean_quantised = ((moments.mean, moments.mean_quantised) if moments
                                    else means(*read, seed=seed))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"layer {name}: {error}; quantise without it, by a "
                                        "mapping of the other layers as weights=") from error
        if change and moments:
            found = change(quantizer, known[name].weight.detach(), moments)
        with torch.no_grad():
            if change:
                source.copy_(found)
            wanted = (known[name].weight.reshape(len(mean), -1, mean.shape[1])
                      @ mean[:, :, None]).flatten()
            have = (layer.weight.reshape(len(mean), -1, mean.shape[1])
                    @ mean_quantised[:, :, None]).flatten()
            bias = wanted - have if known[name].bias is None else known[name].bias + wanted - have
            layer.bias = nn.Parameter(bias)
    return round_biases(new)


def _adaround(quantizer: WeightQuantizer, weight: Tensor, moments: Moments, steps: int) -> Tensor:
    _fit_scale(quantizer, weight, moments)
    scale, zero = (_spread(value, quantizer, weight, moments)
                   for value in (quantizer.scale.detach(), quantizer.zero))
    low, high = quantizer.scheme.limits
    place = moments.target / scale + zero
    down = place.floor()
    rest = (place - down).clamp(0.01, 0.99)
    logit = ((rest - STRETCH[0]) / (STRETCH[1] - rest)).log().requires_grad_()
    nearest = fake_quantize(moments.target, scale, zero, quantizer.scheme)
    unit = moments.loss(nearest).mean().clamp_min(1e-20)
    optimizer = torch.optim.Adam([logit], 0.02)
    for step in range(steps):
        chosen = stretched(logit)
        values = ((down + chosen).clamp(low, high) - zero) * scale
        loss = moments.loss(values).mean() / unit
        if step > 0.2 * steps:
            loss = (loss + 0.1 * (1 - (2 * chosen - 1).abs().pow(sharpness(step / steps))).mean()
                    * (step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rounded = ((down + (logit > 0).float()).clamp(low, high) - zero) * scale
        plain = fake_quantize(weight.reshape(moments.target.shape), scale, zero, quantizer.scheme)
        return _best([rounded, nearest, plain], moments).reshape(weight.shape)


def stretched(logit: Tensor) -> Tensor:
    """What AdaRound learns a share between two levels by: a sigmoid a little wider than 0 to 1,
    which reaches both.

    Example: `stretched(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0.0, 0.5, 1.0]`
    """
    return (logit.sigmoid() * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0, 1)


def sharpness(progress: float) -> float:
    """The power b by which AdaRound draws what lies between two levels towards one of them, 1 - |2
    h - 1|^b: by a cosine from 20, which leaves all but the nearest alone, when a fifth of the steps
    is done, to 2.

    Example: `sharpness(0.2) == 20`
    """
    return 2 + 9 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


def _descended(quantizer: WeightQuantizer, weight: Tensor, moments: Moments, sweeps: int) -> Tensor:
    _fit_scale(quantizer, weight, moments)
    scale, zero = (_spread(value, quantizer, weight, moments)
                   for value in (quantizer.scale.detach(), quantizer.zero))
    low, high = ((limit - zero) * scale for limit in quantizer.scheme.limits)
    values = fake_quantize(moments.target, scale, zero, quantizer.scheme)
    own, pull = (moments.covariance.diagonal(dim1=1, dim2=2)[:, None],
                 (values - moments.target) @ moments.covariance)
    for _ in range(sweeps):
        moved = False
        for k in range(values.shape[2]):
            best = (values[..., k] - pull[..., k] / own[..., k]) / scale[..., k] + zero[..., k]
            change = ((best.round() - zero[..., k]) * scale[..., k]).clamp(low[..., k],
                                                                           high[...,
                                                                                k]) - values[..., k]
            if change.any():
                moved = True
                values[..., k] += change
                pull += change[..., None] * moments.covariance[:, None, k]
        if not moved:
            break
    return values.reshape(weight.shape)


def _fit_scale(quantizer: WeightQuantizer, weight: Tensor, moments: Moments) -> None:
    """Of 36 ranges from 0.3 to 1 of the one that holds all weights (of 100, each end by itself,
    where there is a zero point), and the present one, take what errs least in the layer's output:
    by channel, or for the layer where it has a single scale. Groups keep theirs."""
    scheme = quantizer.scheme
    if scheme.granularity == "group":
        return
    rows = scheme.rows(weight)
    least, most = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    shares = ([(share, share) for share in torch.linspace(1.0, 0.3, 36).tolist()]
              if scheme.symmetric
              else itertools.product(torch.linspace(1.0, 0.4, 10).tolist(), repeat=2))
    best = torch.full_like(quantizer.scale.detach(), torch.inf)
    found: Sequence[Tensor] = (quantizer.scale.detach(), quantizer.zero)
    for trial in (found, *(affine(least * below, most * above, scheme) for below, above in shares)):
        scale, zero = (_spread(value, quantizer, weight, moments) for value in trial)
        rounded = fake_quantize(moments.target, scale, zero, scheme)
        error = moments.loss(rounded).reshape(-1, 1)
        error = error.sum(0, keepdim=True) if scheme.granularity == "tensor" else error
        better = error < best
        best, found = torch.where(better, error,
                                  best), [torch.where(better, *pair)
                                          for pair in zip(trial, found, strict=True)]
    quantizer.scale.data, quantizer.zero.data = found


def _adaquant(quantizer: WeightQuantizer, weight: Tensor, moments: Moments, steps: int) -> Tensor:
    start, zero = quantizer.scale.detach().clone(), _spread(quantizer.zero, quantizer, weight,
                                                            moments)

    def rounded(values: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(values, _spread(scale, quantizer, weight, moments), zero,
                             quantizer.scheme)

    unit = moments.loss(rounded(weight.reshape(moments.target.shape),
                                start)).mean().clamp_min(1e-20)
    moved = moments.target.clone().requires_grad_()
    stretch = torch.zeros_like(start).requires_grad_()
    typical = float(start.mean())
    optimizer = torch.optim.Adam([{"params": [moved], "lr": 0.02 * typical},
                                  {"params": [stretch], "lr": 2e-3}])
    best, kept = float("inf"), (moments.target, start)
    for _ in range(steps):
        scale = start * stretch.exp()
        loss = moments.loss(rounded(moved, scale)).mean() / unit
        if loss.item() < best:
            best, kept = loss.item(), (moved.detach().clone(), scale.detach().clone())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    quantizer.scale.data = kept[1]
    return rounded(*kept).reshape(weight.shape)


def _best(candidates: list[Tensor], moments: Moments) -> Tensor:
    """Channel by channel the candidate of least loss, (g, out / g, K)."""
    losses = torch.stack([moments.loss(candidate) for candidate in candidates])
    chosen = losses.argmin(0)[None, :, :, None].expand(1, *candidates[0].shape)
    return torch.stack(candidates).gather(0, chosen)[0]


# (R, 1) -> (g, out / g, K)
def _spread(value: Tensor, quantizer: WeightQuantizer, weight: Tensor, moments: Moments) -> Tensor:
    rows = quantizer.scheme.rows(torch.ones_like(weight), quantizer.layer)
    return (rows * value).reshape(moments.target.shape)


def _walk(model: nn.Module, batches: list[Inputs]) -> Iterator[tuple[str, list[Tensor]]]:
    """Runs all batches side by side; before each layer, its name and its inputs. The layer may
    change while it waits."""
    graph = Runner(model, batches[0])
    twice = [name for name, calls in graph.calls.items() if calls > 1
             and isinstance(graph.modules[name], WEIGHTED)]
    if twice:
        raise UnsupportedModelError(f"layer {twice[0]} runs {graph.calls[twice[0]]} times, so that "
                                    "no one rounding is best for it")
    values: list[dict] = [{} for _ in batches]
    feeds = [graph.feed(inputs) for inputs in batches]
    for i, node in enumerate(graph.nodes[:-1]):
        if is_layer(node, graph.modules):
            yield node.target, [here[node.args[0]] for here in values]
        with torch.no_grad():
            for feed, here in zip(feeds, values, strict=True):
                graph.step(i, here, feed)


@dataclass(frozen=True)
class Repair:
    """The step of a plan that repairs a quantised subject: "bias", "adaround", "adaquant" or
    "descend", on the batches that it was calibrated on. steps: of AdaRound and AdaQuant; 0 takes
    their default.

    Example: `Repair("bias").apply(Quantize(bits=4, examples=64).apply(Subject(model, task))).model`
    """

    keeps_shape: ClassVar[bool] = True
    method: str = "descend"
    steps: Count = 0
    seed: Count = 0

    def __post_init__(self):
        if self.method not in REPAIRS:
            raise ValueError(f"repair: method is {self.method!r}, expected one of "
                             f"{', '.join(REPAIRS)}")

    def apply(self, subject: Subject) -> Subject:
        """The repaired subject. Raises ValueError where no step quantised it."""
        if "float" not in subject.made:
            raise ValueError("repair: the subject is not quantised; put Quantize(...) before it")
        steps = ({"steps": self.steps} if self.steps and self.method in ("adaround", "adaquant")
                 else {})
        model = REPAIRS[self.method](subject.model, subject.made["float"],
                                     subject.made["calibration"], seed=self.seed, **steps)
        return subject.with_model(model)


REPAIRS = {"bias": correct_bias, "adaround": adaround, "adaquant": adaquant, "descend": descend}
