"""Models: names, checkpoints that come back as they were written, and the one line for each that
does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.measures import accuracy
from workbench.subjects import checkpoints, data, models
from workbench.subjects.tasks import Preprocessing, Split, Task


def test_the_embedded_resnet20_reaches_its_stated_accuracy_on_a_sample(task, model):
    sample = task.test.subset(1000)
    with torch.inference_mode():
        top1 = (model(sample.batch().inputs).argmax(1) == sample.targets).float().mean()
    assert top1 > 0.92  # 94 % on all 10,000; 0.92 is four standard errors of 1,000 below


@pytest.mark.parametrize(("name", "params"), [("resnet20", 269_722), ("resnet56", 853_018)])
def test_cifar_resnets_have_the_parameters_of_the_paper(name, params):
    model = models.load(name, pretrained=False)
    assert sum(p.numel() for p in model.parameters()) == params
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_bare_weights_load_by_the_public_names(tmp_path):
    weights = models.load("resnet20", pretrained=False, seed=3).state_dict()
    assert "layer1.0.conv1.weight" in weights
    assert "linear.weight" in weights
    save_file({k: v.contiguous() for k, v in weights.items() if "num_batches" not in k},
              tmp_path / "bare.safetensors")
    model = models.load(f"resnet20@{tmp_path / 'bare.safetensors'}")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values(),
                                                 strict=True))


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path, task, model):
    models.save(model, tmp_path / "m.safetensors", notes={"note": "kept"})
    again = models.load(str(tmp_path / "m.safetensors"), task)
    assert torch.equal(again(task.example), model(task.example))
    assert models.read_header(tmp_path / "m.safetensors")["note"] == "kept"


def test_a_checkpoint_in_eight_bits_comes_back_within_half_a_step_of_each_row(
        tmp_path, task, model):
    models.save(model, tmp_path / "small.safetensors", eight_bits=True)
    models.save(model, tmp_path / "whole.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < 0.3 * (
        tmp_path / "whole.safetensors").stat().st_size
    again = models.load(str(tmp_path / "small.safetensors"), task)
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(),
                                     strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype), name
        if before.dim() > 1:
            rows = before.flatten(1)
            assert ((rows - after.flatten(1)).abs() <= 0.51 * rows.abs().amax(1, keepdim=True) / 127
                    + 1e-6).all(), name
        elif not before.is_floating_point():
            assert torch.equal(before, after), name


def test_a_row_of_zeros_and_a_name_that_ends_in_step_come_back_from_eight_bits():
    given = {"w": torch.tensor([[0.0, 0.0], [1.0, -127.0]]), "lone.step": torch.ones(3),
             "n": torch.arange(3)}
    again = checkpoints.from_eight_bits(checkpoints.in_eight_bits(given))
    assert again.keys() == given.keys()
    assert all(torch.equal(again[name].float(), value.float()) for name, value in given.items())


@pytest.mark.parametrize("name", ["resnet20", "torchvision:mobilenet_v2"])
def test_a_cut_model_comes_back_from_its_checkpoint_with_its_own_shapes(name, tmp_path):
    from workbench.methods import channels

    whole, example = models.load(name, pretrained=False), torch.randn(2, 3, 64, 64)
    cut = channels.remove(whole, channels.select(channels.score(whole, "l1", example=example), 0.4),
                          example=example)
    models.save(cut, tmp_path / "cut.safetensors")
    again = models.load(str(tmp_path / "cut.safetensors"))
    assert torch.equal(again(example), cut(example))
    assert [str(m) for m in again.modules()] == [str(m) for m in cut.modules()]


def test_pretrained_weights_of_other_classes_are_refused(task):
    with pytest.raises(ValueError, match="efficientnet_lite0 knows 1,000 ImageNet classes of RGB "
                       "images, fashion_mnist has 10"):
        models.load("efficientnet_lite0", task)


def test_a_random_start_follows_from_its_seed_and_leaves_the_global_state(task):
    before = torch.random.get_rng_state()
    one, same, other = (models.load("resnet20", task, pretrained=False, seed=seed).conv1.weight
                        for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_torchvision_models_take_the_classes_of_the_task(task):
    colour = Task("t", *(task.test,) * 3, classes=("a", "b", "c"), source="")
    assert models.load("torchvision:resnet18", colour, pretrained=False).fc.out_features == 3


def test_timm_loads_a_local_folder_in_the_hubs_layout(tmp_path):
    import timm

    source = timm.create_model("resnet10t", num_classes=4)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 4,
              "pretrained_cfg": {"input_size": [3, 64, 64], "num_classes": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    task = Task("t", None, None, Split(torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
                                       torch.zeros(1).long(),
                                                Preprocessing()), classes=tuple("abcd"), source="")
    model = models.load(f"timm:local-dir:{tmp_path}", task)
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(images), source.eval()(images), atol=1e-5)


def test_efficientnet_lite0_knows_its_own_preprocessing():
    how = models.preprocessing("efficientnet_lite0")
    assert (how.size, how.crop, how.interpolation) == (224, 0.875, "bicubic")
    model = models.load("efficientnet_lite0")
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def wrong_architecture(path):
    models.save(models.load("resnet56", pretrained=False), path)
    return f"resnet20@{path}"


def truncated(path):
    models.save(models.load("resnet20", pretrained=False), path)
    path.write_bytes(path.read_bytes()[:50_000])
    return str(path)


def not_a_number(path):
    models.save(models.load("resnet20", pretrained=False), path)
    tensors = load_file(path)
    tensors["layer2.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, path)
    return f"resnet20@{path}"


def other_shape(path):
    models.save(models.load("resnet20", data.load("fashion_mnist"), pretrained=False), path)
    return f"resnet20@{path}"


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: "resnet99", "unknown model 'resnet99'"),
    (lambda path: "torchvision:nonsense", "torchvision:nonsense could not be made"),
    (lambda path: "timm:nonsense", "timm:nonsense could not be made"),
    (lambda path: f"{path}", "does not exist"),
    (wrong_architecture, "another architecture than resnet20: it has, unknown to it, "
     "'layer1.3.bn1.bias'"),
    (truncated, "is not a whole safetensors file"),
    (not_a_number, "layer2.0.conv1.weight holds NaN"),
    (other_shape, r"conv1.weight has shape \(16, 1, 3, 3\), expected \(16, 3, 3, 3\)"),
    (lambda path: "resnet56", "no embedded weights of resnet56 for no task"),
])
def test_what_cannot_be_loaded_is_refused_in_one_line(make, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        models.load(make(tmp_path / "m.safetensors"))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, model):
    import copy

    models.save(model, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    broken = copy.deepcopy(model)
    broken.linear.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match="linear.bias holds NaN or infinity"):
        models.save(broken, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_pictures_that_are_not_the_models_own_are_warned_of(name, task):
    model = models.load(name, task, pretrained=False) if name.startswith("timm:") else None
    with pytest.warns(UserWarning, match='was trained on pictures of 224 x 224 .* '
                      f'preprocessing=models.preprocessing."{name}"'):
        models._expect_prepared(task, name, model)


def test_a_checkpoint_remembers_how_its_pictures_were_prepared(tmp_path):
    import warnings

    import numpy as np
    from PIL import Image

    for k in range(30):
        folder = tmp_path / "photos" / ("train" if k % 2 else "test") / "ab"[k % 3 > 0]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (32, 32, 3),
                                                          dtype=np.uint8)).save(folder / f"{k}.png")
    name = f"folder:{tmp_path / 'photos'}"
    task = data.load(name)
    model = models.load("timm:resnet10t", task, pretrained=False)
    models.save(model, tmp_path / "mine.safetensors")
    told = models.preprocessing(str(tmp_path / "mine.safetensors"))
    assert told == task.test.prepare
    assert models.trained_on(str(tmp_path / "mine.safetensors")) == name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load(str(tmp_path / "mine.safetensors"), data.load(name, preprocessing=told))


def test_a_quantised_model_is_kept_as_its_file(model, task, tmp_path):
    from workbench.methods import quantization

    rounded = quantization.quantize(model, [], activations=None, example=task.example)
    with pytest.raises(ValueError, match=r"kept as its file, onnx.export"):
        models.save(rounded, tmp_path / "int8.safetensors")


def test_weights_of_torch_save_load_and_may_know_more_classes_than_there_are_examples_of(tmp_path):
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2(num_classes=12)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "whole.pth")
    task = data.of((torch.randn(20, 3, 32, 32), torch.arange(20) % 7),
                   (torch.randn(6, 3, 32, 32), torch.arange(6)), name="few")
    loaded = models.load(f"torchvision:mobilenet_v2@{tmp_path / 'whole.pth'}", task)
    inputs = task.test.batch(slice(6)).inputs
    assert torch.equal(loaded(inputs), network.eval().to(memory_format=torch.channels_last)(inputs))
    assert loaded.origin["classes"] == "12"
    assert accuracy.evaluate(loaded, task.test).n == 6


@pytest.mark.parametrize(("held", "message"), [
    ({"state_dict": {"a": 1}}, "holds no state_dict"),
    ([1, 2], "holds no state_dict, tensors by name, but list"),
    (b"", "is not a whole file of tensors"), ({"weight": torch.zeros(3)},
                                              "of another architecture"),
])
def test_what_is_no_state_dict_is_refused_in_one_line(tmp_path, held, message):
    path = tmp_path / "odd.pth"
    torch.save(held, path) if held else path.write_bytes(held)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(f"torchvision:resnet18@{path}", pretrained=False)
    assert "\n" not in str(caught.value)


def test_a_name_of_a_zoo_that_is_nearly_right_is_told():
    with pytest.raises(ValueError, match="did you mean 'torchvision:mobilenet_v2'"):
        models.load("torchvision:mobilenetv2", pretrained=False)


@pytest.mark.parametrize(("name", "said"), [
    ("resnet18.a1_in1k", "check the name and the network"),
    ("resnet18.of_mine", "check the name and the network"),
    ("resnet81", "did you mean 'timm:resnet18'; check the name")])
def test_a_hub_that_does_not_answer_is_no_misspelt_name(name, said):
    def fetched():
        raise OSError("no network")

    with pytest.raises(ValueError, match=said):
        models._of_zoo("timm", name, fetched, pretrained=True)


def test_who_starts_at_random_is_not_told_to():
    with pytest.raises(ValueError, match="check the name$"):
        models.load("timm:mobilenetv3_smal_100", pretrained=False)


def test_of_names_that_are_as_like_the_one_that_begins_alike_is_meant():
    with pytest.raises(ValueError, match="did you mean 'resnet20'; expected"):
        models.load("resnet2O")
