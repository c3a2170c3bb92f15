"""Masks against naive loops; penalties against their formulas; zeros that stay zero and move while
training."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.errors import UnsupportedModelError
from workbench.methods import sparsity
from workbench.subjects import training

RECIPE = training.Recipe(epochs=2, batch_size=64, learning_rate=0.02, precision="fp32")


@pytest.fixture
def layered():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8, 12, 3), nn.Flatten(),
                         nn.Linear(12 * 4, 10)).eval()


def naive_blocks(weight, rows, columns):
    """Every block's mean |w| and the places of its weights, walked one by one."""
    matrix = weight.detach().abs().movedim(1, -1).flatten(1)
    blocks = {}
    for r in range(matrix.shape[0]):
        for c in range(matrix.shape[1]):
            blocks.setdefault((r // rows, c // columns), []).append((r, c))
    return matrix, [(sum(float(matrix[p]) for p in places) / len(places), places)
                    for places in blocks.values()]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 19), st.integers(0, 9))
def test_the_smallest_blocks_go_as_in_a_naive_loop(rows, columns, percent, seed):
    torch.manual_seed(seed)
    model, share = nn.Sequential(nn.Conv2d(4, 6, 3)), percent / 20
    found = sparsity.masks(model, share, pattern=f"{rows}x{columns}")["0"]
    matrix, blocks = naive_blocks(model[0].weight, rows, columns)
    blocks.sort(key=lambda block: -block[0])
    expected = torch.zeros_like(matrix, dtype=torch.bool)
    for _, places in blocks[:max(round((1 - share) * len(blocks)), 1)]:
        for place in places:
            expected[place] = True
    assert torch.equal(found.movedim(1, -1).flatten(1), expected)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (2, 8)]), st.integers(0, 9))
def test_n_of_each_m_along_the_inputs_stay(nm, seed):
    torch.manual_seed(seed)
    n, m = nm
    model = nn.Sequential(nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(16, 4))
    for name, mask in sparsity.masks(model, pattern=f"{n}:{m}").items():
        weight = model.get_submodule(name).weight.detach().abs()
        lines = weight.view(len(weight), weight.shape[1],
                            -1).transpose(1, 2).reshape(-1, weight.shape[1]).tolist()
        kept = mask.view(len(weight), weight.shape[1],
                         -1).transpose(1, 2).reshape(-1, weight.shape[1]).tolist()
        # the inputs of one row at one place of the kernel
        for line, stays in zip(lines, kept, strict=True):
            for start in range(0, len(line), m):
                group = sorted(zip(line[start:start + m], stays[start:start + m], strict=True))
                assert [stay for _, stay in group] == [False] * (m - n) + [True] * n


def test_layer_scope_takes_the_same_share_and_global_scope_the_whole(layered):
    each = sparsity.masks(layered, 0.75)
    assert all(float((~mask).float().mean()) == pytest.approx(0.75, abs=0.01)
               for mask in each.values())
    together = sparsity.masks(layered, 0.75, scope="global")
    weights = sum(mask.numel() for mask in together.values())
    assert sum(int((~mask).sum()) for mask in together.values()) / weights == pytest.approx(
        0.75, abs=0.002)
    assert len({round(float((~mask).float().mean()), 3) for mask in together.values()}) > 1


def test_sparsity_0_keeps_all_in_both_scopes(layered):
    assert all(mask.all() for scope in sparsity.SCOPES
               for mask in sparsity.masks(layered, 0, scope=scope).values())


def test_a_layer_that_m_does_not_divide_stays_dense(layered):
    assert list(sparsity.masks(layered, pattern="2:4")) == ["3", "5"]
    with pytest.raises(UnsupportedModelError, match="pattern '2:5' fits no layer: 5 divides none"):
        sparsity.masks(layered, pattern="2:5")


def test_apply_leaves_the_model_and_the_table_counts_the_zeros(layered):
    sparse = sparsity.apply(layered, sparsity.masks(layered, 0.5, pattern="1x8"))
    assert sparsity.table(layered).zeros.sum() == 0
    table = sparsity.table(sparse).set_index("layer")
    assert table.sparsity.to_dict() == pytest.approx({"0": 0.5, "3": 0.5, "5": 0.5}, abs=0.06)
    whole = sparsity.apply(layered, {"3": torch.zeros(12, 8, 3, 3, dtype=torch.bool)})
    assert sparsity.table(whole).set_index("layer").empty_channels.to_dict() == {
        "0": 0, "3": 12, "5": 0}


