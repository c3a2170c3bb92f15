"""Tasks: what is embedded, what a folder in the hub's layout becomes, what is refused."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from workbench.subjects import data, embedded
from workbench.subjects.tasks import Pictures, Preprocessing


def picture(value: int, side: int = 8) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), value, np.uint8))


def encoded(value: int, side: int = 8) -> dict:
    buffer = io.BytesIO()
    picture(value, side).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def parquet(path, count: int, side: int = 8) -> None:
    rows = [{"image": encoded(i, side), "label": i % 3} for i in range(count)]
    pd.DataFrame(rows).to_parquet(path)


def test_fashion_mnist_is_whole_and_its_splits_are_disjoint(task):
    assert (len(task.train), len(task.validation), len(task.test)) == (55_000, 5_000, 10_000)
    counts = task.train.targets.bincount() + task.validation.targets.bincount()
    assert counts.tolist() == [6_000] * 10
    assert task.example.shape == (1, 1, 28, 28)


def test_normalised_training_images_have_mean_0_and_deviation_1(task):
    images, _ = next(task.train.batches(10_000))
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_batches_hold_every_image_once_in_order(tiny):
    labels = torch.cat([labels for _, labels in tiny.test.batches(64)])
    assert torch.equal(labels, tiny.test.targets)


def test_a_task_is_shown_in_a_few_lines_without_its_pixels(task):
    assert "10,000 test; 10 classes" in repr(task)
    assert len(repr(task)) < 1000


def test_a_subset_is_the_same_for_the_same_seed_and_another_for_another(task):
    one, same, other = (task.test.subset(100, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.inputs, same.inputs)
    assert not torch.equal(one.inputs, other.inputs)


def test_a_damaged_embedded_file_is_named(tmp_path, monkeypatch):
    stored = embedded.folder() / "fashion_mnist"
    (tmp_path / "fashion_mnist").mkdir()
    for path in stored.iterdir():
        (tmp_path / "fashion_mnist" / path.name).write_bytes(path.read_bytes()[:1000])
    (tmp_path / "fashion_mnist" / "SHA256SUMS").write_text((stored / "SHA256SUMS").read_text())
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"train_0.png is damaged"):
        data.load("fashion_mnist")


def test_an_image_folder_becomes_a_task(tmp_path):
    for split in ("train", "test"):
        for name, value in (("cat", 10), ("dog", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(13):
                picture(value + i).save(tmp_path / split / name / f"{i}.png")
    task = data.load(f"folder:{tmp_path}")
    assert task.classes == ("cat", "dog")
    assert (len(task.train), len(task.validation), len(task.test)) == (23, 3, 26)
    assert set(task.test.inputs[task.test.targets == 1].unique().tolist()) == set(range(200, 213))


def test_parquet_in_the_hubs_layout_becomes_a_task(tmp_path):
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", 24)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", 6)
    task = data.load(f"folder:{tmp_path}")
    assert (len(task.train), len(task.validation), len(task.test)) == (22, 2, 6)
    assert task.test.inputs[:, 0, 0, 0].tolist() == list(range(6))


def test_a_set_with_one_split_is_all_test(tmp_path):
    parquet(tmp_path / "photos.parquet", 5)
    task = data.load(f"folder:{tmp_path / 'photos.parquet'}")
    assert (len(task.train), len(task.test)) == (0, 5)
    with pytest.raises(ValueError, match="train holds no images"):
        next(task.train.batches())


def test_large_sets_decode_batch_by_batch_to_the_same_pixels(tmp_path, monkeypatch):
    parquet(tmp_path / "photos.parquet", 7)
    whole = data.load(f"folder:{tmp_path / 'photos.parquet'}")
    monkeypatch.setattr(data, "DECODE_WHOLE_BELOW", 0)
    lazy = data.load(f"folder:{tmp_path / 'photos.parquet'}")
    assert isinstance(lazy.test.inputs, Pictures)
    for (a, _), (b, _) in zip(whole.test.batches(3), lazy.test.batches(3), strict=True):
        assert torch.equal(a, b)
    assert len(lazy.test.subset(3)) == 3
    assert torch.equal(lazy.test.inputs[2:4], whole.test.inputs[2:4])
    assert torch.equal(lazy.test.subset(3, seed=1).inputs[:], whole.test.subset(3, seed=1).inputs)


def test_preprocessing_resizes_and_crops(tmp_path):
    parquet(tmp_path / "photos.parquet", 3, side=40)
    how = Preprocessing(size=16, crop=0.875)
    task = data.load(f"folder:{tmp_path / 'photos.parquet'}", preprocessing=how)
    assert task.example.shape == (1, 3, 16, 16)
    stored = [Image.open(io.BytesIO(row["bytes"])).convert("RGB")
              for row in pd.read_parquet(tmp_path / "photos.parquet").image]
    scaled = [picture.resize((18, 18), Image.Resampling[how.interpolation.upper()])
              for picture in stored]
    middles = [torch.from_numpy(np.array(picture.crop((1, 1, 17, 17)))).permute(2, 0, 1)
               for picture in scaled]
    assert any(torch.equal(task.test.inputs[0], middle) for middle in middles)


@pytest.mark.parametrize(("name", "message"), [
    ("mnist", "unknown data 'mnist'"),
    ("fashon_mnist", "unknown data 'fashon_mnist', did you mean 'fashion_mnist'; expected one of"),
    ("folder:", "unknown data"), ("hub:", "unknown data"),
    ("folder:/nowhere", "'/nowhere' does not exist"),
])
def test_what_is_not_there_is_refused_in_one_line(name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        data.load(name)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no set of images"):
        data.load(f"folder:{tmp_path}")


def test_pictures_without_classes_are_to_be_put_into_folders_of_their_names(tmp_path):
    for k in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
    with pytest.raises(ValueError, match="pictures of each class into a folder of its name"):
        data.load(f"folder:{tmp_path}")


def test_a_folder_of_several_sets_names_them_and_says_how_one_is_given(tmp_path, capfd):
    pd.DataFrame({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "sentences.parquet")
    pd.DataFrame({"samples": [[0.5]], "digit": [3]}).to_parquet(tmp_path / "digits.parquet")
    said = (f"it has digits.parquet, sentences.parquet: for one of them alone give "
            f"folder:{tmp_path}/digits.parquet")
    with pytest.raises(FileNotFoundError, match=said):
        data.load(f"folder:{tmp_path}")
    assert capfd.readouterr() == ("", "")


def test_pictures_of_16_bits_keep_their_tones():
    grey = Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8))
    found = Pictures([grey], Preprocessing(mean=(0.5,), std=(0.5,)), "grey")[:1]
    assert found.flatten().tolist() == list(range(0, 256, 4))


def test_images_of_different_sizes_need_preprocessing(tmp_path):
    rows = [{"image": encoded(1, side), "label": 0} for side in (8, 9)]
    pd.DataFrame(rows).to_parquet(tmp_path / "photos.parquet")
    with pytest.raises(ValueError, match="image 1 has another size"):
        data.load(f"folder:{tmp_path / 'photos.parquet'}")


def test_a_file_that_is_no_image_is_named(tmp_path):
    rows = [{"image": encoded(1), "label": 0}, {"image": {"bytes": b"nonsense", "path": None},
                                                "label": 0}]
    pd.DataFrame(rows).to_parquet(tmp_path / "photos.parquet")
    with pytest.raises(ValueError, match="image 1 cannot be decoded"):
        data.load(f"folder:{tmp_path / 'photos.parquet'}")


def test_labels_that_come_in_turn_are_in_every_split():
    task = data.of((torch.randn(240, 8), torch.arange(240) % 10))
    assert [len(part) for part in (task.train, task.validation, task.test)] == [176, 16, 48]
    assert set(task.test.targets.tolist()) == set(task.train.targets.tolist()) == set(range(10))


@pytest.mark.parametrize(("targets", "words"), [
    (torch.rand(6), r"targets are torch.float32 \(6,\), expected whole numbers \(n,\)"),
    (torch.zeros(6, 1).long(), r"targets are torch.int64 \(6, 1\), expected whole numbers"),
    (torch.tensor([0, 1, -1, 0, 1, 0]), "example 2 is of class -1; classes count from 0")])
def test_targets_that_are_no_classes_are_refused(targets, words):
    with pytest.raises(ValueError, match=words):
        data.of((torch.randn(6, 3), targets))


def test_arrays_and_small_integers_become_what_torch_reads():
    task = data.of((np.ones((10, 3), np.float32), np.zeros(10, np.int32)))
    assert task.train.inputs.dtype == torch.float32
    assert task.train.targets.dtype == torch.int64


@pytest.mark.parametrize(("given", "words"), [
    ([], "mine train holds no examples"), (None, "no training examples"),
    ([(picture(3), 0)], "no pairs of tensors and targets of one shape"),
    ([(torch.ones(2, 2 + k), 0) for k in range(3)],
     "no pairs of tensors and targets of one shape")])
def test_a_dataset_that_is_none_is_told(given, words):
    with pytest.raises(ValueError, match=words):
        data.of(given)


def test_nan_in_an_input_of_one_number_an_example_is_told():
    values = torch.ones(6)
    values[4] = float("nan")
    with pytest.raises(ValueError, match="example 4 holds NaN"):
        data.of(({"signal": torch.ones(6, 3), "age": values}, torch.zeros(6).long()))


def test_tags_are_called_by_the_classes():
    inputs, tags = torch.zeros(6, 4).long(), torch.zeros(6, 4).long()
    task = data.of((inputs, tags), asks="tags", classes=("O", "B-room", "I-room"))
    assert task.test.objective.tags == ("O", "B-room", "I-room")
    with pytest.raises(ValueError, match="tags want names, such as classes="):
        data.of((inputs, tags), asks="tags")
