"""Name a model's layers, see what they put out, count what they cost, replace some in a copy."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from workbench.batches import Inputs, call, rows
from workbench.errors import UnsupportedModelError, listed, reason

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Change:
    """What a method would do to one layer at one level: the layers that are replaced, by name, and
    what that removes.

    removed, of: channels (or ranks, or bits) that go, of how many. layers: those that are coupled
    and go together. left: the fraction of a layer's weights and MACs that stays, 1 for layers not
    named. note: a word for the reader.

    Example: `Change({"conv1": nn.Identity()}, removed=16, of=16, layers=("conv1",)).note == ""`
    """

    modules: Mapping[str, nn.Module]
    removed: int
    of: int
    layers: tuple[str, ...]
    left: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight of a layer is (inputs, outputs, ...), as that of a transposed convolution.

    Example: `is_transposed(nn.ConvTranspose2d(3, 2, 2))`
    """
    return isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)


class Masked(nn.Module):
    """A layer with some of its output channels zero, as if their weights and biases were; a
    function of the layer's own output, so that whoever has that need not compute it again.

    Example: `Masked(nn.Linear(3, 2), torch.tensor([0]))(torch.ones(1, 3))[0, 0] == 0`
    """

    def __init__(self, layer: nn.Module, channels: Tensor):
        super().__init__()
        self.layer = layer
        kept = torch.ones(layer.out_channels if is_transposed(layer) else len(layer.weight))
        kept[channels] = 0
        linear = isinstance(layer, nn.Linear)
        self.register_buffer("kept",
                             kept if linear else kept.view(-1, *[1] * (layer.weight.dim() - 2)))

    def of_output(self, values: Tensor) -> Tensor:
        """The layer's output with these channels zero."""
        return values * self.kept.to(values.dtype)

    def forward(self, values: Tensor) -> Tensor:
        return self.of_output(self.layer(values))


def named(model: nn.Module, patterns: str | Sequence[str] = "*") -> dict[str, nn.Module]:
    """The convolution and linear layers whose names match a glob, by name, in the order of
    definition.

    Raises ValueError where a pattern matches none.

    Example: `layers.named(model, "layer2.*")`
    """
    weighted = {name: module for name, module in model.named_modules()
                if isinstance(module, WEIGHTED)}
    return {name: weighted[name] for name in matching(weighted, patterns)}


