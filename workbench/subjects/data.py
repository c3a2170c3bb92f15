"""Data sets as tasks: train, validation and test images, their classes, origin and licence.

Sources: Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), embedded whole; anything the `datasets` library reads.
"""

import glob
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench import files

EMBEDDED = ("fashion_mnist", "stamps")
DECODE_WHOLE_BELOW = 2**30  # bytes of uint8 pixels that are decoded once and kept; larger sets decode batch by batch
VALIDATION_EVERY = 12  # every 12th training image is validation where a set has none: 5,000 of 60,000


@dataclass(frozen=True)
class Preprocessing:
    """How images become a network's input: resize, centre crop, then (pixel / 255 - mean) / std per channel.

    size: side in pixels of the square input; None keeps the images' own size.
    crop: fraction of the resized shorter side that the centre crop keeps.
    """

    size: int | None = None
    crop: float = 1.0
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


class Pictures:
    """Encoded images of a `datasets` column, decoded to uint8 (n, C, H, W) when indexed by an int64 tensor or a slice.

    `take` chooses images without decoding them.
    """

    def __init__(self, column, preprocessing: Preprocessing, name: str, places: Tensor | None = None):
        self.column, self.preprocessing, self.name = column, preprocessing, name
        self.places = torch.arange(len(column)) if places is None else places
        self.shape = (len(self.places), *self._decode(int(self.places[0])).shape)

    def take(self, indices: Tensor) -> "Pictures":
        return Pictures(self.column, self.preprocessing, self.name, self.places[indices])

    def _decode(self, index: int) -> Tensor:
        from PIL import Image

        how = self.preprocessing
        try:
            picture = self.column[index].convert("RGB" if len(how.mean) == 3 else "L")
        except (OSError, AttributeError) as error:  # damaged or truncated; None where there is no picture
            raise ValueError(f"{self.name}: image {index} cannot be decoded ({_first_line(error)}); "
                             "remove or replace it") from error
        if how.size:
            scale = how.size / how.crop / min(picture.size)
            wide, high = (max(how.size, round(side * scale)) for side in picture.size)
            picture = picture.resize((wide, high), Image.Resampling[how.interpolation.upper()])
            left, top = (wide - how.size) // 2, (high - how.size) // 2
            picture = picture.crop((left, top, left + how.size, top + how.size))
        return torch.from_numpy(np.array(picture)).view(picture.height, picture.width, -1).permute(2, 0, 1)

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        places = self.places[indices].tolist()
        with ThreadPoolExecutor() as threads:
            decoded = list(threads.map(self._decode, places))
        odd = next((i for i, image in zip(places, decoded, strict=True) if image.shape != self.shape[1:]), None)
        if odd is not None:
            raise ValueError(f"{self.name}: image {odd} has another size than image 0, {self.shape[2]} x {self.shape[3]} "
                             "pixels; give preprocessing=models.preprocessing(MODEL), which resizes them")
        return torch.stack(decoded)


