"""Channels: cut and silenced models compute the same, on networks of every kind; bad requests are
refused."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn

from workbench.errors import UnsupportedModelError
from workbench.graph import coupling
from workbench.graph.group import Kept
from workbench.graph.layers import Masked, macs_of
from workbench.measures import accuracy
from workbench.methods import channels
from workbench.subjects import data, models


class Concatenating(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 3,
                                                   padding=1), nn.Conv2d(3, 6, 1), nn.Conv2d(
                                                       14, 12, 3)
        self.last = nn.Linear(12, 10)

    def forward(self, x):
        x = self.three(torch.cat([self.one(x).relu(), self.two(x).relu()], 1)).relu()
        return self.last(x.mean((2, 3)))


class Splitting(nn.Module):
    """Halves that change places, channels that are shuffled, and a split whose sizes the forward
    fixes."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 16,
                                                   3), nn.Conv2d(16, 12, 1), nn.Conv2d(12, 12, 1)
        self.four, self.last = nn.Conv2d(12, 20, 1), nn.Linear(20, 10)

    def forward(self, x):
        a, b = self.one(x).relu().chunk(2, 1)
        x = self.two(torch.cat([b, a], 1)).relu()
        x = x.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        first, second = self.three(x).relu().split([4, 8], 1)
        return self.last(self.four(torch.cat([second, first], 1)).relu().mean((2, 3)))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.Conv2d(16, 24, 3, groups=4), nn.ReLU(),
                         nn.Conv2d(24, 8, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(32, 10))


def zoo(name: str):
    sizes = {"resnet20": 32, "resnet56": 32}
    if name == "concatenating":
        return Concatenating(), torch.randn(2, 3, 16, 16)
    if name == "splitting":
        return Splitting(), torch.randn(2, 3, 16, 16)
    if name == "grouped":
        return grouped(), torch.randn(2, 3, 16, 16)
    if name == "vit":
        import timm

        return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10,
                                 depth=2), torch.randn(2, 3, 64, 64)
    side = sizes.get(name, 64)
    return models.load(name, pretrained=False), torch.randn(2, 3, side, side)


