"""Fake quantisation of whole networks, its repairs, and the integer graph that ONNX Runtime
runs."""

import sys
from collections import OrderedDict

import onnx as onnx_library
import pytest
import torch
from torch import nn

from workbench.deployment import onnx, sessions
from workbench.errors import UnsupportedModelError
from workbench.graph import layers, moments
from workbench.graph.layers import named
from workbench.measures import accuracy, equivalence, peers, sensitivity
from workbench.methods import channels, quantization, reparameterization, rounding
from workbench.methods.quantization import Quantize
from workbench.numbers.grid import Scheme
from workbench.numbers.histograms import CALIBRATORS
from workbench.numbers.quantizers import quantizers
from workbench.plans import allocation
from workbench.subjects import data, training
from workbench.subjects.subject import Subject
from workbench.subjects.tasks import with_views

FOUR = Scheme(4, granularity="channel")
EXAMPLE = torch.randn(2, 1, 28, 28)


@pytest.fixture(scope="module")
def folded(model, task):
    return reparameterization.fold_batchnorm(model, task.example)


@pytest.fixture(scope="module")
def seen(task):
    return list(task.validation.subset(200).batches(100))


@pytest.fixture(scope="module")
def eight(folded, seen):
    return quantization.quantize(folded, seen)


@pytest.fixture(scope="module")
def four(folded, seen):
    return quantization.quantize(folded, seen, weights=FOUR)


def logit_error(candidate, reference, images):
    with torch.no_grad():
        return (candidate(images) - reference(images)).norm().item() / reference(
            images).norm().item()


def test_eight_bits_answer_as_float_does_and_the_model_is_left_as_it_was(
        model, folded, eight, tiny):
    images, _ = next(tiny.test.batches(200))
    assert logit_error(eight, folded, images) < 0.05
    assert logit_error(folded, model, images) < 1e-5
    assert (eight(images).argmax(1) == folded(images).argmax(1)).float().mean() > 0.97


def test_a_quantiser_stands_behind_whatever_the_runtime_stores(eight):
    places = [quantizer.place for _, quantizer in quantizers(eight)]
    assert places[0] == "input x"
    # the images, 19 convolutions with their ReLUs, 9 additions, the average
    assert len(places) == 1 + 19 + 9 + 1


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_every_calibrator_keeps_the_answers(folded, seen, tiny, calibrator):
    images, _ = next(tiny.test.batches(200))
    calibrated = quantization.quantize(folded, seen, calibrator=calibrator)
    assert (calibrated(images).argmax(1) == folded(images).argmax(1)).float().mean() > 0.9


def test_weights_alone_or_some_layers_alone_can_be_quantised(folded, tiny):
    images, _ = next(tiny.test.batches(50))
    only = quantization.quantize(folded, [], weights=FOUR, activations=None, layers="layer3.*",
                                 example=images)
    assert set(quantization.integers(only)) == {name for name in named(folded)
                                                if name.startswith("layer3")}
    assert 0 < logit_error(only, folded, images) < 0.5


def test_a_prepared_model_passes_values_on_until_it_is_calibrated(folded, tiny, tmp_path):
    images, _ = next(tiny.test.batches(20))
    ready = quantization.prepare(folded, images, weights=None)
    assert torch.equal(ready(images), folded(images))
    with pytest.raises(UnsupportedModelError,
                       match="its range is not known yet; call quantization.calibrate"):
        onnx.export(ready, tiny.example, tmp_path / "x.onnx")


def test_the_table_counts_bits_and_noise(folded, eight, four):
    by_eight, by_four = quantization.table(eight, folded), quantization.table(four, folded)
    assert (by_eight.sqnr_db - by_four.sqnr_db).median() == pytest.approx(24, abs=3), "6 dB a bit"
    first = by_four[by_four.layer == "layer1.0.conv1"].iloc[0]
    # 4-bit weights, a scale and a bias a channel
    assert first.size_bytes == 16 * 16 * 9 // 2 + 16 * 4 + 16 * 4


