"""A training between two steps as one safetensors file, written whole, taken up only by the same training."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench import files


def save(path: Path, parts: Mapping, optimizer: torch.optim.Optimizer, identity: dict, progress: dict) -> None:
    """Write the state_dict of each of `parts`, the optimizer's slots, what the training is and how far it has come."""
    tensors = {f"{name}.{k}": v.contiguous().clone()  # a copy: two names may share one tensor
               for name, part in parts.items() for k, v in part.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v.contiguous() for k, v in slots.items() if v is not None}
    with files.atomic(path) as new:
        save_file(tensors, new, {"identity": json.dumps(identity), "progress": json.dumps(progress)})


def restore(path: Path, parts: Mapping, optimizer: torch.optim.Optimizer, identity: dict) -> dict:
    """Take up what `save` wrote and return its progress. Raises ValueError where it is damaged or of another training."""
    try:
        with safe_open(path, framework="pt") as stored:
            header, tensors = stored.metadata(), {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"training state {path} is damaged ({error}); delete it to start anew") from error
    theirs = json.loads(header["identity"])
    for key, mine in identity.items():
        if theirs.get(key) != mine:
            raise ValueError(f"training state {path} is of another run: its {key} is {theirs.get(key)!r}, here {mine!r}; "
                             "delete it or give another path")
    for name, part in parts.items():
        part.load_state_dict({k[len(name) + 1:]: v for k, v in tensors.items() if k.startswith(f"{name}.")})
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, slot = key.split(".")
            slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    return json.loads(header["progress"])