def disturbed(model: nn.Module) -> nn.Module:
    """The model in eval mode with norms that do something, and outputs of a size that a difference
    would show in."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "torchvision:resnet18",
                                  "torchvision:mobilenet_v2", "concatenating",
                                  "torchvision:shufflenet_v2_x0_5", "splitting", "grouped", "vit"])
def test_masked_and_removed_models_agree_and_the_removed_one_is_smaller(name):
    torch.manual_seed(0)
    model, example = zoo(name)
    disturbed(model)
    scores = channels.score(model, "l1", example=example)
    removed = channels.select(scores, 0.5, scope="layer")
    small, masked = (make(model, removed, example=example)
                     for make in (channels.remove, channels.mask))
    inputs = torch.randn(3, *example.shape[1:])
    with torch.inference_mode():
        assert torch.allclose(small(inputs), masked(inputs),
                              atol=1e-4 * masked(inputs).abs().max().item())
        assert not torch.allclose(masked(inputs), model(inputs),
                                  atol=1e-3 * model(inputs).abs().max().item())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert sizes[0] < 0.8 * sizes[1]


def test_norms_without_weights_are_cut_and_come_back(tmp_path):
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, affine=False), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()

    x, task = torch.randn(8, 3, 8, 8), data.of((torch.randn(30, 3, 8, 8), torch.arange(30) % 3))
    scores = channels.score(made(), "l1", example=x)
    small = channels.cut_to(models.wrap(made(), task), scores, macs=0.6, example=x,
                            batches=[(x, None)])
    assert small[1].num_features == small[0].out_channels < 16
    models.save(small, tmp_path / "small.safetensors")
    again = models.load(tmp_path / "small.safetensors", task, into=made())
    torch.testing.assert_close(again(x), small(x))
    with pytest.raises(UnsupportedModelError, match="no batch norm with a scale for bn_gamma"):
        channels.score(made(), "bn_gamma", example=x)


def test_what_the_loss_does_not_read_scores_nothing():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aside = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 5)

        def forward(self, x):
            states = self.body(x).relu()
            return self.head(states), self.aside(states)

    model, x = Aside(), torch.randn(6, 4)
    model.body.requires_grad_(False)
    scores = channels.score(model, "taylor", example=x, batches=[(x, torch.arange(6) % 3)])
    assert scores[scores.layer == "body"].score.sum() > 0
    assert (scores[scores.layer == "aside"].score == 0).all()


def test_a_transposed_convolution_is_scored_by_its_outputs():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.randn(6, 3, 8, 8)
    scores = channels.score(model, "taylor", example=x, batches=[(x, torch.arange(6) % 3)])
    assert scores.groupby("layer", sort=False).size().tolist() == [16, 8, 3]
    masked = Masked(model[2], torch.tensor([1]))
    assert (masked(torch.randn(1, 16, 4, 4))[:, 1] == 0).all()


def test_channels_that_are_split_go_by_parts_or_stay_and_say_why():
    model, example = zoo("splitting")
    found = {group.layer: group for group in coupling.groups(disturbed(model), example)}
    assert {name: (group.channels, group.kept) for name, group in found.items()} == {
        "one": (8, None), "two": (6, None), "three": (12, Kept.FIXED), "four": (20, None),
        "last": (10, Kept.OUTPUT)}
    read = found["one"].read_by["two"][0].tolist()
    assert read == [8, 0], "one of each half, at the place of the other"


def test_the_callers_model_is_left_as_it_was():
    model, example = zoo("resnet20")
    before = copy.deepcopy(model.state_dict())
    channels.remove(model, {"layer1.0.conv1": [0, 5]}, example=example)
    channels.mask(model, {"layer1.0.conv1": [0, 5]}, example=example)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(),
                                                 strict=True))


def test_the_callers_mode_is_left_as_it_was():
    model, example = zoo("resnet20")
    model.train()
    channels.score(model, "l1", example=example)
    channels.remove(model, {"layer1.0.conv1": [0]}, example=example)
    assert all(module.training for module in model.modules())


def test_a_model_that_puts_out_nan_is_not_taken_for_verified():
    model, example = zoo("resnet20")
    model.linear.bias.data[0] = float("nan")
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        channels.remove(model, {"layer1.0.conv1": [0]}, example=example)


def test_removing_no_channels_changes_nothing():
    model, example = zoo("resnet20")
    assert torch.equal(channels.remove(model, {}, example=example)(example), model(example))
    assert channels.select(channels.score(model, "l1", example=example), 0.0) == {}


def test_a_silent_channel_can_go_without_a_trace():
    model, example = zoo("resnet20")
    model.layer2[1].bn1.weight.data[3] = model.layer2[1].bn1.bias.data[3] = 0
    small = channels.remove(model, {"layer2.1.conv1": [3]}, example=example)
    assert small.layer2[1].conv1.out_channels == 31
    assert torch.allclose(small(example), model(example), atol=1e-5)


def test_scores_are_the_formula_of_each_criterion():
    model, example = zoo("resnet20")
    weight = model.layer3[1].conv1.weight.detach()
    model.layer3[1].bn1.weight.data.uniform_(-1, 1)
    expected = {"l1": [w.abs().sum() for w in weight],
                "l2": [w.pow(2).sum().sqrt() for w in weight],
                    "fpgm": [sum((w - v).norm() for v in weight) for w in weight],
                    "bn_gamma": model.layer3[1].bn1.weight.detach().abs()}
    for criterion, values in expected.items():
        table = channels.score(model, criterion, example=example).query("layer == 'layer3.1.conv1'")
        assert table.score.tolist() == pytest.approx([float(v) for v in values], rel=1e-3)


def test_taylor_scores_are_weight_times_gradient(tiny, model):
    batches = list(tiny.test.batches(100))
    table = channels.score(model, "taylor", example=tiny.example,
                           batches=batches).query("layer == 'layer1.1.conv1'")
    work = copy.deepcopy(model)
    nn.functional.cross_entropy(work(torch.cat([x for x, _ in batches])),
                                torch.cat([y for _, y in batches])).backward()
    weight = work.layer1[1].conv1.weight
    expected = (weight * weight.grad).abs().sum((1, 2, 3))
    assert table.score.tolist() == pytest.approx(expected.tolist(), rel=1e-2)


def test_random_scores_follow_from_their_seed():
    model, example = zoo("resnet20")
    one, same, other = (channels.score(model, "random", example=example, seed=s).score
                        for s in (0, 0, 1))
    assert one.equals(same)
    assert not one.equals(other)


def test_selection_takes_the_lowest_keeps_multiples_and_what_is_kept():
    values = [*range(16), *range(32, 48)]
    scores = pd.DataFrame({"layer": ["a"] * 16 + ["b"] * 16, "channel": [*range(16)] * 2,
                           "score": values, "kept": False})
    assert channels.select(scores, 0.5, scope="layer") == {"a": list(range(8)), "b": list(range(8))}
    for ratio in (0.1, 0.4, 0.7, 0.99):
        for places in channels.select(scores, ratio, multiple=8).values():
            assert (16 - len(places)) % 8 == 0
    assert list(channels.select(scores, 0.9, keep="b")) == ["a"]
    assert all(len(places) < 16 for places in channels.select(scores, 0.99).values())


@pytest.mark.parametrize(("change", "message"), [
    ({"ratio": 1.0}, "ratio is 1.0, expected 0 <= ratio < 1"), ({"ratio": 1.2}, "ratio is 1.2"),
    ({"ratio": -0.1}, "ratio is -0"),
    ({"scope": "all"}, "unknown scope 'all'"), ({"keep": "layer9.*"},
                                                r"keep: no layer matches 'layer9.\*'"),
])
def test_bad_selections_are_refused(change, message):
    model, example = zoo("resnet20")
    scores = channels.score(model, "l1", example=example)
    with pytest.raises(ValueError, match=message):
        channels.select(scores, **{"ratio": 0.5, **change})


def test_nan_scores_are_refused():
    model, example = zoo("resnet20")
    scores = channels.score(model, "l1", example=example)
    scores.loc[4, "score"] = float("nan")
    with pytest.raises(ValueError, match="the score of channel 4 of layer conv1 is NaN"):
        channels.select(scores, 0.5)
    model.layer1[0].conv1.weight.data[2] = float("nan")
    with pytest.raises(ValueError, match=r"layer layer1.0.conv1: criterion l1 gives NaN"):
        channels.score(model, "l1", example=example)


def test_what_cannot_be_scored_or_cut_is_named():
    model, example = zoo("resnet20")
    with pytest.raises(ValueError, match="unknown criterion 'entropy'"):
        channels.score(model, "entropy", example=example)
    with pytest.raises(ValueError, match="needs batches"):
        channels.score(model, "taylor", example=example)
    with pytest.raises(UnsupportedModelError, match="channels of layer conv1 cannot be removed: "
                       "they run through a shortcut"):
        channels.remove(model, {"conv1": [0]}, example=example)
    with pytest.raises(ValueError, match="no group of channels is called 'layer9'"):
        channels.remove(model, {"layer9": [0]}, example=example)
    with pytest.raises(ValueError, match="has channels 0 to 15, of which one must stay"):
        channels.remove(model, {"layer1.0.conv1": [16]}, example=example)
    with pytest.raises(UnsupportedModelError, match="layer one has no batch norm"):
        channels.score(Concatenating(), "bn_gamma", example=torch.zeros(1, 3, 16, 16))


def test_a_model_that_cannot_be_traced_is_refused():
    class Odd(nn.Module):
        def forward(self, x):
            raise RuntimeError("not today")

    with pytest.raises(UnsupportedModelError,
                       match=r"Odd does not run on the example \(not today\)"):
        channels.groups(Odd(), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"params": 0.3}])
def test_a_cut_meets_its_target_and_not_by_much(target):
    from workbench.graph.layers import macs_of

    model, example = zoo("resnet20")
    with pytest.warns(UserWarning, match="still hold the statistics of the whole one; before it is "
                      "judged give batches="):
        small = channels.cut_to(model, channels.score(model, "l1", example=example),
                                example=example, scope="layer", **target)
    left = {"macs": macs_of(small, example) / macs_of(model, example),
            "params": sum(p.numel() for p in small.parameters()) / sum(p.numel()
                                                                       for p in model.parameters())}
    (kind, wanted), = target.items()
    assert wanted - 0.05 < left[kind] <= wanted


def test_any_cost_can_be_the_target():
    model, example = zoo("resnet20")
    scores = channels.score(model, "l1", example=example)

    def first_stage(candidate):
        return sum(p.numel() for p in candidate.layer1.parameters())

    seen = [(torch.randn(8, *example.shape[1:]), None)]
    small = channels.cut_to(model, scores, example=example, share=0.6, cost=first_stage,
                            scope="layer", batches=seen)
    assert 0.5 < first_stage(small) / first_stage(model) <= 0.6


def test_cutting_by_turns_reaches_the_target_and_recovers_after_each():
    model, example = zoo("resnet20")
    costs = []

    def recover(candidate, step):
        costs.append((step, macs_of(candidate, example) / macs_of(model, example)))
        return candidate

    small = channels.iteratively(model, macs=0.25, steps=2,
                                 score=lambda m: channels.score(m, "l1", example=example),
                                 recover=recover, example=example, scope="layer")
    assert [step for step, _ in costs] == [1, 2]
    assert 0.45 < costs[0][1] <= 0.5
    assert 0.2 < macs_of(small, example) / macs_of(model, example) <= 0.25
    with pytest.raises(ValueError, match="steps is 0"):
        channels.iteratively(model, macs=0.25, steps=0, score=None, recover=None, example=example)


def test_a_cut_network_takes_the_statistics_of_its_own_activations(model, tiny):
    cut = {"example": tiny.example, "macs": 0.7, "scope": "layer"}
    scores = channels.score(model, "l1", example=tiny.example)
    small = channels.cut_to(model, scores, batches=tiny.validation.batches(50), **cut)
    with pytest.warns(UserWarning, match="batch norms"):
        stale = channels.cut_to(model, scores, **cut)
    assert accuracy.evaluate(small,
                             tiny.test).value > accuracy.evaluate(stale, tiny.test).value + 0.1


def test_impossible_targets_are_refused():
    model, example = zoo("resnet20")
    scores = channels.score(model, "l1", example=example)
    with pytest.raises(ValueError, match="2% of the cost cannot be reached: .* stay when all that "
                       "may go is gone"):
        channels.cut_to(model, scores, example=example, macs=0.02)
    with pytest.raises(ValueError, match="exactly one of macs, params, and share with cost"):
        channels.cut_to(model, scores, example=example)
    with pytest.raises(ValueError, match="expected more than 0"):
        channels.cut_to(model, scores, example=example, params=0)


def test_a_cut_keeps_the_widths_that_the_runtime_likes_as_far_as_they_come_near_the_target():
    model, example = models.load("torchvision:mobilenet_v2",
                                 pretrained=False), torch.randn(2, 3, 64, 64)
    scores = channels.score(model, "l1", example=example)
    small = channels.cut_to(model, scores, macs=0.8, example=example, batches=[(example, None)])
    assert 0.8 * channels.NEAR <= macs_of(small, example) / macs_of(model, example) <= 0.8
    widths = scores[~scores.kept].groupby("layer").group_size.first()
    left = dict(small.named_modules())
    narrowest = {layer: channels.blocks(width, parts=4) for layer, width in widths.items()}
    assert all(left[layer].out_channels % multiple == 0 for layer, multiple in narrowest.items())
    assert [channels.blocks(width) for width in (1, 2, 16, 24, 320)] == [1, 1, 8, 8, 16]


class Derived(nn.Module):
    """Attention whose forward takes the width of a head from the model's, as older code of timm
    does, and a token that is handed to a module."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.token = 4, nn.Parameter(torch.randn(1, 1, 32))
        self.qkv, self.proj, self.fc, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(
            32, 64), nn.Linear(64, 5)
        self.same = nn.Identity()

    def forward(self, x):
        x = torch.cat([self.same(self.token).expand(x.shape[0], -1, -1), x], 1)
        shape = x.shape[0], x.shape[1], 3, self.num_heads, x.shape[2] // self.num_heads
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k,
                                                                     v).transpose(1, 2).flatten(2))
        return self.head(torch.relu(self.fc(x)).mean(1))


