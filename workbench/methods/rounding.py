"""Repairs of a quantised model without labels or training: equalisation, bias correction, AdaRound, AdaQuant, descent.

All but the first go through the layers in their order. With x the input of a layer in the float model, x' that in the
quantised one so far, they need only second moments: E|W x - W' x'|^2, the bias chosen best, is the quadratic form
(W' - W*) G (W' - W*)^T plus a constant, with G = Cov(x'), W* = W Cov(x, x') G^-1. So a layer's rounding is found on K x K
matrices, K inputs a channel, and memory does not grow with the images. Convolutions give patches at places drawn at
random. Where K is large and images are few, W* would fit those images and no others: a ridge draws it back to W, as far as
images held out ask for.

Sources: equalisation and bias correction Nagel et al. 2019 (arXiv 1906.04721); AdaRound Nagel et al. 2020
(arXiv 2004.10568), here without the ReLU behind the layer; AdaQuant Hubara et al. 2020 (arXiv 2006.10518); coordinate
descent Behdin et al. 2023 (QuantEase, arXiv 2309.01885), here with the target W*.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from workbench import files
from workbench.layers import WEIGHTED, Stepper, UnsupportedModelError, named, patches, reason
from workbench.quantizers import WeightQuantizer, affine, fake_quantize, round_biases

PLACES = (16, 256)  # patches of each image that a convolution's moments take, least and most
ROWS = 10  # patches in all for each input of a channel: with fewer, second moments fit the images and not the data
LIVE = 1e-3  # of the largest channel: below it a channel is not equalised
FOLDS = 5  # every fifth image is held out to choose, by layer, the ridge of W* from these shares of the mean variance
SHARES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
SHRINKAGE, DAMPING = 0.2, 1e-2  # of each variance (or the share, if less) and of their mean: added to Cov(x') to round with
STRETCH = (-0.1, 1.1)  # of AdaRound's rectified sigmoid
STEPS = 1000
SWEEPS = 8  # of coordinate descent at most; it ends where none of a layer's weights moves any more


@dataclass
class _Moments:
    """Per group of a layer's inputs: means (g, K) of x and x', target W* (g, out / g, K) and Cov(x') (g, K, K)."""

    mean: Tensor
    mean_quantised: Tensor
    target: Tensor
    covariance: Tensor

    def loss(self, weight: Tensor) -> Tensor:
        """The quadratic form, per output channel (g, out / g), with the gradient 2 (W' - W*) G at no further product."""
        apart = weight - self.target
        pull = (apart @ self.covariance).detach()
        half = (apart * pull).sum(2)
        return 2 * half - half.detach()


def equalize(model: nn.Module, *, passes: int = 3) -> nn.Module:
    """A copy that computes the same, with the ranges of neighbouring layers made equal channel by channel.

    Channel i of a layer is divided, and what reads it multiplied, by s_i = sqrt(max|W_1,i| / max|W_2,i|); channels below a
    thousandth of the largest are left, or their biases would grow without bound. It needs two
    convolution or linear layers with nothing but a ReLU (not ReLU6) between them, batch norms folded.

    Raises UnsupportedModelError where the model cannot be traced or has no such pair.

    Example: `equal = rounding.equalize(reparameterization.fold_batchnorm(model))`
    """
    new = copy.deepcopy(model).eval()
    pairs = _pairs(new)
    if not pairs:
        raise UnsupportedModelError(f"{type(model).__name__} has no two layers with only a ReLU between them; fold its batch "
                                    "norms first (ReLU6 cannot be equalised)")
    with torch.no_grad():
        for _ in range(passes):
            for first, second in pairs:
                depthwise = getattr(second, "groups", 1) > 1
                mine = first.weight.abs().flatten(1).amax(1)
                theirs = (second.weight if depthwise else second.weight.transpose(0, 1)).abs().flatten(1).amax(1)
                live = (mine > LIVE * mine.max()) & (theirs > LIVE * theirs.max())
                share = torch.where(live, (mine / theirs.clamp_min(1e-12)).sqrt(), 1.0)
                first.weight /= share.view(-1, *[1] * (first.weight.dim() - 1))
                if first.bias is not None:
                    first.bias /= share
                second.weight *= share.view(-1, 1, 1, 1) if depthwise else share.view(1, -1, *[1] * (second.weight.dim() - 2))
    return new


def correct_bias(model: nn.Module, reference: nn.Module, batches: Iterable, *, seed: int = 0) -> nn.Module:
    """A copy of the quantised `model` in which each layer's mean output equals that of the float `reference`.

    b' = b + W E[x] - W' E[x'], layer by layer. Raises ValueError where there are no images, UnsupportedModelError where the
    two models have other layers.

    Example: `rounding.correct_bias(quantised, folded, list(task.validation.subset(500).batches()))`
    """
    return _repair(model, reference, batches, lambda quantizer, weight, moments: None, "bias correction", seed)


def adaround(model: nn.Module, reference: nn.Module, batches: Iterable, *, steps: int = STEPS, seed: int = 0) -> nn.Module:
    """A copy of the quantised `model` whose weights are rounded up or down so that each layer's output errs least.

    The scales are first chosen for the same. Then W' = s clamp(floor(W* / s) + h(V)), h the rectified sigmoid, V by Adam on
    the quadratic form plus a term that drives h to 0 or 1; where plain rounding errs less in a channel, that is kept. The
    biases are corrected. Raises as `correct_bias`.

    Example: `rounding.adaround(quantised, folded, list(task.validation.subset(500).batches()))`
    """
    return _repair(model, reference, batches, lambda *layer: _adaround(*layer, steps), "AdaRound", seed)


def adaquant(model: nn.Module, reference: nn.Module, batches: Iterable, *, steps: int = STEPS, seed: int = 0) -> nn.Module:
    """A copy of the quantised `model` whose weights and scales move, straight through the rounding, to where each layer's
    output errs least; the best step is kept. The biases are corrected. Raises as `correct_bias`.
    """
    return _repair(model, reference, batches, lambda *layer: _adaquant(*layer, steps), "AdaQuant", seed)


def descend(model: nn.Module, reference: nn.Module, batches: Iterable, *, sweeps: int = SWEEPS, seed: int = 0) -> nn.Module:
    """A copy of the quantised `model` whose weights were put, one input of a channel after the other, where each layer's output
    errs least given all others, until none moves: AdaRound's problem over the whole grid, and no steps of training.

    The scales (and zero points) are first chosen as by `adaround`. With P = (W' - W*) G, weight k goes to the level nearest
    to w'_k - P_k / G_kk. The biases are corrected. Raises as `correct_bias`.

    Example: `rounding.descend(quantised, folded, list(task.validation.subset(500).batches()))`
    """
    return _repair(model, reference, batches, lambda *layer: _descended(*layer, sweeps), "coordinate descent", seed)


def _repair(model: nn.Module, reference: nn.Module, batches: Iterable, change, title: str, seed: int) -> nn.Module:
    new, reference = copy.deepcopy(model).eval(), copy.deepcopy(reference).eval()
    batches = [images for images, _ in batches]
    known, layers = named(reference), named(new)
    if list(known) != list(layers):
        raise UnsupportedModelError(f"the quantised model has layers {', '.join(list(layers)[:4])}, ..., the reference "
                                    f"{', '.join(list(known)[:4])}, ...; give the float model that was quantised")
    if not batches:
        raise ValueError(f"{title} saw no images; give at least one batch")
    walks = zip(_walk(reference, batches), _walk(new, batches), strict=True)  # both stop before each layer
    for (name, inputs), (_, inputs_quantised) in files.progress(walks, total=len(layers), title=title, unit="layer"):
        layer = layers[name]
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        quantizer, source = layer.parametrizations.weight[0], layer.parametrizations.weight.original
        if quantizer.scheme.levels == "kmeans":
            raise UnsupportedModelError(f"layer {name}: {title} needs uniform levels, not k-means")
        moments = _moments(known[name], inputs, inputs_quantised, seed)
        found = change(quantizer, known[name].weight.detach(), moments)
        with torch.no_grad():
            if found is not None:
                source.copy_(found)
            groups = len(moments.mean)
            wanted = (known[name].weight.reshape(groups, -1, moments.mean.shape[1]) @ moments.mean[:, :, None]).flatten()
            have = (layer.weight.reshape(groups, -1, moments.mean.shape[1]) @ moments.mean_quantised[:, :, None]).flatten()
            bias = wanted - have if known[name].bias is None else known[name].bias + wanted - have
            layer.bias = nn.Parameter(bias)
    return round_biases(new)


def _adaround(quantizer: WeightQuantizer, weight: Tensor, moments: _Moments, steps: int) -> Tensor:
    _fit_scale(quantizer, weight, moments)
    scale, zero = (_spread(value, quantizer, weight, moments) for value in (quantizer.scale.detach(), quantizer.zero))
    low, high = quantizer.scheme.limits
    down = (moments.target / scale).floor()
    rest = (moments.target / scale - down).clamp(0.01, 0.99)
    logit = ((rest - STRETCH[0]) / (STRETCH[1] - rest)).log().requires_grad_()
    nearest = fake_quantize(moments.target, scale, zero, quantizer.scheme)
    unit = moments.loss(nearest).mean().clamp_min(1e-20)
    optimizer = torch.optim.Adam([logit], 0.02)
    for step in range(steps):
        chosen = (logit.sigmoid() * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0, 1)
        values = ((down + zero + chosen).clamp(low, high) - zero) * scale
        loss = moments.loss(values).mean() / unit
        if step > 0.2 * steps:  # sharpness 20 to 2
            sharp = 2 + 9 * (1 + torch.cos(torch.tensor(torch.pi * (step / steps - 0.2) / 0.8)))
            loss = loss + 0.1 * (1 - (2 * chosen - 1).abs().pow(sharp)).mean() * (step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rounded = ((down + zero + (logit > 0).float()).clamp(low, high) - zero) * scale
        plain = fake_quantize(weight.reshape(moments.target.shape), scale, zero, quantizer.scheme)
        return _best([rounded, nearest, plain], moments).reshape(weight.shape)


def _descended(quantizer: WeightQuantizer, weight: Tensor, moments: _Moments, sweeps: int) -> Tensor:
    _fit_scale(quantizer, weight, moments)
    scale, zero = (_spread(value, quantizer, weight, moments) for value in (quantizer.scale.detach(), quantizer.zero))
    low, high = ((limit - zero) * scale for limit in quantizer.scheme.limits)
    values = fake_quantize(moments.target, scale, zero, quantizer.scheme)
    own, pull = moments.covariance.diagonal(dim1=1, dim2=2)[:, None], (values - moments.target) @ moments.covariance
    for _ in range(sweeps):
        moved = False
        for k in range(values.shape[2]):
            best = (values[..., k] - pull[..., k] / own[..., k]) / scale[..., k]
            change = (best.round() * scale[..., k]).clamp(low[..., k], high[..., k]) - values[..., k]
            if change.any():
                moved = True
                values[..., k] += change
                pull += change[..., None] * moments.covariance[:, None, k]
        if not moved:
            break
    return values.reshape(weight.shape)


def _fit_scale(quantizer: WeightQuantizer, weight: Tensor, moments: _Moments) -> None:
    """Of 36 ranges from 0.3 to 1 of the one that holds all weights (of 100, each end by itself, where there is a zero point),
    and the present one, take what errs least in the layer's output: by channel, or for the layer where it has a single scale.
    Groups keep theirs."""
    scheme = quantizer.scheme
    if scheme.granularity == "group":
        return
    rows = scheme.rows(weight)
    least, most = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    shares = [(share, share) for share in torch.linspace(1.0, 0.3, 36).tolist()] if scheme.symmetric else \
        itertools.product(torch.linspace(1.0, 0.4, 10).tolist(), repeat=2)
    best, found = torch.full_like(quantizer.scale.detach(), torch.inf), (quantizer.scale.detach(), quantizer.zero)
    for trial in (found, *(affine(least * below, most * above, scheme) for below, above in shares)):
        rounded = fake_quantize(moments.target, *(_spread(value, quantizer, weight, moments) for value in trial), scheme)
        error = moments.loss(rounded).reshape(-1, 1)
        error = error.sum(0, keepdim=True) if scheme.granularity == "tensor" else error
        better = error < best
        best, found = torch.where(better, error, best), [torch.where(better, *pair) for pair in zip(trial, found, strict=True)]
    quantizer.scale.data, quantizer.zero.data = found


def _adaquant(quantizer: WeightQuantizer, weight: Tensor, moments: _Moments, steps: int) -> Tensor:
    start, zero = quantizer.scale.detach().clone(), _spread(quantizer.zero, quantizer, weight, moments)

    def rounded(values: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(values, _spread(scale, quantizer, weight, moments), zero, quantizer.scheme)

    unit = moments.loss(rounded(weight.reshape(moments.target.shape), start)).mean().clamp_min(1e-20)
    moved = moments.target.clone().requires_grad_()
    stretch = torch.zeros_like(start).requires_grad_()
    typical = float(start.mean())
    optimizer = torch.optim.Adam([{"params": [moved], "lr": 0.02 * typical}, {"params": [stretch], "lr": 2e-3}])
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


def _best(candidates: list[Tensor], moments: _Moments) -> Tensor:
    """Channel by channel the candidate of least loss, (g, out / g, K)."""
    losses = torch.stack([moments.loss(candidate) for candidate in candidates])
    chosen = losses.argmin(0)[None, :, :, None].expand(1, *candidates[0].shape)
    return torch.stack(candidates).gather(0, chosen)[0]


def _spread(value: Tensor, quantizer: WeightQuantizer, weight: Tensor, moments: _Moments) -> Tensor:  # (R, 1) -> (g, out / g, K)
    rows = quantizer.scheme.rows(torch.ones_like(weight), quantizer.layer)
    return (rows * value).reshape(moments.target.shape)


def _moments(layer: nn.Module, inputs: list[Tensor], inputs_quantised: list[Tensor], seed: int) -> _Moments:
    inputs_each = layer.weight[0].numel()
    places = min(max(-(-ROWS * inputs_each // sum(map(len, inputs))), PLACES[0]), PLACES[1])
    fitted, apart, seen = None, None, 0
    for k, pair in enumerate(zip(inputs, inputs_quantised, strict=True)):
        x, y = (patches(layer, values, seed=1000 * seed + k, places=places).unflatten(1, (len(values), -1)) for values in pair)
        held_out = torch.arange(seen, seen + len(pair[0])) % FOLDS == FOLDS - 1
        fitted, apart = _added(fitted, x[:, ~held_out], y[:, ~held_out]), _added(apart, x[:, held_out], y[:, held_out])
        seen += len(pair[0])
    weight = layer.weight.detach().double().reshape(len(fitted[1]), -1, inputs_each)
    share, both = 1.0, fitted
    if seen >= FOLDS:  # each share's target from four fifths of the images, judged on the fifth
        (_, _, *few), (_, _, cross, own) = _centred(fitted), _centred(apart)
        targets = {share: _target(weight, *few, share) for share in SHARES}
        share = min(SHARES, key=lambda share: float(((targets[share] @ own - 2 * weight @ cross) * targets[share]).sum()))
        both = [a + b for a, b in zip(fitted, apart, strict=True)]
    mean, mean_quantised, cross, own = _centred(both)
    variances = own.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(min(share, SHRINKAGE) * variances + DAMPING * variances.mean(1, keepdim=True).clamp_min(1e-12))
    return _Moments(mean.float(), mean_quantised.float(), _target(weight, cross, own, share).float(), (own + ridge).float())


def _added(sums: list | None, x: Tensor, y: Tensor) -> list:
    """Sums with those of x and y (g, n, P, K) added: how many rows, x, y, x y^T, y y^T."""
    x, y = x.flatten(1, 2), y.flatten(1, 2)
    found = [x.shape[1], *(v.double() for v in (x.sum(1), y.sum(1), x.transpose(1, 2) @ y, y.transpose(1, 2) @ y))]
    return found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]


def _centred(sums: list) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of x and x', Cov(x, x') and Cov(x')."""
    mean, mean_quantised, cross, own = (value / sums[0] for value in sums[1:])
    return (mean, mean_quantised, cross - mean[:, :, None] * mean_quantised[:, None],
            own - mean_quantised[:, :, None] * mean_quantised[:, None])


def _target(weight: Tensor, cross: Tensor, own: Tensor, share: float) -> Tensor:
    """W* = (W Cov(x, x') + d W) (Cov(x') + d I)^-1, d = share of the mean variance: W itself where d is large."""
    ridge = share * own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)[:, None, None] * torch.eye(own.shape[1]).double()
    return torch.linalg.solve(own + ridge, (weight @ (cross + ridge)).transpose(1, 2)).transpose(1, 2)


def _walk(model: nn.Module, batches: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Runs all batches side by side; before each layer, its name and its inputs. The layer may change while it waits."""
    graph = Stepper(model, remedy="write its forward without branches on values")
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    twice = [name for name, count in calls.items() if count > 1 and isinstance(graph.modules[name], WEIGHTED)]
    if twice:
        raise UnsupportedModelError(f"layer {twice[0]} runs {calls[twice[0]]} times, so that no one rounding is best for it")
    values: list[dict] = [{} for _ in batches]
    for i, node in enumerate(graph.nodes[:-1]):
        if node.op == "call_module" and isinstance(graph.modules[node.target], WEIGHTED):
            yield node.target, [here[node.args[0]] for here in values]
        with torch.no_grad():
            for images, here in zip(batches, values, strict=True):
                graph.step(i, here, images)


def _pairs(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise UnsupportedModelError(f"{type(model).__name__} cannot be traced to find neighbouring layers "
                                    f"({reason(error)})") from error
    modules, pairs = dict(model.named_modules()), []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.Conv2d | nn.Linear):
            continue
        place = node
        while len(place.users) == 1:
            place = next(iter(place.users))
            module = modules.get(place.target) if place.op == "call_module" else None
            relu = (place.op == "call_function" and place.target in (F.relu, torch.relu)) or \
                   (place.op == "call_method" and place.target == "relu")
            if not (isinstance(module, nn.ReLU | nn.Identity | nn.Dropout) or relu):
                break
        second = modules.get(place.target) if place.op == "call_module" else None
        first = modules[node.target]
        once = calls[node.target] == calls[place.target] == 1
        if place is not node and once and type(second) is type(first) and len(first.weight) in (
                second.weight.shape[1], len(second.weight) if getattr(second, "groups", 1) == len(second.weight) else -1):
            pairs.append((first, second))
    return pairs
