"""Data sets as tasks: embedded ones, anything the `datasets` library reads, and what the caller
brings.

Source: Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), embedded whole.
"""

import glob
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench import files
from workbench.batches import Batch, Inputs, count, joined, mapped
from workbench.errors import listed, nearest, quietly, reason
from workbench.subjects import embedded, intents, stamps, texts
from workbench.subjects.objectives import Objective, Tagging, Understanding, objective
from workbench.subjects.tasks import Pictures, Preprocessing, Split, Task, as_stored, set_aside

# bytes of uint8 pixels that are decoded once and kept; larger sets decode batch by batch
DECODE_WHOLE_BELOW = 2**30
TEST_EVERY = 5  # one in five is test where the caller gives one set only


def load(name: str, *, preprocessing: Callable[[Batch], Batch] | None = None) -> Task:
    """The task `name`: an embedded set ("fashion_mnist", "stamps", "wiki_topics", "wiki_text",
    "wordnet"), "intents:LANGUAGE", "hub:ID" or "folder:PATH".

    ID is a Hugging Face data set. PATH is a folder in the hub's layout (train/CLASS/x.png, or
    train-*.parquet), a Parquet file, or a pattern of Parquet files whose names say their split.
    Pictures with labels, text with `label`, `tokens` with `tags` (and an `intent`), or text alone
    are known by their columns. A set with one split only is all test. preprocessing: what the model
    expects, models.preprocessing(MODEL), or a tasks.Preprocessing of yours; pictures default to
    their own size and ImageNet's mean and standard deviation, text needs it for its tokens.

    Raises ValueError for an unknown name or preprocessing of another kind, FileNotFoundError for a
    missing or empty folder.

    Example: `task = data.load("fashion_mnist")`
    """
    kind, _, rest = name.partition(":")
    if name in EMBEDDED:
        return EMBEDDED[name](preprocessing)
    if kind == "intents" and rest:
        return intents.load(rest, preprocessing)
    if kind in FETCHED and rest:
        return _from_columns(name, partial(FETCHED[kind], rest), preprocessing)
    raise ValueError(f"unknown data {name!r}{nearest(name, EMBEDDED)}; expected one of "
                     f"{', '.join(EMBEDDED)}, "
                     "intents:LANGUAGE, hub:ID or folder:PATH")


def of(train, test=None, *, validation=None, asks: Objective | str = "class",
       classes: tuple[str, ...] | None = None, prepare: Callable[[Batch], Batch] = as_stored,
       name: str = "mine") -> Task:
    """A task of your own examples.

    train, test, validation: each a pair (inputs, targets) with inputs a tensor, a tuple or a
    mapping of named tensors, all with the examples along axis 0; a torch Dataset of such pairs; or
    a Dataset of the `datasets` library with columns that `load` knows. Without `test` a fifth of
    `train` is test, without `validation` a twelfth of the rest is, drawn always alike. asks:
    "class", "tags" (which are called by `classes`), "next_token" or an Objective. prepare: from a
    stored batch to the one that the model reads, for `datasets` what models.preprocessing gives.

    Raises ValueError where inputs and targets are not as many or targets are no classes, for an
    unknown objective, or NaN.

    Example: `task = data.of((torch.randn(100, 8), torch.randint(0, 3, (100,))))`
    """
    asked = asks if isinstance(asks, Objective) else objective(asks)
    given = {"train": train, "validation": validation, "test": test}
    if hasattr(train, "features"):
        sets = {kind: part for kind, part in given.items() if part is not None}
        return _from_columns(name, lambda: sets, None if prepare is as_stored else prepare)
    if train is None:
        raise ValueError(f"{name}: no training examples; give train=(inputs, targets)")
    if isinstance(asked, Tagging) and not asked.tags:
        if not classes:
            raise ValueError(f"{name}: tags want names, such as classes=('O', 'B-room', 'I-room')")
        asked = replace(asked, tags=tuple(classes))
    splits = {kind: _own_split(part, asked, prepare, f"{name} {kind}")
              for kind, part in given.items() if part is not None}
    if "test" not in splits:
        splits["train"], splits["test"] = set_aside(splits["train"], f"{name} test",
                                                    every=TEST_EVERY, seed=0)
    if "validation" not in splits:
        splits["train"], splits["validation"] = set_aside(splits["train"], f"{name} validation",
                                                          seed=0)
    if classes is None:
        highest = max((int(split.targets.max()) for split in splits.values() if len(split)),
                      default=0)
        classes = getattr(asked, "tags", ()) or tuple(map(str, range(highest + 1)))
    return Task(name, splits["train"], splits["validation"], splits["test"], tuple(classes),
                "the caller's own", "the caller's own")


