import numpy as np
import pytest
import torch

from workbench.subjects import data, embedded, models, stamps
from workbench.subjects.tasks import Preprocessing

KNOWN = stamps.load()


def test_every_stamp_has_a_picture_a_description_and_speech():
    assert KNOWN.pictures.shape == (925, 3, 64, 64)
    assert set(KNOWN.texts.concept) == set(KNOWN.clips.concept) == set(range(925))
    assert set(KNOWN.clips.language) == set(stamps.SPOKEN)
    assert (KNOWN.texts.text.str.len() > 0).all()
    penguin = KNOWN.concepts.name.tolist().index("animals/birds/penguin")
    assert KNOWN.texts[(KNOWN.texts.concept == penguin)
                       & (KNOWN.texts.language == "en")].text.item() == "A penguin."


def test_a_picture_is_its_tile_of_the_sheet():
    from PIL import Image

    sheet = np.array(Image.open(embedded.verified("stamps", "pictures.webp")))
    across = sheet.shape[1] // 64
    for place in (0, 1, across, 5 * across + 3):
        down, right = 64 * (place // across), 64 * (place % across)
        tile = torch.from_numpy(sheet[down:down + 64, right:right + 64]).permute(2, 0, 1)
        assert torch.equal(KNOWN.pictures[place], tile)


def test_new_concepts_share_no_group_with_the_others_and_keep_the_categories():
    new = KNOWN.concepts.part == stamps.NEW_CONCEPT
    assert 90 <= new.sum() <= 110
    assert not set(KNOWN.concepts.group[new]) & set(KNOWN.concepts.group[~new])
    share = KNOWN.concepts.category[new].value_counts(
        normalize=True) - KNOWN.concepts.category.value_counts(normalize=True)
    assert share.abs().max() < 0.03
    for rows in (KNOWN.texts, KNOWN.clips):
        assert ((rows.part == stamps.NEW_CONCEPT) == new.to_numpy()[rows.concept]).all()


def test_new_pairs_are_a_tenth_and_given_away_by_no_other_wording():
    groups = KNOWN.concepts.group.to_numpy()
    for rows in (KNOWN.texts, KNOWN.clips):
        known = rows[rows.part != stamps.NEW_CONCEPT]
        assert 0.08 < (known.part == stamps.NEW_PAIR).mean() < 0.16
    clips = KNOWN.clips.assign(group=groups[KNOWN.clips.concept])
    pairs = {part: set(zip(rows.group, rows.language, strict=True))
             for part, rows in clips.groupby("part")}
    assert not pairs[stamps.NEW_PAIR] & pairs[stamps.TRAIN]
    words = KNOWN.texts.assign(group=groups[KNOWN.texts.concept],
                               text=KNOWN.texts.text.str.casefold().str.strip(" ."))
    told = {part: set(zip(rows.group, rows.text, strict=True))
            for part, rows in words.groupby("part")}
    assert not told[stamps.NEW_PAIR] & told[stamps.TRAIN]


def test_the_seed_decides_what_is_held_out():
    again, other = stamps.load(), stamps.load(seed=1)
    assert again.concepts.equals(KNOWN.concepts)
    assert again.clips.equals(KNOWN.clips)
    assert not other.concepts.part.equals(KNOWN.concepts.part)


def test_spectrograms_end_in_silence_and_reach_the_loudest_value():
    rows = KNOWN.clips.iloc[[0, 700, 3000]]
    mels = KNOWN.spectrograms(rows, longest=100)
    assert mels.shape[:2] == (3, 40)
    assert mels.shape[2] <= 100
    assert mels.max() == 1
    shortest = rows.frames.clip(upper=100).argmin()
    assert mels[shortest, :, min(rows.frames.iloc[shortest], 100):].abs().sum() == 0


def test_a_language_that_is_not_there_gets_one_line():
    with pytest.raises(ValueError, match="no descriptions in 'tlh'; there are be, bg"):
        KNOWN.spoken(("fr", "tlh"))
    with pytest.raises(ValueError, match="'tlh'"):
        stamps.load(languages=("tlh",))


def test_as_a_task_new_concepts_are_the_test_images():
    task = data.load("stamps", preprocessing=models.preprocessing("resnet20"))
    assert len(task.test) == (KNOWN.concepts.part == stamps.NEW_CONCEPT).sum()
    assert len(task.train) + len(task.validation) + len(task.test) == 925
    assert task.classes[int(task.test.targets[0])] == KNOWN.concepts.category[
        KNOWN.concepts.part == stamps.NEW_CONCEPT].iloc[0]
    large = data.load("stamps", preprocessing=Preprocessing(size=96))
    assert large.example.shape == (1, 3, 96, 96)
    with pytest.raises(ValueError, match="RGB"):
        data.load("stamps", preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)))


def test_pictures_are_those_of_the_contact_sheet():
    from PIL import Image

    sheet = np.array(Image.open(embedded.folder() / "stamps" / "pictures.webp"))
    assert torch.equal(KNOWN.pictures[32],
                       torch.from_numpy(sheet[64:128, 64:128].copy()).permute(2, 0, 1))


def test_a_subset_keeps_what_belongs_together():
    few = KNOWN.subset(50, seed=3)
    assert len(few.concepts) == len(few.pictures) == 50
    assert set(few.texts.concept) == set(range(50))
    old = KNOWN.concepts.name.tolist().index(few.concepts.name[17])
    assert torch.equal(few.pictures[17], KNOWN.pictures[old])
    assert few.texts[few.texts.concept == 17].text.tolist() == KNOWN.texts[
        KNOWN.texts.concept == old].text.tolist()
    assert len(KNOWN.subset(2000).concepts) == 925
    with pytest.raises(ValueError, match="at least 1 concept"):
        KNOWN.subset(0)
