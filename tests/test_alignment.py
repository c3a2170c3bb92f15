from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from workbench.measures import retrieval
from workbench.methods import distillation
from workbench.subjects import alignment, encoders, stamps, training
from workbench.subjects.alignment import Items, Recipe


class Linear(nn.Module):
    def __init__(self, width: int, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.dropout = nn.Linear(width, 8), nn.Dropout(0.2)

    def forward(self, values):
        return F.normalize(self.linear(self.dropout(values)), dim=1)


def seen(seed: int, width: int, *, concepts: int = 40, languages=("",)) -> Items:
    meaning = torch.randn(concepts, 6, generator=torch.Generator().manual_seed(1))
    view = torch.randn(6, width, generator=torch.Generator().manual_seed(seed))
    rows = pd.DataFrame([(c, language) for language in languages for c in range(concepts)],
                        columns=["concept", "language"])
    rows["part"] = np.where(rows.concept < 30, stamps.TRAIN, stamps.NEW_CONCEPT)
    return Items(meaning[rows.concept.to_list()] @ view, rows)


ITEMS = {"image": seen(2, 12), "text": seen(3, 10, languages=("en", "fr"))}
TRAIN = {name: items.take(items.rows.part == stamps.TRAIN) for name, items in ITEMS.items()}
EACH = torch.arange(40)


def encoded(**settings):
    return alignment.align({"image": Linear(12), "text": Linear(10)}, TRAIN, EACH, **settings)


def test_the_contrastive_loss_of_equal_and_of_random_vectors():
    vectors = torch.eye(8)
    assert alignment.contrastive(vectors, vectors, 100.0) < 1e-6
    assert alignment.contrastive(vectors, vectors, 0.0) == pytest.approx(np.log(8))
    # none to tell apart
    assert alignment.contrastive(vectors, vectors.flip(0), 100.0,
                                 torch.zeros(8, dtype=torch.int64)) < 1e-6
    with pytest.raises(ValueError, match="batches of 8 and 7"):
        alignment.contrastive(vectors, vectors[:7], 1.0)


def test_alignment_finds_concepts_that_it_has_not_seen():
    encoders_, history = encoded(recipe=Recipe(steps=150, batch_size=20, learning_rate=0.02))
    assert history.loss.iloc[-1] < history.loss.iloc[0]
    vectors = alignment.embed(encoders_, ITEMS)
    table = retrieval.directions(vectors, ITEMS, EACH, stamps.NEW_CONCEPT, whole=False,
                                 languages=("en", "fr"))
    assert table[["query", "gallery"]].values.tolist() == [["image", "text"], ["text", "image"]]
    assert (table.queries == 20).all()
    assert (table.recall_at_5 > 0.8).all()


def test_a_killed_alignment_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    recipe = Recipe(steps=12, batch_size=16)
    whole, _ = encoded(recipe=recipe)
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)
    steps = iter(range(7))
    advance = training.Loop.advance
    monkeypatch.setattr(training.Loop, "advance", lambda *given: (next(steps), advance(*given))[1])
    with pytest.raises(StopIteration):  # as a kill would come
        encoded(recipe=recipe, state=tmp_path / "state")
    monkeypatch.setattr(training.Loop, "advance", advance)
    resumed, history = encoded(recipe=recipe, state=tmp_path / "state")
    assert len(history) == 12
    for one, two in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="of another run: its seed is 0, here 1"):
        encoded(recipe=recipe, seed=1, state=tmp_path / "state")
    told = {"teacher": {name: torch.ones(len(items.rows), 8) for name, items in TRAIN.items()},
            "recipe": recipe}
    encoded(teaching=partial(distillation.embeddings, temperature=2.0), state=tmp_path / "taught",
            **told)
    with pytest.raises(ValueError, match=r"of another run: its teaching is .embeddings .*2.0"):
        encoded(teaching=partial(distillation.embeddings, temperature=1.0),
                state=tmp_path / "taught", **told)


def test_a_taught_student_comes_nearer_to_its_teacher():
    teacher = alignment.embed(encoded(recipe=Recipe(steps=60, batch_size=20,
                                                    learning_rate=0.02))[0], TRAIN)
    apart = {}
    for taught in (None, teacher):
        student, _ = alignment.align({"image": Linear(12, 7), "text": Linear(10, 8)}, TRAIN, EACH,
                                     teacher=taught,
                                     recipe=Recipe(steps=150, batch_size=20, learning_rate=0.02),
                                    teaching=distillation.embeddings)
        found = alignment.embed(student, TRAIN)
        apart[taught is None] = sum((1 - (found[k] * teacher[k]).sum(1)).mean().item()
                                    for k in found)
    assert apart[False] < 0.5 * apart[True]
    assert distillation.embeddings({"image": torch.eye(4)}, {"image": torch.eye(4)}) == 0
    with pytest.raises(ValueError, match="image is"):
        distillation.embeddings({"image": torch.eye(4)}, {"image": torch.eye(5)})