def test_trained_through_the_grid_it_gets_better(folded, tiny, seen):
    rough = quantization.quantize(folded, seen, weights=Scheme(3, granularity="channel"))
    recipe = training.Recipe(epochs=5, batch_size=64, learning_rate=3e-3, precision="fp32")
    start = quantization.for_training(rough)
    trained = training.fit(start, tiny, recipe=recipe).model
    scales = [(a.scale, b.scale) for (_, a), (_, b) in zip(quantizers(start), quantizers(trained),
                                                           strict=True)]
    assert any(not torch.equal(a, b) for a, b in scales), "activation scales learn"
    learnt = accuracy.evaluate(rough, tiny.train), accuracy.evaluate(trained, tiny.train)
    assert learnt[1].top1 > learnt[0].top1 + 0.01
    for name, integers in quantization.integers(trained).items():
        assert integers.abs().max() <= 4, name


def test_equalising_changes_ranges_and_nothing_else(folded, tiny):
    images, _ = next(tiny.test.batches(50))
    equal = reparameterization.equalize(folded, images)
    assert logit_error(equal, folded, images) < 1e-5
    first, second = equal.layer1[0].conv1.weight, equal.layer1[0].conv2.weight
    assert torch.allclose(first.abs().flatten(1).amax(1),
                          second.abs().transpose(0, 1).flatten(1).amax(1), rtol=1e-3)


def test_a_depthwise_layer_is_equalised_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
                        nn.Conv2d(8, 4, 1)).eval()
    net[0].weight.data *= torch.logspace(-2, 2, 8).view(-1, 1, 1, 1)
    images = torch.randn(4, 3, 6, 6)
    equal = reparameterization.equalize(net, images)
    assert torch.allclose(equal(images), net(images), rtol=1e-3, atol=1e-3)
    assert equal[0].weight.abs().flatten(1).amax(1).log().std() < net[0].weight.abs().flatten(
        1).amax(1).log().std()


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.Linear(8, 3)],
                         ids=["convolution", "linear"])
def test_means_alone_are_those_beside_the_second_moments(layer):
    draw = torch.Generator().manual_seed(0)
    shape = (4, 9, 9) if isinstance(layer, nn.Conv2d) else (5, 8)
    x, y = ([torch.randn(count, *shape, generator=draw) for count in (7, 4)] for _ in range(2))
    both = moments.moments(layer, x, y, seed=1)
    mean, mean_quantised = moments.means(layer, x, y, seed=1)
    torch.testing.assert_close(mean, both.mean)
    torch.testing.assert_close(mean_quantised, both.mean_quantised)


def test_correcting_the_bias_brings_each_layers_mean_back(folded, four, seen):
    fixed = rounding.correct_bias(four, folded, seen)
    images = torch.cat([images for images, _ in seen])
    with torch.no_grad():
        apart = [(net(images).mean(0) - folded(images).mean(0)).abs().max().item()
                 for net in (four, fixed)]
    assert apart[1] < 0.3 * apart[0]


@pytest.mark.parametrize(("repair", "given"), [
    (rounding.adaround, {"steps": 200}), (rounding.adaquant, {"steps": 200}),
    (rounding.descend, {})])
def test_better_rounding_errs_less_on_other_images_and_stays_on_the_grid(
        folded, four, seen, tiny, repair, given):
    images, _ = next(tiny.test.batches(200))
    fixed = repair(four, folded, seen, **given)
    assert logit_error(fixed, folded,
                       images) < 0.8 * logit_error(rounding.correct_bias(four, folded, seen),
                                                   folded, images)
    for name, integers in quantization.integers(fixed).items():
        layer = fixed.get_submodule(name)
        quantizer = layer.parametrizations.weight[0]
        assert integers.min() >= -8
        assert integers.max() <= 7
        assert torch.allclose(integers.flatten(1) * quantizer.scale, layer.weight.flatten(1),
                              atol=1e-6)


def test_adaround_draws_to_a_level_first_weakly_and_then_strongly():
    assert [rounding.sharpness(progress) for progress in (0.2, 0.6, 1.0)] == pytest.approx(
        [20, 11, 2])


