"""Spoken commands with an intent and slots, made from the templates of Home Assistant in some sixty
languages.

Sentences are drawn from templates (package home-assistant-intents, Apache-2.0, read by hassil), so
that they are more regular than what people say. Templates, not sentences, are held out: no test
sentence is a sibling of a training sentence. What a household would name itself (devices, rooms)
and what may be anything (a message, an item to buy) is filled with descriptions of stamps in the
same language, or English where there are none.
"""

import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np
import pandas as pd

from workbench.errors import listed
from workbench.subjects import embedded
from workbench.subjects.objectives import Understanding
from workbench.subjects.tasks import Split, Task, Texts
from workbench.subjects.texts import tagged

LEAST = 15  # intents that a language needs
# what a household names itself, and how many of each there are
OWN = {"area": 12, "name": 40, "floor": 3}
DRAWN = {"train": 120, "validation": 12, "test": 30}  # sentences of an intent, at most
SOURCE = "templates of home-assistant-intents (home-assistant.io), filled; no sentence of a person"
# scripts that put no spaces between words: each letter stands for itself
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI")

Piece = tuple[str, str]  # a stretch of text, and the slot that it fills or ""


def languages() -> list[str]:
    """The languages that have at least fifteen intents. Raises ModuleNotFoundError where the
    packages are missing.

    Example: `"en" in languages()`
    """
    package, _ = _packages()
    return [code for code in sorted(package.get_languages())
            if len(package.get_intents(code)["intents"]) >= LEAST]


def load(language: str, prepare=None, *, seed: int = 0) -> Task:
    """The commands of a language, every template in one of the three splits by `seed`.

    Raises ValueError for a language that is not there or has too few intents, ModuleNotFoundError
    where the packages are missing.

    Example: `task = data.load("intents:en", preprocessing=models.preprocessing("minilm"))`
    """
    package, hassil = _packages()
    known = package.get_languages()
    if language not in known:
        raise ValueError(f"intents: no templates in {language!r}; there are {listed(languages())}")
    told = hassil.Intents.from_dict(package.get_intents(language))
    if len(told.intents) < LEAST:
        raise ValueError(f"intents: {language!r} has {len(told.intents)} intents, at least {LEAST} "
                         f"are needed; take one of {listed(languages())}")
    drawn = _Drawing(told, _things(language), seed)
    parts = {part: [] for part in DRAWN}
    for name, intent in told.intents.items():
        for part, templates in _parted(intent.data, name, seed).items():
            parts[part] += [(name, pieces) for pieces in drawn.sentences(templates, DRAWN[part])]
    rows = {part: [(name, *_words(pieces)) for name, pieces in found]
            for part, found in parts.items()}
    seen = {tuple(words) for _, words, _ in rows["train"]}
    known = {name for name, _, _ in rows["train"]}
    for part in ("validation", "test"):  # two templates may give the same words
        rows[part] = [row for row in rows[part] if tuple(row[1]) not in seen and row[0] in known]
    names = tuple(sorted({name for name, _, _ in rows["train"]}))
    tags = ["O",
            *sorted({tag for found in rows.values() for _, _, line in found for tag in line}
                    - {"O"})]
    splits = {part: tagged([row[1] for row in found], [row[2] for row in found],
                           [row[0] for row in found], names=names, tags=tuple(tags),
                           prepare=prepare, name=f"intents:{language} {part}")
              for part, found in rows.items()}
    return Task(f"intents:{language}", splits["train"], splits["validation"], splits["test"], names,
                SOURCE, "Apache-2.0")


