"""A task: examples with what is right for them, how they are prepared for a model, and what is
asked of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench import files
from workbench.batches import Batch, Inputs, joined, rows, tensors
from workbench.errors import reason
from workbench.subjects.objectives import IGNORED, Objective

# what to do where a task has no examples but those that judge
ONE_SPLIT = ("a set that has one split only is all test: give folder:PATH files or folders named "
             "train, validation and test, or data.of(train, test)")


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become a network's input: resized and cropped when decoded; called, (pixel / 255
    - mean) / std by channel.

    size: side in pixels of the square input; None keeps the pictures' own size.
    crop: fraction of the resized shorter side that the centre crop keeps.

    Example: `Preprocessing(mean=(0.5,), std=(0.5,))(Batch(torch.zeros(2, 1, 8, 8,
    dtype=torch.uint8))).inputs.min() == -1`
    """

    size: int | None = None
    crop: float = 1.0
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __call__(self, stored: Batch) -> Batch:
        """Pictures uint8 (n, C, H, W) as float32, channels-last."""
        mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (self.mean, self.std))
        made = ((stored.inputs.float() / 255 - mean)
                / std).contiguous(memory_format=torch.channels_last)
        return Batch(made, stored.targets)

def as_stored(stored: Batch) -> Batch:
    """Nothing to prepare: the examples are the model's inputs already.

    Example: `as_stored(task.test.batch(slice(4)))`
    """
    return stored


class Pictures:
    """Encoded pictures of a `datasets` column, decoded to uint8 (n, C, H, W) when indexed by an
    int64 tensor or a slice.

    `take` chooses pictures without decoding them.

    Example: `Pictures(column, preprocessing, "photographs")[:8]`
    """

    def __init__(self, column, preprocessing: Preprocessing, name: str,
                 places: Tensor | None = None):
        self.column, self.preprocessing, self.name = column, preprocessing, name
        self.places = torch.arange(len(column)) if places is None else places
        self.shape = (len(self.places), *self._decode(int(self.places[0])).shape)

    def __len__(self) -> int:
        return len(self.places)

    def take(self, places: Tensor) -> "Pictures":
        return Pictures(self.column, self.preprocessing, self.name, self.places[places])

    def told(self) -> Tensor:
        """Which pictures of the column these are, for a fingerprint."""
        return self.places

    def _decode(self, index: int) -> Tensor:
        from PIL import Image

        how = self.preprocessing
        try:
            picture = self.column[index]
            if picture.mode.startswith("I;16"):  # convert would cut all above 255 off
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            picture = picture.convert("RGB" if len(how.mean) == 3 else "L")
        # damaged or truncated; None where there is no picture
        except (OSError, AttributeError) as error:
            raise ValueError(f"{self.name}: image {index} cannot be decoded ({reason(error)}); "
                             "remove or replace it") from error
        if how.size:
            scale = how.size / how.crop / min(picture.size)
            wide, high = (max(how.size, round(side * scale)) for side in picture.size)
            picture = picture.resize((wide, high), Image.Resampling[how.interpolation.upper()])
            left, top = (wide - how.size) // 2, (high - how.size) // 2
            picture = picture.crop((left, top, left + how.size, top + how.size))
        return torch.from_numpy(np.array(picture)).view(picture.height, picture.width,
                                                        -1).permute(2, 0, 1)

    def __getitem__(self, places: Tensor | slice) -> Tensor:
        chosen = self.places[places].tolist()
        with ThreadPoolExecutor() as threads:
            decoded = list(threads.map(self._decode, chosen))
        odd = next((i for i, image in zip(chosen, decoded, strict=True)
                    if image.shape != self.shape[1:]), None)
        if odd is not None:
            raise ValueError(f"{self.name}: image {odd} has another size than image 0, "
                             f"{self.shape[2]} x {self.shape[3]} pixels; give "
                             "preprocessing=models.preprocessing(MODEL), which resizes them")
        return torch.stack(decoded)


class Texts:
    """Sentences (or lists of words) to be indexed as a tensor is, by an int64 tensor or a slice.

    Example: `len(Texts(["one", "two"])) == 2`
    """

    def __init__(self, lines: Sequence):
        self.lines = np.empty(len(lines), dtype=object)
        self.lines[:] = lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, places: Tensor | slice) -> "Texts":
        return Texts(list(self.lines[places if isinstance(places, slice) else places.numpy()]))

    take = __getitem__

    def told(self) -> str:
        """The lines, for a fingerprint."""
        return "\n".join(map(str, self.lines))