@pytest.mark.parametrize("repair", [rounding.adaround, rounding.descend])
def test_rounding_finds_the_best_of_a_layer_small_enough_to_try_all(repair):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 1))
    batches = [(torch.randn(500, 6) @ torch.randn(6, 6), torch.zeros(500))]
    rough = quantization.quantize(net, batches, weights=Scheme(3), activations=None)
    scale = rough.get_submodule("0").parametrizations.weight[0].scale.item()
    centred = batches[0][0] - batches[0][0].mean(0)
    down = (net[0].weight.detach() / scale).floor()
    errors = []
    for choice in range(64):
        up = torch.tensor([[choice >> k & 1 for k in range(6)]])
        errors.append((centred @ ((down + up).clamp(-4, 3) * scale - net[0].weight).T).pow(
            2).mean().item())
    fixed = repair(rough, net, batches)
    found = (centred @ (fixed.get_submodule("0").weight - net[0].weight).T).pow(2).mean().item()
    assert sorted(errors).index(min(errors,
                                    key=lambda e: abs(e
                                                      - found))) <= 2, "among the three best of 64"


def test_convolution_patches_give_the_convolution_back():
    torch.manual_seed(0)
    for layer in (nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Conv2d(4, 8, 3, groups=2, dilation=2),
                  nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, (3, 5), padding="same")):
        images = torch.randn(2, 4, 9, 9)
        out, places = layer(images), torch.randint(0, 2**31, (2, 10),
                                                   generator=torch.Generator().manual_seed(3))
        patches = layers.patches(layer, images, seed=3, places=10)  # (g, N, K)
        weight = layer.weight.view(layer.groups, -1, patches.shape[2])
        found = torch.einsum("gnk,gok->ngo", patches, weight).flatten(1) + layer.bias
        expected = out[:, :, places[0] % out.shape[2],
                       places[1] % out.shape[3]].transpose(1, 2).flatten(0, 1)
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def integer_file(four, task, tmp_path_factory):
    return onnx.export(four, task.example, tmp_path_factory.mktemp("onnx") / "four.onnx")


def test_the_integer_graph_answers_as_the_fake_quantised_module(four, integer_file, tiny):
    images, _ = next(tiny.test.batches(200))
    found, expected = sessions.open(integer_file)(images), four(images)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.995
    assert (found - expected).norm() / expected.norm() < 0.03


def test_scales_and_integers_reach_the_file_unchanged(four, integer_file):
    graph = onnx_library.load(integer_file).graph
    stored = {constant.name: onnx_library.numpy_helper.to_array(constant)
              for constant in graph.initializer}
    weights = {name: value.astype("int8") for name, value in stored.items()
               if value.dtype.name in ("int4", "int8") and value.ndim > 1}
    ours = list(quantization.integers(four).values())
    assert sorted(v.tobytes()
                  for v in weights.values()) == sorted(v.to(torch.int8).numpy().tobytes()
                                                       for v in ours)
    assert not any(value.dtype == "float32" and value.size > 64
                   for value in stored.values()), "no float weights are left"
    scales = {value.tobytes() for value in stored.values() if value.dtype == "float32"}
    assert all(quantizer.scale.detach().numpy().tobytes() in scales
               for _, quantizer in quantizers(four))


def test_an_integer_graph_shows_its_layers_by_name(four, integer_file, tiny):
    images, _ = next(tiny.test.batches(50))
    found, expected = sessions.open(integer_file).activations(images), sessions.open(
        four).activations(images)
    assert list(found) == list(expected) == list(named(four))
    for name, values in found.items():
        assert (values - expected[name]).norm() < 0.05 * expected[name].norm(), name


def test_float_weights_beside_quantised_ones_stay_float_on_the_runtime(tmp_path):
    """ONNX Runtime rounds them to 8 bits per tensor, unasked, wherever integers stand around the
    layer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                            nn.Conv2d(8, 8, 3)).eval()
    network[2].weight.data[0] *= 40.0  # then one scale for all channels is much too coarse
    network[4].weight.data[:, 0] /= 40.0
    images = torch.randn(50, 1, 12, 12)
    mixed = quantization.quantize(network, [(images, None)],
                                  weights=dict.fromkeys("04", quantization.INT8_WEIGHTS))
    path = onnx.export(mixed, images, tmp_path / "mixed.onnx")
    found = sessions.open(path)
    with torch.no_grad():
        expected = mixed(images)
    assert (found(images) - expected).norm() < 0.03 * expected.norm()
    # its profile can be read too
    assert set(sessions.times(path, images[:1], threads=1, runs=5)) == {"0", "2", "4", ""}
    import onnxruntime

    plain = onnxruntime.InferenceSession(path,
                                         providers=["CPUExecutionProvider"]).run(
                                             None, {"input": images.numpy()})[0]
    assert (torch.from_numpy(plain) - expected).norm() > 2 * (found(images) - expected).norm()


def operators(path, folder) -> list[str]:
    """What ONNX Runtime makes of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx_library.load(folder / "optimized.onnx").graph.node]


