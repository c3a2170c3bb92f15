"""The 117,659 sets of synonyms of WordNet 3.0, embedded: the words, the definition and the topic of
each.

A topic is the lexicographer file that a set comes from (noun.animal, verb.motion, ...;
lexnames(5WN)). Source: Miller 1995, WordNet: a lexical database for English (doi
10.1145/219717.219748); Debian's package wordnet-base.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench.subjects import embedded

THINGS = tuple(f"noun.{name}"
               for name in ("Tops", "act", "animal", "artifact", "body", "communication", "event",
                            "food", "location", "object", "person", "phenomenon", "plant", "shape",
                            "substance"))


def load(topics: Sequence[str] | None = None) -> pd.DataFrame:
    """Columns topic, words (joined by "; "), definition; of all topics or of these.

    Raises ValueError for an unknown topic, FileNotFoundError where the embedded file is missing.

    Example: `load(["noun.animal"]).columns.to_list() == ["topic", "words", "definition"]`
    """
    table = pd.read_parquet(embedded.verified("wordnet", "synsets.parquet")).astype(str)
    known = sorted(table.topic.unique())
    for topic in topics or ():
        if topic not in known:
            raise ValueError(f"wordnet: unknown topic {topic!r}; there are {', '.join(known)}")
    return table[table.topic.isin(topics or known)].reset_index(drop=True)


def words(topics: Sequence[str] = THINGS, *, count: int | None = None, longest: int = 24,
          seed: int = 0) -> list[str]:
    """The words of these topics, each once, of at most `longest` letters; `count` of them drawn by
    `seed`. Raises as `load` does.

    Example: `[f"A {word}." for word in wordnet.words(("noun.animal",))]`
    """
    every = sorted({word for row in load(topics).words for word in row.split("; ")
                    if len(word) <= longest})
    order = np.random.default_rng(seed).permutation(len(every))
    return [every[place] for place in order[:count]]
