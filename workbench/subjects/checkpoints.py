"""Checkpoints as plain safetensors: weights, and in the header how the model is built anew, cut or
not."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from workbench import files
from workbench.errors import reason
from workbench.graph.depth import leave_out

STEP = ".step"


def in_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in a quarter of float32's bytes: of each matrix or filter q = round(w / s),
    int8, with one step s = max |w| / 127 a row (NAME.step, float16); vectors as float16, integers
    as they are. Every reader of checkpoints gives them back as w = s q.

    Example: `in_eight_bits({"w": torch.tensor([[1.0, -2.0]])})["w"].dtype == torch.int8`
    """
    kept = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dim() < 2:
            kept[name] = (tensor.half().contiguous() if tensor.is_floating_point()
                          else tensor.contiguous())
            continue
        rows = tensor.float().flatten(1)
        steps = (rows.abs().amax(1) / 127).half().clamp_min(torch.finfo(torch.half).tiny)
        kept[name] = (rows / steps.float()[:, None]).round().clamp(-127,
                                                                   127).to(torch.int8).view(
                                                                       tensor.shape)
        kept[name + STEP] = steps
    return kept


def from_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `in_eight_bits` was given, but for rounding; tensors that it did not make as they
    are.

    Example: `from_eight_bits(in_eight_bits(model.state_dict())).keys() ==
    model.state_dict().keys()`
    """
    whole = {name: tensor for name, tensor in tensors.items()
             if not (name.endswith(STEP) and name[:-len(STEP)] in tensors)}
    for name in whole:
        steps = tensors.get(name + STEP)
        if steps is not None and tensors[name].dtype == torch.int8:
            whole[name] = (tensors[name].float()
                           * steps.float().view(-1, *[1] * (tensors[name].dim() - 1)))
    return whole


def save(model: nn.Module, path: Path | str, *, notes: dict[str, str] | None = None,
         eight_bits: bool = False) -> None:
    """Write the weights as safetensors, with the architecture and `notes` in its header, whole or
    not at all.

    eight_bits: matrices and filters as `in_eight_bits` keeps them.

    Raises ValueError where the model did not come from models.load or models.wrap, or holds NaN.

    Example: `save(model, "small.safetensors", eight_bits=True)`
    """
    if not hasattr(model, "origin"):
        if isinstance(model, fx.GraphModule):
            raise ValueError("a quantised or folded model is kept as its file, onnx.export(model, "
                             "example, PATH); as a checkpoint save the model that it was made of")
        raise ValueError("this model does not know its architecture; start from models.load, or "
                         "models.wrap for your own")
    refuse_nan(model, "the model to be saved")
    # tied weights: each once more
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    with files.atomic(path) as new:
        save_file(in_eight_bits(tensors) if eight_bits else tensors, new,
                  metadata=model.origin | (notes or {}))


def read_header(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors. Raises as models.load does for
    an unreadable file.

    Example: `checkpoints.save(model, "one.safetensors");
    read_header(Path("one.safetensors"))["architecture"] == "resnet20"`
    """
    return _read(path)[1]


def fill(model: nn.Module, path: Path, architecture: str) -> None:
    """Put the weights of a checkpoint into `model`, itself, which takes their shapes where the
    checkpoint is of a cut model.

    Raises FileNotFoundError for a missing file, ValueError for one that is damaged or does not fit,
    naming the first tensor.

    Example: `models.save(model, "mine.safetensors"); fill(model, Path("mine.safetensors"), "it")`
    """
    tensors, header = _read(path)
    if header.get("dropped", "[]") != getattr(model, "origin", {}).get("dropped", "[]"):
        for names in json.loads(header.get("dropped", "[]")):
            leave_out(model, names)
    if header.get("cut") == "true":
        _shrink(model, tensors)
        set_attributes(model, json.loads(header.get("attributes", "{}")))
        model.origin |= {key: header[key] for key in ("cut", "attributes") if key in header}
    if header.get("change") == "low rank":
        tensors = _changed(model, tensors)
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    stored = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    odd = sorted(wanted.keys() ^ stored.keys())
    if odd:
        where = "lacks" if odd[0] in wanted else "has, unknown to it,"
        raise ValueError(f"checkpoint {path} is of another architecture than {architecture}: it "
                         f"{where} {odd[0]!r} ({len(odd)} such names); load it as NAME@{path} with "
                         "the right NAME")
    for key, tensor in stored.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(f"checkpoint {path} does not fit {architecture}: {key} has shape "
                             f"{tuple(tensor.shape)}, expected {tuple(wanted[key].shape)}; are it "
                             "and the data of the same classes, and was load given the task?")
    model.load_state_dict({k: v.to(wanted[k].dtype) if k in wanted else v
                           for k, v in tensors.items()}, strict=False)