def test_one_modality_is_taught_by_itself_in_half_precision_too_and_not_without_a_teacher():
    teacher = alignment.embed(encoded(recipe=Recipe(steps=60, batch_size=20,
                                                    learning_rate=0.02))[0], TRAIN)
    texts = {"text": TRAIN["text"]}
    for precision in ("fp32", "bf16"):
        recipe = Recipe(steps=60, batch_size=20, learning_rate=0.02, precision=precision)
        student, history = alignment.align({"text": Linear(10, 8)}, texts, EACH, recipe=recipe,
                                           teacher=teacher,
                                           teaching=distillation.embeddings)
        assert history.loss.iloc[-1] < history.loss.iloc[0] / 2
        assert (alignment.embed(student, texts)["text"] * teacher["text"]).sum(1).mean() > 0.8
    with pytest.raises(ValueError, match="or with a teacher one, of the same names"):
        alignment.align({"text": Linear(10)}, texts, EACH)
    with pytest.raises(ValueError, match="precision is 'int8', expected one of fp32, "
                       "bf16, fp16, auto"):
        Recipe(precision="int8")


def test_bad_items_and_recipes_get_one_line():
    rows = ITEMS["image"].rows
    with pytest.raises(ValueError, match="3 inputs and 40 rows"):
        Items(torch.ones(3, 2), rows)
    with pytest.raises(ValueError, match="NaN"):
        Items(torch.full((40, 2), torch.nan), rows)
    with pytest.raises(ValueError, match="steps is 0"):
        Recipe(steps=0)
    with pytest.raises(ValueError, match="encoders of image and items of image, text"):
        alignment.align({"image": Linear(12)}, TRAIN, EACH)


def test_saved_encoders_come_back_and_others_are_refused(tmp_path):
    made = nn.ModuleDict({"image": Linear(12)})
    alignment.save(made, tmp_path / "a.safetensors", {"seed": 0})
    again = alignment.load(nn.ModuleDict({"image": Linear(12)}), tmp_path / "a.safetensors")
    torch.testing.assert_close(again["image"].linear.weight, made["image"].linear.weight, atol=1e-3,
                               rtol=1e-3)
    with pytest.raises(ValueError, match="does not hold these encoders"):
        alignment.load(nn.ModuleDict({"image": Linear(9)}), tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(ValueError, match="cut.safetensors"):
        alignment.load(made, tmp_path / "cut.safetensors")


def test_ranks_count_what_is_nearer_or_as_near():
    gallery = F.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0, 1]]), dim=1)
    rank, right = retrieval.ranks(gallery[[0, 2]], gallery, torch.tensor([1, 3]),
                                  torch.tensor([0, 1, 2, 3]))
    assert rank.tolist() == [2, 2]  # one that is nearer; one that is as near
    assert right.tolist() == [1, 1]
    with pytest.raises(ValueError, match="no right answer"):
        retrieval.ranks(gallery, gallery, torch.tensor([9] * 4), torch.arange(4))
    with pytest.raises(ValueError, match="0 queries"):
        retrieval.ranks(gallery[:0], gallery, torch.arange(0), torch.arange(4))
    with pytest.raises(ValueError, match="NaN"):
        retrieval.ranks(gallery * torch.nan, gallery, torch.arange(4), torch.arange(4))


def test_chance_is_what_drawing_gives():
    assert retrieval.chance(torch.tensor([1, 2]), 100,
                            10).tolist() == pytest.approx([0.1, 1 - (90 * 89) / (100 * 99)])
    assert retrieval.chance(torch.tensor([5]), 12, 10).item() == 1


def test_intervals_resample_groups():
    hits = np.repeat([0.0, 1.0], 50)[:, None]
    (narrow,), (wide,) = retrieval.interval(hits,
                                            np.arange(100)), retrieval.interval(
                                                hits, np.repeat(range(10), 10))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert narrow[0] < 0.5 < narrow[1]


def test_ngrams_read_any_script_and_refuse_nothing_to_read():
    grams = encoders.ngrams(["Une rose.", "роза", "薔薇"])
    assert grams.shape[0] == 3
    assert (grams.max(1).values > 0).all()
    assert torch.equal(encoders.ngrams(["une ROSE"])[0], grams[0][grams[0] > 0])
    with pytest.raises(ValueError, match="no characters"):
        encoders.ngrams(["rose", " . "])


def test_the_small_encoders_give_unit_vectors_and_ignore_more_silence():
    speech = encoders.SpeechEncoder(16).eval()
    with torch.no_grad():
        mels = torch.rand(2, 40, 60)
        assert torch.allclose(speech(mels).norm(dim=1), torch.ones(2))
        assert speech.layers(mels).shape == (2, 256, 15), "two of four layers halve the frames"
        text = encoders.TextEncoder(16).eval()
        grams = encoders.ngrams(["rose", "a longer text"])
        assert torch.allclose(text(grams)[:1], text(grams[:1, :int((grams[0] > 0).sum())]),
                              atol=1e-6)
        assert encoders.PictureEncoder(16).eval()(torch.rand(2, 3, 64, 64)).shape == (2, 16)
    speech.train()
    assert not torch.allclose(speech(mels), speech(mels))  # other voices


def test_small_encoders_learn_pictures_words_and_speech_end_to_end():
    known = stamps.load(languages=("en", "fr"))
    few = {name: items.take(items.rows.concept < 24)
           for name, items in encoders.items(known, pretrained=False).items()}
    built = encoders.build(few, dim=32)
    assert set(built) == {"image", "text", "speech"}
    _, history = alignment.align(built, few, known.meanings, recipe=Recipe(steps=4, batch_size=16))
    assert np.isfinite(history.loss).all()
