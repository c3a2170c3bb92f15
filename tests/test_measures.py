"""Accuracy, cost and equivalence against formulas, naive loops and a peer library."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from workbench.deployment import onnx, sessions
from workbench.errors import UnsupportedModelError
from workbench.graph import layers
from workbench.measures import accuracy, cost, equivalence
from workbench.methods import reparameterization
from workbench.subjects import data, models


@given(st.integers(0, 300), st.integers(1, 300))
def test_the_interval_is_wilsons(hits, n):
    hits = min(hits, n)
    labels = torch.zeros(n, dtype=torch.int64)
    found = accuracy.from_predictions((torch.arange(n) >= hits).long(), labels)
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert found.low == pytest.approx(expected.low, abs=1e-6)
    assert found.high == pytest.approx(expected.high, abs=1e-6)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_the_paired_difference_counts_images_and_holds_its_own_value(pairs):
    labels = torch.zeros(len(pairs), dtype=torch.int64)
    one, other = (accuracy.from_predictions(torch.tensor([int(not p[k]) for p in pairs]), labels)
                  for k in (0, 1))
    found = accuracy.difference(one, other)
    assert found.difference == pytest.approx(other.top1 - one.top1)
    assert found.gained == sum(b and not a for a, b in pairs)
    assert found.low <= found.difference <= found.high
    b, c = found.lost, found.gained
    exact = min(1, 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))
    assert found.p_value == pytest.approx(exact)


def test_the_paired_interval_covers_the_truth_about_95_times_in_100():
    draw, covered = torch.Generator().manual_seed(0), 0
    for _ in range(1000):
        kinds = torch.multinomial(torch.tensor([0.85, 0.06, 0.03, 0.06]), 400, replacement=True,
                                  generator=draw)
        one, other = ((kinds == 0) | (kinds == k) for k in (1, 2))
        made = [accuracy.from_predictions((~right).long(), torch.zeros(400).long())
                for right in (one, other)]
        found = accuracy.difference(*made)
        covered += found.low <= -0.03 <= found.high
    assert 930 <= covered <= 970


def test_a_difference_needs_the_same_images(tiny, model):
    one = accuracy.evaluate(model, tiny.test)
    with pytest.raises(ValueError, match="the same images"):
        accuracy.difference(one, accuracy.evaluate(model, tiny.validation))


def test_evaluate_counts_what_a_plain_loop_counts(tiny, model):
    with torch.inference_mode():
        hits = [model(x).argmax(1).item() == y.item() for x, y in tiny.test.batches(1)]
    found = accuracy.evaluate(model, tiny.test, batch_size=64)
    assert found.correct.tolist() == hits
    assert found.n == 200


def test_accuracy_on_a_models_own_answers_is_agreement_with_it(tiny, model, network):
    labelled = accuracy.labelled_by(network, tiny.test)
    assert accuracy.evaluate(network, labelled).value == 1.0
    agreement = equivalence.compare(network, model, tiny.test).agreement
    assert accuracy.evaluate(model, labelled).value == pytest.approx(agreement)
    tokens = data.of((torch.zeros(8, 4).long(), torch.zeros(8, 4).long()), asks="next_token")
    with pytest.raises(ValueError, match="asks for more than one class an example"):
        accuracy.labelled_by(torch.nn.Embedding(3, 3), tokens.test)


def test_cost_equals_the_formula_of_each_layer(task, model):
    table = cost.table(model, task.example).set_index("layer")
    assert table.macs["conv1"] == 28 * 28 * 16 * 1 * 9
    assert table.macs["layer2.0.conv1"] == 14 * 14 * 32 * 16 * 9
    assert table.macs["linear"] == 64 * 10
    assert table.params.sum() == sum(p.numel() for p in model.parameters())
    assert table.size_bytes.sum() == 4 * table.params.sum()


def test_cost_counts_attention_and_grouped_convolutions():
    vit = models.load("timm:vit_tiny_patch16_224", pretrained=False)
    # timm's own table
    assert cost.total(vit, torch.zeros(1, 3, 224, 224))["macs"] == pytest.approx(1.26e9, rel=0.02)
    mobile = models.load("torchvision:mobilenet_v2", pretrained=False)
    # torchvision's
    assert cost.total(mobile, torch.zeros(1, 3, 224,
                                          224))["macs"] == pytest.approx(0.300e9, rel=0.02)


def test_the_products_of_torchs_own_attention_are_counted():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    # three projections and one behind, queries times keys, weights times values
    assert cost.total(Net(), torch.randn(1, 5, 8))["macs"] == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled(), "put back as it was"


def test_what_runs_in_lists_of_modules_counts_for_the_layers_and_nothing_is_negative():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"one": nn.Linear(8, 8), "other": nn.Linear(8, 4)}) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block["one"](x) + block["other"](x).repeat(1, 2)
            return x @ torch.ones(8, 2)

    table = cost.table(Listed(), torch.zeros(1, 8)).set_index("layer")
    assert table.macs.to_dict() == {"Listed": 16} | {
        f"blocks.{k}.{name}": macs for k in range(3) for name, macs in (("one", 64), ("other", 32))}
    lite = models.load("efficientnet_lite0", None, pretrained=False)
    assert (cost.table(lite, torch.zeros(1, 3, 64, 64)).macs >= 0).all()


def test_cost_leaves_the_model_as_it_was(network):
    network.train()
    cost.table(network, torch.zeros(1, 1, 28, 28))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_a_model_is_equivalent_to_itself_and_not_to_another(network):
    images = torch.randn(50, 1, 28, 28)
    assert equivalence.compare(network, network, images).row() == {
        "cosine_mean": pytest.approx(1), "cosine_min": pytest.approx(1), "l2_mean": 0, "l2_max": 0,
        "agreement": 1, "n": 50,
        "equivalent": True}
    other = layers.replaced(network, "5", torch.nn.Linear(network[5].in_features, 10))
    assert not equivalence.compare(network, other, images).passed


def test_equivalence_equals_the_formula_and_does_not_depend_on_batches():
    a, b = torch.randn(23, 7), torch.randn(23, 7)
    numbers = torch.arange(23.0).view(23, 1)
    found = [equivalence.compare(lambda x: a[x[:, 0].long()], lambda x: b[x[:, 0].long()], numbers,
                                 batch_size=s)
             for s in (1, 5, 23)]
    for one in found:
        assert one.cosine_mean == pytest.approx(torch.cosine_similarity(a, b).mean().item(),
                                                abs=1e-6)
        assert one.cosine_min == pytest.approx(torch.cosine_similarity(a, b).min().item(), abs=1e-6)
        assert one.l2_max == pytest.approx(((a - b).norm(dim=1) / a.norm(dim=1)).max().item(),
                                           abs=1e-5)
        assert one.agreement == pytest.approx((a.argmax(1) == b.argmax(1)).double().mean().item())


def test_networks_that_answer_one_number_are_compared():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x):
            return self.layer(x)[:, 0]

    model, x = One().eval(), torch.randn(9, 3)
    assert equivalence.compare(model, model, x).passed
    other = copy.deepcopy(model)
    other.layer.bias.data += 1
    assert not equivalence.compare(model, other, x).passed


def test_equivalence_keeps_nothing_of_a_stream(network):
    def stream():
        for seed in range(20):
            yield torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(seed))

    assert equivalence.compare(network, network, stream()).n == 640


def test_a_verdict_says_which_limit_is_not_kept():
    limits = equivalence.Limits()
    good = equivalence.Equivalence(1.0, 1.0, 0.0, 0.0, 1.0, 20, limits)
    assert str(good).endswith("the same answer for 100.00% of 20")
    bad = equivalence.Equivalence(1.0, 0.9985, 0.01, 0.05, 1.0, 20, limits)
    assert str(bad).startswith("not equivalent: least cosine 0.9985, largest relative L2 0.05, ")
    assert str(bad).endswith("; asked: relative L2 of the outputs <= 0.0001; by_layer shows where "
                             "they part")


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["conv1", "layer1.2.conv1", "layer2.0.conv2", "layer3.2.conv2", "linear"]),
       st.integers(0, 99))
def test_the_damaged_layer_is_the_first_that_parts(layer, seed):
    task = data.load("fashion_mnist")
    model = models.load("resnet20", task)
    hurt = copy.deepcopy(layers.named(model, layer)[layer])
    hurt.weight.data += hurt.weight.std() * torch.randn(hurt.weight.shape,
                                                        generator=torch.Generator().manual_seed(
                                                            seed))
    frame = equivalence.by_layer(model, layers.replaced(model, layer, hurt), task.test.subset(40))
    assert frame.layer[frame["first"]].tolist() == [layer]
    assert (frame.sqnr_db[: frame["first"].idxmax()] == math.inf).all()


def test_folding_batch_norm_changes_no_layer(task, model):
    folded = reparameterization.fold_batchnorm(model, task.example)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert equivalence.compare(model, folded, task.test.subset(300)).passed
    frame = equivalence.by_layer(model, folded, task.test.subset(50))
    assert len(frame) == 20
    assert frame.sqnr_db.min() > 80


def test_layers_that_work_in_place_do_not_overwrite_what_is_compared(tmp_path):
    model = models.load("torchvision:resnet18", pretrained=False)
    images = torch.randn(4, 3, 64, 64)
    frame = equivalence.by_layer(model, onnx.export(model, images[:1], tmp_path / "m.onnx"), images)
    assert not frame.parted.any()
    assert len(frame) == 21


def test_the_export_is_compared_layer_by_layer(task, model, tmp_path):
    path = onnx.export(model, task.example, tmp_path / "m.onnx")
    frame = equivalence.by_layer(model, path, task.test.subset(50))
    assert frame.layer.tolist() == list(layers.named(model))
    assert not frame.parted.any()


def test_outputs_of_different_sizes_and_nan_are_refused(network):
    images = torch.randn(4, 1, 28, 28)
    wide = layers.replaced(network, "5", torch.nn.Linear(network[5].in_features, 11))
    with pytest.raises(ValueError, match="puts out 10 numbers an example, Sequential 11"):
        equivalence.compare(network, wide, images)
    images[2] = float("nan")
    with pytest.raises(ValueError, match="inputs hold NaN or infinity .first in row 2"):
        equivalence.compare(network, network, images)
    with pytest.raises(ValueError, match="there are no examples"):
        equivalence.compare(network, network, images[:0])
    with pytest.raises(UnsupportedModelError, match="shows no layers"):
        equivalence.by_layer(network, lambda x: x, torch.randn(2, 1, 28, 28))


def test_nan_weights_show_in_the_evaluation(tiny, model):
    broken = copy.deepcopy(model)
    broken.linear.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="outputs of ResNet hold NaN"):
        accuracy.evaluate(broken, tiny.test)


def test_sessions_of_every_kind_agree(task, model, tmp_path):
    import onnxruntime

    path = onnx.export(model, task.example, tmp_path / "m.onnx")
    kinds = [model, path, str(path), onnxruntime.InferenceSession(path), lambda x: model(x),
             sessions.open(model)]
    images = task.test.batch(slice(5)).inputs
    outputs = [sessions.open(kind)(images) for kind in kinds]
    assert all(torch.allclose(output, outputs[0], atol=1e-4) for output in outputs)
    assert all(output.shape == (5, 10) for output in outputs)


def test_the_mean_over_seeds_has_students_interval_and_a_single_seed_none():
    import pandas as pd

    frame = pd.DataFrame({"kind": ["a"] * 3 + ["b"], "top1": [0.9, 0.92, 0.94, 0.8],
                          "top1_change": [0, 0.1, 0.2, 0.3]})
    means = accuracy.over_seeds(frame, ["kind"]).set_index("kind")
    assert means.top1["a"] == pytest.approx(0.92)
    assert means.top1_high["a"] - means.top1["a"] == pytest.approx(4.30265 * 0.02 / math.sqrt(3),
                                                                   rel=1e-4)
    assert math.isnan(means.top1_low["b"])
    assert means.runs.tolist() == [3, 1]


@pytest.mark.parametrize("limit", [{"cosine": 2.0}, {"l2": -1e-4}, {"agreement": 1.5},
                                   {"cosine": float("nan")}])
def test_a_limit_that_no_models_could_meet_or_miss_is_refused(limit):
    name = next(iter(limit))
    with pytest.raises(ValueError, match=f"limit {name} is .*, expected .* to "):
        equivalence.Limits(**limit)