@dataclass(frozen=True)
class Split:
    """Examples with what is right for them.

    inputs: what is stored, a tensor, a tuple or mapping of tensors, `Pictures` or `Texts`, N
    examples along axis 0. targets: int64 (N, ...), or `Texts` of lists of numbers. prepare: stored
    Batch -> the Batch that a model reads. units: int64 (N,), equal where examples belong together
    (sentences of one speaker), None where each stands for itself.

    Example: `len(Split(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), name="mine")) == 4`
    """

    inputs: Inputs | Pictures | Texts
    targets: Tensor | Texts
    prepare: Callable[[Batch], Batch] = as_stored
    objective: Objective = field(default_factory=Objective)
    name: str = "split"
    units: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return f"Split({self.name!r}, {len(self):,} {self.objective.unit}s, {self.prepare})"

    @cached_property
    def fingerprint(self) -> str:
        """What tells these examples from others: SHA-256 of what is stored, of encoded pictures of
        which they are."""
        inputs = ([self.inputs.told()] if isinstance(self.inputs, Pictures | Texts)
                  else tensors(self.inputs))
        targets = self.targets.told() if isinstance(self.targets, Texts) else self.targets
        return files.fingerprint([*inputs, targets])

    def stored(self, places: Tensor | slice) -> Batch:
        """The examples at `places` as they are stored."""
        inputs = (self.inputs[places] if isinstance(self.inputs, Pictures | Texts)
                  else rows(self.inputs, places))
        return Batch(inputs, self.targets[places])

    def batch(self, places: Tensor | slice = slice(None)) -> Batch:
        """The examples at `places` as a model reads them, all of them by default."""
        made = self.prepare(self.stored(places))
        self.objective.check_targets(made.inputs, made.targets)
        return made

    def batches(self, size: int = 256) -> Iterator[Batch]:
        """Batches of inputs and targets as a model reads them, in order, of at most `size`.

        Raises ValueError where the split is empty.
        """
        if not len(self):
            raise ValueError(f"{self.name} holds no {self.objective.unit}s; {ONE_SPLIT}")
        for places in torch.arange(len(self)).split(size):
            yield self.batch(places)

    def take(self, places: Tensor) -> "Split":
        """The examples at `places`, int64 (n,), in that order; nothing is decoded."""
        lazy = isinstance(self.inputs, Pictures | Texts) and len(places)
        inputs = self.inputs.take(places) if lazy else self.stored(places).inputs
        units = None if self.units is None else self.units[places]
        return replace(self, inputs=inputs, targets=self.targets[places], units=units)

    def subset(self, count: int, *, seed: int = 0) -> "Split":
        """`count` of the examples (all, if there are fewer), drawn without replacement by `seed`,
        in their old order."""
        if count < 1:
            raise ValueError(f"a subset of {self.name} needs at least 1 {self.objective.unit}, "
                             f"found {count}")
        if count >= len(self):
            return self
        chosen = torch.randperm(len(self),
                                generator=torch.Generator().manual_seed(seed))[:count].sort().values
        return self.take(chosen)

    def empty(self, name: str) -> "Split":
        """A split of the same kind without examples."""
        inputs = (self.inputs if isinstance(self.inputs, Pictures | Texts)
                  else rows(self.inputs, slice(0, 0)))
        inputs = (torch.empty(0) if isinstance(inputs, Pictures) else Texts([])
                  if isinstance(inputs, Texts) else inputs)
        return replace(self, inputs=inputs, targets=self.targets[:0], name=name,
                       units=None if self.units is None else self.units[:0])