def answers_of(path: Path, model: nn.Module, classes: int) -> int:
    """How many classes the network of a checkpoint tells apart, where that is all in which it
    differs from `model`, which has `classes`; else `classes`.

    Example: `models.save(model, "mine.safetensors"); answers_of(Path("mine.safetensors"),
    model, 10) == 10`
    """
    tensors, wanted = _read(path)[0], model.state_dict()
    shapes = {(value.shape, wanted[key].shape) for key, value in tensors.items() if key in wanted}
    odd = {(have, want) for have, want in shapes if have != want}
    heads = all(have[1:] == want[1:] and want[:1] == (classes,) for have, want in odd)
    return max(have[0] for have, _ in odd) if odd and heads else classes


def set_attributes(model: nn.Module, attributes: dict[str, int]) -> None:
    """Set numbers of modules by their dotted names, such as how many heads are left of an
    attention.

    Example: `set_attributes(nn.Sequential(nn.Flatten()), {"0.start_dim": 1})`
    """
    for name, value in attributes.items():
        holder, _, key = name.rpartition(".")
        setattr(model.get_submodule(holder), key, value)


def refuse_nan(model: nn.Module, where: str) -> None:
    """Raise ValueError, naming the tensor, where a weight is NaN or infinite.

    Example: `refuse_nan(model, "one.safetensors")`
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}: {key} holds NaN or infinity; train or fetch these weights "
                             "again")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if path.suffix in (".pth", ".pt", ".bin"):
        return _unpickled(path), {}
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            return from_eight_bits(tensors), stored.metadata() or {}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path} is not a whole safetensors file ({error}); fetch or "
                         "write it again") from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, read without running what it holds."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is not a whole file of tensors ({reason(error)}); "
                         "fetch it again, or write its state_dict anew, with "
                         "safetensors.torch.save_file") from error
    held = stored if isinstance(stored, dict) else {}
    inner = next((held[key] for key in ("state_dict", "model") if isinstance(held.get(key), dict)),
                 stored)
    if (not isinstance(inner, dict)
        or not all(isinstance(value, Tensor) for value in inner.values())):
        raise ValueError(f"checkpoint {path} holds no state_dict, tensors by name, but "
                         f"{type(inner).__name__}; save that of the model, model.state_dict()")
    return {key.removeprefix("module."): value for key, value in inner.items()}


def save_change(model: nn.Module, base: nn.Module, path: Path | str, *, rank: int,
                whole: Sequence[str] = (), notes: dict[str, str] | None = None) -> None:
    """Write only how `model` differs from `base`, which it was trained from, as float16: of each
    matrix that changed the best change of this rank (singular values), other tensors that changed,
    and those of the modules `whole`, as they are.

    Raises ValueError where the two have other tensors. Source: low-rank changes of fine-tuning, Hu
    et al. 2021 (arXiv 2106.09685), here found after training.

    Example: `save_change(model, copy.deepcopy(model), "change.safetensors", rank=4)`
    """
    before, tensors = base.state_dict(), {}
    if before.keys() != model.state_dict().keys():
        raise ValueError("save_change: the two models have other tensors; give the model that "
                         "training started from")
    for key, after in model.state_dict().items():
        change = after - before[key] if after.is_floating_point() else torch.zeros(1)
        if (change.any() and change.dim() == 2 and min(change.shape) > rank
            and not key.startswith(tuple(whole))):
            left, values, right = torch.linalg.svd(change, full_matrices=False)
            tensors |= {f"{key}.left": (left[:, :rank] * values[:rank].sqrt()).half().contiguous(),
                        f"{key}.right": (right[:rank]
                                         * values[:rank, None].sqrt()).half().contiguous()}
        elif change.any():
            tensors[key] = after.half().contiguous()
    with files.atomic(path) as new:
        save_file(tensors, new, metadata=model.origin | {"change": "low rank"} | (notes or {}))


def _changed(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own tensors with the changes that `save_change` wrote."""
    new = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in tensors.items():
        if key.endswith(".left"):
            name = key.removesuffix(".left")
            new[name] += value.float() @ tensors[f"{name}.right"].float()
        elif not key.endswith(".right"):
            new[key] = value.to(new[key].dtype)
    return new


def _shrink(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give each convolution, linear or recurrent layer and norm the shape that its stored tensors
    have."""
    for name, module in model.named_modules():
        units = tensors.get(f"{name}.weight_hh_l0")
        if units is not None and isinstance(module, nn.RNNBase):
            module.hidden_size = units.shape[1]
            module.input_size = tensors[f"{name}.weight_ih_l0"].shape[1]
            for key, _ in list(module.named_parameters()):
                setattr(module, key, nn.Parameter(torch.zeros(tensors[f"{name}.{key}"].shape)))
        key = "weight" if getattr(module, "weight", None) is not None else "running_mean"
        weight, old = tensors.get(f"{name}.{key}"), getattr(module, key, None)
        if weight is None or old is None or weight.shape == old.shape:
            continue
        for key, old in [*module.named_parameters(recurse=False),
                         *module.named_buffers(recurse=False)]:
            new = torch.zeros(tensors.get(f"{name}.{key}", old).shape, dtype=old.dtype)
            setattr(module, key, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            depthwise = module.groups == module.out_channels == module.in_channels
            module.groups = len(weight) if depthwise else module.groups
            module.out_channels, module.in_channels = len(weight), weight.shape[1] * module.groups
        else:
            module.num_features = len(weight)