def _own_split(given, asked: Objective, prepare, name: str) -> Split:
    if isinstance(given, Split):
        return given
    inputs, targets = (given if isinstance(given, tuple | list) and len(given) == 2
                       else _gathered(given, name))
    inputs, targets = mapped(torch.as_tensor, inputs), torch.as_tensor(targets)
    if count(inputs) != len(targets):
        raise ValueError(f"{name}: {count(inputs)} inputs and {len(targets)} targets; expected as "
                         "many")
    mapped(lambda value: _whole(value, name), inputs)
    if type(asked) is Objective:
        _expect_classes(targets, name)
    return Split(inputs, targets if targets.is_floating_point() else targets.long(), prepare, asked,
                 name)


def _expect_classes(targets: Tensor, name: str) -> None:
    """Raise ValueError for targets that are not one class an example."""
    if targets.dim() != 1 or targets.is_floating_point():
        raise ValueError(f"{name}: targets are {targets.dtype} {tuple(targets.shape)}, expected "
                         "whole numbers (n,), the class of each example; or give asks=")
    if len(targets) and int(targets.min()) < 0:
        raise ValueError(f"{name}: example {int(targets.argmin())} is of class "
                         f"{int(targets.min())}; classes count from 0, leave out what has none")


def _gathered(given, name: str) -> tuple[Inputs, Tensor]:
    """All examples of a torch Dataset."""
    if not hasattr(given, "__getitem__") or not hasattr(given, "__len__"):
        raise ValueError(f"{name}: found {type(given).__name__}; expected (inputs, targets), a "
                         "torch Dataset or a `datasets` set")
    if not len(given):
        raise ValueError(f"{name} holds no examples")
    pairs = [given[k] for k in files.progress(range(len(given)), title=name, unit="example")]
    try:
        inputs = joined([mapped(lambda value: torch.as_tensor(value)[None], inputs)
                         for inputs, _ in pairs])
        return inputs, torch.stack([torch.as_tensor(target) for _, target in pairs])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: its examples are no pairs of tensors and targets of one shape "
                         f"({reason(error)}); transform them in the Dataset") from error


def _whole(value: Tensor, name: str) -> Tensor:
    if value.is_floating_point() and not value.isfinite().all():
        place = int((~value.isfinite()).reshape(len(value), -1).any(1).nonzero()[0])
        raise ValueError(f"{name}: example {place} holds NaN or infinity; mend it or leave it out")
    return value


def _fashion_mnist(preprocessing: Preprocessing | None) -> Task:
    from PIL import Image

    def sheet(name: str) -> np.ndarray:  # 100 x 100 tiles of 28 x 28 pixels
        pixels = np.array(Image.open(embedded.verified("fashion_mnist", name)))
        return pixels.reshape(100, 28, 100, 28).swapaxes(1, 2).reshape(-1, 1, 28, 28)

    def labels(name: str) -> Tensor:
        stored = np.load(embedded.verified("fashion_mnist", name), allow_pickle=False)
        return torch.from_numpy(stored.astype(np.int64))

    how = preprocessing or Preprocessing(mean=(0.2860,), std=(0.3530,))
    if not isinstance(how, Preprocessing) or len(how.mean) != 1 or how.size not in (None, 28):
        raise ValueError("fashion_mnist has one channel and 28 x 28 pixels; this preprocessing is "
                         f"{how}")
    images = torch.from_numpy(np.concatenate([sheet(f"train_{k}.png") for k in range(6)]))
    train = Split(images, labels("train_labels.npy"), how, name="fashion_mnist train")
    test = Split(torch.from_numpy(sheet("test_0.png")), labels("test_labels.npy"), how,
                 name="fashion_mnist test")
    classes = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
               "bag", "ankle boot")
    train, validation = set_aside(train, "fashion_mnist validation")
    return Task("fashion_mnist", train, validation, test, classes,
                "Zalando Research, github.com/zalandoresearch/fashion-mnist (arXiv 1708.07747)",
                "MIT")