def test_heads_that_the_forward_derives_stay_and_the_rest_is_cut():
    torch.manual_seed(0)
    model, x = Derived().eval(), torch.randn(2, 7, 32)
    groups = {group.layer: group.kept for group in coupling.groups(model, x)}
    assert groups["qkv"] == Kept.FIXED
    assert groups["fc"] is None
    small = channels.cut_to(model, channels.score(model, "l1", example=x), macs=0.9, example=x)
    assert small.fc.out_features < 64
    assert small.qkv.out_features == 96
    assert model.token.requires_grad


class Meeting(nn.Module):
    """A parameter that meets channels, on either side of the sum."""

    def __init__(self, first: bool):
        super().__init__()
        self.one, self.two, self.first = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), first
        self.fixed = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x):
        x = self.one(x)
        return self.two(self.fixed + x if self.first else x + self.fixed).mean((2, 3))


@pytest.mark.parametrize("first", [True, False])
def test_channels_that_meet_a_parameter_stay(first):
    groups = coupling.groups(Meeting(first).eval(), torch.randn(2, 3, 8, 8))
    assert {group.layer: group.kept for group in groups} == {"one": Kept.OTHER, "two": Kept.OUTPUT}


class Spelled(nn.Module):
    """Attention written out: two products and a softmax."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.mix, self.last = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2)
                   for part in (self.q, self.k, self.v))
        seen = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.last(self.mix(seen.transpose(1, 2).flatten(2)).mean(1))


def test_heads_of_attention_that_is_written_out_can_go():
    torch.manual_seed(0)
    model, x = Spelled().eval(), torch.randn(2, 5, 16)
    heads = next(group for group in coupling.groups(model, x) if group.layer == "q")
    assert (heads.unit, heads.channels, heads.kept) == ("head", 4, None)
    small = channels.remove(model, {"q": [1]}, example=x)
    assert [small.q.out_features, small.v.out_features, small.mix.in_features] == [12, 12, 12]
    with torch.no_grad():
        torch.testing.assert_close(small(x), channels.mask(model, {"q": [1]}, example=x)(x))
