"""Blocks of a network: which of them it runs without, and the network without them."""

import copy
import json
from collections.abc import Sequence

from torch import nn

from workbench.batches import Inputs, answer, call
from workbench.errors import listed
from workbench.graph.layers import WEIGHTED, evaluating


def blocks(model: nn.Module, example: Inputs) -> list[str]:
    """The names of the blocks that can go, each by itself, in the order of definition.

    A block is an element of an nn.Sequential or nn.ModuleList with two or more layers in it,
    without which the network still runs on the example and answers in the same shape. Of what holds
    several such blocks, a stage, these count; of a block with one within it, such as squeeze and
    excitation, the block as a whole.

    Example: `depth.blocks(models.load("resnet20", task), task.example)[:2] == ["layer1.0",
    "layer1.1"]`
    """
    held = {f"{name}.{key}" if name else key for name, module in model.named_modules()
            if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1
            for key, _ in module.named_children()}
    deep = [name for name, module in model.named_modules() if name in held
            and sum(isinstance(layer, WEIGHTED) for layer in module.modules()) > 1]
    shape = shape_without(model, [], example)
    free = [name for name in deep if shape_without(model, [name], example) == shape]
    for name in sorted(free, key=lambda name: -name.count(".")):  # the innermost first
        inner = [other for other in free if other.startswith(f"{name}.")]
        free = [other for other in free if other not in (inner if len(inner) < 2 else [name])]
    return free


def without_blocks(model: nn.Module, names: Sequence[str], *, shared: bool = False) -> nn.Module:
    """A copy without these blocks, what stands before each going on to what stands behind it. It is
    not run.

    In an nn.Sequential the others keep their names; in an nn.ModuleList those behind move up.
    shared: the copy has the weights of `model` themselves, for a look at its answers.

    Raises ValueError for a name that is no element of either, or where a list would be left empty.

    Example: `without_blocks(model, ["layer1.1"])`
    """
    weights = [*model.parameters(), *model.buffers()] if shared else ()
    new = copy.deepcopy(model, {id(tensor): tensor for tensor in weights})
    leave_out(new, names)
    return new


def leave_out(model: nn.Module, names: Sequence[str]) -> None:
    """Take these blocks out of `model` itself, and note it where the model knows its origin. Raises
    as `without_blocks` does.

    Example: `leave_out(copy.deepcopy(model), ["layer1.1"])`
    """
    lists: dict[str, set[int]] = {}
    for name in names:
        holder, _, key = name.rpartition(".")
        within = dict(model.named_modules(remove_duplicate=False)).get(holder)
        if (not isinstance(within, nn.Sequential | nn.ModuleList)
            or key not in dict(within.named_children())):
            raise ValueError(f"{name!r} is no block of {type(model).__name__}; blocks lie in an "
                             "nn.Sequential or nn.ModuleList, here "
                             f"{listed(_containers(model)) or 'none'}")
        if isinstance(within, nn.Sequential):
            setattr(within, key, nn.Identity())
        else:
            lists.setdefault(holder, set()).add(int(key))
    for holder, gone in lists.items():
        within = model.get_submodule(holder)
        if len(gone) == len(within):
            raise ValueError(f"all {len(within)} blocks of {holder} would go; leave at least one")
        model.set_submodule(holder,
                            nn.ModuleList(block for place, block in enumerate(within)
                                          if place not in gone))
    if names and hasattr(model, "origin"):  # so that its checkpoint is read as what it is
        model.origin = (model.origin
                        | {"dropped": json.dumps([*json.loads(model.origin.get("dropped", "[]")),
                                                  list(names)])})


def shape_without(model: nn.Module, names: Sequence[str],
                  example: Inputs) -> tuple[int, ...] | None:
    """The shape of the answer without these blocks; None where the network does not run without
    them.

    Raises as `without_blocks` does, and what the whole network raises where no names are given.

    Example: `shape_without(model, ["layer1.1"], x) == (len(x), 10)`
    """
    new = without_blocks(model, names, shared=True)
    try:
        with evaluating(new):
            return tuple(answer(call(new, example)).shape)
    except Exception:  # of the model's own forward, which may raise anything
        if not names:
            raise
        return None


def _containers(model: nn.Module) -> list[str]:
    return [name or "the network itself" for name, module in model.named_modules()
            if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1]
