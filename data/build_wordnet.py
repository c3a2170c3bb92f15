"""Build data/wordnet/ from Debian's package wordnet-base.

    apt-get install wordnet-base        (or: apt-get download, dpkg-deb -x ... DIR)
    python data/build_wordnet.py [--source DIR]

Every set of synonyms of WordNet 3.0: its words, its definition without the examples, and its topic,
which is the lexicographer file that it comes from (noun.animal, verb.motion, ...). One Parquet
table. Run twice, it writes the same bytes.
"""

import argparse
import hashlib
import re
import shutil
from pathlib import Path

import pandas as pd

OUT = Path(__file__).parent / "wordnet"
KINDS = {
    "adj": "all pert",
    "adv": "all",
    "noun": "Tops act animal artifact attribute body cognition communication event feeling food "
    "group location motive object "
            "person phenomenon plant possession process quantity relation shape state "
            "substance time",
    "verb": "body change cognition communication competition consumption contact creation emotion "
    "motion perception possession "
            "social stative weather",
}
# as lexnames(5WN) counts
NAMES = [f"{kind}.{name}" for kind, names in KINDS.items() for name in names.split()] + ["adj.ppl"]


def main() -> None:
    """Write the table, the licence and the checksums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--licence", type=Path,
                        default=Path("/usr/share/doc/wordnet-base/copyright"))
    asked = parser.parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    rows = [row for kind in ("noun", "verb", "adj", "adv")
            for row in read(asked.source / f"data.{kind}")]
    table = pd.DataFrame(rows, columns=["topic", "words",
                                        "definition"]).sort_values(["topic", "words", "definition"])
    table["topic"] = table.topic.astype("category")
    table.to_parquet(OUT / "synsets.parquet", compression="brotli", compression_level=11,
                     use_dictionary=False, index=False)
    shutil.copyfile(asked.licence, OUT / "LICENCE")
    sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n"
            for f in sorted(OUT.glob("*.*"))]
    (OUT / "SHA256SUMS").write_text("".join(sums))


def read(path: Path):
    """Rows (topic, words joined by "; ", definition) of one of WordNet's data files; its format is
    wndb(5WN)."""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("  "):
            continue  # the licence stands before the data
        head, _, gloss = line.partition(" | ")
        fields = head.split(" ")
        count = int(fields[3], 16)
        words = [re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ")
                 for word in fields[4:4 + 2 * count:2]]
        yield NAMES[int(fields[1])], "; ".join(words), gloss.split('; "')[0].strip().rstrip(";")


if __name__ == "__main__":
    main()