def recombined(split: Split, count: int, *, seed: int = 0) -> Split:
    """`count` new sentences: those of `split`, each entity in them replaced by one of another
    sentence in the same slot.

    Intent and tags follow, so that no one has to label them. Raises ValueError where the split has
    no entities.

    Example: `more = intents.recombined(task.train, 20_000)`
    """
    tags, random = cast(Understanding, split.objective).tags, np.random.default_rng(seed)
    spans = [_spans([tags[mark] for mark in marks[1:]]) for marks in split.targets.lines]
    filled: dict[str, list[Sequence[str]]] = {}
    for words, found in zip(split.inputs.lines, spans, strict=True):
        for slot, start, end in found:
            filled.setdefault(slot, []).append(words[start:end])
    if not filled:
        raise ValueError(f"{split.name} has no entities to put elsewhere")
    lines, targets = [], []
    for k in random.integers(len(split), size=count):
        words, marks = [*split.inputs.lines[k]], [*split.targets.lines[k]]
        for slot, start, end in reversed(spans[k]):
            new = filled[slot][random.integers(len(filled[slot]))]
            words[start:end] = new
            marks[1 + start:1 + end] = [tags.index(f"{'I' if place else 'B'}-{slot}")
                                        for place in range(len(new))]
        lines.append(words)
        targets.append(marks)
    return replace(split, inputs=Texts(lines), targets=Texts(targets), units=None,
                   name=f"{split.name}, recombined")


def with_recombined(split: Split, count: int, *, seed: int = 0) -> Split:
    """The sentences of `split` and, behind them, `count` that are `recombined` from them.

    Example: `with_recombined(commands.train, 1000)`
    """
    more = recombined(split, count, seed=seed) if count else split.empty("none")
    return replace(split, inputs=Texts([*split.inputs.lines, *more.inputs.lines]),
                   targets=Texts([*split.targets.lines, *more.targets.lines]), units=None)


def chained(split: Split, most: int, *, seed: int = 0) -> Split:
    """As many requests as `split` has sentences, each of one to `most` of them, one behind the
    other, with the intent of the first: of other lengths, as when people say several things at
    once.

    Raises ValueError for fewer than one.

    Example: `chained(commands.test, 3)`
    """
    if most < 1:
        raise ValueError(f"chained: most is {most}, expected 1 sentence or more")
    random = np.random.default_rng(seed)
    lines, targets = [], []
    for _ in range(len(split)):
        chosen = random.integers(len(split), size=random.integers(1, most + 1))
        lines.append([word for k in chosen for word in split.inputs.lines[k]])
        marks = [mark for k in chosen for mark in split.targets.lines[k][1:]]
        targets.append([split.targets.lines[chosen[0]][0], *marks])
    return replace(split, inputs=Texts(lines), targets=Texts(targets), units=None,
                   name=f"{split.name}, chained")