def matching(names: Iterable[str], patterns: str | Sequence[str], *, what: str = "") -> list[str]:
    """Those of the names that match one of the globs, in their order.

    Raises ValueError, `what` before it, where a glob matches nothing.

    Example: `layers.matching(["conv1", "fc"], "conv*") == ["conv1"]`
    """
    names, patterns = list(names), [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{what}no layer matches {pattern!r}; the layers are {listed(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def replaced(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """A deep copy of `model` in which `layer` stands at `name`. Raises ValueError where there is no
    such module.

    Example: `layers.replaced(model, "conv1", nn.Identity()).conv1`
    """
    new = copy.deepcopy(model)
    parent, _, child = name.rpartition(".")
    try:
        holder = new.get_submodule(parent)
        getattr(holder, child)
    except AttributeError as error:
        raise ValueError(f"no layer {name!r}; the layers are {listed(named(model))}") from error
    setattr(holder, child, layer)
    return new


def macs_of(model: nn.Module, example: Inputs) -> int:
    """Multiply-accumulates of one example, the first of `example`: half the operations that torch
    counts.

    Source: torch.utils.flop_counter, which counts convolutions, matrix products and attention.

    Example: `macs_of(torch.nn.Linear(8, 4), torch.ones(1, 8)) == 32`
    """
    return sum(macs_by_module(model, example).get("Global", {0: 0}).values())


def macs_by_module(model: nn.Module, example: Inputs) -> dict[str, dict]:
    """Multiply-accumulates of one example, by path of module ("Global" for all) and by
    operation.

    Example: `macs_by_module(model, x)["Global"]`
    """
    counter, learning = FlopCounterMode(display=False), [p for p in model.parameters()
                                                         if p.requires_grad]
    # attention as plain products: the counter knows neither the CPU's fused kernel nor that of
    # nn.MultiheadAttention
    fused = torch.backends.mha.get_fastpath_enabled()
    with evaluating(model), torch.inference_mode(False), torch.no_grad(), counter, sdpa_kernel(
        SDPBackend.MATH):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            # else the counter fails where one is handed to a module, as PiT's class token is
            for parameter in learning:
                parameter.requires_grad_(False)
            call(model, rows(example, slice(0, 1)))
        except RuntimeError as error:  # of the model's own code
            raise UnsupportedModelError(f"{type(model).__name__} does not run on the example "
                                        f"({reason(error)})") from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for parameter in learning:
                parameter.requires_grad_(True)
    return {path: {op: count // 2 for op, count in ops.items()}
            for path, ops in counter.get_flop_counts().items()}


def own_macs(model: nn.Module, example: Inputs) -> dict[str, int]:
    """Multiply-accumulates of one example by module, without those of the modules in it; a
    functional operation (attention, say) counts for the module whose forward calls it.

    Example: `own_macs(torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.ones(1, 8))["0"] == 32`
    """
    counts = {path: sum(ops.values()) for path, ops in macs_by_module(model, example).items()}
    root = type(model).__name__
    whole: dict[str, int] = {}
    own: dict[str, int] = {}
    if not counts.get(root) and "Global" in counts:
        counts[root] = counts["Global"]
    for name, module in reversed(list(model.named_modules())):  # what is inside comes first
        inside = sum(whole.get(f"{name}.{child}" if name else child, 0)
                     for child, _ in module.named_children())
        # a list of modules is not called itself
        whole[name] = counts.get(f"{root}.{name}" if name else root, inside)
        own[name] = whole[name] - inside
    return {name: own[name] for name, _ in model.named_modules()}


def patches(layer: nn.Module, values: Tensor, *, seed: int, places: int = 16) -> Tensor:
    """The inputs `values` of a layer as rows of its matrix product, (groups, N, K), K inputs a
    channel.

    A linear layer gives all; a convolution `places` patches of each image, at places drawn by
    `seed`, the same for all. Raises UnsupportedModelError for another layer, or padding that is not
    zeros.

    Example: `patches(nn.Linear(256, 4), a, seed=0).shape[-1] == 256`
    """
    if isinstance(layer, nn.Linear):
        return values.reshape(1, -1, values.shape[-1])
    if not isinstance(layer, nn.Conv1d | nn.Conv2d) or layer.padding_mode != "zeros":
        raise UnsupportedModelError(f"{type(layer).__name__} has no patches here; only Conv1d and "
                                    "Conv2d with zero padding, and Linear")
    values = F.pad(values, layer._reversed_padding_repeated_twice)  # of padding="same" too
    sizes = [layer.kernel_size, layer.dilation, layer.stride]
    if isinstance(layer, nn.Conv1d):  # as over pictures that are one pixel high
        values, sizes = values.unsqueeze(2), [(1, *size) for size in sizes]
    (tall, wide), (down, right), (below, beside) = sizes
    windows = values.unfold(2, down * (tall - 1) + 1, below)
    windows = windows.unfold(3, right * (wide - 1) + 1, beside)[..., ::down, ::right]
    rows, columns = torch.randint(0, 2**31, (2, places),
                                  generator=torch.Generator().manual_seed(seed))
    chosen = windows[:, :, rows % windows.shape[2], columns % windows.shape[3]]  # (n, C, P, kh, kw)
    inputs = chosen[0, 0, 0].numel() * chosen.shape[1] // layer.groups
    return chosen.transpose(1, 2).reshape(-1, layer.groups, inputs).transpose(0, 1)


@contextlib.contextmanager
def capture(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dictionary that each forward pass fills, in order of execution, with every weighted layer's
    output.

    A batch norm that directly follows a layer counts as part of it: the output behind the norm is
    kept, under the layer's name. So a model and its copy with the norms folded put out the same at
    every layer.

    Example: `with layers.capture(model) as outputs: model(x)`
    """
    outputs: dict[str, Tensor] = {}
    # the name of the layer that ran last and its very output, which a norm may follow
    latest: list = [None, None]

    def keep(name: str):
        def hook(_module, _inputs, output):
            latest[:] = name, output
            outputs[name] = output.clone()  # what follows may work in place
        return hook

    # what a library's own norm does besides, such as its activation, is left out
    def keep_behind(norm, inputs, _output):
        name, made = latest
        if (made is not None and inputs[0] is made and norm.running_mean is not None
            and torch.equal(made, outputs[name])):
            latest[1] = None  # nothing came in between, in place either
            outputs[name] = F.batch_norm(made, norm.running_mean, norm.running_var, norm.weight,
                                         norm.bias, eps=norm.eps)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED):
            handles.append(module.register_forward_hook(keep(name)))
        elif isinstance(module, _NORMS):
            handles.append(module.register_forward_hook(keep_behind))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watch(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that each forward pass fills with the outputs of the modules `names`, blocks as
    well as layers.

    Raises ValueError where there is no such module.

    Example: `with layers.watch(model, ["layer1"]) as outputs: model(x)`
    """
    outputs: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(f"no module {name!r} in {type(model).__name__}; its blocks are "
                             f"{listed(child for child, _ in model.named_children())}")

    def keep(name: str):
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients; each module's own mode is put back at the end.

    Example: `with layers.evaluating(model): model(x)`
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.inference_mode():
            yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode
