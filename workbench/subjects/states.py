"""A training between two steps as one safetensors file, written whole, taken up only by the same
training.

A finished one can be kept without what only its steps needed, and committed: `finish` writes it,
`finished` finds it again, on any processor.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench import files, machine
from workbench.subjects import embedded


def mark(tensors: Iterable[Tensor]) -> dict:
    """What tells one start, or one set of examples, from another: "exact" to the bit, "about" (mean
    |x| of each tensor) to the rounding of another processor.

    Example: `states.mark([torch.ones(2)])["about"] == [1.0]`
    """
    tensors = list(tensors)
    return {"exact": files.fingerprint(tensors),
            "about": [float(tensor.double().abs().mean()) for tensor in tensors]}


def told(function: Callable) -> str:
    """The name of a function and what `partial` gave it, for an identity.

    Example: `states.told(max) == "max"`
    """
    if isinstance(function, functools.partial):
        return f"{told(function.func)} {function.args} {function.keywords}"
    return getattr(function, "__qualname__", type(function).__qualname__)


def save(path: Path, parts: Mapping, optimizer: torch.optim.Optimizer, identity: dict,
         progress: dict) -> None:
    """Write the state_dict of each of `parts`, the optimizer's slots, what the training is and how
    far it has come.

    Example: `save(Path("a.state"), {"model": model}, torch.optim.SGD(model.parameters(), 0.1),
    {"steps": 1}, {"step": 1})`
    """
    tensors = {f"{name}.{k}": v.contiguous().clone()  # a copy: two names may share one tensor
               for name, part in parts.items() for k, v in part.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v.contiguous() for k, v in slots.items()
                    if v is not None}
    with files.atomic(path) as new:
        save_file(tensors, new,
                  {"identity": json.dumps(identity), "progress": json.dumps(progress)})


def restore(path: Path, parts: Mapping, optimizer: torch.optim.Optimizer, identity: dict) -> dict:
    """Take up what `save` wrote and return its progress. Raises ValueError where it is damaged or
    of another training.

    Example: `optimizer = torch.optim.SGD(model.parameters(), 0.1); save(Path("a.state"), {"model":
    model}, optimizer, {"steps": 1}, {"step": 1}); restore(Path("a.state"), {"model": model},
    optimizer, {"steps": 1}) == {"step": 1}`
    """
    try:
        with safe_open(path, framework="pt") as stored:
            header, names = stored.metadata(), stored.keys()
            tensors = {name: stored.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"training state {path} is damaged ({error}); delete it to start "
                         "anew") from error
    if "identity" not in (header or {}):
        raise ValueError(f"{path} is no training state; give a path of its own")
    theirs = json.loads(header["identity"])
    for key, mine in json.loads(json.dumps(identity)).items():
        if theirs.get(key) != mine:
            other, own = (value["exact"] if isinstance(value, dict) else value
                          for value in (theirs.get(key), mine))
            raise ValueError(f"training state {path} is of another run: its {key} is {other!r}, "
                             f"here {own!r}; delete it or give another path")
    for name, part in parts.items():
        part.load_state_dict({k[len(name) + 1:]: v for k, v in tensors.items()
                              if k.startswith(f"{name}.")})
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, slot = key.split(".")
            slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    return json.loads(header["progress"])


def finish(state: Path, path: Path) -> None:
    """Write of the finished training `state` what `finished` takes up: its model (matrices and
    filters as float16, the rest as it is), what the training is, its history and the machine.

    Raises ValueError where its last step is not done.

    Example: `save(Path("a.state"), {"model": model}, torch.optim.SGD(model.parameters(), 0.1),
    {"steps": 1}, {"step": 1}); finish(Path("a.state"), Path("a.safetensors"))`
    """
    with safe_open(state, framework="pt") as stored:
        header, every = stored.metadata(), stored.keys()
        names = [name for name in every if name.startswith("model.")]
        tensors = {name: stored.get_tensor(name) for name in names}
    progress, steps = json.loads(header["progress"]), json.loads(header["identity"])["steps"]
    if progress["step"] < steps:
        raise ValueError(f"training state {state} is at step {progress['step']} of {steps}; go on "
                         "with it first")
    small = {name: t.half() if t.is_floating_point() and t.dim() > 1 else t
             for name, t in tensors.items()}
    with files.atomic(path) as new:
        save_file(small, new, header | {"machine": machine.describe()})


def finished(model: nn.Module, identity: dict, folder: Path | str) -> dict | None:
    """Fill `model` from the training of `folder` that is the same one, but for the rounding of its
    start, and return its progress; None where there is none. Raises ValueError where a file is
    damaged.

    Example: `finished(model, {"steps": 1}, Path(".")) is None`
    """
    mine = json.loads(json.dumps(identity))
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as stored:
                header = stored.metadata()
        except SafetensorError as error:
            raise ValueError(f"finished training {path} is damaged ({error}); delete it or write "
                             "it again") from error
        # those finished before the examples themselves were looked at do not tell them
        untold = {key: mine[key] for key in ("stored",) if key in mine}
        if _same(untold | json.loads(header["identity"]), mine):
            tensors = load_file(embedded.verified(path) if (path.parent / "SHA256SUMS").exists()
                                else path)
            model.load_state_dict({name.removeprefix("model."): tensor
                                   for name, tensor in tensors.items()})
            print(f"{path.stem}: trained before, {mine['steps']:,} steps, on "
                  f"{header['machine'].partition(';')[0]}")
            return json.loads(header["progress"])
    return None


def _same(theirs: object, mine: object) -> bool:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        if "about" in mine:
            one, other = theirs.get("about", []), mine["about"]
            return len(one) == len(other) and np.allclose(one, other, rtol=1e-3, atol=1e-6)
        return theirs.keys() == mine.keys() and all(_same(theirs[key], mine[key]) for key in mine)
    if isinstance(theirs, list) and isinstance(mine, list):
        return len(theirs) == len(mine) and all(map(_same, theirs, mine))
    return theirs == mine