def test_the_runtime_computes_with_integers(integer_file, tmp_path):
    kinds = operators(integer_file, tmp_path)
    assert kinds.count("QLinearConv") == 19
    assert "Conv" not in kinds
    assert kinds.count("QLinearAdd") >= 7, "all but the two padded shortcuts"


@pytest.mark.parametrize("pooling", [nn.AdaptiveAvgPool2d(1), nn.Identity()])
def test_a_linear_layer_behind_a_reshape_computes_with_integers_too(tmp_path, pooling):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), pooling, nn.Flatten(),
                        nn.LazyLinear(5)).eval()
    images = torch.randn(20, 3, 8, 8)
    net(images)
    rough = quantization.quantize(net, [(images, None)])
    path = onnx.export(rough, images, tmp_path / "net.onnx")
    assert set(operators(path, tmp_path)) & {"Gemm", "QGemm", "Conv",
                                             "QLinearConv"} == {"QGemm", "QLinearConv"}
    with torch.no_grad():
        torch.testing.assert_close(sessions.open(path)(images), rough(images), atol=0.02, rtol=0.02)


def test_sensitivity_by_bits_needs_nothing_new(folded, tiny):
    method = quantization.quantizing(folded)
    frame = sensitivity.scan(folded, tiny.test, method, levels=[0.25, 0.5, 1.0],
                             layers=["conv1", "linear"])
    assert frame.note.tolist() == ["2 bits", "4 bits", "8 bits"] * 2
    assert frame.top1_change.abs().iloc[2] <= frame.top1_change.abs().iloc[0]


@pytest.mark.parametrize(("call", "words"), [
    (lambda m: quantization.quantize(m, []), "calibration saw no examples"),
    (lambda m: quantization.quantize(m, [(torch.ones(4, 1, 28, 28), None)]),
     "every number of input x is 1 in every example; give real"),
    (lambda m: quantization.quantize(m, [(torch.full((1, 1, 28, 28), float("nan")), None)]),
     "of input x hold NaN"),
    (lambda m: quantization.quantize(m, [(EXAMPLE, None)], calibrator="median"),
     "unknown calibrator 'median'"),
    (lambda m: quantization.prepare(m, EXAMPLE, by="best"), "unknown way to fit weights 'best'"),
    (lambda m: quantization.prepare(m, EXAMPLE, layers="layer9"), "no layer matches 'layer9'"),
    (lambda m: rounding.adaround(m, m, []), "AdaRound saw no examples"),
    (lambda m: rounding.descend(m, m, []), "coordinate descent saw no examples")])
def test_bad_input_gets_one_line(folded, call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(folded)
    assert words in str(error.value)


def test_what_cannot_be_traced_or_repaired_is_refused(network, folded, four, seen):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(UnsupportedModelError, match="Branching cannot be traced"):
        quantization.prepare(Branching(), torch.zeros(2, 4))
    with pytest.raises(UnsupportedModelError,
                       match="has no two layers with only a ReLU between them"):
        reparameterization.equalize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(),
                                                  nn.Conv2d(4, 2, 3)), EXAMPLE)
    named_relu = nn.Sequential(OrderedDict(a=nn.Conv2d(1, 4, 3), relu=nn.Hardswish(),
                                           b=nn.Conv2d(4, 2, 3)))
    with pytest.raises(UnsupportedModelError,
                       match="has no two layers with only a ReLU between them"):
        reparameterization.equalize(named_relu, EXAMPLE)
    with pytest.raises(UnsupportedModelError, match="give the float model that was quantised"):
        rounding.correct_bias(four, network, seen)