def test_penalties_equal_their_formulas_and_can_be_differentiated(layered):
    expected = 0.0
    for name in ("0", "3", "5"):
        weight = layered.get_submodule(name).weight.detach()
        expected += sum(math.sqrt(row.numel())
                        * math.sqrt(sum(float(v) ** 2 for v in row.flatten())) for row in weight)
    found = sparsity.penalty(layered, "group_lasso")
    assert found.item() == pytest.approx(expected, rel=1e-5)
    layered[1].weight.data.normal_()
    gammas = sparsity.penalty(layered, "bn_gamma")
    assert gammas.item() == pytest.approx(layered[1].weight.abs().sum().item())
    found.backward()
    row = layered[3].weight[5]
    assert torch.allclose(layered[3].weight.grad[5], math.sqrt(72) * row / row.norm(), atol=1e-5)


def test_group_lasso_shrinks_channels_and_gammas_shrink_under_theirs(tiny, model):
    short = replace(RECIPE, epochs=1)
    plain = training.fit(model, tiny, recipe=short).model
    for kind, strength in (("group_lasso", 1e-2), ("bn_gamma", 1e-1)):
        driven = training.fit(model, tiny, recipe=short,
                              loss=sparsity.penalised(kind, strength)).model
        assert sparsity.penalty(driven, kind) < 0.95 * sparsity.penalty(plain, kind)


@pytest.mark.parametrize(("pattern", "share"), [("unstructured", 0.9), ("4x2", 0.75),
                                                ("2:4", None)])
def test_training_keeps_the_sparsity_and_moves_the_zeros(network, tiny, pattern, share):
    regrow = sparsity.Regrow(network, share, pattern=pattern, every=3, exchange=0.3)
    fixed = sparsity.Regrow(network, share, pattern=pattern, exchange=0)
    start = sparsity.apply(network, regrow.masks)
    moved, still = (training.fit(start, tiny, recipe=RECIPE, after_step=hook).model
                    for hook in (regrow, fixed))
    came, went = 0, 0
    for name, mask in regrow.masks.items():
        before, after, unmoved = mask, moved.get_submodule(name).weight != 0, still.get_submodule(
            name).weight != 0
        assert not (unmoved & ~before).any(), "exchange=0 keeps the masks"
        came, went = came + int((after & ~before).sum()), went + int((before & ~after).sum())
        assert float(after.float().mean()) == pytest.approx(float(before.float().mean()), abs=0.05)
        if pattern == "2:4":
            assert (after.movedim(1, -1).reshape(-1, 4).sum(1) <= 2).all()
    assert came > 50
    assert went > 50


def test_gradual_sparsity_rises_to_what_was_asked(network, tiny):
    seen = []

    class Watched(sparsity.Regrow):
        def __call__(self, model, step, steps):
            super().__call__(model, step, steps)
            seen.append(float(sparsity.table(model).sparsity.mean()))

    regrow = Watched(network, 0.8, every=1, until=0.75, gradual=True, exchange=0.1)
    assert all(mask.all() for mask in regrow.masks.values())
    rising = training.fit(network, tiny, recipe=RECIPE, after_step=regrow)
    assert seen == sorted(seen)
    assert sparsity.table(rising.model).sparsity.tolist() == pytest.approx([0.8] * 3, abs=0.02)


@pytest.mark.parametrize("exchange", [0.0, 0.3])
def test_one_block_of_each_layer_stays_in_training_too(exchange):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    regrow = sparsity.Regrow(net, 0.9, pattern="8x8", exchange=exchange, every=1)
    net(torch.randn(4, 8)).sum().backward()
    regrow.before_step(net)
    regrow(net, 1, 4)
    assert all(mask.sum() >= 64 for mask in regrow.masks.values())


def test_a_layer_that_the_loss_does_not_read_regrows_by_its_weights_alone():
    net = nn.ModuleDict({"read": nn.Linear(8, 8), "aside": nn.Linear(8, 8)})
    regrow = sparsity.Regrow(net, 0.5, every=1)
    net["read"](torch.randn(4, 8)).sum().backward()
    regrow.before_step(net)
    regrow(net, 1, 4)
    assert [round(mask.float().mean().item(), 2) for mask in regrow.masks.values()] == [0.5, 0.5]


