"""Plots show what they are given, and stay readable where there is much of it."""

import numpy as np
import pandas as pd
import pytest

from workbench.reporting import language_plots, plan_plots, plots


def curves(layers: int, what: str) -> pd.DataFrame:
    rows = [{"layer": f"layer{k}", "level": level, "removed": 1, "n": 100, what: 0.9 - 0.01 * k
             * level,
             f"{what}_change": -0.01 * k * level, f"{what}_change_low": -0.02 * k * level,
             f"{what}_change_high": 0.0}
            for k in range(layers) for level in (0.3, 0.6)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("what", ["top1", "right"])
def test_a_legend_names_the_most_sensitive_layers_only(what):
    axes = plots.sensitivity(curves(40, what))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(axes.lines) == 41
    assert set(labels) == {f"layer{k}" for k in range(28, 40)} | {"unchanged"}
    assert "12 of 40" in axes.get_legend().get_title().get_text()
    assert np.nanmax(plots.sensitivity_map(curves(3, what)).images[0].get_array()) == pytest.approx(
        1.2)


def test_a_scan_at_one_level_is_a_row_a_layer():
    table = curves(5, "top1")
    axes = plots.sensitivity(table[table.level == 0.6])
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"layer{k}" for k in range(5)]
    assert "60%" in axes.get_xlabel()
    assert list(axes.lines[0].get_xdata()) == pytest.approx([-0.6 * k for k in range(5)])


@pytest.mark.parametrize("column", ["rung", "stage", "candidate", "anything"])
def test_a_ladder_takes_its_names_from_any_table_of_differences(column):
    table = pd.DataFrame({column: ["a", "b"], "top1_change": [0.0, -0.1],
                          "top1_change_low": [0.0, -0.2],
                          "top1_change_high": [0.0, 0.0]})
    assert [text.get_text() for text in plots.ladder(table).get_yticklabels()] == ["a", "b"]


def test_what_is_left_stands_in_percent_beside_what_was_published():
    table = pd.DataFrame({"subject": ["a", "b"], "params": [0.2, 1.0], "latency": [0.1, 0.5]})
    axes = plan_plots.left(table, ["params", "latency"], beside={"latency": 0.436})
    assert [list(line.get_xdata()) for line in axes.lines[:2]] == [[20, 10], [100, 50]]
    assert axes.lines[2].get_xdata()[0] == pytest.approx(43.6)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "a", "b", "as the articles have it"]


def test_stages_are_named_in_the_legend():
    table = pd.DataFrame({"recipe": "ours", "stage": ["start", "prune", "quantize"],
                          "ratio": [1.0, 0.8, 0.4],
                          "top1_change": [0.0, -0.1, -0.1], "top1_change_low": [0.0, -0.2, -0.2],
                          "top1_change_high": 0.0})
    assert [text.get_text() for text in plots.stages(table).get_legend().get_texts()] == [
        "ours: prune → quantize"]


def test_decoders_stand_with_their_perplexity_and_contexts_at_their_own_places():
    table = pd.DataFrame({"candidate": ["float32", "4 bits", "genai, 4 bits"],
                          "tokens_per_s": [10.0, 20.0, 30.0],
                          "over": [1.0, 1.02, np.nan]})
    axes = language_plots.decoders(table)
    assert [text.get_text() for text in axes.texts] == ["30", "20, 1.020x the perplexity",
                                                        "10, 1.000x the perplexity"]
    rows = pd.DataFrame({"candidate": ["a", "b"] * 2, "context": [16, 16, 1024, 1024],
                         "latency_ms": [1.0, 2.0, 1.5, 3.0]})
    axes = language_plots.contexts(rows)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["16", "1,024"]
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.0, 1.5], [2.0, 3.0]]


def test_more_recipes_than_colours_are_all_drawn():
    row = {"stage": ["start", "end"], "ratio": [1.0, 0.5], "perplexity_change": [0.0, 0.5],
           "perplexity_change_low": [0.0, 0.4], "perplexity_change_high": [0.0, 0.6]}
    ax = plots.stages(pd.concat([pd.DataFrame(row).assign(recipe=str(k)) for k in range(7)]))
    assert len(ax.get_legend().get_texts()) == 7
    assert ax.get_ylabel() == "change of perplexity"
    assert max(line.get_ydata()[-1] for line in ax.get_lines()) < 1, "no points"
    many = pd.DataFrame({"subject": list("abcdefg"), "params": np.linspace(0.1, 0.7, 7)})
    assert len(plan_plots.left(many, ["params"]).get_legend().get_texts()) == 7
