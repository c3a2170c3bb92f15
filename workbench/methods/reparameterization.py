"""Structural rewrites that leave the computed function as it is.

Sources: batch-norm folding as in Jacob et al. 2018 (arXiv 1712.05877, section 3.2); branches fused
as in RepVGG, Ding et al. 2021 (arXiv 2101.03697); ranges equalised as in Nagel et al. 2019 (arXiv
1906.04721). And one that does change it: the batch norms' statistics taken anew.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from workbench.batches import Inputs
from workbench.errors import UnsupportedModelError
from workbench.graph.kinds import aten, is_idle, is_layer
from workbench.graph.norms import fold_batchnorm, reestimate_batchnorm
from workbench.graph.running import Runner
from workbench.subjects.subject import Count, Subject

LIVE = 1e-3  # of the largest channel: below it a channel is not equalised

__all__ = ["equalize", "fold_batchnorm", "fuse_branches", "reestimate_batchnorm"]


def equalize(model: nn.Module, example: Inputs, *, passes: int = 3) -> nn.Module:
    """A copy that computes the same, with the ranges of neighbouring layers made equal channel by
    channel.

    Channel i of a layer is divided, and what reads it multiplied, by s_i = sqrt(max|W_1,i| /
    max|W_2,i|); channels below a thousandth of the largest are left, or their biases would grow
    without bound. It needs two convolution or linear layers with nothing but a ReLU (not ReLU6)
    between them, batch norms folded.

    Raises UnsupportedModelError where the model cannot be traced or has no such pair.

    Example: `equal = reparameterization.equalize(folded, task.example)`
    """
    names = _pairs(Runner(model, example))
    if not names:
        raise UnsupportedModelError(f"{type(model).__name__} has no two layers with only a ReLU "
                                    "between them; fold its batch norms first (ReLU6 cannot be "
                                    "equalised)")
    new = copy.deepcopy(model).eval()
    pairs = [tuple(new.get_submodule(name) for name in pair) for pair in names]
    with torch.no_grad():
        for _ in range(passes):
            for first, second in pairs:
                depthwise = getattr(second, "groups", 1) > 1
                mine = first.weight.abs().flatten(1).amax(1)
                theirs = (second.weight if depthwise
                          else second.weight.transpose(0, 1)).abs().flatten(1).amax(1)
                live = (mine > LIVE * mine.max()) & (theirs > LIVE * theirs.max())
                share = torch.where(live, (mine / theirs.clamp_min(1e-12)).sqrt(), 1.0)
                first.weight /= share.view(-1, *[1] * (first.weight.dim() - 1))
                if first.bias is not None:
                    first.bias /= share
                second.weight *= (share.view(-1, 1, 1, 1) if depthwise
                                  else share.view(1, -1, *[1] * (second.weight.dim() - 2)))
    return new


def fuse_branches(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which each block that was trained with branches is the one convolution
    that it amounts to.

    A block is a module with a method `fused()`, which returns what stands in its place
    (networks.RepVGGBlock), or, as in timm, `reparameterize()`, which changes itself. Raises
    UnsupportedModelError where there is none.

    Example: `fused = reparameterization.fuse_branches(models.load("repvgg_small", task))`
    """
    new = copy.deepcopy(model).eval()
    blocks = [name for name, module in new.named_modules() if hasattr(module, "fused")]
    others = [module for module in new.modules() if hasattr(module, "reparameterize")]
    if not blocks and not others:
        raise UnsupportedModelError(f"{type(model).__name__} has no block with branches to fuse "
                                    "(fused or reparameterize); for batch norms alone use "
                                    "fold_batchnorm")
    if "" in blocks:
        return new.fused()
    for name in blocks:
        new.set_submodule(name, new.get_submodule(name).fused())
    for module in others:
        module.reparameterize()
    return new


def _pairs(graph: Runner) -> list[tuple[str, str]]:
    """The names of neighbouring layers with nothing but a ReLU between them."""
    pairs = []
    for node in graph.nodes:
        if not is_layer(node, graph.modules):
            continue
        place = node
        while len(place.users) == 1:
            place = next(iter(place.users))
            if not (is_idle(place, graph.modules) or place.target is aten.relu.default):
                break
        if not is_layer(place, graph.modules) or place is node:
            continue
        first, second = graph.modules[node.target], graph.modules[place.target]
        once = graph.calls[node.target] == graph.calls[place.target] == 1
        depthwise = getattr(second, "groups", 1) == len(second.weight)
        reads = len(second.weight) if depthwise else second.weight.shape[1]
        if (once and type(second) is type(first) and isinstance(first, nn.Conv2d | nn.Linear)
            and len(first.weight) == reads):
            pairs.append((node.target, place.target))
    return pairs


@dataclass(frozen=True)
class Fold:
    """The step of a plan that folds batch norms.

    Example: `Fold().apply(Subject(model, task)).model`
    """

    def apply(self, subject: Subject) -> Subject:
        """The subject with its norms folded."""
        return subject.with_model(fold_batchnorm(subject.model, subject.example))


@dataclass(frozen=True)
class Equalize:
    """The step of a plan that makes the ranges of neighbouring layers equal; batch norms are to be
    folded before.

    Example: `Equalize().apply(Fold().apply(start))`
    """

    keeps_shape: ClassVar[bool] = True

    def apply(self, subject: Subject) -> Subject:
        """The subject with equal ranges."""
        return subject.with_model(equalize(subject.model, subject.example))


@dataclass(frozen=True)
class Fuse:
    """The step of a plan that fuses branches.

    Example: `Fuse()`
    """

    def apply(self, subject: Subject) -> Subject:
        """The subject with its branches fused."""
        return subject.with_model(fuse_branches(subject.model))


@dataclass(frozen=True)
class Reestimate:
    """The step of a plan that takes the batch norms' statistics anew, from `examples` of the
    validation split.

    Example: `Reestimate(examples=64).apply(Subject(model, task)).model`
    """

    keeps_shape: ClassVar[bool] = True
    needs_examples: ClassVar[bool] = True
    examples: Count = 1000
    seed: Count = 0

    def apply(self, subject: Subject) -> Subject:
        """The subject with the statistics of its own activations."""
        seen = subject.task.validation.subset(self.examples, seed=self.seed).batches(100)
        return subject.with_model(reestimate_batchnorm(subject.model, seen))
