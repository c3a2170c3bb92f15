"""Low-rank layers: a weight replaced by two thinner ones, the rank given, by energy, or by a share
of the cost.

A linear layer W (o, i) becomes U V with U (o, r), V (r, i); a convolution W (o, c, h, w) an h x w
convolution to r channels and a 1 x 1 to o; a table of embeddings W (tokens, width) one of r numbers
a token and a linear layer to the width. The factors are the truncated singular value decomposition
of W, the best of its rank in Frobenius norm (Eckart & Young 1936), or, with images, of W L where L
L^T = E[x x^T] of the layer's inputs, the best in the outputs.

Sources: Denton et al. 2014 (arXiv 1404.0736); Zhang et al. 2015 (arXiv 1505.06798) for the outputs'
norm; tables Lan et al. 2019 (arXiv 1909.11942).
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import pandas as pd
import torch
from annotated_types import Ge
from torch import Tensor, nn

from workbench.batches import Batch, Inputs, call, pairs, rows
from workbench.errors import UnsupportedModelError
from workbench.graph.layers import Change, evaluating, matching, named, patches
from workbench.subjects.subject import Count, Globs, Share, Subject

DAMPING = 1e-3  # of the mean second moment, added to E[x x^T] before it is factored
COSTS = ("params", "macs")


@dataclass
class _Factors:
    """The singular vectors of one layer: left (o, k), values (k,) descending, right (k, K),
    whitened if images were given."""

    layer: nn.Module
    left: Tensor
    values: Tensor
    right: Tensor
    positions: int = 1  # places of the output map, by which parameters become MACs

    @property
    def full(self) -> int:
        """Parameters of the layer as it is, without bias."""
        return self.layer.weight.numel()

    @property
    def each(self) -> int:
        """Parameters that one rank costs."""
        return self.left.shape[0] + self.right.shape[1]

    @property
    def most(self) -> int:
        """The largest rank that is smaller than the layer itself."""
        return min((self.full - 1) // self.each, len(self.values))

    def energy(self) -> Tensor:
        """Share of the energy that ranks 1, 2, ... keep, (k,)."""
        squares = self.values.double().pow(2)
        return squares.cumsum(0) / squares.sum().clamp_min(1e-30)

    def cut(self, rank: int) -> nn.Sequential:
        """The two thinner layers."""
        root = self.values[:rank].sqrt()
        first, second, layer = (root[:, None] * self.right[:rank], self.left[:, :rank] * root,
                                self.layer)
        if isinstance(layer, nn.Embedding):
            pair = nn.Sequential(nn.Embedding(layer.num_embeddings, rank),
                                 nn.Linear(rank, layer.embedding_dim, bias=False))
            first, second = second, first.T
        elif isinstance(layer, nn.Linear):
            pair = nn.Sequential(nn.Linear(layer.in_features, rank, bias=False),
                                 nn.Linear(rank, layer.out_features, bias=layer.bias is not None))
        else:
            pair = nn.Sequential(nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride,
                                           layer.padding, layer.dilation, bias=False,
                                           padding_mode=layer.padding_mode),
                                 nn.Conv2d(rank, layer.out_channels, 1,
                                           bias=layer.bias is not None))
        with torch.no_grad():
            pair[0].weight.copy_(first.reshape(pair[0].weight.shape))
            pair[1].weight.copy_(second.reshape(pair[1].weight.shape))
            if getattr(layer, "bias", None) is not None:
                pair[1].bias.copy_(layer.bias)
        return pair.to(memory_format=torch.channels_last).train(layer.training)


def factorize(model: nn.Module, *, rank: int | Mapping[str, int] | None = None,
              energy: float | None = None, share_of_layers: float | None = None,
              cost: str = "params", layers: str | Sequence[str] = "*",
              batches: Iterable[Batch] | None = None, example: Inputs | None = None) -> nn.Module:
    """A copy of `model` whose linear and convolution layers are low-rank where that makes them
    smaller.

    One of: rank (of every layer, or by name), energy (share of the sum of squared singular values
    that each layer keeps), share_of_layers (of the `cost` of the chosen layers alone, "params" or
    "macs", this share stays; ranks go where they keep most energy for it). A network whose layers
    all lose a fifth at once is to be trained again. layers: globs. batches: of inputs and targets,
    for the best factors in the outputs instead of the weights. example: one input, needed for
    "macs". Grouped convolutions stay as they are, and so do tables of embeddings, unless a glob
    other than "*" names them.

    Raises ValueError where not exactly one of the three is given or it is out of range, and where
    that share is below rank 1 in every layer; UnsupportedModelError where no layer can be factored.

    Example: `factorization.factorize(model, share_of_layers=0.5, layers="layer*",
    batches=task.train.subset(500).batches())`
    """
    given = [value for value in (rank, energy, share_of_layers) if value is not None]
    if len(given) != 1:
        raise ValueError(f"factorize takes one of rank, energy and share_of_layers, {len(given)} "
                         "were given")
    if cost not in COSTS:
        raise ValueError(f"unknown cost {cost!r}; expected one of {', '.join(COSTS)}")
    if (energy is not None and not 0 < energy <= 1 or share_of_layers is not None
        and not 0 < share_of_layers <= 1):
        raise ValueError(f"energy or share_of_layers is {given[0]}, expected more than 0 and at "
                         "most 1")
    if cost == "macs" and example is None:
        raise ValueError("cost 'macs' needs an example, one input of the model")
    factors = _factors(model, layers, batches, example)
    if cost == "macs":  # looking a token up costs none
        factors = {name: f for name, f in factors.items() if not isinstance(f.layer, nn.Embedding)}
    if rank is not None:
        ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(factors, rank)
        odd = next((name for name, r in ranks.items() if name not in factors or r < 1), None)
        if odd is not None:
            raise ValueError(f"layer {odd}: rank {ranks[odd]} is not possible; expected at least "
                             f"1, and one of the layers {', '.join(list(factors)[:4])}, ...")
    elif energy is not None:
        ranks = {name: int((f.energy() < energy - 1e-9).sum()) + 1 for name, f in factors.items()}
    else:
        ranks = _within(factors, share_of_layers, cost)
    new = copy.deepcopy(model)
    for name, f in factors.items():
        if name in ranks and ranks[name] <= f.most:
            new.set_submodule(name, f.cut(ranks[name]))
    return new


def table(model: nn.Module, reference: nn.Module) -> pd.DataFrame:
    """One row per layer and table of `reference`: layer, rank (NaN where it is whole), full_rank,
    error, params, params_before.

    error: relative Frobenius distance of the product from the reference's weight. Biases are
    counted.

    Example: `factorization.table(factorization.factorize(model, energy=0.9, example=x), model)`
    """
    lines, modules = [], dict(model.named_modules())
    for name, layer in (named(reference) | _tables(reference)).items():
        here, before = modules[name], layer.weight.detach()
        count = sum(p.numel() for p in here.parameters())
        row = {"layer": name, "rank": float("nan"), "full_rank": min(before.flatten(1).shape),
               "error": 0.0}
        if isinstance(here, nn.Sequential):
            first, second = (part.weight.detach().flatten(1) for part in here)
            product = first @ second.T if isinstance(layer, nn.Embedding) else second @ first
            row |= {"rank": second.shape[1],
                    "error": ((product - before.flatten(1)).norm() / before.norm()).item()}
        lines.append(row
                     | {"params": count,
                        "params_before": sum(p.numel() for p in layer.parameters())})
    return pd.DataFrame(lines)


def truncating(model: nn.Module, *, batches: Iterable[Batch] | None = None):
    """A method for sensitivity.scan: (layer, level) -> that layer, alone, without the fraction
    `level` of its rank.

    Example: `sensitivity.scan(model, task.test, factorization.truncating(model), levels=[0.25, 0.5,
    0.75])`
    """
    factors = _factors(model, "*", batches, None)

    def method(layer: str, level: float) -> Change:
        f = factors[layer]
        removed = min(round(level * len(f.values)), len(f.values) - 1)
        left = len(f.values) - removed
        return Change({layer: f.cut(left)} if removed else {}, removed=removed, of=len(f.values),
                      layers=(layer,), left={layer: left * f.each / f.full},
                      note=f"rank {left}" if removed else "nothing was removed")

    method.layers = list(factors)  # type: ignore[attr-defined]  # a function may have attributes
    return method


def _factors(model: nn.Module, patterns, batches: Iterable[Batch] | None,
             example: Inputs | None) -> dict[str, _Factors]:
    known = named(model) | ({} if patterns == "*" else _tables(model))
    chosen = {name: known[name] for name in matching(known, patterns) if _factorable(known[name])}
    if not chosen:
        raise UnsupportedModelError(f"no layer of {patterns!r} can be factored; it takes Linear, "
                                    "ungrouped Conv2d and, by name, Embedding")
    # a table reads no numbers
    layers = {name: layer for name, layer in chosen.items() if not isinstance(layer, nn.Embedding)}
    moments = _second_moments(model, layers, batches) if batches is not None and layers else {}
    positions = _positions(model, layers, example) if example is not None else {}
    factors = {}
    for name, layer in chosen.items():
        weight = layer.weight.detach().flatten(1).double()
        if not weight.isfinite().all():
            raise ValueError(f"layer {name}: its weights hold NaN or infinity; look at them")
        root = torch.linalg.cholesky(moments[name]) if name in moments else None
        left, values, right = torch.linalg.svd(weight if root is None else weight @ root,
                                               full_matrices=False)
        if root is not None:
            right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
        factors[name] = _Factors(layer, left.float(), values.float(), right.float(),
                                 positions.get(name, 1))
    return factors


def _factorable(layer: nn.Module) -> bool:
    whole = (isinstance(layer, nn.Linear | nn.Embedding)
             or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
    return whole and min(layer.weight.flatten(1).shape) > 1


def _tables(model: nn.Module) -> dict[str, nn.Module]:
    """Tables of embeddings by name, without those whose weights another layer uses too."""
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and uses[id(module.weight)] == 1}


def _second_moments(model: nn.Module, chosen: Mapping[str, nn.Module],
                    batches: Iterable[Batch]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(chosen, 0)

    def watching(name: str):
        def hook(layer, inputs):
            seen = patches(layer, inputs[0], seed=counts[name])[0].double()
            sums[name] = sums.get(name, 0) + seen.T @ seen
            counts[name] += len(seen)
        return hook

    handles = [layer.register_forward_pre_hook(watching(name)) for name, layer in chosen.items()]
    try:
        with evaluating(model):
            for inputs, _ in pairs(batches):
                call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not all(counts.values()):
        raise ValueError("factorize saw no examples in its batches; give at least one batch")
    means = {name: total / counts[name] for name, total in sums.items()}
    return {name: m + DAMPING * m.diagonal().mean().clamp_min(1e-12) * torch.eye(len(m)).double()
            for name, m in means.items()}


def _positions(model: nn.Module, chosen: Mapping[str, nn.Module],
               example: Inputs) -> dict[str, int]:
    found = {}

    def watching(name: str):
        return lambda layer, _inputs, output: found.__setitem__(name,
                                                                output[0].numel()
                                                                // len(layer.weight))

    handles = [layer.register_forward_hook(watching(name)) for name, layer in chosen.items()]
    with evaluating(model):
        call(model, rows(example, slice(0, 1)))
    for handle in handles:
        handle.remove()
    return found


def _within(factors: Mapping[str, _Factors], share_of_layers: float, cost: str) -> dict[str, int]:
    """Ranks that keep most energy (each layer's own, as shares) for the share: rank by rank where
    the gain for its cost is largest. What is left over makes layers whole again that stand at their
    largest rank, the cheapest first."""
    unit = {name: f.positions if cost == "macs" else 1 for name, f in factors.items()}
    left = share_of_layers * sum(f.full * unit[name] for name, f in factors.items())
    ranks = {name: 1 for name, f in factors.items() if f.most >= 1}
    left -= sum((f.each if name in ranks else f.full) * unit[name] for name, f in factors.items())
    if left < 0:
        raise ValueError(f"share_of_layers is {share_of_layers}, too little even for rank 1 in "
                         "every layer; give a larger one")
    steps = ((-(f.values[k] ** 2 / f.values.pow(2).sum().clamp_min(1e-30)
                / (f.each * unit[name])).item(), k, name)
             for name, f in factors.items() for k in range(1, f.most))
    for _, k, name in sorted(steps):
        price = factors[name].each * unit[name]
        if price <= left and ranks[name] == k:
            ranks[name], left = k + 1, left - price
    at_most = [name for name, rank in ranks.items() if rank == factors[name].most]
    for name in sorted(at_most, key=lambda name: factors[name].full * unit[name]):
        price = (factors[name].full - ranks[name] * factors[name].each) * unit[name]
        if price <= left:
            del ranks[name]
            left -= price
    return ranks


@dataclass(frozen=True)
class Factorize:
    """The step of a plan that puts low-rank pairs in the place of layers: exactly one of `rank`,
    `energy` and `share_of_layers`.

    outputs: the best factors in the layers' outputs on `examples` of the validation split, instead
    of in the weights.

    Example: `Factorize(energy=0.9).apply(Subject(model, task)).model`
    """

    rank: Annotated[int, Ge(1)] | None = None
    energy: Share | None = None
    share_of_layers: Share | None = None
    cost: Literal[COSTS] = "params"  # type: ignore[valid-type]
    layers: Globs = "*"
    outputs: bool = False
    examples: Count = 300
    seed: Count = 0

    def __post_init__(self):
        if sum(target is not None
               for target in (self.rank, self.energy, self.share_of_layers)) != 1:
            raise ValueError("factorize: give exactly one of rank, energy and share_of_layers")

    @property
    def needs_examples(self) -> bool:
        """Whether the factors are fitted to outputs."""
        return self.outputs

    def apply(self, subject: Subject) -> Subject:
        """The factored subject."""
        seen = (subject.task.validation.subset(self.examples, seed=self.seed).batches(50)
                if self.outputs else None)
        model = factorize(subject.model, rank=self.rank, energy=self.energy,
                          share_of_layers=self.share_of_layers, cost=self.cost, layers=self.layers,
                          batches=seen, example=subject.example)
        return subject.with_model(model)