def _fetch(identifier: str):
    import datasets

    try:
        return datasets.load_dataset(identifier)
    # the library raises some twenty kinds: no network, unknown id, gated, no builder
    except Exception as error:
        raise FileNotFoundError(f"hub:{identifier} could not be loaded ({reason(error)}); "
                                "check the id and the network, or use folder:PATH") from error


def _open_folder(path: str):
    import datasets

    matches = sorted(glob.glob(path))
    if not matches:
        raise FileNotFoundError(f"data folder {path!r} does not exist; expected train/CLASS/*.png "
                                "or train-*.parquet in it")
    datasets.disable_progress_bars()
    try:
        if os.path.isdir(matches[0]):
            with quietly():
                return datasets.load_dataset(matches[0])
        kinds = ("train", "validation", "test")
        named = {kind: [m for m in matches if kind in Path(m).stem] for kind in kinds}
        named = {kind: found for kind, found in named.items() if found} or {"test": matches}
        return datasets.load_dataset("parquet", data_files=named)
    except Exception as error:  # as above, and whatever a damaged image or Parquet file provokes
        tables = sorted(Path(matches[0]).glob("*.parquet"))
        several = (f"; it has {listed([table.name for table in tables])}: for one of them alone "
                   f"give folder:{tables[0]}" if len(tables) > 1 else "")
        raise FileNotFoundError(f"data folder {path!r} holds no set of images or text "
                                f"({reason(error)}); expected train/CLASS/*.png or "
                                f"train-*.parquet{several}") from error


EMBEDDED: dict[str, Callable[..., Task]] = {
    "fashion_mnist": _fashion_mnist, "stamps": stamps.task, "wiki_topics": texts.wiki_topics,
    "wiki_text": texts.wiki_text,
    "wordnet": texts.glosses}
FETCHED = {"hub": _fetch, "folder": _open_folder}


def _from_columns(name: str, read, preprocessing: Callable[[Batch], Batch] | None) -> Task:
    """A task of a `datasets` dictionary, by the columns that it has."""
    stored = read()
    first = next(iter(stored.values()))
    if not len(first):
        raise FileNotFoundError(f"{name} holds no examples")
    columns = _columns(first.features, name)
    classes = _classes(stored, columns.get("label") or columns.get("tags"), name)
    if "image" in columns:
        made = _pictures(name, stored, columns, preprocessing)
    else:
        if isinstance(preprocessing, Preprocessing):
            raise ValueError(f"{name} is text, and this preprocessing is of pictures; load it with "
                             "that of a language model")
        tags = _classes(stored, columns.get("tags"), name)
        made = {kind: texts.of_columns(part, columns, classes, tags, preprocessing,
                                       f"{name} {kind}")
                for kind, part in stored.items() if len(part)}
        _refuse_unseen(made, classes, name)
    return _task(name, made, classes, getattr(getattr(first, "info", None), "license", ""))


def _columns(features, name: str) -> dict[str, str]:
    """Which column is the image, the text or the tokens, and which the label or the tags."""
    import datasets

    image = next((c for c, f in features.items() if _holds_images(f)), None)
    label = next((c for c, f in features.items()
                  if isinstance(f, datasets.ClassLabel) or c in ("label", "intent", "topic")), None)
    tags = next((c for c in features if c in ("tags", "ner_tags", "slots")), None)
    text = next((c for c in features if c in ("text", "sentence")), None)
    if image and label:
        return {"image": image, "label": label}
    if tags and "tokens" in features:
        return {"tokens": "tokens", "tags": tags} | ({"label": label} if label else {})
    if text:
        return {"text": text} | ({"label": label} if label else {})
    classes = ("; call the column of the labels 'label', or put the pictures of each class into a "
               "folder of its name, as in train/CLASS/x.png" if image else "")
    raise ValueError(f"{name} has the columns {', '.join(features)}; expected images or text with "
                     f"one named label, tokens with tags, or text alone{classes}")


