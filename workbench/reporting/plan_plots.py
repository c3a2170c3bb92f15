"""Figures of plans: what a search found beneath the exact front, how soon each sampler gets there,
orders, before and after."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from workbench.reporting.plots import BLUE, GREY, RED, _axes


def front(table: pd.DataFrame, found: pd.DataFrame, *, limit: float | None = None,
          ax: Axes | None = None) -> Axes:
    """Every plan of a space as points, their exact front, and the front of what a search found.

    table, found: columns lost (fraction), latency (share) and front (whether no other beats the
    plan); table also bits.

    Example: `plan_plots.front(points.assign(bits=8), points)`
    """
    ax = ax or _axes(8, 5)
    for (bits, part), colour in zip(table.groupby("bits", sort=False), cycle((GREY, "#9bb7d4")),
                                    strict=False):
        kind = "float" if bits == 32 else f"{bits} bits"
        ax.scatter(part.latency, 100 * part.lost, s=7, color=colour, label=f"every plan, {kind}")
    for points, colour, label, marker in ((table, "black", "exact front", ""),
                                          (found, RED, "front of the search", "o")):
        best = points[points.front].sort_values("latency")
        ax.step(best.latency, 100 * best.lost, where="post", color=colour, label=label,
                marker=marker, markersize=5)
    if limit:
        ax.axvline(limit, color=BLUE, linestyle=":", label=f"limit, {limit:g}x")
    ax.set(xlabel="latency, as a share of the model's as it came", ylabel="accuracy lost, points",
           title="What a search finds, and what there is (lower left is better)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def samplers(curves: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of the exact front's area against evaluations, the mean over seeds of each sampler with
    its bootstrap interval.

    curves: sampler, seed, evaluations, share.

    Example: `plan_plots.samplers(pd.DataFrame({"sampler": "random", "seed": [0, 0, 1, 1],
    "evaluations": [1, 2, 1, 2], "share": [0.5, 0.7, 0.4, 0.8]}))`
    """
    ax = ax or _axes(8, 5)
    order = curves[curves.evaluations
                   == curves.evaluations.max()].groupby("sampler").share.mean().sort_values(
                       ascending=False)
    draws = np.random.default_rng(0)
    for name, colour in zip(order.index,
                            cycle((RED, BLUE, "#2a7a5b", "#b8860b", "#7a4fa3", "#444444",
                                   "#c06c84")),
                            strict=False):
        table = curves[curves.sampler == name].pivot(index="evaluations", columns="seed",
                                                     values="share")
        values = table.to_numpy()
        means = values[:, draws.integers(values.shape[1], size=(500, values.shape[1]))].mean(2)
        low, high = np.percentile(means, [2.5, 97.5], axis=1)
        ax.plot(table.index, values.mean(1), color=colour,
                label=f"{name} ({values.shape[1]} seeds)")
        ax.fill_between(table.index, low, high, color=colour, alpha=0.15)
    ax.set(xlabel="plans evaluated", ylabel="share of the exact front's area",
           title="How soon each sampler gets there (mean, 95 %)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def attainment(surfaces: pd.DataFrame, exact: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What half of each sampler's seeds attain, with a band from a quarter to three quarters, and
    the exact front beneath.

    surfaces: sampler, percentile (25, 50, 75), lost (fraction), latency (share). exact: lost,
    latency of the front alone.

    Example: `attainment(pd.DataFrame({"sampler": "tpe", "percentile": [25, 50, 75], "lost": 0.01,
    "latency": 0.6}), pd.DataFrame({"lost": [0.0, 0.01], "latency": [0.9, 0.5]}))`
    """
    ax = ax or _axes(8, 5)
    # beyond it nothing is gained
    grid = np.linspace(exact.latency.min(), 1.15 * exact.latency.max(), 400)
    for name, colour in zip(surfaces.sampler.unique(), cycle((RED, BLUE, "#2a7a5b", "#b8860b")),
                            strict=False):
        own = surfaces[surfaces.sampler == name]
        few, half, many = (_attained(own[own.percentile == k], grid) for k in (25, 50, 75))
        ax.step(grid, half, where="post", color=colour, label=f"{name}, half of the seeds")
        ax.fill_between(grid, few, many, step="post", color=colour, alpha=0.15)
    ax.step(grid, _attained(exact, grid), where="post", color="black", label="exact front")
    ax.set(xlabel="latency, as a share of the model's as it came", ylabel="accuracy lost, points",
           title="What samplers attain (band: a quarter to three quarters of the seeds)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def _attained(points: pd.DataFrame, grid: np.ndarray) -> np.ndarray:
    """The least that is lost, in points, at each latency or below."""
    within = points.latency.to_numpy()[None] <= grid[:, None] + 1e-12
    return np.where(within.any(1),
                    np.where(within, 100 * points.lost.to_numpy()[None], np.inf).min(1), np.nan)


def orders(matrix: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What each order of methods loses, the best on top, with its interval. matrix: order,
    top1_change with _low and _high.

    Example: `plan_plots.orders(pd.DataFrame({"order": ["PDQ"], "top1_change": -0.01,
    "top1_change_low": -0.02, "top1_change_high": 0.0}))`
    """
    ax = ax or _axes(7, 0.6 + 0.4 * len(matrix))
    rows = matrix.iloc[::-1]
    ends = [abs(rows[f"top1_change_{end}"] - rows.top1_change).fillna(0) * 100
            for end in ("low", "high")]
    ax.errorbar(100 * rows.top1_change, range(len(rows)), xerr=ends, fmt="o", color=BLUE, capsize=3)
    ax.set_yticks(range(len(rows)), rows.order)
    ax.axvline(0, color=GREY, linestyle=":")
    ax.set(xlabel="change of top-1, points (95 %)",
           title="P prune, D distil, Q quantise, in their order")
    return ax


def left(table: pd.DataFrame, columns: Sequence[str], *, beside: Mapping[str, float] | None = None,
         by: str = "subject", ax: Axes | None = None) -> Axes:
    """What is left of each quantity, in percent of what it was before: a row a quantity, a mark a
    subject, the further left the less. beside: a published share of some of the quantities.

    Example: `plan_plots.left(pd.DataFrame({"subject": ["MiniLM"], "params": 0.2}), ["params"])`
    """
    ax = ax or _axes(8, 1 + 0.5 * len(columns))
    places = np.arange(len(columns))[::-1]
    looks = zip(cycle((BLUE, RED, "#2a7a5b", "#b8860b", GREY)), cycle("os^Dv<>"), strict=False)
    for (_, row), (colour, marker) in zip(table.iterrows(), looks, strict=False):
        shares = [100 * row[column] for column in columns]
        ax.plot(shares, places, marker, color=colour, markersize=8, label=row[by])
        for share, place in zip(shares, places, strict=True):
            ax.annotate(f"{share:.0f}", (share, place), textcoords="offset points", xytext=(0, 7),
                        ha="center", fontsize=7, color=colour)
    for name, share in (beside or {}).items():
        ax.plot(100 * share, places[list(columns).index(name)], "|", color="black", markersize=20,
                label="as the articles have it" if name == next(iter(beside)) else None)
    ax.axvline(100, color=GREY, linestyle=":")
    ax.set_yticks(places, columns)
    ax.set(xlabel="left of it, percent of the model as it came", title="Before and after",
           xlim=(0, None), ylim=(-0.6, len(columns) - 0.2))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax
