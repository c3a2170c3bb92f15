"""What people bring that does not fit, each with its one line; and what looks as if it did not fit,
and does."""

import io
import warnings

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from workbench.deployment import onnx
from workbench.errors import UnsupportedModelError
from workbench.measures import accuracy, cost, equivalence, latency, sensitivity
from workbench.methods import channels, quantization, reparameterization
from workbench.subjects import data, models, tasks

WAYS = {
    "cost": lambda model, task: cost.table(model, task.example),
    "score": lambda model, task: channels.score(model, "l1", example=task.example),
    "quantize": lambda model, task: quantization.quantize(model, list(task.train.batches(16))),
    "fold": lambda model, task: reparameterization.fold_batchnorm(model, task.example),
    "export": lambda model, task: onnx.export(model, task.example, "never.onnx"),
    "judge": lambda model, task: accuracy.evaluate(model, task.test),
}


class Net(nn.Module):
    """Two convolutions and a linear layer of so many classes; `way` says what is odd about it."""

    def __init__(self, way: str = "", classes: int = 4):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3,
                                           padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(
                                               8, 8, 3, padding=1)
        self.norm, self.head, self.way = nn.BatchNorm2d(8), nn.Linear(8 * 64 if way == "fixed"
                                                                      else 8, classes), way
        if way == "tied":
            self.c.weight = self.b.weight

    def forward(self, x):
        x = self.norm(self.b(self.a(x).relu())).relu()
        x = (self.norm(self.b(x)) if self.way == "twice" else self.c(x)).relu()
        if self.way == "branch" and x.sum() > 0:
            x = 2 * x
        return self.head(x.flatten(1) if self.way == "fixed" else x.mean((2, 3)))


@pytest.fixture(scope="module")
def squares():
    draw = torch.Generator().manual_seed(0)
    return data.of((torch.rand(64, 3, 8, 8, generator=draw), torch.arange(64) % 4), name="squares")


@pytest.mark.parametrize("way", [*WAYS, "wrap"])
@pytest.mark.parametrize(("changed", "remedy"),
                         [(lambda m: m.half(),
                           r"weights are torch.float16, .*model.to\(torch.float32\)"),
                          (lambda m: m.to("meta"), r"weights are on meta, .*model.to\('cpu'\)")],
                         ids=["dtype", "device"])
def test_weights_of_another_type_or_on_another_device_are_named(squares, tmp_path, monkeypatch, way,
                                                                changed, remedy):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, UnsupportedModelError), match=remedy) as found:
        (WAYS | {"wrap": models.wrap})[way](changed(Net().eval()), squares)
    assert len(str(found.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["score", "quantize", "fold", "export"])
def test_a_branch_on_values_is_refused_in_one_line_and_nothing_is_printed(
        squares, tmp_path, monkeypatch, capfd, way):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedModelError, match="Net cannot be .*data-dependent") as found:
        WAYS[way](Net("branch").eval(), squares)
    assert len(str(found.value).splitlines()) == 1
    assert "def forward" not in "".join(capfd.readouterr())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["cost", "score", "export", "judge"])
def test_pictures_of_another_size_are_named(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    larger = data.of((torch.rand(64, 3, 12, 12), torch.arange(64) % 4), name="larger")
    with pytest.raises((ValueError, UnsupportedModelError),
                       match=r"Net .*shapes cannot be multiplied \(\d+x1152 and 512x4\)"):
        WAYS[way](Net("fixed").eval(), larger)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["tied", "twice"])
def test_tied_weights_and_layers_used_twice_go_all_the_way(squares, tmp_path, way):
    model = models.wrap(Net(way), squares)
    batches = list(squares.train.batches(16))
    scores = channels.score(model, "l1", example=squares.example)
    small = channels.cut_to(model, scores, macs=0.6, example=squares.example, batches=batches)
    left, whole = (cost.total(one, squares.example)["macs"] for one in (small, model))
    assert left <= 0.6 * whole
    rounded = quantization.quantize(small, batches)
    path = onnx.export(rounded, squares.example, tmp_path / "small.onnx")
    assert equivalence.compare(rounded, path, squares.train).passed
    curves = sensitivity.scan(model, squares.test,
                              channels.silencing(model, example=squares.example), levels=[0.5])
    assert curves.top1.between(0, 1).all()
    models.save(small, tmp_path / "small.safetensors")
    again = models.load(tmp_path / "small.safetensors", squares, into=Net(way))
    torch.testing.assert_close(again(squares.example), small(squares.example))


def test_a_cut_that_would_leave_nothing_is_refused(squares):
    with pytest.raises(ValueError, match="layer a has channels 0 to 7, of which one must stay"):
        channels.remove(Net().eval(), {"a": list(range(8))}, example=squares.example)


@pytest.mark.parametrize(("first", "line"),
                         [(0, "Net answers 4 classes, .* has 6; give it a head for 6"),
                          (-3, "has no split with labels from 0 on")])
def test_labels_that_do_not_fit_are_named(tmp_path, first, line):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    rows = {"image": [{"bytes": picture.getvalue(), "path": "a.png"}] * 12,
            "label": [first + k % 6 for k in range(12)]}
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=line):
        models.wrap(Net(), data.load(f"folder:{tmp_path}"))


@pytest.mark.parametrize(("labels", "line"), [([0.5, 1.5], "holds 0.5; expected whole numbers"),
                                              ([0.0, float("nan")], "holds None; expected whole"),
                                              (["a", None], "expected whole numbers or names")])
def test_labels_that_are_no_whole_numbers_are_not_cut_to_some(tmp_path, labels, line):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    rows = {"image": [{"bytes": picture.getvalue(), "path": "a.png"}] * 12, "label": labels * 6}
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=line):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize(("name", "line"), [
    ("mobilenet_v2", "did you mean 'torchvision:mobilenet_v2'"),
    ("mobilenetv4_conv_small", "did you mean 'timm:mobilenetv4_conv_small'"),
    ("nothing.like_it", "unknown model 'nothing.like_it'; expected one of resnet20")])
@pytest.mark.parametrize("way", [models.load, models.preprocessing])
def test_a_name_of_no_model_is_told_which_was_meant(name, line, way):
    with pytest.raises(ValueError, match=line):
        way(name)


@pytest.mark.parametrize("way", [models.load, models.preprocessing])
def test_bare_weights_want_a_name_before_them(tmp_path, way):
    torch.save({}, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match="does not say its architecture; load it as NAME@"):
        way(str(tmp_path / "mine.pth"))


def test_weights_of_imagenet_in_a_file_warn_of_other_pictures_too(tmp_path):
    how = tasks.Preprocessing(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    drawn = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    ours = data.of((drawn, torch.arange(12) % 3), prepare=how)
    network = models.load("torchvision:squeezenet1_1", pretrained=False)
    for classes, warned in ((1000, True), (3, False)):
        network.classifier[1] = nn.Conv2d(512, classes, 1)
        torch.save(network.state_dict(), tmp_path / "mine.pth")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            models.load(f"torchvision:squeezenet1_1@{tmp_path / 'mine.pth'}", ours)
        assert any("is usually trained on pictures of 224" in str(one.message)
                   for one in said) == warned


@pytest.mark.parametrize(("call", "line"), [
    (lambda net, task, seen: accuracy.evaluate(net, task), "found a Task: give its test split"),
    (lambda net, task, seen: sensitivity.scan(net, task, None, levels=[0.5]), "found a Task"),
    (lambda net, task, seen: sensitivity.scan(net, task.test, None, levels=0.5), r"\[0.5\]"),
    (lambda net, task, seen: quantization.quantize(net, seen, weights=4), r"Scheme\(4\)"),
    (lambda net, task, seen: quantization.quantize(net, seen, weights={"a": 4}), r"Scheme\(4\)"),
    (lambda net, task, seen: quantization.quantize(net, seen, activations=8), "activations is 8"),
    (lambda net, task, seen: latency.paired([net], task.example), "give {name: model")])
def test_what_is_of_the_wrong_kind_is_told_what_to_give(squares, call, line):
    net = models.wrap(Net(), squares)
    with pytest.raises(TypeError, match=line):
        call(net, squares, list(squares.train.batches(16)))


def test_a_checkpoint_of_ones_own_class_has_no_preprocessing_of_its_own(tmp_path):
    inputs = data.of((torch.randn(12, 6), torch.arange(12) % 3))
    models.save(models.wrap(nn.Linear(6, 3), inputs), tmp_path / "mine.safetensors")
    assert models.preprocessing(str(tmp_path / "mine.safetensors")) is None
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        models.preprocessing(str(tmp_path / "none.safetensors"))
