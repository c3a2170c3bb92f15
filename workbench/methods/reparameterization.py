"""Structural rewrites that leave the computed function as it is.

Sources: batch-norm folding as in Jacob et al. 2018 (arXiv 1712.05877, section 3.2); branches fused as in RepVGG, Ding et
al. 2021 (arXiv 2101.03697). And one that does change it: the batch norms' statistics taken anew.
"""

import copy
from collections import Counter
from collections.abc import Iterable

import torch
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from workbench.layers import UnsupportedModelError, reason

_FUSE = {nn.Conv1d: fuse_conv_bn_eval, nn.Conv2d: fuse_conv_bn_eval, nn.Linear: fuse_linear_bn_eval}


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy in which each batch norm that directly follows a convolution or linear layer is folded into it.

    W' = W gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta; an Identity stays in its place, so
    names remain. A norm whose layer feeds something else too, or runs twice, is left alone. The copy is in eval mode.

    Raises UnsupportedModelError where torch.fx cannot trace the model or nothing was there to fold.

    Example: `folded = reparameterization.fold_batchnorm(model)`
    """
    new = copy.deepcopy(model).eval()
    try:
        graph = fx.Tracer().trace(new)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise UnsupportedModelError(f"{type(model).__name__} cannot be traced to find its batch norms: "
                                    f"{reason(error)}") from error
    modules, folded = dict(new.named_modules()), 0
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        norm, layer = modules[node.target], modules[source.target]
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and type(layer) in _FUSE and len(source.users) == 1 \
                and calls[node.target] == calls[source.target] == 1:
            with torch.no_grad():
                new.set_submodule(source.target, _FUSE[type(layer)](layer, norm))
            new.set_submodule(node.target, nn.Identity())
            folded += 1
    if not folded:
        raise UnsupportedModelError(f"{type(model).__name__} has no batch norm directly behind a convolution or linear layer")
    return new


def fuse_branches(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which each block that was trained with branches is the one convolution that it amounts to.

    A block is a module with a method `fused()`, which returns what stands in its place (models.RepVGGBlock), or, as in
    timm, `reparameterize()`, which changes itself. Raises UnsupportedModelError where there is none.

    Example: `fused = reparameterization.fuse_branches(models.load("repvgg_small", task))`
    """
    new = copy.deepcopy(model).eval()
    blocks = [name for name, module in new.named_modules() if hasattr(module, "fused")]
    others = [module for module in new.modules() if hasattr(module, "reparameterize")]
    if not blocks and not others:
        raise UnsupportedModelError(f"{type(model).__name__} has no block with branches to fuse (fused or reparameterize); "
                                    "for batch norms alone use fold_batchnorm")
    if "" in blocks:
        return new.fused()
    for name in blocks:
        new.set_submodule(name, new.get_submodule(name).fused())
    for module in others:
        module.reparameterize()
    return new


def reestimate_batchnorm(model: nn.Module, batches: Iterable) -> nn.Module:
    """A copy whose batch norms hold the mean and variance of `batches`, each batch weighing the same; nothing else changes.

    What a cut or quantised model needs before it is judged: the statistics of its own activations. batches: (images,
    labels) pairs of at least two images. Raises ValueError where there are none, UnsupportedModelError where no batch
    norm is left.

    Example: `reparameterization.reestimate_batchnorm(cut, task.validation.subset(1000).batches(100))`
    """
    new = copy.deepcopy(model).eval()
    norms = [module for module in new.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise UnsupportedModelError(f"{type(model).__name__} has no batch norm whose statistics could be taken anew")
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    count = 0
    with torch.no_grad():
        for images, _ in batches:
            new(images)
            count += 1
    if not count:
        raise ValueError("re-estimation of batch norms saw no images; give at least one batch")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return new.eval()