def shuffled(split: Split, size: int, generator: torch.Generator) -> Tensor:
    """The places of all examples in random order, int64 (N,), to be taken in batches of `size`.

    Sentences of like length come together, so that little of a batch is padding: within every
    sixteen batches they are put in order of length, and then the batches are drawn.

    Example: `shuffled(task.train, 64, torch.Generator().manual_seed(0)).split(64)`
    """
    order = torch.randperm(len(split), generator=generator)
    if not isinstance(split.inputs, Texts):
        return order
    lengths = torch.tensor([len(line) for line in split.inputs.lines])
    order = torch.cat([part[lengths[part].argsort(stable=True)]
                       for part in order.split(16 * size)])
    full = order[:len(split) // size * size].view(-1, size)
    drawn = full[torch.randperm(len(full), generator=generator)]
    return torch.cat([drawn.flatten(), order[full.numel():]])


@dataclass(frozen=True)
class Task:
    """A data set and what is asked of a model: splits, names of the classes, source and licence.

    Example: `Task("mine", task.train, task.validation, task.test, task.classes, source="here")`
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    source: str
    licence: str = field(default="see its source")

    @property
    def objective(self) -> Objective:
        """What is asked of a model."""
        return self.test.objective

    @property
    def example(self) -> Inputs:
        """One input of a model: the first test example."""
        return self.test.batch(torch.arange(1)).inputs

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(split):,} {kind}"
                          for kind, split in (("train", self.train),
                                              ("validation", self.validation), ("test", self.test))
                          if split is not None)
        return f"Task({self.name!r}: {sizes}; {len(self.classes)} classes)"


def expect_split(split) -> None:
    """Raise TypeError where examples with what is right for them are none: a whole task, say.

    Example: `expect_split(task.test)`
    """
    if not isinstance(split, Split):
        meant = ": give its test split, task.test" if isinstance(split, Task) else ""
        raise TypeError(f"expected a Split of examples, found a {type(split).__name__}{meant}")


def described(inputs: Inputs) -> str:
    """The shapes of inputs, for a message or a caption.

    Example: `described(torch.zeros(1, 3, 8, 8)) == "3 x 8 x 8"`
    """
    def one(value: Tensor) -> str:
        return " x ".join(map(str, value.shape[1:])) or "1"

    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {one(value)}" for name, value in inputs.items())
    return ", ".join(map(one, tensors(inputs)))


def with_unlabelled(labelled: Split, more: Split) -> Split:
    """The examples of both splits, those of `more` without their labels: their targets are IGNORED.

    Raises ValueError where they hold other kinds of input, or something else than one class an
    example is asked for.

    Example: `len(with_unlabelled(task.train, task.validation)) == len(task.train) +
    len(task.validation)`
    """
    if not isinstance(labelled.targets, Tensor) or labelled.targets.dim() != 1:
        raise ValueError(f"{labelled.name}: unlabelled examples can stand beside those with one "
                         "class each, not beside tags or plain text")
    texts = isinstance(labelled.inputs, Texts) and isinstance(more.inputs, Texts)
    if not texts and _kind(labelled.inputs) != _kind(more.inputs):
        raise ValueError(f"unlabelled examples of {more.name} are not of the kind of those of "
                         f"{labelled.name}; give texts beside texts, tensors beside tensors of the "
                         "same shape and type")
    inputs = (Texts([*labelled.inputs.lines, *more.inputs.lines]) if texts
              else joined([labelled.inputs, more.inputs]))
    targets = torch.cat([labelled.targets, torch.full((len(more),), IGNORED)])
    return replace(labelled, inputs=inputs, targets=targets, units=None)


def _kind(inputs) -> object:
    """What has to agree before examples can be joined; never equal for pictures that are not
    decoded yet, or texts."""
    return (object() if isinstance(inputs, Pictures | Texts)
            else [(value.dtype, value.shape[1:]) for value in tensors(inputs)])


def set_aside(train: Split, name: str, *, every: int = 12,
              seed: int | None = None) -> tuple[Split, Split]:
    """Every twelfth example of `train` as a split called `name`, or, where labels may come in turn,
    as many drawn by `seed`: (the rest, those), in their order.

    Example: `[len(part) for part in set_aside(task.train, "test", every=4)]`
    """
    aside = torch.arange(len(train)) % every == 0
    if seed is not None:
        aside = aside[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))]
    return train.take((~aside).nonzero()[:, 0]), replace(train.take(aside.nonzero()[:, 0]),
                                                         name=name)


def augment(images: Tensor, *, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Images uint8 (n, C, H, W), each moved by up to `shift` pixels (zeros enter) and, by an even
    chance, mirrored.

    Example: `augment(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), shift=1, flip=True,
    generator=torch.Generator()).shape == (2, 1, 8, 8)`
    """
    n, _, high, wide = images.shape
    if shift:
        corner = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
        # (n, H), (n, W)
        rows, columns = corner[0] + torch.arange(high), corner[1] + torch.arange(wide)
        padded = F.pad(images, (shift,) * 4).permute(0, 2, 3, 1)  # (n, H + 2 shift, W + 2 shift, C)
        images = padded[torch.arange(n)[:, None, None], rows[:, :, None],
                        columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def with_views(split: Split, times: int, *, least: float = 0.6, seed: int = 0) -> Split:
    """The pictures of a split, decoded, and `times` further views of each: a square of `least` to
    all of the shorter side, brought back to their size, mirrored by an even chance. For what is
    fitted to few pictures; a view has the label of its picture. Five pictures, their views, the
    next five: so that who holds every fifth example out, as graph.moments does, holds pictures out
    with all their views.

    Raises ValueError where the inputs are no pictures uint8 (n, C, H, W).

    Example: `len(with_views(task.validation.subset(4), 2)) == 12`
    """
    stored = split.stored(slice(None))
    if getattr(stored.inputs, "dtype", None) != torch.uint8 or stored.inputs.dim() != 4:
        raise ValueError(f"views are of pictures, uint8 (n, C, H, W); {split.name} holds others: "
                         "leave views at 0")
    drawn = torch.Generator().manual_seed(seed)
    seen = torch.cat([stored.inputs, *(_seen_again(picture, least, drawn)
                                       for _ in range(times) for picture in stored.inputs)])
    n = len(split)
    order = torch.tensor(sorted(range(len(seen)), key=lambda k: (k % n // 5, k // n, k % n)))
    units = None if split.units is None else split.units[order % n]
    return replace(split, inputs=seen[order], targets=stored.targets[order % n], units=units)


def _seen_again(picture: Tensor, least: float, drawn: torch.Generator) -> Tensor:
    """Another view (1, C, H, W) of a picture (C, H, W)."""
    high, wide = picture.shape[1:]
    side = round(min(high, wide) * (least + (1 - least) * torch.rand(1, generator=drawn).item()))
    top, left = (int(torch.randint(0, room - side + 1, (1,), generator=drawn))
                 for room in (high, wide))
    part = picture[None, :, top:top + side, left:left + side].float()
    new = F.interpolate(part, (high, wide), mode="bicubic", antialias=True).clamp(0, 255).round()
    return (new.flip(3) if torch.rand(1, generator=drawn) < 0.5 else new).to(torch.uint8)