def _refuse_unseen(splits: Mapping[str, Split], named: tuple[str, ...], name: str) -> None:
    """Raise ValueError where a sentence has an intent that no training sentence has."""
    if "train" not in splits or not isinstance(splits["train"].objective, Understanding):
        return
    known = {marks[0] for marks in splits["train"].targets.lines}
    for split in splits.values():
        for k, marks in enumerate(split.targets.lines):
            if marks[0] not in known:
                raise ValueError(f"{split.name}: sentence {k} has the intent {named[marks[0]]!r}, "
                                 f"which no training sentence of {name} has; leave it out")


def _classes(stored: Mapping, column: str | None, name: str) -> tuple[str, ...]:
    if column is None:
        return ()
    feature = next(iter(stored.values())).features[column]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if names:
        return tuple(names)
    values = [value for part in stored.values() for value in part[column][:]]
    values = ([tag for line in values for tag in line] if values and isinstance(values[0], list)
              else values)
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(set(values), key=lambda tag: (tag != "O", tag)))
    odd = [value for value in values if not isinstance(value, int | float) or value % 1 != 0]
    if odd:
        raise ValueError(f"{name}: the column {column!r} holds {odd[0]!r}; expected whole numbers "
                         "or names")
    return tuple(map(str, range(int(max(values)) + 1)))


def _task(name: str, splits: dict[str, Split], classes: tuple[str, ...], licence: str) -> Task:
    hidden = [kind for kind, part in splits.items()  # -1: the hub keeps them secret
              if isinstance(part.targets, Tensor) and part.targets.numel()
              and part.targets.min() < 0]
    splits = {kind: part for kind, part in splits.items() if kind not in hidden}
    if not splits:
        raise ValueError(f"{name} has no split with labels from 0 on")
    if len(splits) == 1:
        splits = {"test": next(iter(splits.values()))}
    test = splits.get("test") or splits.get("validation") or splits.get("valid")
    if test is None:
        raise ValueError(f"{name} has the splits {', '.join(splits)}; expected test or validation "
                         "among them")
    train, validation = splits.get("train"), splits.get("validation")
    if train is not None and (validation is None or validation is test):
        train, validation = set_aside(train, f"{name} validation")
    return Task(name, train or test.empty(f"{name} train"),
                validation or test.empty(f"{name} validation"), test, classes, name,
                licence or "see its source")


def _pictures(name: str, stored, columns: Mapping[str, str],
              preprocessing: Callable[[Batch], Batch] | None) -> dict[str, Split]:
    import datasets

    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise ValueError(f"{name} holds pictures, and this preprocessing is {preprocessing!r}; "
                         "give that of a picture model, models.preprocessing(NAME)")
    how = preprocessing or Preprocessing()
    splits = {}
    for kind, part in stored.items():
        if len(part):
            part = part.cast_column(columns["image"], datasets.Image())
            splits[kind] = _picture_split(part, columns["image"], columns["label"], how,
                                          f"{name} {kind}")
    return splits


def _holds_images(feature) -> bool:
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _picture_split(part, image: str, label: str, how: Preprocessing, name: str) -> Split:
    pictures = Pictures(part[image], how, name)
    try:
        labels = torch.tensor(part[label][:]).long()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: the column {label!r} holds {part[label][0]!r}; expected whole "
                         "numbers") from error
    if int(np.prod(pictures.shape)) > DECODE_WHOLE_BELOW:
        return Split(pictures, labels, how, name=name)
    blocks = torch.arange(len(labels)).split(512)
    decoded = [pictures[block] for block in files.progress(blocks, title=f"decoding {name}")]
    return Split(torch.cat(decoded), labels, how, name=name)
