"""Grids against naive loops; histograms against numpy and a naive KL; gradients; what cannot be
calibrated is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import UnsupportedModelError
from workbench.numbers import grid, histograms
from workbench.numbers.grid import Scheme
from workbench.numbers.histograms import Histogram
from workbench.numbers.quantizers import ActivationQuantizer, WeightQuantizer


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.sampled_from(grid.GRANULARITIES), st.integers(0, 99))
def test_a_weight_lands_on_the_nearest_point_of_its_grid(bits, symmetric, granularity, seed):
    weight = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(seed))
    scheme = Scheme(bits, symmetric, granularity, group=4 if granularity == "group" else 0)
    quantizer = WeightQuantizer(weight, scheme)
    found, rows = scheme.rows(quantizer(weight).detach()), scheme.rows(weight)
    low, high = scheme.limits
    for row, values, scale, zero in zip(rows, found, quantizer.scale.tolist(),
                                        quantizer.zero.tolist(), strict=True):
        grid = [(q - zero[0]) * scale[0] for q in range(low, high + 1)]
        for value, here in zip(row.tolist(), values.tolist(), strict=True):
            assert abs(here - value) <= min(abs(point - value) for point in grid) + 1e-6
    assert torch.allclose(quantizer(found.view(weight.shape)), found.view(weight.shape),
                          atol=1e-6), "twice is once"
    assert low <= quantizer.integers(weight).min()
    assert quantizer.integers(weight).max() <= high


def test_more_bits_and_finer_scales_never_err_more():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -2, 0, 8)[:, None]

    def error(scheme, by="minmax"):
        return (WeightQuantizer(weight, scheme, by=by)(weight) - weight).pow(2).sum().item()

    by_bits = [error(Scheme(bits)) for bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(Scheme(4)) > error(Scheme(4, granularity="channel")) > error(
        Scheme(4, granularity="group", group=4))
    assert error(Scheme(3), by="mse") < error(Scheme(3))
    assert error(Scheme(3, levels="kmeans")) < error(Scheme(3), by="mse")


def test_kmeans_finds_values_that_are_there():
    rows = torch.tensor([[-5.0, -2.0, 0.25, 4.0] * 9])
    assert grid.kmeans(rows, 2).tolist() == [[-5.0, -2.0, 0.25, 4.0]]


def test_the_gradient_is_straight_through_inside_and_none_outside():
    values = torch.tensor([-9.0, -0.3, 0.6, 9.0], requires_grad=True)
    grid.fake_quantize(values, torch.tensor(0.5), torch.tensor(0.0), Scheme(3)).sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 0]


def test_the_step_learns_as_in_the_paper():
    """d x'/d s = round(x/s) - x/s inside the limits, the limit outside (Esser et al., equation
    3)."""
    values, scale = torch.tensor([0.6, 9.0, -9.0]), torch.tensor(0.5, requires_grad=True)
    for value, expected in zip(values, (1 - 1.2, 3, -4), strict=True):
        gradient, = torch.autograd.grad(grid.fake_quantize(value, scale, torch.tensor(0.0),
                                                           Scheme(3)), scale)
        assert gradient.item() == pytest.approx(expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0.01, 30)), min_size=1, max_size=6),
       st.integers(0, 99))
def test_a_histogram_counts_every_value_once_whatever_the_order_of_ranges(batches, seed):
    draw, histogram, everything = torch.Generator().manual_seed(seed), Histogram(), []
    for middle, spread in batches:
        values = middle + spread * torch.randn(300, generator=draw)
        histogram.add(values)
        everything.append(values)
    values = torch.cat(everything).numpy()
    edges = (histogram.first + np.arange(len(histogram.counts) + 1)) * histogram.width
    expected, _ = np.histogram(values.astype(np.float64), edges)
    assert histogram.counts.sum() == len(values)
    assert len(histogram.counts) <= histograms.BINS
    assert np.abs(histogram.counts.numpy() - expected).sum() <= 4, "but for values on an edge"
    assert histogram.range("minmax", Scheme(8)) == (min(values.min(), 0), max(values.max(), 0))


def test_percentile_cuts_what_numpy_would():
    histogram, values = Histogram(), torch.randn(200_000,
                                                 generator=torch.Generator().manual_seed(1))
    for part in values.split(10_000):
        histogram.add(part)
    found = histogram.range("percentile", Scheme(8, symmetric=False))
    assert found == pytest.approx(np.quantile(values.numpy(), [5e-5, 1 - 5e-5]), abs=0.08)


def test_mse_finds_the_clipping_that_errs_least():
    values = torch.cat([torch.randn(50_000, generator=torch.Generator().manual_seed(2)),
                        torch.tensor([30.0])])
    histogram, scheme = Histogram(), Scheme(4, symmetric=False)
    histogram.add(values)

    def error(low, high):
        scale, zero = grid.affine(torch.tensor([low]), torch.tensor([high]), scheme)
        return (grid.fake_quantize(values, scale, zero, scheme) - values).pow(2).sum().item()

    low, high = histogram.range("mse", scheme)
    assert high < 10
    assert error(low, high) < 1.02 * min(error(values.min().item() * k / 50, 30.0 * k / 50)
                                         for k in range(5, 51))


def test_entropy_finds_the_threshold_that_a_naive_loop_finds(monkeypatch):
    monkeypatch.setattr(histograms, "BINS", 128)
    histogram, scheme = Histogram(), Scheme(4)
    histogram.add(torch.cat([torch.randn(20_000, generator=torch.Generator().manual_seed(3)),
                             torch.tensor([9.0, -12.0])]))
    reach = max(histogram.first + len(histogram.counts), -histogram.first)
    sizes = [0] * reach
    for place, count in enumerate(histogram.counts.tolist(), histogram.first):
        sizes[place if place >= 0 else -place - 1] += count
    best = (math.inf, 0)
    for bins in range(8, reach + 1):
        p = sizes[:bins - 1] + [sizes[bins - 1] + sum(sizes[bins:])]
        edges = torch.linspace(0, bins, 9, dtype=torch.float64).round().long().tolist()
        q = []
        for start, end in zip(edges, edges[1:], strict=False):
            part = sizes[start:end]
            level = sum(part) / max(sum(v > 0 for v in part), 1)
            q += [level if v > 0 or place == bins - 1 else 0 for place, v in enumerate(part, start)]
        inside, total = sum(sizes[:bins]), sum(sizes)
        kl = sum(a / total * math.log((a / total) / (b / inside)) for a, b in zip(p, q, strict=True)
                 if a and b)
        best = min(best, (kl, bins))
    low, high = histogram.range("entropy", scheme)
    assert max(-low, high) == pytest.approx(best[1] * histogram.width)
    assert high < 9


def test_zeros_of_a_relu_do_not_draw_the_entropy_threshold_in():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(3))
    scheme, found = Scheme(8, symmetric=False), []
    for cut in (values[values > 0], values.relu()):
        histogram = Histogram()
        histogram.add(cut)
        found.append(histogram.range("entropy", scheme)[1])
    assert found[0] == pytest.approx(found[1], rel=0.02)
    assert found[0] > 2.5


def test_an_activation_quantiser_watches_and_then_quantises():
    quantizer = ActivationQuantizer(Scheme(8, symmetric=False), place="relu")
    values = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 5.1
    quantizer.observe()
    assert torch.equal(quantizer(values), values)
    quantizer.settle("minmax")
    assert (quantizer(values) - values).abs().max() <= 5.1 / 255 / 2 + 1e-6
    assert quantizer(torch.tensor([99.0])).item() == pytest.approx(values.max().item(), rel=1e-3)
    assert not quantizer(values).requires_grad, "its scale learns only when it is told to"
    quantizer.learned = True
    assert quantizer(values).requires_grad


@pytest.mark.parametrize(("call", "words"), [
    (lambda: Scheme(1), "bits is 1, expected a whole number, 2 to 8"),
    (lambda: Scheme("8"), "bits is '8', expected a whole number"),
    (lambda: Scheme(9), "bits is 9"),
    (lambda: Scheme(4, granularity="row"), "granularity is 'row', expected one of"),
    (lambda: Scheme(4, granularity="group"), "a group of at least 1 input"),
    (lambda: Scheme(4, granularity="channel", group=8), "and only with it"),
    (lambda: Scheme(4, levels="log"), "levels is 'log'"),
    (lambda: Histogram().range("minmax", Scheme(8)), "calibration saw no images"),
    (lambda: Histogram().range("median", Scheme(8)), "unknown calibrator 'median'"),
    (lambda: Histogram().add(torch.tensor([1.0, float("nan")]), "conv1"),
     "the values of conv1 hold NaN or infinity"),
    (lambda: WeightQuantizer(torch.full((2, 2), float("inf")), Scheme(8), layer="fc"),
     "layer fc: its weights hold NaN"),
    (lambda: ActivationQuantizer(Scheme(8, granularity="channel"), place="x"),
     "only granularity 'tensor'")])
def test_bad_input_gets_one_line(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert words in str(error.value)


def test_groups_that_do_not_fit_name_the_layer():
    with pytest.raises(UnsupportedModelError, match="layer conv1 has 9 inputs a channel, which "
                       "groups of 4 do not divide"):
        WeightQuantizer(torch.ones(2, 1, 3, 3), Scheme(4, granularity="group", group=4),
                        layer="conv1")


def test_a_spike_does_not_make_the_entropy_threshold_clip_what_matters():
    torch.manual_seed(0)
    histogram = Histogram()
    spiky = torch.cat([torch.randn(100_000).abs(), torch.full((30_000,), 0.05),
                       torch.full((30_000,), 0.11)])
    histogram.add(spiky[torch.randperm(len(spiky))])
    _, high = histogram.range("entropy", Scheme(8, symmetric=False))
    assert (spiky > high).float().mean() <= 1.1e-3