def _spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Slot, first word and the word behind the last of each entity."""
    starts = [k for k, tag in enumerate(tags) if tag.startswith("B-")]
    return [(tags[k][2:], k,
             next((j for j in range(k + 1, len(tags)) if not tags[j].startswith("I-")), len(tags)))
            for k in starts]


@dataclass
class _Drawing:
    """Draws sentences from templates."""

    told: Any
    things: Sequence[str]
    seed: int

    def sentences(self, templates: list[tuple], count: int) -> list[list[Piece]]:
        """At most `count` different ones, as many of each template as possible."""
        found: dict[str, list[Piece]] = {}
        for turn in range(4 * count):
            if len(found) == count or not templates:
                break
            sentence, rules = templates[turn % len(templates)]
            random = np.random.default_rng([self.seed, turn,
                                            zlib.crc32((sentence.text or "").encode())])
            pieces = self._of(sentence.expression, {**self.told.expansion_rules, **rules}, random,
                              "")
            found.setdefault("".join(text for text, _ in pieces).casefold(), pieces)
        return list(found.values())

    def _of(self, expression, rules, random, slot: str) -> list[Piece]:
        _, hassil = _packages()
        kinds = hassil.expression
        if isinstance(expression, kinds.TextChunk):
            return [(expression.original_text, slot)]
        if isinstance(expression, kinds.Alternative):
            return self._of(expression.items[random.integers(len(expression.items))], rules, random,
                            slot)
        if isinstance(expression, kinds.Permutation):
            order = random.permutation(len(expression.items))
            return [piece for k in order
                    for piece in [*self._of(expression.items[k], rules, random, slot), (" ", slot)]]
        if isinstance(expression, kinds.Group):
            return [piece for item in expression.items
                    for piece in self._of(item, rules, random, slot)]
        if isinstance(expression, kinds.RuleReference):
            return self._of(rules[expression.rule_name].expression, rules, random, slot)
        return self._filled(expression, rules, random)

    def _filled(self, reference, rules, random) -> list[Piece]:
        """What stands in a slot."""
        _, hassil = _packages()
        slot, name = reference.slot_name, reference.list_name
        known = self.told.slot_lists.get(name)
        if isinstance(known, hassil.intents.TextSlotList) and known.values:
            return self._of(known.values[random.integers(len(known.values))].text_in, rules, random,
                            slot)
        ends = ((known.start, known.stop + 1, known.step)
                if isinstance(known, hassil.intents.RangeSlotList) else None)
        if ends is None and reference.is_inline_range:
            start, stop, step = reference.get_inline_range()
            ends = start, stop + 1, step
        if ends:
            return [(str(random.choice(np.arange(*ends))), slot)]
        chosen = self.things
        if name in OWN:  # the same few in all sentences
            order = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(chosen))[
                :OWN[name]]
            chosen = [chosen[k] for k in order]
        return [(chosen[random.integers(len(chosen))], slot)]


def _parted(blocks, intent: str, seed: int) -> dict[str, list[tuple]]:
    """The templates of an intent by split: a fifth is test, a tenth validation, at least one each
    where there are enough."""
    every = [(sentence, block.expansion_rules or {}) for block in blocks
             for sentence in block.sentences]
    order = np.random.default_rng([seed, zlib.crc32(intent.encode())]).permutation(len(every))
    test = max(len(every) // 5, int(len(every) > 1))
    validation = max(len(every) // 10, int(len(every) > 2))
    ends = {"test": order[:test], "validation": order[test:test + validation],
            "train": order[test + validation:]}
    return {part: [every[k] for k in sorted(places)] for part, places in ends.items()}


def _words(pieces: list[Piece]) -> tuple[list[str], list[str]]:
    """The words of a sentence and their tags. A word is a run of letters, marks and figures;
    punctuation stands for itself."""
    letters = [(letter, slot, k) for k, (text, slot) in enumerate(pieces) for letter in text]
    words, tags, before, inside = [], [], "", ("", -1)
    for letter, slot, piece in letters:
        kind = _kind(letter, before)
        if kind == "more" and words:
            words[-1] += letter
        elif kind != "space":
            words.append(letter)
            same = (slot and inside[0] == slot
                    and not (piece != inside[1] and pieces[piece][1] != slot))
            tags.append(f"{'I' if same and tags and tags[-1] != 'O' else 'B'}-{slot}" if slot
                        else "O")
            inside = (slot, piece)
        before = "" if kind == "space" else letter
    return words, tags


def _kind(letter: str, before: str) -> str:
    """Whether a letter is a space, begins a word ("new") or belongs to the word before it
    ("more")."""
    if letter.isspace():
        return "space"
    if unicodedata.category(letter).startswith("M"):
        return "more" if before else "new"
    written = letter.isalnum() and not unicodedata.name(letter, "").startswith(UNSPACED)
    after = before and (before.isalnum() or unicodedata.category(before).startswith("M"))
    return ("more" if written and after and not unicodedata.name(before, "").startswith(UNSPACED)
            else "new")


@cache
def _things(language: str) -> tuple[str, ...]:
    """Short descriptions of stamps, without what stands in brackets."""
    table = pd.read_parquet(embedded.verified("stamps", "descriptions.parquet"))
    column = next((name for name in (language.replace("-", "_"), language.partition("-")[0])
                   if name in table), "en")
    found = table[column if table[column].notna().sum() > 200 else "en"].dropna()
    found = found.str.replace(r"\s*\(.*?\)", "", regex=True).str.replace(r"^(A|An|The|Some) ", "",
                                                                         regex=True)
    found = ["".join(letter for letter in text if letter in "'- "
                     or unicodedata.category(letter)[0] in "LMN") for text in found]
    return tuple(dict.fromkeys(text[:1].lower() + text[1:] for text in found
                               if 1 <= len(text.split()) <= 4))


@cache
def _packages():
    try:
        import hassil
        import home_assistant_intents
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("intents need their packages; pip install "
                                  "'workbench[intents]'") from error
    return home_assistant_intents, hassil
