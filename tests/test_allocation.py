"""Formats within a budget: the integer programme against trying everything, and where formats meet
against a runtime."""

import itertools

import pandas as pd
import pytest
import torch
from torch import nn

from workbench.errors import UnsupportedModelError
from workbench.methods import quantization
from workbench.plans import allocation


def options(rows):
    return pd.DataFrame(rows, columns=["layer", "bits", "loss", "size_bytes"])


def test_the_programme_finds_what_trying_everything_finds():
    draw = torch.Generator().manual_seed(0)
    table = options([(f"l{k}", b, float(torch.rand(1, generator=draw)) * 2.0 ** -b, (k + 1) * b)
                     for k in range(5) for b in (2, 4, 8)])
    for budget in (35, 60, 90, 200):
        found = allocation.allocate(table, budget)
        best = min(sum(combination.loss for combination in chosen) for chosen in
                    itertools.product(*[list(part.itertuples())
                                        for _, part in table.groupby("layer")])
                    if sum(row.size_bytes for row in chosen) <= budget)
        rows = [table[(table.layer == name) & (table.bits == b)].iloc[0]
                for name, b in found.items()]
        assert sum(row.loss for row in rows) == pytest.approx(best, abs=1e-8)
        assert sum(row.size_bytes for row in rows) <= budget


def test_an_allocation_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="budget is 3 size_bytes, the cheapest widths need 4"):
        allocation.allocate(options([("a", 2, 0.1, 2), ("b", 2, 0.1, 2)]), 3)
    with pytest.raises(ValueError, match="layer a is NaN"):
        allocation.allocate(options([("a", 2, float("nan"), 2)]), 3)


def test_small_losses_are_allocated_as_well_and_ties_go_to_more_bits():
    table = options([(f"l{k}", b, 1e-8 * (k + 1) * 4.0 ** -b, b) for k in range(6)
                     for b in (2, 3, 4, 8)])
    scaled = table.assign(loss=1e8 * table.loss)
    assert allocation.allocate(table, 24) == allocation.allocate(scaled, 24)
    free = table.assign(loss=0.0)
    assert set(allocation.allocate(free, 1000).values()) == {8}


class Residual(nn.Module):
    """Two convolutions and a shortcut around the second, a third and a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(k, 4, 3, padding=1) for k in (1, 4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        first = torch.relu(self.a(x))
        return self.head(torch.relu(self.c(first + self.b(first))).mean((2, 3)))


LAYERS = ("a", "b", "c", "head")


@pytest.fixture(scope="module")
def places():
    return allocation.borders(Residual(), torch.randn(5, 1, 8, 8))


def test_borders_are_what_layers_read_through_relus_and_means(places):
    assert list(places.itertuples(index=False, name=None)) == [
        ("(inputs)", "a", 64), ("a", "b", 256), ("a", "(add)", 256), ("b", "(add)", 256),
        ("(add)", "c", 256), ("c", "head", 4)]


@pytest.mark.parametrize(("rounded", "numbers"), [
    ((), 0), (LAYERS, 64), (("a",), 64 + 256 + 256), (("b",), 256 + 256 + 256), (("c",), 256 + 4),
    (("a", "b"), 64 + 256 + 256), (("a", "b", "c"), 64 + 4), (("b", "c"), 256 + 4), (("head",), 4)])
def test_numbers_that_cross(places, rounded, numbers):
    """Of "b": what a puts out is made integers, and floats again for the addition, as is what b
    puts out. Of "b" and "c": what a puts out is made integers, all that follows is."""
    assert allocation.crossing(places, rounded) == numbers


def test_a_budget_of_time_pays_for_its_borders_as_trying_everything_does(places):
    draw = torch.Generator().manual_seed(1)
    table = pd.DataFrame([(name, bits, 0.0 if bits == 32 else loss, 1.0 if bits == 32 else 0.3)
                          for name in LAYERS
                          for loss in [float(torch.rand(1, generator=draw))] for bits in (8, 32)],
                         columns=["layer", "bits", "loss", "milliseconds"])
    crossed = places.assign(milliseconds=places.numbers * 1e-3)
    every = [set(itertools.compress(LAYERS, chosen))
             for chosen in itertools.product((0, 1), repeat=4)]
    for budget in (1.3, 1.9, 2.5, 3.0, 3.5, 4.0):
        def spent(rounded):
            return sum(0.3 if name in rounded else 1.0
                       for name in LAYERS) + allocation.crossing(places, rounded) * 1e-3

        def lost(rounded):
            return table[(table.bits == 8) & table.layer.isin(rounded)].loss.sum()

        best = min(lost(rounded) for rounded in every if spent(rounded) <= budget)
        found = allocation.allocate(table, budget, cost="milliseconds", borders=crossed)
        rounded = {name for name, bits in found.items() if bits == 8}
        assert spent(rounded) <= budget + 1e-6
        assert lost(rounded) == pytest.approx(best)


def test_a_budget_that_borders_exceed_and_a_border_without_choice_are_refused(places):
    table = pd.DataFrame([(name, bits, 1.0, bits / 8) for name in LAYERS for bits in (8, 32)],
                         columns=["layer", "bits", "loss", "milliseconds"])
    with pytest.raises(ValueError, match="no choice of formats stays within 4.01 milliseconds"):
        allocation.allocate(table, 4.01, cost="milliseconds",
                            borders=places.assign(milliseconds=1.0))
    with pytest.raises(ValueError,
                       match="borders name the layer head, for which there is no choice"):
        allocation.allocate(table[table.layer != "head"], 9, cost="milliseconds",
                            borders=places.assign(milliseconds=1.0))


def test_a_model_that_cannot_be_traced_has_no_borders():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedModelError, match="Branching cannot be traced"):
        allocation.borders(Branching(), torch.randn(1, 1))


@pytest.mark.parametrize(("rounded", "places"), [
    (LAYERS, {"x", "relu", "b", "add", "relu_1", "mean"}), (("a",), {"x", "relu"}),
    (("head",), {"mean"}),
    (("b",), {"relu", "b"}), (("c",), {"add", "relu_1"}), (("a", "head"), {"x", "relu", "mean"})])
def test_quantisers_stand_only_where_a_rounded_layer_reads_or_puts_out(rounded, places):
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(20, 1, 8, 8)
    mixed = quantization.quantize(model, [(x, None)],
                                  weights=dict.fromkeys(rounded, quantization.INT8_WEIGHTS))
    found = [node.args[0].name for node in mixed.graph.nodes if node.name.startswith("quantizer_")]
    assert set(found) == places
    assert len(found) == len(places)
    with torch.no_grad():
        assert 0 < (mixed(x) - model(x)).norm() < 0.1 * model(x).norm()
