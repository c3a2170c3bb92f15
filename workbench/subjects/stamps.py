"""Aligned pictures, descriptions and speech: 925 stamps of Tux Paint, embedded.

A concept is a stamp: a picture of 64 x 64 pixels, its description in up to 78 languages and the
spoken description in up to eight. Those with one English description share a `meaning`; those with
one description or nearly one picture (mirrored, too) share a `group`, and are held out together.
Speech is a log-mel spectrogram: 40 bands, a frame each 16 ms, values 0 to 31 in steps of 2 dB.

Two ways of holding out, both by seed and by whole groups: *new concepts* (about 100, each category
in its share), of which nothing is trained on; and *new recordings and wordings*, a tenth of the
(group, language) pairs of the others, of which neither clip nor description is, though the concept
is known from its picture and other languages.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.subjects import embedded
from workbench.subjects.tasks import Preprocessing, Split, Task, set_aside

SPOKEN = ("be", "bg", "ca", "el", "es", "fr", "ro", "ru")
LANGUAGES = ("en", *SPOKEN)
SIDE, TILES, BANDS, LOUDEST = 64, 31, 40, 31
NEW_CONCEPTS, NEW_PAIRS = 100, 0.1  # concepts; fraction of the (group, language) pairs
TRAIN, NEW_CONCEPT, NEW_PAIR = "train", "new concept", "new pair"
SOURCE = "Tux Paint Stamps 2022-06-04, tuxpaint.org (Debian package tuxpaint-stamps-default)"


@dataclass(frozen=True)
class Stamps:
    """The set. `part` is TRAIN, NEW_CONCEPT or, for texts and clips, NEW_PAIR.

    pictures: uint8 (N, 3, 64, 64). concepts: name, category, group, meaning, part; row k is concept
    k. texts: concept, language, text, part. clips: concept, language, start, frames, part. speech:
    per language uint8 (frames in all, 40).

    Example: `stamps.load(languages=("en",)).subset(100)`
    """

    pictures: Tensor
    concepts: pd.DataFrame
    texts: pd.DataFrame
    clips: pd.DataFrame
    speech: dict[str, Tensor]

    @cached_property
    def meanings(self) -> Tensor:
        """int64 (N,): equal where the English descriptions are."""
        return torch.tensor(self.concepts.meaning.to_list())

    def spectrograms(self, rows: pd.DataFrame, *, longest: int = 192) -> Tensor:
        """float32 (n, 40, T) in 0-1 of rows of `clips`; the shorter end in silence (0), T is at
        most `longest` frames."""
        frames = [self.speech[row.language][row.start:row.start + min(row.frames, longest)]
                  for row in rows.itertuples()]
        return (torch.nn.utils.rnn.pad_sequence(frames, batch_first=True).transpose(1, 2).float()
                / LOUDEST)

    def subset(self, count: int, *, seed: int = 0) -> "Stamps":
        """`count` of the concepts (all, if there are fewer), drawn by `seed`, numbered anew in
        their old order."""
        if count < 1:
            raise ValueError(f"a subset of stamps needs at least 1 concept, found {count}")
        kept = np.sort(np.random.default_rng(seed).permutation(len(self.concepts))[:count])
        number = {old: new for new, old in enumerate(kept)}
        texts, clips = (rows[rows.concept.isin(number)].reset_index(drop=True)
                        for rows in (self.texts, self.clips))
        texts, clips = (rows.assign(concept=rows.concept.map(number)) for rows in (texts, clips))
        return replace(self, pictures=self.pictures[kept.tolist()],
                       concepts=self.concepts.iloc[kept].reset_index(drop=True), texts=texts,
                       clips=clips)

    def spoken(self, languages: tuple[str, ...]) -> "Stamps":
        """The texts and clips of these languages only. Raises ValueError for one that is not
        there."""
        known = set(self.texts.language)
        for language in languages:
            if language not in known:
                raise ValueError(f"stamps: no descriptions in {language!r}; there are "
                                 f"{', '.join(sorted(known))}")
        return replace(self,
                       texts=self.texts[self.texts.language.isin(languages)].reset_index(drop=True),
                       clips=self.clips[self.clips.language.isin(languages)].reset_index(drop=True))


def load(*, languages: tuple[str, ...] = LANGUAGES, seed: int = 0) -> Stamps:
    """The embedded set, held out by `seed`.

    Raises ValueError for a language that is not there, FileNotFoundError where the embedded files
    are missing.

    Example: `known = stamps.load(); known.texts[known.texts.part == stamps.NEW_CONCEPT]`
    """
    from PIL import Image

    concepts = pd.read_csv(embedded.verified("stamps", "concepts.csv"))
    clips = pd.read_csv(embedded.verified("stamps", "clips.csv"))
    table = pd.read_parquet(embedded.verified("stamps", "descriptions.parquet"))
    sheet = np.array(Image.open(embedded.verified("stamps", "pictures.webp")))
    tiles = sheet.reshape(-1, SIDE, TILES, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE,
                                                                           3)[:len(concepts)]
    speech = {language: torch.from_numpy(np.array(Image.open(
                  embedded.verified("stamps", f"speech_{language}.png"))))
              for language in SPOKEN if language in languages}
    texts = table.rename_axis("concept").reset_index().melt("concept", var_name="language",
                                                            value_name="text").dropna()
    concepts["meaning"] = pd.factorize(table.en.str.casefold().str.replace(r"\W+", " ",
                                                                           regex=True)
                                       .str.strip())[0]
    held = new_concepts(concepts, seed=seed)
    concepts["part"] = np.where(held, NEW_CONCEPT, TRAIN)
    pairs = _new_pairs(concepts, table.columns, seed)
    found = Stamps(torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous(), concepts,
                   _parted(texts, concepts, pairs), _parted(clips, concepts, pairs), speech)
    return found.spoken(tuple(languages))


def task(preprocessing: Preprocessing | None = None) -> Task:
    """The pictures as images to classify by category; new concepts are the test images.

    Example: `len(stamps.task().classes) > 5`
    """
    known = load(languages=("en",))
    categories = sorted(known.concepts.category.unique())
    labels = torch.tensor([categories.index(name) for name in known.concepts.category])
    how = preprocessing or Preprocessing()
    if not isinstance(how, Preprocessing) or len(how.mean) != 3:
        raise ValueError(f"stamps are RGB pictures; this preprocessing is {how}")
    every = Split(resized(known.pictures, how.size or SIDE), labels, how, name="stamps")
    test = torch.tensor((known.concepts.part == NEW_CONCEPT).to_list())
    train, validation = set_aside(replace(every.take((~test).nonzero()[:, 0]), name="stamps train"),
                                  "stamps validation")
    return Task("stamps", train, validation,
                replace(every.take(test.nonzero()[:, 0]), name="stamps test"), tuple(categories),
                SOURCE, "GPL-2")


def resized(pictures: Tensor, side: int) -> Tensor:
    """uint8 (n, 3, side, side), bicubic; the whole picture, nothing cropped.

    Example: `resized(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), 32).shape == (2, 3, 32, 32)`
    """
    if side == pictures.shape[-1]:
        return pictures
    parts = [F.interpolate(part.float(), size=(side, side), mode="bicubic", antialias=True)
             for part in pictures.split(64)]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def new_concepts(concepts: pd.DataFrame, *, count: int = NEW_CONCEPTS, seed: int = 0) -> np.ndarray:
    """bool (N,): about `count` concepts, by whole groups that lie in one category, each category in
    its share.

    Example: `new_concepts(stamps.load().concepts).mean() < 0.5`
    """
    random, held = np.random.default_rng(seed), set()
    alone = concepts.groupby("group").category.transform("nunique") == 1
    sizes = concepts.groupby("group").size()
    for _, part in concepts[alone].groupby("category"):
        room = count * len(part) / len(concepts)
        for group in random.permutation(part.group.unique()):
            if sizes[group] / 2 <= room:
                held.add(group)
                room -= sizes[group]
    return concepts.group.isin(held).to_numpy()


def _new_pairs(concepts: pd.DataFrame, languages, seed: int) -> set[tuple[int, str]]:
    random = np.random.default_rng([seed, 1])
    groups = concepts[concepts.part == TRAIN].group.unique()
    return {(group, language) for language in sorted(languages) for group in groups
            if random.random() < NEW_PAIRS}


def _parted(rows: pd.DataFrame, concepts: pd.DataFrame,
            pairs: set[tuple[int, str]]) -> pd.DataFrame:
    groups = concepts.group.to_numpy()[rows.concept]
    paired = [pair in pairs for pair in zip(groups, rows.language, strict=True)]
    # the same words in another language, or of a near-duplicate, would give them away
    if "text" in rows:
        words = list(zip(groups, rows.text.str.casefold().str.strip(" ."), strict=True))
        given = {word for word, new in zip(words, paired, strict=True) if new}
        paired = [new or word in given for word, new in zip(words, paired, strict=True)]
    new = (concepts.part == NEW_CONCEPT).to_numpy()[rows.concept]
    return rows.assign(part=np.where(new, NEW_CONCEPT, np.where(paired, NEW_PAIR, TRAIN)))
