"""Batch norms: folded into the layers before them, or their statistics taken anew.

Source: Jacob et al. 2018 (arXiv 1712.05877, section 3.2).
"""

import copy
from collections.abc import Iterable

import torch
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from workbench.batches import Batch, Inputs, call, count, pairs
from workbench.errors import UnsupportedModelError
from workbench.graph.kinds import BATCHNORM
from workbench.graph.running import Runner

_FUSE = {nn.Conv1d: fuse_conv_bn_eval, nn.Conv2d: fuse_conv_bn_eval, nn.Linear: fuse_linear_bn_eval}


def fold_batchnorm(model: nn.Module, example: Inputs) -> nn.Module:
    """A copy in which each batch norm that directly follows a convolution or linear layer is folded
    into it.

    W' = W gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta; an Identity
    stays in its place, so names remain; a traced graph loses their nodes. A norm whose layer feeds
    something else too, or that follows another layer elsewhere, is left alone. The copy is in eval
    mode.

    A model without such norms comes back as it is, copied. Raises UnsupportedModelError where the
    model cannot be traced.

    Example: `folded = reparameterization.fold_batchnorm(model, task.example)`
    """
    graph = Runner(model, example)
    pairs = dict.fromkeys(pair for node in graph.nodes if (pair := _foldable(node, graph)))
    new = copy.deepcopy(model).eval()
    with torch.no_grad():
        for layer, norm in pairs:
            found, folded = new.get_submodule(layer), new.get_submodule(norm)
            new.set_submodule(layer, _FUSE[type(found)](found, folded))
            new.set_submodule(norm, _rest(folded))
    if isinstance(new, fx.GraphModule):
        _without(new, {norm for _, norm in pairs})
    return new


def _without(graph: fx.GraphModule, names: set[str]) -> None:
    """Take the calls of these idle modules out of the graph, itself."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and node.target in names:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()


def _foldable(node: fx.Node, graph: Runner) -> tuple[str, str] | None:
    """Of a norm's node, the names of its layer and of the norm, where the two always go
    together."""
    source = node.args[0] if node.args else None
    if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
        return None
    norm, layer = graph.modules[node.target], graph.modules[source.target]
    if not isinstance(norm, BATCHNORM) or type(layer) not in _FUSE or norm.running_mean is None:
        return None
    if isinstance(layer, nn.Linear) and len(source.meta.get("shape", ())) > 2:
        return None  # the norm is over tokens, not over what the layer puts out
    calls = [other for other in graph.nodes if other.op == "call_module"
             and other.target == source.target]
    readers = [user.target for call in calls for user in call.users]
    together = readers == [node.target] * len(calls) and len(readers) == graph.calls[node.target]
    return (source.target, node.target) if together else None


def _rest(norm: nn.Module) -> nn.Module:
    """What stays where a folded norm stood: nothing, or the activation that timm's norms hold."""
    parts = [getattr(norm, name) for name in ("drop", "act")
             if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*parts) if parts else nn.Identity()


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
    """A copy whose batch norms hold the mean and variance of `batches`, each batch weighing the
    same; nothing else changes.

    What a cut or quantised model needs before it is judged: the statistics of its own activations.
    A batch of one example is passed over; targets are not looked at. Raises ValueError where there
    is none of more, UnsupportedModelError where no batch norm is left.

    Example: `reparameterization.reestimate_batchnorm(cut,
    task.validation.subset(1000).batches(100))`
    """
    new = copy.deepcopy(model).eval()
    norms = [module for module in new.modules() if isinstance(module, BATCHNORM)]
    if not norms:
        raise UnsupportedModelError(f"{type(model).__name__} has no batch norm whose statistics "
                                    "could be taken anew")
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    seen = 0
    with torch.no_grad():
        for inputs, _ in pairs(batches):
            if count(inputs) > 1:  # one example has no variance
                call(new, inputs)
                seen += 1
    if not seen:
        raise ValueError("re-estimation of batch norms saw no batch of two or more examples; give "
                         "at least one")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return new.eval()