def test_what_comes_back_starts_at_zero_and_a_last_move_reaches_the_sparsity(network):
    regrow = sparsity.Regrow(network, 0.5, every=1000, until=1.0, gradual=True, exchange=0.0)
    regrown = sparsity.Regrow(network, 0.5, every=1, exchange=0.5)
    for hook, steps in ((regrow, 3), (regrown, 3)):
        model = sparsity.apply(network, hook.masks).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step in range(1, steps + 1):
            model(torch.randn(4, 1, 28, 28)).square().mean().backward()
            before = dict(hook.masks)
            hook.before_step(model)
            optimizer.step()
            hook(model, step, steps)
            optimizer.zero_grad()
            for name, mask in hook.masks.items():
                assert (model.get_submodule(name).weight[mask & ~before[name]] == 0).all()
    assert sparsity.table(sparsity.apply(network, regrow.masks)).sparsity.tolist() == pytest.approx(
        [0.5] * 3, abs=0.03)


def test_global_masks_leave_each_layer_something_and_are_exact_among_equals():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[1].weight)
    found = sparsity.masks(model, 0.9, scope="global")
    assert all(mask.any() for mask in found.values())
    assert sum(int(mask.sum()) for mask in found.values()) == 21


def test_a_sparse_training_that_is_killed_goes_on_to_the_same_zeros(network, tiny, tmp_path,
                                                                    monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0)
    regrow = sparsity.Regrow(network, 0.8, every=2)
    whole = training.fit(network, tiny, recipe=RECIPE, after_step=regrow).model
    real, calls = sparsity.Regrow.__call__, []

    def stopping(self, *arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(sparsity.Regrow, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        training.fit(network, tiny, recipe=RECIPE, after_step=regrow, state=tmp_path / "s")
    monkeypatch.setattr(sparsity.Regrow, "__call__", real)
    resumed = training.fit(network, tiny, recipe=RECIPE, after_step=regrow,
                           state=tmp_path / "s").model
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(),
                                                 resumed.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="its after_step is"):
        training.fit(network, tiny, recipe=RECIPE, state=tmp_path / "s")


@pytest.mark.parametrize(("call", "words"), [
    (lambda m: sparsity.masks(m, 1.0), "sparsity is 1.0, expected 0 <= sparsity < 1"),
    (lambda m: sparsity.masks(m, 1.2), "sparsity is 1.2, expected 0 <= sparsity < 1"),
    (lambda m: sparsity.masks(m), "sparsity is None, expected"),
    (lambda m: sparsity.masks(m, 0.6, pattern="2:4"), "pattern '2:4' has sparsity 0.5, not 0.6"),
    (lambda m: sparsity.masks(m, 0.5, pattern="4:2"), "unknown pattern '4:2'; expected"),
    (lambda m: sparsity.masks(m, 0.5, pattern="0x4"), "unknown pattern '0x4'; expected"),
    (lambda m: sparsity.masks(m, 0.5, scope="all"), "unknown scope 'all'"),
    (lambda m: sparsity.masks(m, 0.5, layers="layer9.*"),
     "no layer matches 'layer9.*'; the layers are 0, 3, 5"),
    (lambda m: sparsity.apply(m, {"7": torch.ones(1)}), "no layer '7' in Sequential"),
    (lambda m: sparsity.apply(m, {"3": torch.ones(2)}),
     "layer 3 has weights (12, 8, 3, 3), the mask (2,)"),
    (lambda m: sparsity.penalised("lasso", 1), "unknown penalty 'lasso'"),
    (lambda m: sparsity.penalised("bn_gamma", 0), "strength is 0, expected more than 0"),
    (lambda m: sparsity.Regrow(m, 0.5, exchange=1), "exchange is 1"),
    (lambda m: sparsity.Regrow(m, pattern="2:4", gradual=True),
     "fixes its sparsity, so it cannot rise")])
def test_bad_input_gets_one_line(layered, call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(layered)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_nan_weights_and_a_network_without_norms_are_refused(layered):
    with pytest.raises(UnsupportedModelError,
                       match="has no batch norm for bn_gamma; use group_lasso"):
        sparsity.penalty(nn.Sequential(nn.Linear(3, 2)), "bn_gamma")
    layered[3].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 3: its weights hold NaN"):
        sparsity.masks(layered, 0.5)