def test_mixed_precision_quantises_each_layer_to_its_own_width(folded, seen, tiny):
    method = quantization.quantizing(folded)
    curves = sensitivity.scan(folded, tiny.test.subset(40), method, levels=[0.25, 0.5, 1.0],
                              layers=["conv1", "layer1.0.conv1"])
    table = allocation.choices(curves, folded)
    assert list(table.bits) == [2, 4, 8, 2, 4, 8]
    assert list(table.size_bytes[:3]) == [144 * b / 8 for b in (2, 4, 8)]
    assert table.loss[0] > table.loss[1] > table.loss[2] > 0
    bits = allocation.allocate(table, table[table.bits == 4].size_bytes.sum())
    mixed = quantization.quantize(folded, seen,
                                  weights={name: Scheme(b, granularity="channel")
                                           for name, b in bits.items()})
    found = quantization.table(mixed, folded).set_index("layer").bits
    assert found.to_dict() == bits
    with pytest.raises(ValueError, match="no layer is called 'nowhere'"):
        quantization.quantize(folded, seen, weights={"nowhere": Scheme(4)})


def test_coded_weights_are_no_larger_than_their_entropy_allows(folded):
    shared = quantization.quantize(folded, [], weights=Scheme(4, levels="kmeans"), activations=None,
                                   example=EXAMPLE)
    sizes = quantization.coded(shared)
    floor = sizes.entropy_bits * sizes.params / 8
    assert (sizes.coded_bytes >= floor).all()
    assert (sizes.entropy_bits <= 4).all()
    assert (sizes.coded_bytes.sum() < sizes.size_bytes.sum())
    layer = named(shared)["layer3.0.conv1"]
    assert len(layer.weight.unique()) <= 16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("repair", "given"), [(rounding.adaround, {"steps": 100}),
                                               (rounding.descend, {})])
def test_rounding_fits_its_scales_to_the_outputs(repair, given, symmetric):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4, bias=False)).eval()
    net[0].weight.data[:, 0] = 1.0  # one large weight, on an input that is always nothing
    x = torch.randn(400, 8)
    x[:, 0] = 0
    rough = quantization.quantize(net, [(x, None)],
                                  weights=Scheme(3, symmetric=symmetric, granularity="channel"))
    fixed = repair(rough, net, [(x, None)], **given)
    with torch.no_grad():
        errors = [(m(x) - net(x)).pow(2).mean() for m in (fixed, rough)]
    assert errors[0] < 0.5 * errors[1]


def test_zero_points_hold_lopsided_weights_and_reach_the_int8_kernels(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(),
                           nn.Conv2d(16, 8, 3)).eval(), torch.randn(60, 3, 10, 10)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.abs_()  # all of them on one side of zero
    made = {}
    for symmetric in (True, False):
        rough = quantization.quantize(net, [(x, None)],
                                      weights=Scheme(3, symmetric=symmetric, granularity="channel"))
        made[symmetric] = rounding.descend(rough, net, [(x, None)])
    assert logit_error(made[False], net, x) < 0.8 * logit_error(made[True], net, x)
    path = onnx.export(made[False], x, tmp_path / "zero.onnx")
    stored = {constant.name: constant for constant in onnx_library.load(path).graph.initializer}
    kinds = [stored[f"{k}.weight"].data_type for k in (0, 2)]
    assert kinds == [onnx_library.TensorProto.INT8,
                     onnx_library.TensorProto.INT4], "the second is large enough to be packed"
    assert operators(path, tmp_path).count("QLinearConv") >= 1
    with torch.no_grad():
        assert (sessions.open(path)(x) - made[False](x)).norm() < 0.02 * made[False](x).norm()


@pytest.mark.parametrize("repair", [rounding.correct_bias, rounding.adaround, rounding.descend])
def test_rounding_over_time_errs_less(repair):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 16, 5, padding=2, dilation=1), nn.ReLU(),
                        nn.Conv1d(16, 8, 3, stride=2, padding=1)).eval()
    x, other = torch.randn(2, 64, 4, 40)
    rough = quantization.quantize(net, [(x, None)], weights=FOUR)
    assert logit_error(repair(rough, net, [(x, None)]), net, other) < 0.97 * logit_error(rough, net,
                                                                                         other)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_layer_that_pads_otherwise_is_rounded_cut_and_exported_too(mode, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, padding_mode=mode), nn.ReLU(),
                        nn.Conv2d(16, 4, 3, padding=(0, 1), padding_mode=mode)).eval()
    x = torch.randn(16, 3, 8, 8)
    small = channels.remove(net, {"0": [0, 5]}, example=x)
    assert channels.score(small, "l1", example=x).groupby("layer").size()["0"] == 14
    rough = quantization.quantize(net, [(x, None)], weights=FOUR)
    fixed = rounding.correct_bias(rough, net, [(x, None)])
    assert logit_error(fixed, net, x) <= logit_error(rough, net, x)
    path = onnx.export(fixed, x[:1], tmp_path / "padded.onnx")
    assert (sessions.open(path)(x) - fixed(x)).norm() < 0.02 * fixed(x).norm()


