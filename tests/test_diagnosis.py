import pytest
import torch
from torch import nn

from workbench.batches import Batch
from workbench.errors import UnsupportedModelError
from workbench.measures import accuracy, diagnosis
from workbench.methods import quantization, reparameterization
from workbench.subjects import data, models

CAUSES = {"scale": "weight scale off", "range": "activation range off",
          "per_tensor": "one scale for all channels",
          "stale_norm": "stale batch norm"}


@pytest.fixture(scope="module")
def task():
    return data.load("fashion_mnist")


@pytest.fixture(scope="module")
def model(task):
    return models.load("resnet20", task)


@pytest.fixture(scope="module")
def folded(model, task):
    return reparameterization.fold_batchnorm(model, task.example)


@pytest.fixture(scope="module")
def look(task):
    return list(task.validation.subset(100, seed=1).batches(50))


@pytest.fixture(scope="module")
def healthy(folded, task):
    return quantization.quantize(folded, task.validation.subset(100, seed=0).batches(50))


@pytest.fixture(scope="module")
def with_norms(model, task):
    return quantization.quantize(model, task.validation.subset(100, seed=0).batches(50), fold=False)


def test_a_healthy_candidate_has_no_fault_and_its_effects_add_up(folded, healthy, look):
    found = diagnosis.diagnose(folded, healthy, look)
    assert not found.table.fault.any()
    assert (found.table.blame == 0).all()
    assert found.table.effect.is_monotonic_decreasing
    assert set(found.table.cause) <= {"few bits for its weights", "few bits for its activations"}
    # errors of many layers add up roughly; joins have their own
    assert abs(found.unexplained) < 0.7


def test_the_effect_of_a_layer_is_that_of_the_network_with_it_alone_changed(folded, healthy, look):
    from workbench.graph.layers import replaced

    found = diagnosis.diagnose(folded, healthy, look).table.set_index("layer")
    name = "layer2.0.conv2"  # no ReLU before its quantiser
    unit = nn.Sequential(healthy.get_submodule(name), healthy.quantizer_layer2_0_conv2)
    changed = replaced(folded, name, unit)
    with torch.inference_mode():
        pairs = [(folded(images), changed(images)) for images, _ in look]
    errors = torch.cat([(b - a).pow(2).sum(1) / a.pow(2).sum(1) for a, b in pairs])
    assert found.effect[name] == pytest.approx(errors.mean().item(), rel=1e-4)
    flips = torch.cat([a.argmax(1) != b.argmax(1) for a, b in pairs]).float().mean().item()
    assert found.flips[name] == pytest.approx(flips)


@pytest.mark.parametrize(("fault", "layer", "by"), [
    ("scale", "layer1.1.conv2", 8.0), ("scale", "linear", 1 / 8), ("range", "layer2.2.conv1", 8.0),
    ("per_tensor", "conv1", 1.0)])
def test_a_planted_fault_is_the_first_suspect(folded, healthy, look, fault, layer, by):
    sick = diagnosis.plant(healthy, layer, fault, by=by)
    first = diagnosis.diagnose(folded, sick, look).table.iloc[0]
    assert (first.layer, first.cause, bool(first.fault)) == (layer, CAUSES[fault], True)


