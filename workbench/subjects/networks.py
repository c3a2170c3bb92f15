"""Small networks of our own: CIFAR ResNets, a RepVGG, towers for several inputs; and teachers made
of other networks.

Sources: CIFAR ResNets of He et al. 2016 (arXiv 1512.03385, section 4.2) with option A shortcuts,
parameter names as in akamaster/pytorch_resnet_cifar10; RepVGG of Ding et al. 2021 (arXiv
2101.03697), a small one of our own widths.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench import files, machine
from workbench.batches import answer, call
from workbench.graph.layers import evaluating
from workbench.subjects.objectives import NextToken
from workbench.subjects.tasks import Split, Texts, shuffled

# channels and blocks, the first of stride 2, behind a stem of 16 channels
REPVGG_STAGES = ((32, 2), (64, 3), (128, 2))


class PadShortcut(nn.Module):
    """Option A shortcut: every second pixel, `padding` channels of zeros before and behind; no
    parameters.

    Example: `PadShortcut(4)(torch.ones(1, 8, 8, 8)).shape == (1, 16, 4, 4)`
    """

    def __init__(self, padding: int):
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:  # (n, C, H, W) -> (n, C + 2 padding, H / 2, W / 2)
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut around both.

    Example: `BasicBlock(8, 16, 2)(torch.ones(1, 8, 8, 8)).shape == (1, 16, 4, 4)`
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = (PadShortcut((channels_out - channels_in) // 2) if stride == 2
                         else nn.Identity())
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet: a 3 x 3 stem, three stages of 16, 32 and 64 channels, average pooling, one
    linear layer.

    Example: `ResNet(3, in_channels=1)(x).shape == (len(x), 10)`
    """

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
    """Trained as the sum of a 3 x 3 branch, a 1 x 1 branch and, where the shape stays, the input,
    each behind its batch norm; then a ReLU. `fused` gives one convolution that computes the same in
    eval mode. Without `branches` the 3 x 3 one stands alone.

    Example: `RepVGGBlock(8, 16)(torch.ones(1, 8, 8, 8)).shape == (1, 16, 8, 8)`
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1, *,
                 branches: bool = True):
        super().__init__()
        self.conv3 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.conv1 = (nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if branches
                      else None)
        self.bn1 = nn.BatchNorm2d(channels_out) if branches else None
        self.bn0 = (nn.BatchNorm2d(channels_in) if branches and channels_in == channels_out
                    and stride == 1 else None)
        self.relu = nn.ReLU()

    # (n, channels_in, H, W) -> (n, channels_out, H / stride, W / stride)
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv3(x))
        if self.conv1 is not None:
            y = y + self.bn1(self.conv1(x))
        return self.relu(y if self.bn0 is None else y + self.bn0(x))

    def fused(self) -> nn.Sequential:
        """Convolution and ReLU: W = sum of g / s W_branch, b = sum of beta - m g / s, the 1 x 1
        branch and the input as 3 x 3 kernels with zeros around."""
        conv = nn.Conv2d(self.conv3.in_channels, self.conv3.out_channels, 3, self.conv3.stride, 1)
        eye = torch.eye(len(self.conv3.weight))[:, :, None, None]
        kernels = [(self.conv3.weight, self.bn3)]
        kernels += ([(F.pad(self.conv1.weight, (1, 1, 1, 1)), self.bn1)] if self.conv1 is not None
                    else [])
        kernels += [(F.pad(eye, (1, 1, 1, 1)), self.bn0)] if self.bn0 is not None else []
        gains = [norm.weight / (norm.running_var + norm.eps).sqrt() for _, norm in kernels]
        with torch.no_grad():
            conv.weight.copy_(sum(k * g.view(-1, 1, 1, 1)
                                  for (k, _), g in zip(kernels, gains, strict=True)))
            conv.bias.copy_(sum(norm.bias - norm.running_mean * g
                                for (_, norm), g in zip(kernels, gains, strict=True)))
        return nn.Sequential(conv, nn.ReLU()).to(memory_format=torch.channels_last).eval()


class RepVGG(nn.Module):
    """A stem of 16 channels and three stages of RepVGG blocks, average pooling, one linear
    layer.

    Example: `RepVGG(in_channels=1)(x).shape == (len(x), 10)`
    """

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


class Towers(nn.Module):
    """One network for each named input; what they put out, side by side, goes into `head`.

    Example: `Towers({"signal": nn.Linear(8, 16), "station": nn.Embedding(4, 16)}, nn.Linear(32,
    3))`
    """

    def __init__(self, parts: Mapping[str, nn.Module], head: nn.Module):
        super().__init__()
        self.parts, self.head = nn.ModuleDict(parts), head

    def forward(self, **inputs: Tensor) -> Tensor:  # (n, ...) each -> (n, classes)
        missing = [name for name in (*self.parts, *inputs) if name not in inputs
                   or name not in self.parts]
        if missing:
            raise ValueError(f"input {missing[0]!r} is missing or unknown; expected "
                             f"{', '.join(self.parts)}")
        return self.head(torch.cat([part(inputs[name]) for name, part in self.parts.items()], 1))


class Averaged(nn.Module):
    """Several networks as one, whose logits are the mean of theirs (Hinton et al. 2015, arXiv
    1503.02531, section 3).

    Raises ValueError for none.

    Example: `distillation.loss(networks.Averaged([one, other]))`
    """

    def __init__(self, several: Sequence[nn.Module]):
        super().__init__()
        if not several:
            raise ValueError("Averaged: there is no network; give at least one")
        self.several = nn.ModuleList(several)

    def forward(self, *given, **named) -> Tensor:
        return torch.stack([answer(network(*given, **named)) for network in self.several]).mean(0)


class Remembered(nn.Module):
    """A network that has answered the sentences of a split once and looks its answers up: a teacher
    that costs its students next to nothing.

    split: of sentences, which `network` reads as `input_ids` and `attention_mask` and answers as a
    whole or token by token; they are found again however they are padded. It answers in bf16 where
    the processor multiplies it. Raises ValueError for a split of anything else, and, when called,
    for a sentence that is not among them.

    Example: `distillation.loss(networks.Remembered(teacher, commands.train))`
    """

    answers: Tensor  # (sentences, or the tokens of all of them; what each may be answered)

    def __init__(self, network: nn.Module, split: Split, *, size: int = 64):
        super().__init__()
        answers: list[Tensor] = []
        self.places: dict[bytes, tuple[int, int]] = {}
        known, order = 0, shuffled(split, size, torch.Generator().manual_seed(0))
        half = torch.autocast("cpu", torch.bfloat16, enabled=machine.multiplies_bf16())
        with torch.inference_mode(), evaluating(network), half, files.progress(
                total=len(split), title="what the teacher answers", unit="sentence") as bar:
            for places in order.split(size):
                inputs, _ = split.batch(places)
                if not isinstance(inputs, Mapping):
                    raise ValueError(f"Remembered: {split.name} holds no sentences; a teacher that "
                                     "sees pictures anew each time cannot be remembered")
                logits = answer(call(network, inputs)).float()
                for key, mask, row in zip(_sentences(inputs), inputs["attention_mask"].bool(),
                                          logits, strict=True):
                    answers.append(row[mask] if row.dim() > 1 else row[None])
                    self.places[key] = known, known + len(answers[-1])
                    known += len(answers[-1])
                bar.update(len(places))
        self.by_token = logits.dim() == 3
        self.register_buffer("answers", torch.cat(answers).clone())

    # int64 (n, L) each -> (n, answers), or (n, L, answers), 0 behind the end of a sentence
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        keys = _sentences({"input_ids": input_ids, "attention_mask": attention_mask})
        new = next((k for k, key in enumerate(keys) if key not in self.places), None)
        if new is not None:
            raise ValueError(f"Remembered: sentence {new} of the batch is none of those whose "
                             "answers are known; give the split that is trained on")
        known = torch.cat([self.answers[slice(*self.places[key])] for key in keys])
        if not self.by_token:
            return known
        out = known.new_zeros(*input_ids.shape, known.shape[1])
        out[attention_mask.bool()] = known
        return out


def can_remember(split: Split) -> bool:
    """Whether `Remembered` has little to keep of a split: sentences with a choice of classes or
    tags, not of the next token out of a vocabulary.

    Example: `not can_remember(task.train)`
    """
    return isinstance(split.inputs, Texts) and not isinstance(split.objective, NextToken)


def _sentences(inputs: Mapping[str, Tensor]) -> list[bytes]:
    """The tokens of each sentence, without padding, as a key."""
    return [ids[mask].cpu().numpy().tobytes()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(),
                                 strict=True)]