def test_a_layer_that_has_no_patches_is_named():
    net = nn.Sequential(nn.ConvTranspose2d(3, 8, 2)).eval()
    x = torch.randn(4, 3, 8, 8)
    rough = quantization.quantize(net, [(x, None)])
    with pytest.raises(UnsupportedModelError, match="layer 0: ConvTranspose2d has no patches here; "
                       ".* zero padding, and Linear; quantise without it"):
        rounding.correct_bias(rough, net, [(x, None)])


def test_with_few_images_rounding_fits_what_images_held_out_bear_out(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32)).eval()
    # 60 images, 256 inputs: the second layer fits anything
    few, others = torch.randn(60, 64), torch.randn(1000, 64)
    rough = quantization.quantize(net, [(few, None)], weights=Scheme(3, granularity="channel"))
    errors = {}
    for shares in (moments.SHARES, *((share,) for share in moments.SHARES)):
        monkeypatch.setattr(moments, "SHARES", shares)
        errors[shares] = logit_error(rounding.adaround(rough, net, [(few, None)], steps=200), net,
                                     others)
    chosen, *fixed = errors.values()
    assert chosen < 0.95 * fixed[0], "than with next to no ridge"
    assert chosen < 1.05 * min(fixed), "than with the best ridge for all layers"


@pytest.mark.parametrize("repair", [rounding.adaround, rounding.adaquant, rounding.descend])
def test_rounding_is_the_same_however_large_the_inputs_are(repair):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(200, 16) @ torch.randn(16, 16)
    # powers of two round nothing
    small, whole = (repair(quantization.quantize(net, [(x * size, None)], weights=FOUR,
                                                 activations=None), net, [(x * size, None)])
                    for size in (2**-12, 1))
    assert torch.equal(*(quantization.integers(made)["0"] for made in (small, whole)))


def test_fewer_images_than_folds_still_give_a_rounding():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    rough = quantization.quantize(net, [(x, None)], weights=FOUR)
    assert logit_error(rounding.adaround(rough, net, [(x[:1], None), (x[1:], None)], steps=20), net,
                       x) < 0.2


def test_a_peer_that_is_not_installed_is_named(folded, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ValueError, match="NNCF is not installed; pip install"):
        peers.quantize_nncf(tmp_path / "x.onnx", [], tmp_path / "y.onnx")


def test_images_that_two_models_answer_differently_are_explained_or_named(folded, tiny):
    images = tiny.test.batch(slice(60)).inputs
    with torch.no_grad():
        logits = folded(images)
    closest = int((logits.topk(2).values @ torch.tensor([1.0, -1.0])).argmin())
    margin = (logits[closest].topk(2).values @ torch.tensor([1.0, -1.0])).item()

    # the runner-up of the closest image wins by a hair; image 0 is answered at random
    def nudged(x):
        out = logits.clone()
        out[closest, logits[closest].topk(2).indices[1]] += 1.01 * margin
        out[0] = out[0].flip(0)
        return out[:len(x)]

    assert equivalence.disagreements(folded, folded, [images], limit=1e-3).empty
    rows = equivalence.disagreements(folded, nudged, [images],
                                     limit=1.1 * margin).set_index("image")
    assert sorted(rows.index) == sorted({0, closest})
    assert rows.explained[closest]
    assert not rows.explained[0]
    assert torch.allclose(equivalence.shifts(folded, nudged, [images]).sort().values[:-2],
                          torch.zeros(58), atol=1e-4)
    with pytest.raises(ValueError, match="puts out 10 numbers an example, function 7"):
        equivalence.disagreements(folded, sessions.open(lambda x: logits[:, :7], name="function"),
                                  [images], limit=1.0)
    with pytest.raises(ValueError, match="limit is 0"):
        equivalence.disagreements(folded, folded, [images], limit=0)


