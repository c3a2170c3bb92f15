"""The scan: exact equals the plain loop, fast covers it, killed it goes on, shards merge."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from workbench.errors import UnsupportedModelError
from workbench.graph import layers
from workbench.measures import sensitivity
from workbench.measures.accuracy import paired_interval
from workbench.methods import channels, quantization

LEVELS = [0.3, 0.6, 0.9]


@pytest.fixture(scope="module")
def some(task):
    return task.test.subset(120)


@pytest.fixture(scope="module")
def silencing(model, task):
    return channels.silencing(model, example=task.example)


@pytest.fixture(scope="module")
def exact(model, some, silencing):
    return sensitivity.scan(model, some, silencing, levels=LEVELS, batch_size=50)


def test_exact_counts_what_the_plain_loop_counts(model, some, silencing, exact):
    plain = sensitivity.scan(model, some, silencing, levels=LEVELS, batch_size=50, mode="plain")
    pd.testing.assert_frame_equal(exact, plain)
    assert exact.top1_change.min() < -0.05


def test_zeroed_filters_count_what_the_plain_loop_counts(model, some):
    method = channels.zeroing(model, layers=layers.named(model, ["conv1", "layer2.*", "linear"]))
    both = [sensitivity.scan(model, some, method, levels=LEVELS, mode=mode)
            for mode in ("exact", "plain")]
    pd.testing.assert_frame_equal(*both)


def test_networks_with_functions_methods_and_reused_values_are_scanned_alike(some):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 6, 3,
                                               padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(
                                                   12, 10)
            self.shift = nn.Parameter(torch.randn(1, 6, 1, 1))

        def forward(self, x):
            x = torch.relu(self.a(x))
            y = self.b(x) + x * self.shift
            return self.c(torch.cat([x.mean((2, 3)), y.flatten(2).max(2).values], dim=1))

    model = Odd().eval()
    method = channels.zeroing(model, layers=layers.named(model))
    both = [sensitivity.scan(model, some, method, levels=LEVELS, mode=mode)
            for mode in ("exact", "plain")]
    pd.testing.assert_frame_equal(*both)


def test_what_was_not_removed_is_said(exact):
    kept = exact[exact.layer == "conv1"]
    assert (kept.removed == 0).all()
    assert (kept.top1_change == 0).all()
    assert kept.note.str.contains("padded with zero channels").all()
    assert (exact[exact.layer == "layer1.0.conv1"].removed == [5, 10, 14]).all()


def test_coupled_layers_are_one_row_and_costs_are_those_of_the_cut_model(model, task, some, exact):
    from workbench.measures import cost

    assert exact[exact.layer == "conv1"].layers.iloc[0].startswith("conv1 + layer1.0.conv2")
    ranked = channels.score(model, "l1",
                            example=task.example).query("layer == 'layer2.1.conv1'").sort_values(
                                "score")
    small = channels.remove(model, {"layer2.1.conv1": ranked.channel.tolist()[:19]},
                            example=task.example)
    row = exact[(exact.layer == "layer2.1.conv1") & (exact.level == 0.6)].iloc[0]
    assert {"params": row.params,
            "macs": row.macs}.items() <= cost.total(small, task.example).items()


def test_a_scan_of_other_images_is_not_taken_up(tiny, model, tmp_path):
    method, state = quantization.quantizing(model), tmp_path / "scan.json"
    how = {"levels": [0.5], "layers": ["conv1"], "state": state}
    sensitivity.scan(model, tiny.test.subset(40, seed=0), method, **how)
    with pytest.raises(ValueError, match="is of another scan"):
        sensitivity.scan(model, tiny.test.subset(40, seed=1), method, **how)


def test_fast_intervals_hold_the_exact_values(model, task):
    split = task.test.subset(1500)
    method = channels.silencing(model, example=task.example)
    names = [name for name in method.layers if name.endswith("conv1")][1::2]
    exact, fast = (sensitivity.scan(model, split, method, levels=LEVELS, layers=names, mode=m,
                                    tolerance=0.05, batch_size=100)
                   for m in ("exact", "fast"))
    middle = (fast.top1_change_high + fast.top1_change_low) / 2
    # what the table tells, of examples like these, told back to the whole split, which the scan
    # stops by: from the interval the sums, from the sums the other interval
    size = fast.n + sensitivity.ADDED
    spread = ((fast.top1_change_high - middle) * size / sensitivity.Z_OF_LOOKS) ** 2
    totals, squares = middle * size, spread - sensitivity.ADDED / 2 + middle**2 * size
    ends = [paired_interval(total, square, n, z=sensitivity.Z_OF_LOOKS,
                            population=len(split), added=sensitivity.ADDED)
            for total, square, n in zip(totals, squares, fast.n, strict=True)]
    half = pd.Series([(high - low) / 2 for low, high in ends])
    assert ((exact.top1_change - middle).abs() <= half).mean() >= 0.9
    assert fast.attrs["saved"] > 0.4
    assert (half <= 0.05 + 1e-9).all()


def test_a_table_of_all_examples_still_has_an_interval(model, task):
    split = task.test.subset(60)
    method = channels.silencing(model, example=task.example)
    table = sensitivity.scan(model, split, method, levels=[0.9], layers=["layer2.1.conv1"],
                             mode="fast", tolerance=0.001)
    assert table.n.item() == 60
    assert (table.top1_change_high
            - table.top1_change_low).item() > 0.05, "60 examples say little of others like them"


def test_a_killed_scan_goes_on_to_the_same_table(model, some, silencing, exact, tmp_path,
                                                 monkeypatch):
    counted = sensitivity._Scan._save

    def killed(self):
        counted(self)
        if self.batch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sensitivity._Scan, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        sensitivity.scan(model, some, silencing, levels=LEVELS, batch_size=50,
                         state=tmp_path / "s.json")
    monkeypatch.setattr(sensitivity._Scan, "_save", counted)
    resumed = sensitivity.scan(model, some, silencing, levels=LEVELS, batch_size=50,
                               state=tmp_path / "s.json")
    pd.testing.assert_frame_equal(resumed, exact)
    other = channels.silencing(model, example=some.batch(slice(1)).inputs, criterion="random")
    for method, levels in ((silencing, [0.5]), (other, LEVELS)):
        with pytest.raises(ValueError, match="is of another scan"):
            sensitivity.scan(model, some, method, levels=levels, batch_size=50,
                             state=tmp_path / "s.json")


def test_shards_merge_to_the_whole(model, some, silencing, exact):
    shards = [sensitivity.scan(model, some, silencing, levels=LEVELS, batch_size=50, shard=(k, 3))
              for k in range(3)]
    merged = sensitivity.merge(shards).set_index(["layer",
                                                  "level"]).loc[
                                                      exact.set_index(["layer", "level"]).index]
    pd.testing.assert_frame_equal(merged.reset_index(), exact, check_like=True)
    with pytest.raises(ValueError, match="stands in two shards"):
        sensitivity.merge([shards[0], shards[0]])


def test_scanning_leaves_the_model_as_it_was(model, some, silencing):
    model.train()
    sensitivity.scan(model, some, silencing, levels=[0.5], layers=["layer1.0.conv1"])
    assert all(module.training for module in model.modules())
    model.eval()


@pytest.mark.parametrize(("options", "message"), [
    ({"mode": "slow"}, "unknown mode 'slow'"), ({"levels": []}, "expected at least one"),
    ({"levels": [0]}, "each above 0"),
    ({"levels": [1.2]}, "at most 1"), ({"layers": ["layer9"]},
                                       "the method knows no layer 'layer9'"),
])
def test_bad_scans_are_refused(model, some, silencing, options, message):
    with pytest.raises(ValueError, match=message):
        sensitivity.scan(model, some, silencing, **{"levels": LEVELS, **options})


def test_a_model_that_cannot_be_traced_is_refused_and_scanned_plainly(some):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(784, 10)

        def forward(self, x):
            return self.fc(x.flatten(1)) if x.sum() > 0 else -self.fc(x.flatten(1))

    model = Branching().eval()
    method = channels.zeroing(model, layers=layers.named(model))
    with pytest.raises(UnsupportedModelError, match="Branching cannot be traced .* without "
                       "branches on values"):
        sensitivity.scan(model, some, method, levels=[0.5])
    assert len(sensitivity.scan(model, some, method, levels=[0.5], mode="plain")) == 1


def test_taylor_is_the_mean_of_weight_times_gradient(tiny, model):
    batches = list(tiny.test.batches(100))
    table = sensitivity.taylor(model, batches).set_index("layer").score
    loss = nn.functional.cross_entropy(model(torch.cat([x for x, _ in batches])),
                                       torch.cat([y for _, y in batches]))
    gradient, = torch.autograd.grad(loss, model.layer3[0].conv2.weight)
    assert table["layer3.0.conv2"] == pytest.approx((model.layer3[0].conv2.weight
                                                     * gradient).abs().mean().item(), rel=1e-2)


def test_redundancy_adapts_to_the_network_and_judges_no_layer_alone():
    scores = pd.DataFrame({"layer": list("abcdefg"), "score": [10.0, 10, 1, 10, 1, 1, 1]})
    judged = sensitivity.redundant(scores, 0.6).set_index("layer").redundant
    assert judged["f"]
    assert not judged["c"]  # low itself, but its neighbours are not
    smoothed = sensitivity.redundant(scores, 0.6).smoothed
    assert smoothed[:4].tolist() == [10, 7.75, 5.5, 5.5], "with the median of both neighbours"
    scaled = sensitivity.redundant(scores.assign(score=scores.score * 1000),
                                   0.6).set_index("layer").redundant
    assert scaled.equals(judged)
    with pytest.raises(ValueError, match="score of layer b is NaN"):
        sensitivity.redundant(scores.assign(score=[1, float("nan"), 1, 1, 1, 1, 1]))


def test_redundancy_is_judged_from_a_scan_too_and_not_of_what_cannot_be_cut(exact):
    judged = sensitivity.redundant(exact)
    assert set(judged.layer) == set(exact[exact.removed > 0].layer)
    assert set(exact.layer) - set(judged.layer), "groups that run through padded shortcuts"
    with pytest.raises(ValueError, match="no layer can be judged"):
        sensitivity.redundant(exact[exact.removed == 0])


def test_fast_intervals_cover_the_truth_over_all_looks():
    """Gains and losses of many sizes, drawn without replacement and looked at as the scan does,
    until 0.03 is reached."""
    draws, population, tolerance, rng = 500, 5000, 0.03, np.random.default_rng(0)
    for lost, gained in itertools.product((0.001, 0.01, 0.03, 0.1, 0.4), (0.0, 0.01, 0.1)):
        right, total = np.zeros(draws), np.zeros((draws, 2), int)
        cells = np.tile(np.array([lost, gained, 1 - lost - gained]) * population,
                        (draws, 1)).round().astype(int)
        done = np.zeros(draws, bool)
        for n in range(sensitivity.LEAST, population + 1, sensitivity.LOOK):
            size = n if n == sensitivity.LEAST else sensitivity.LOOK
            drawn = np.array([rng.multivariate_hypergeometric(row, size) for row in cells])
            cells, total = cells - drawn, total + drawn[:, :2]
            for k in np.flatnonzero(~done):
                low, high = paired_interval(total[k, 1] - total[k, 0], total[k].sum(), n,
                                            z=sensitivity.Z_OF_LOOKS,
                                            population=population, added=sensitivity.ADDED)
                if (high - low) / 2 <= tolerance:
                    done[k], right[
                        k] = True, low <= gained - lost + 1e-12 and gained - lost <= high + 1e-12
            if done.all():
                break
        assert right.mean() >= 0.94, (lost, gained)  # 0.95 less what 500 draws leave open