@dataclass(frozen=True)
class Split:
    """Images with labels. images: uint8 (N, C, H, W), a tensor or `Pictures`; labels: int64 (N,)."""

    images: Tensor | Pictures
    labels: Tensor
    preprocessing: Preprocessing
    name: str = "split"

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({self.name!r}, {len(self):,} images, {self.preprocessing})"

    def normalise(self, images: Tensor) -> Tensor:
        """Network input float32 (n, C, H, W), channels-last, of uint8 images (n, C, H, W)."""
        mean = torch.tensor(self.preprocessing.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.preprocessing.std).view(1, -1, 1, 1)
        return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def batches(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of network input float32 (n, C, H, W) and labels int64 (n,), in order, n at most `size`.

        Raises ValueError where the split is empty.
        """
        if not len(self):
            raise ValueError(f"{self.name} holds no images")
        for indices in torch.arange(len(self)).split(size):
            yield self.normalise(self.images[indices]), self.labels[indices]

    def take(self, indices: Tensor) -> "Split":
        """The images at `indices`, int64 (n,), in that order; nothing is decoded."""
        images = self.images.take(indices) if isinstance(self.images, Pictures) and len(indices) else self.images[indices]
        return replace(self, images=images, labels=self.labels[indices])

    def subset(self, count: int, *, seed: int = 0) -> "Split":
        """`count` of the images (all, if there are fewer), drawn without replacement by `seed`, in their old order."""
        if count < 1:
            raise ValueError(f"a subset of {self.name} needs at least 1 image, found {count}")
        if count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        return self.take(chosen)


@dataclass(frozen=True)
class Task:
    """A data set: its splits, class names, source and licence."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    source: str
    licence: str = field(default="see its source")

    @property
    def example(self) -> Tensor:
        """One network input, float32 (1, C, H, W): the first test image."""
        return next(self.test.batches(1))[0]


def load(name: str, *, preprocessing: Preprocessing | None = None) -> Task:
    """The task `name`: "fashion_mnist", "stamps" (pictures by category), "hub:ID" (a Hugging Face data set), or "folder:PATH".

    PATH is a folder in the hub's layout (train/CLASS/x.png, or train-*.parquet), a Parquet file, or a pattern of
    Parquet files whose names say their split. A set with one split only is all test. `preprocessing` defaults to the
    images' own size and ImageNet's mean and standard deviation; models.preprocessing(MODEL) gives what a model expects.

    Raises ValueError for an unknown name, FileNotFoundError for a missing or empty folder.

    Example: `task = data.load("fashion_mnist")`
    """
    kind, _, rest = name.partition(":")
    if name == "fashion_mnist":
        return _fashion_mnist(preprocessing)
    if name == "stamps":
        from workbench.subjects import stamps

        return stamps.task(preprocessing)
    if kind == "hub" and rest:
        return _from_columns(name, partial(_fetch, rest), preprocessing)
    if kind == "folder" and rest:
        return _from_columns(name, partial(_open_folder, rest), preprocessing)
    raise ValueError(f"unknown data {name!r}; expected one of {', '.join(EMBEDDED)}, hub:ID or folder:PATH")


def folder() -> Path:
    """Where the embedded data lie: WORKBENCH_DATA, or data/ of the clone that this package is installed from."""
    return Path(os.environ.get("WORKBENCH_DATA") or Path(__file__).parents[2] / "data")


def verify(path: Path) -> Path:
    """`path`, once its SHA-256 is the one in SHA256SUMS beside it.

    Raises FileNotFoundError where it is missing, ValueError where it is damaged.
    """
    listing = path.parent / "SHA256SUMS"
    for wanted in (listing, path):
        if not wanted.exists():
            raise FileNotFoundError(f"embedded file {wanted} is missing; install from a clone (pip install -e .) "
                                    "or set WORKBENCH_DATA to its data folder")
    sums = {name: digest for digest, name in map(str.split, listing.read_text().splitlines())}
    if files.sha256(path) != sums.get(path.name):
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {listing}; restore it with git checkout")
    return path


def _fashion_mnist(preprocessing: Preprocessing | None) -> Task:
    from PIL import Image

    def sheet(name: str) -> np.ndarray:  # 100 x 100 tiles of 28 x 28 pixels
        pixels = np.array(Image.open(verify(folder() / "fashion_mnist" / name)))
        return pixels.reshape(100, 28, 100, 28).swapaxes(1, 2).reshape(-1, 1, 28, 28)

    def labels(name: str) -> Tensor:
        stored = np.load(verify(folder() / "fashion_mnist" / name), allow_pickle=False)
        return torch.from_numpy(stored.astype(np.int64))

    how = preprocessing or Preprocessing(mean=(0.2860,), std=(0.3530,))
    if len(how.mean) != 1 or how.size not in (None, 28):
        raise ValueError("fashion_mnist has one channel and 28 x 28 pixels; this preprocessing expects "
                         f"{len(how.mean)} channels and size {how.size}")
    images = torch.from_numpy(np.concatenate([sheet(f"train_{k}.png") for k in range(6)]))
    train = Split(images, labels("train_labels.npy"), how, "fashion_mnist train")
    test = Split(torch.from_numpy(sheet("test_0.png")), labels("test_labels.npy"), how, "fashion_mnist test")
    classes = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    train, validation = set_aside(train, "fashion_mnist validation")
    return Task("fashion_mnist", train, validation, test, classes,
                "Zalando Research, github.com/zalandoresearch/fashion-mnist (arXiv 1708.07747)", "MIT")


def set_aside(train: Split, name: str) -> tuple[Split, Split]:
    """Every twelfth image of `train` as a split called `name`: (the rest, those)."""
    aside = torch.arange(len(train)) % VALIDATION_EVERY == 0
    return train.take((~aside).nonzero()[:, 0]), replace(train.take(aside.nonzero()[:, 0]), name=name)


def _fetch(identifier: str):
    import datasets

    try:
        return datasets.load_dataset(identifier)
    except Exception as error:  # the library raises some twenty kinds: no network, unknown id, gated, no builder
        raise FileNotFoundError(f"hub:{identifier} could not be loaded ({_first_line(error)}); "
                                "check the id and the network, or use folder:PATH") from error


def _open_folder(path: str):
    import datasets

    matches = sorted(glob.glob(path))
    if not matches:
        raise FileNotFoundError(f"data folder {path!r} does not exist; expected train/CLASS/*.png or train-*.parquet in it")
    datasets.disable_progress_bars()
    try:
        if os.path.isdir(matches[0]):
            return datasets.load_dataset(matches[0])
        kinds = ("train", "validation", "test")
        named = {kind: [m for m in matches if kind in Path(m).stem] for kind in kinds}
        named = {kind: found for kind, found in named.items() if found} or {"test": matches}
        return datasets.load_dataset("parquet", data_files=named)
    except Exception as error:  # as above, and whatever a damaged image or Parquet file provokes
        raise FileNotFoundError(f"data folder {path!r} holds no set of images ({_first_line(error)}); "
                                "expected train/CLASS/*.png or train-*.parquet") from error


def _from_columns(name: str, read, preprocessing: Preprocessing | None) -> Task:
    """A task of a `datasets` dictionary: its first image column, and the column `label` or the first of class labels."""
    import datasets

    stored = read()
    first = next(iter(stored.values()))
    if not len(first):
        raise FileNotFoundError(f"{name} holds no images")
    image = next((c for c, f in first.features.items() if _holds_images(f)), None)
    label = next((c for c, f in first.features.items() if isinstance(f, datasets.ClassLabel) or c == "label"), None)
    if image is None or label is None:
        raise ValueError(f"{name} has the columns {', '.join(first.features)}; expected one of images and one named label")
    stored = stored.cast_column(image, datasets.Image())
    how = preprocessing or Preprocessing()
    splits = {kind: _split(part, image, label, how, f"{name} {kind}") for kind, part in stored.items() if len(part)}
    splits = {kind: part for kind, part in splits.items() if part.labels.min() >= 0}  # -1: the hub keeps them secret
    if not splits:
        raise ValueError(f"{name} has no split with labels")
    if len(splits) == 1:
        splits = {"test": next(iter(splits.values()))}
    test = splits.get("test") or splits.get("validation") or splits.get("valid")
    if test is None:
        raise ValueError(f"{name} has the splits {', '.join(splits)}; expected test or validation among them")
    empty = replace(test, images=torch.empty(0), labels=test.labels[:0])
    train, validation = splits.get("train"), splits.get("validation")
    if train is not None and (validation is None or validation is test):
        train, validation = set_aside(train, f"{name} validation")
    names = getattr(first.features[label], "names", None)
    count = max(int(part.labels.max()) for part in splits.values()) + 1
    return Task(name, train or replace(empty, name=f"{name} train"), validation or replace(empty, name=f"{name} validation"),
                test, tuple(names or map(str, range(count))), name, first.info.license or "see its source")


def _holds_images(feature) -> bool:
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _split(part, image: str, label: str, how: Preprocessing, name: str) -> Split:
    pictures = Pictures(part[image], how, name)
    try:
        labels = torch.tensor(part[label][:], dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: the column {label!r} holds {part[label][0]!r}; expected whole numbers") from error
    if int(np.prod(pictures.shape)) > DECODE_WHOLE_BELOW:
        return Split(pictures, labels, how, name)
    blocks = torch.arange(len(labels)).split(512)
    decoded = [pictures[block] for block in files.progress(blocks, title=f"decoding {name}")]
    return Split(torch.cat(decoded), labels, how, name)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