def test_a_dead_channel_keeps_its_bias_in_the_integer_graph(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
                        nn.Linear(8 * 64, 5)).eval()
    net[0].weight.data[2] *= 1e-9
    net[0].bias.data[2] = 0.5
    x = torch.randn(20, 3, 8, 8)
    rough = quantization.quantize(net, [(x, None)])
    path = onnx.export(rough, x, tmp_path / "dead.onnx")
    with torch.no_grad():
        assert (sessions.open(path)(x) - rough(x)).norm() < 0.02 * rough(x).norm()


def test_four_bits_by_groups_are_stored_as_four_bits_and_answer_the_same(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10, bias=False)).eval()
    x = torch.randn(50, 64)
    four = quantization.quantize(net, [], weights=Scheme(4, granularity="group", group=32),
                                 activations=None, example=x)
    path = onnx.export(four, x, tmp_path / "four.onnx")
    nodes = [node.op_type for node in onnx_library.load(path).graph.node]
    assert nodes.count("MatMulNBits") == 2
    with torch.no_grad():
        assert (sessions.open(path)(x) - four(x)).norm() < 0.02 * four(x).norm()
    assert path.stat().st_size < onnx.export(net, x, tmp_path / "whole.onnx").stat().st_size / 3


def test_groups_without_a_kernel_are_refused(tmp_path):
    net = nn.Sequential(nn.Conv2d(32, 4, 1)).eval()
    images = torch.randn(4, 32, 4, 4)
    grouped = quantization.quantize(net, [], weights=Scheme(4, granularity="group", group=32),
                                    activations=None, example=images)
    with pytest.raises(UnsupportedModelError,
                       match="no kernel for uniform levels by groups of 32 inputs"):
        onnx.export(grouped, images, tmp_path / "x.onnx")


@pytest.mark.parametrize("given", [torch.randn(4, 1, 28, 28), {"x": torch.zeros(1)},
                                   [torch.randn(4, 1, 28, 28)], [(1, 2, 3)]])
def test_inputs_in_the_place_of_batches_are_refused_in_one_line(folded, tiny, given):
    with pytest.raises(TypeError, match="found a whole Split; give several"):
        quantization.quantize(folded, tiny.validation)
    with pytest.raises(TypeError, match="give several of inputs and targets, such as "
                       "task.validation") as caught:
        quantization.quantize(folded, given)
    assert "\n" not in str(caught.value)


def test_a_transposed_convolution_is_quantised_and_exported(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.randn(16, 3, 8, 8)
    eight = quantization.quantize(model, [(x, None)])
    assert logit_error(eight, model, x) < 0.05
    path = onnx.export(eight, x[:1], tmp_path / "up.onnx")
    assert (sessions.open(path)(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_views_of_few_pictures_calibrate_beside_them(model, tiny):
    few = tiny.validation.subset(7)
    pictures, labels = few.stored(slice(None))
    more = with_views(few, 2, seed=1)
    seen = torch.tensor([*(0, 1, 2, 3, 4) * 3, *(5, 6) * 3])  # five pictures, their views, the rest
    assert torch.equal(more.targets, labels[seen])
    whole = [*range(5), 15, 16]
    assert torch.equal(more.inputs[whole], pictures)
    views = sorted(set(range(21)) - set(whole))
    for place in views:
        view, picture = more.inputs[place], pictures[seen[place]]
        assert view.dtype == torch.uint8
        assert view.float().mean() > 0.5 * picture.float().mean()
    # a part of it, or it mirrored; a part may be the whole
    assert sum(torch.equal(more.inputs[place], pictures[seen[place]]) for place in views) < 3
    assert torch.equal(with_views(few, 2, seed=1).inputs, more.inputs)
    assert not torch.equal(with_views(few, 2, seed=2).inputs, more.inputs)
    made = Quantize(8, examples=7, views=2).apply(Subject(model, tiny)).made["calibration"]
    assert sum(len(batch.targets) for batch in made) == 21
    # the whole picture, where no part is asked for: itself, or mirrored
    for view, picture in zip(with_views(few, 1, least=1.0).inputs[5:10], pictures, strict=False):
        assert torch.equal(view, picture) or torch.equal(view, picture.flip(2))


def test_views_are_of_pictures_only():

    floats = data.of((torch.randn(8, 3), torch.arange(8) % 2), name="mine")
    with pytest.raises(ValueError, match="views are of pictures.*leave views at 0"):
        with_views(floats.test, 1)