def test_stale_statistics_are_found_and_their_repair_brings_the_accuracy_back(
        model, with_norms, look, task):
    val = task.validation.subset(300, seed=2)
    dark = [val.prepare(Batch(val.inputs // 3, val.targets))]
    sick = diagnosis.plant(with_norms, "layer2.1.conv1", "stale_norm", batches=dark)
    found = diagnosis.diagnose(model, sick, look)
    assert found.table.layer[0] == "layer2.1.conv1"
    assert found.table.cause[0] == "stale batch norm"
    ill, well = (accuracy.evaluate(m, val).top1 for m in (sick, found.repaired()))
    assert well >= ill
    again = diagnosis.diagnose(model, found.repaired(), look)
    assert not again.table.set_index("layer").fault["layer2.1.conv1"]


def test_a_repaired_scale_is_the_healthy_one(folded, healthy, look):
    sick = diagnosis.plant(healthy, "layer3.0.conv1", "scale")
    repaired = diagnosis.diagnose(folded, sick, look).repaired()
    images = look[0][0]
    with torch.inference_mode():
        assert torch.equal(repaired(images), healthy(images))
        assert not torch.equal(sick(images), healthy(images))


def test_damaged_weights_of_a_float_model_are_found(folded, look):
    sick = reparameterization.copy.deepcopy(folded)
    with torch.no_grad():
        sick.layer2[0].conv1.weight[3] = 0
    found = diagnosis.diagnose(folded, sick, look)
    assert (found.table.layer[0], found.table.cause[0]) == ("layer2.0.conv1", "weights changed")
    assert (found.table.cause[1:] == "none").all()
    assert torch.equal(found.repaired().layer2[0].conv1.weight, folded.layer2[0].conv1.weight)


def test_a_changed_bias_and_weights_that_were_zeroed_before_rounding_are_found(folded, look, task):
    sick = reparameterization.copy.deepcopy(folded)
    with torch.no_grad():
        sick.layer3[0].conv2.bias[1] += 1
    table = diagnosis.diagnose(folded, sick, look).table
    assert (table.layer[0], table.cause[0]) == ("layer3.0.conv2", "weights changed")
    sick = reparameterization.copy.deepcopy(folded)
    with torch.no_grad():
        sick.layer2[1].conv1.weight[5] = 0
    rounded = quantization.quantize(sick, task.validation.subset(100, seed=0).batches(50))
    found = diagnosis.diagnose(folded, rounded, look)
    assert (found.table.layer[0], found.table.cause[0]) == ("layer2.1.conv1", "weights changed")
    assert diagnosis.diagnose(folded, folded, look).unexplained == 0


def test_channels_of_zeros_do_not_count_as_spread(look):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)).eval()
    model(look[0].inputs)
    for channel in range(8):
        model[0].weight.data[channel] = 2.0**channel if channel > 4 else 0.0
    found = diagnosis.diagnose(model, model, look).table.set_index("layer")
    assert found.channel_spread["0"] == 2  # 128 over the median of 32, 64 and 128
    model[0].weight.data.zero_()
    found = diagnosis.diagnose(model, model, look).table.set_index("layer")
    assert found.channel_spread.isna()["0"]


def test_what_cannot_be_diagnosed_says_why(folded, healthy, look, task):
    with pytest.raises(ValueError, match="no examples"):
        diagnosis.diagnose(folded, healthy, [])
    with pytest.raises(ValueError, match="NaN"):
        diagnosis.diagnose(folded, healthy, [(look[0][0] * float("nan"), None)])
    with pytest.raises(UnsupportedModelError, match="differ in their layers"):
        diagnosis.diagnose(folded, models.load("resnet56", task, pretrained=False), look)
    found = diagnosis.diagnose(folded, healthy, look)
    assert repr(found).startswith("Diagnosis of 20 layers, 0 with a fault that can be repaired; "
                                  f"first to look at: {found.table.layer[0]}: ")
    with pytest.raises(ValueError, match="no layer has a fault to repair: .* try scales by "
                       "channel, .* or more bits for"):
        found.repaired()
    with pytest.raises(ValueError, match="unknown fault 'rust'"):
        diagnosis.plant(healthy, "conv1", "rust")
    with pytest.raises(ValueError, match="no layer matches"):
        diagnosis.plant(healthy, "conv99", "scale")
    with pytest.raises(ValueError, match="is not one layer's name"):
        diagnosis.plant(healthy, "layer1.*", "scale")
    with pytest.raises(ValueError, match="nothing that fault 'stale_norm'"):
        diagnosis.plant(healthy, "conv1", "stale_norm")
