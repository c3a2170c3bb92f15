import importlib.util
from pathlib import Path

import pytest

from workbench.subjects import embedded, wordnet

ROOT = Path(__file__).parent.parent
SYNSET = ('02012849 05 n 01 heron 0 002 @ 02005790 n 0000 #m 02012602 n 0000 | grey or white '
          'wading bird; "it waded"  \n')


def test_every_set_has_a_topic_words_and_a_definition():
    table = wordnet.load()
    assert len(table) == 117_659
    assert table.topic.nunique() == 45
    assert (table[["topic", "words", "definition"]] != "").all(axis=None)
    assert table[table.words == "heron"].topic.tolist() == ["noun.animal"]


def test_words_are_each_there_once_and_follow_the_seed():
    animals = wordnet.words(("noun.animal",))
    assert "heron" in animals
    assert len(set(animals)) == len(animals)
    assert max(map(len, animals)) <= 24
    assert wordnet.words(count=50, seed=1) == wordnet.words(count=50, seed=1) != wordnet.words(
        count=50, seed=2)


def test_an_unknown_topic_and_a_changed_file_get_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown topic 'noun.animals'; there are adj.all"):
        wordnet.load(("noun.animals",))
    monkeypatch.setattr(embedded, "folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"wordnet/SHA256SUMS is missing; install"):
        wordnet.load()


def test_the_builder_reads_the_format_of_wordnet(tmp_path):
    spec = importlib.util.spec_from_file_location("build_wordnet",
                                                  ROOT / "data" / "build_wordnet.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    (tmp_path / "data.noun").write_text("  1 This software and database\n" + SYNSET)
    assert list(builder.read(tmp_path / "data.noun")) == [("noun.animal", "heron",
                                                           "grey or white wading bird")]
    assert len(builder.NAMES) == 45
    assert builder.NAMES[44] == "adj.ppl"
