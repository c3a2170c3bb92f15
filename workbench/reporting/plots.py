"""Plots of the workbench's DataFrames: each takes a frame and returns Axes; none shows, saves or
sets anything global."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED, GREY = "#1f5fa8", "#b3261e", "#8a97a5"
NAMED = 12  # lines that a legend names; more would hide them


def images(pictures: np.ndarray, titles: Sequence[str], *, columns: int = 10) -> Figure:
    """A grid of pictures, uint8 (n, C, H, W) with C of 1 or 3, each under its title.

    Example: `plots.images(np.zeros((2, 1, 8, 8), np.uint8), ["one", "two"])`
    """
    rows = -(-len(pictures) // columns)
    figure, grid = plt.subplots(rows, columns, squeeze=False, figsize=(columns * 1.05, rows * 1.25),
                                layout="constrained")
    for axes, picture, title in zip(grid.flat, pictures, titles, strict=False):
        axes.imshow(np.moveaxis(picture, 0, -1).squeeze(), cmap="gray_r", interpolation="nearest")
        axes.set_title(title, fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def confusion(counts: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Counts of true class (rows) against predicted class (columns); the colour leaves the diagonal
    out.

    Example: `confusion(pd.DataFrame(np.eye(2, dtype=int)))`
    """
    ax = ax or _axes(7, 6)
    wrong = counts.to_numpy(dtype=float, copy=True)
    np.fill_diagonal(wrong, 0)
    ax.imshow(wrong, cmap="Reds")
    for (row, column), value in np.ndenumerate(counts.to_numpy()):
        if value:
            shade = "white" if wrong[row, column] > 0.6 * wrong.max() else "#1d2733"
            ax.text(column, row, f"{value}", ha="center", va="center", fontsize=8, color=shade)
    ax.set_xticks(range(len(counts)), counts.columns, rotation=45, ha="right")
    ax.set_yticks(range(len(counts)), counts.index)
    ax.set(xlabel="predicted class", ylabel="true class",
           title="Test images by true and predicted class (colour: errors)")
    return ax


def cost(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of the multiply-accumulates and of the parameters, layer by layer, of cost.table.

    Example: `cost(pd.DataFrame({"layer": ["conv1", "fc"], "macs": [900, 100], "params": [9, 91]}))`
    """
    ax = ax or _axes(8, 4)
    heavy = table[table.macs > 0]
    at = np.arange(len(heavy))
    ax.bar(at - 0.2, heavy.macs / table.macs.sum() * 100, 0.4, label="MACs", color=BLUE)
    ax.bar(at + 0.2, heavy.params / table.params.sum() * 100, 0.4, label="parameters", color=GREY)
    ax.set_xticks(at, heavy.layer, rotation=90, fontsize=8)
    ax.set(ylabel="share of the whole, %",
           title=f"Cost by layer ({table.macs.sum() / 1e6:.1f} M MACs, "
           f"{table.params.sum() / 1e3:,.0f} k parameters)")
    ax.legend(frameon=False)
    return ax


def latency(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Median latency of latency.paired, a bar per candidate and row, with the 95th percentile as a
    tick and in brackets.

    Example: `plots.latency(frame)`
    """
    ax = ax or _axes(7, 0.45 * len(table) + 1.2)
    names = [f"{r.candidate}, threads {r.threads}, batch {r.batch}" for r in table.itertuples()]
    at = np.arange(len(table))[::-1]
    ax.barh(at, table.latency_ms, color=BLUE, height=0.6)
    ax.plot(table.p95_ms, at, "|", color=RED, markersize=12)
    for y, value, high in zip(at, table.latency_ms, table.p95_ms, strict=True):
        ax.text(max(value, high), y, f"  {value:.2f} ({high:.2f})", va="center", fontsize=9)
    ax.margins(x=0.25)
    ax.set_yticks(at, names)
    ax.set(xlabel="latency of one batch, ms: median (and 95th percentile)")
    ax.set_title(table.attrs.get("machine", ""), fontsize=7, wrap=True)
    return ax


def stages(table: pd.DataFrame, *, by: str = "recipe", ax: Axes | None = None) -> Axes:
    """Points of the metric lost against the latency that is left, stage by stage, a line a recipe;
    paired 95 % intervals.

    Example: `stages(pd.DataFrame({"recipe": "int8", "stage": ["start", "quantize"], "ratio": [1.0,
    0.5], "top1_change": [0.0, -0.001], "top1_change_low": [0.0, -0.003], "top1_change_high": [0.0,
    0.001]}))`
    """
    ax = ax or _axes(8, 4.5)
    change = next(column for column in table if column.endswith("_change")
                  and not column.startswith("int8"))
    scale, unit = (1, "") if change.startswith("perplexity") else (100, ", points")
    looks = zip(itertools.cycle((BLUE, RED, GREY, "#2a7a5b")), itertools.cycle("os^Dv"),
                strict=False)
    for (name, line), (colour, marker) in zip(table.groupby(by, sort=False), looks, strict=False):
        low, high = (abs(line[f"{change}_{end}"] - line[change]) * scale for end in ("low", "high"))
        ax.errorbar(line.ratio, line[change] * scale, [low, high], color=colour, marker=marker,
                    capsize=2, label=f"{name}: {' → '.join(line.stage[1:])}")
    ax.axhline(0, color=GREY, linestyle=":")
    ax.set(xlabel="latency, as a share of the model as it came",
           ylabel=f"change of {change.removesuffix('_change')}{unit}",
           title="Stage by stage (paired, 95 %)")
    ax.invert_xaxis()
    ax.legend(frameon=False, fontsize=8)
    return ax


def layer_cosine(frames: dict[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """1 - cosine of each layer's output, log scale, of equivalence.by_layer, one line per
    candidate.

    Example: `plots.layer_cosine({"int8": equivalence.by_layer(model, quantised, inputs)})`
    """
    ax = ax or _axes(8, 4.5)
    for (name, frame), marker in zip(frames.items(), "os^Dv*" * len(frames), strict=False):
        loss = np.maximum(1 - frame.cosine.to_numpy(), 1e-16)
        ax.semilogy(range(len(frame)), loss, marker=marker, markersize=4, label=name)
        for place in np.flatnonzero(frame["first"]):
            ax.annotate(f"parts at {frame.layer[place]}", (place, loss[place]),
                        textcoords="offset points", xytext=(-8, 8), ha="right", color=RED)
    frame = next(iter(frames.values()))
    ax.set_xticks(range(len(frame)), frame.layer, rotation=90, fontsize=8)
    ax.set(ylabel="1 - cosine with the reference",
           title="Where the models part, layer by layer (lower is closer)")
    ax.margins(y=0.12)
    ax.axhline(1 - 0.995, color=GREY, linestyle=":", label="limit, cosine 0.995")
    ax.legend(frameon=False)
    return ax


def sensitivity(curves: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Top-1 against the fraction of channels, neurons or heads removed, a line a layer of
    sensitivity.scan, with its interval; of a scan at one level the points lost, a row a layer.

    Example: `plots.sensitivity(curves)`
    """
    cut = curves[curves.removed > 0]
    layers = list(cut.layer.unique())
    if cut.level.nunique() == 1:
        return _at_one_level(cut, ax or _axes(8, 0.2 * len(layers) + 1.5))
    ax = ax or _axes(8, 5)
    # the share of a sentence's tokens that are right, where tokens count
    what = "top1" if "top1" in curves else "right"
    worst = cut.groupby("layer")[f"{what}_change"].min().nsmallest(NAMED).index
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(layers)))
    for layer, shade in zip(layers, shades, strict=True):
        line = cut[cut.layer == layer]
        base = line[what] - line[f"{what}_change"]
        ax.plot(line.level, line[what] * 100, color=shade, marker="." if len(line) < 3 else None,
                label=layer if layer in worst else None)
        low, high = ((base + line[f"{what}_change_{end}"]) * 100 for end in ("low", "high"))
        ax.fill_between(line.level, low, high, color=shade, alpha=0.1)
    ax.axhline((curves[what] - curves[f"{what}_change"]).iloc[0] * 100, color=GREY, linestyle=":",
               label="unchanged")
    ax.set(xlabel="fraction of the layer's channels, neurons or heads removed",
           ylabel="top-1, %" if what == "top1" else "right tokens, %",
           title=f"Sensitivity, one layer at a time ({curves.n.max():,} examples; band: paired 95 "
           "%)")
    title = (f"most sensitive {NAMED} of {len(layers)}; colour: depth" if len(layers) > NAMED
             else None)
    ax.legend(frameon=False, fontsize=7, title=title, title_fontsize=7, loc="upper left",
              bbox_to_anchor=(1.0, 1.0))
    return ax


def _at_one_level(cut: pd.DataFrame, ax: Axes) -> Axes:
    """What each layer's change costs, in the order of the network, with its interval."""
    what = "top1" if "top1" in cut else "right"
    change, low, high = (100 * cut[f"{what}_change{end}"].to_numpy()
                         for end in ("", "_low", "_high"))
    ax.errorbar(change, range(len(cut)), xerr=[change - low, high - change], fmt="o", markersize=4,
                color=BLUE, elinewidth=1)
    ax.axvline(0, color=GREY, linestyle=":")
    ax.set_yticks(range(len(cut)), cut.layer, fontsize=7)
    ax.invert_yaxis()
    unit = "top-1" if what == "top1" else "right tokens"
    ax.set(xlabel=f"change of {unit} where {cut.level.iloc[0]:.0%} of the layer is removed, points",
           title=f"Sensitivity, one layer at a time ({cut.n.max():,} examples; paired 95 %)")
    return ax


def sensitivity_map(curves: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Points of top-1 lost, layer by level; grey where nothing could be removed.

    Example: `sensitivity_map(curves)`
    """
    what = "top1" if "top1" in curves else "right"
    lost = (-100 * curves[f"{what}_change"]).where(curves.removed > 0)
    grid = curves.assign(lost=lost).pivot(index="layer", columns="level",
                                          values="lost").loc[curves.layer.unique()]
    ax = ax or _axes(8, 0.32 * len(grid) + 1.5)
    shades = plt.get_cmap("Reds").with_extremes(bad="#d9dee4")
    ax.imshow(np.ma.masked_invalid(grid.to_numpy()), cmap=shades, aspect="auto", vmin=0)
    for (row, column), value in np.ndenumerate(grid.to_numpy()):
        dark = np.isfinite(value) and value > 0.6 * np.nanmax(grid.to_numpy())
        ax.text(column, row, f"{value:.1f}" if np.isfinite(value) else "-", ha="center",
                va="center", fontsize=8, color="white" if dark else "#1d2733")
    ax.set_xticks(range(grid.shape[1]), [f"{level:g}" for level in grid.columns])
    ax.set_yticks(range(len(grid)), grid.index, fontsize=8)
    ax.set(xlabel="fraction of the layer's channels removed",
           title="Points of top-1 lost (grey: cannot be removed)")
    return ax


def agreement(correlations: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A square table of rank correlations between criteria.

    Example: `plots.agreement(pd.DataFrame(np.eye(2), ["l1", "taylor"], ["l1", "taylor"]))`
    """
    ax = ax or _axes(6.5, 5.5)
    ax.imshow(correlations, cmap="RdBu", vmin=-1, vmax=1)
    for (row, column), value in np.ndenumerate(correlations.to_numpy()):
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                color="white" if abs(value) > 0.7 else "black")
    ax.set_xticks(range(len(correlations)), correlations.columns, rotation=45, ha="right")
    ax.set_yticks(range(len(correlations)), correlations.index)
    ax.set(title="Rank correlation of the criteria within a layer (Spearman, mean over layers)")
    return ax


def ladder(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Paired difference of each row with the first kind of model, in points, with its 95 %
    interval, one below the other.

    Columns: top1_change, top1_change_low and top1_change_high, as `accuracy.difference` gives them,
    and the name of each row in `rung`, `stage`, `candidate` or `model`, else in the first column.

    Example: `plots.ladder(pd.DataFrame({"rung": ["int8"], "top1_change": -0.01, "top1_change_low":
    -0.02, "top1_change_high": 0.0}))`
    """
    ax = ax or _axes(8, 0.45 * len(table) + 1.4)
    names = next((name for name in ("rung", "stage", "candidate", "model") if name in table),
                 table.columns[0])
    errors = [(table.top1_change - table.top1_change_low) * 100,
              (table.top1_change_high - table.top1_change) * 100]
    ax.errorbar(table.top1_change * 100, range(len(table)), xerr=errors, fmt="o", capsize=3,
                color=BLUE)
    ax.axvline(0, color=GREY, linestyle=":")
    ax.set_yticks(range(len(table)), table[names])
    ax.invert_yaxis()
    ax.set(xlabel="top-1 against float32, points (same test images)")
    return ax


def blame(table: pd.DataFrame, *, most: int = 12, ax: Axes | None = None) -> Axes:
    """Effect of each layer on the logits and what of it a repair takes away, the first suspects of
    diagnosis.diagnose.

    Example: `plots.blame(diagnosis.diagnose(folded, quantised, batches).table)`
    """
    first = table.head(most)
    ax = ax or _axes(8, 0.35 * len(first) + 1.4)
    at = np.arange(len(first))
    ax.barh(at, first.effect, color=GREY, label="effect: what stays is the price of the bits")
    ax.barh(at, first.blame, color=RED, label="blame: what a repair takes away")
    ax.set_yticks(at, [f"{r.layer}: {r.cause}" for r in first.itertuples()], fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="error of the logits by this layer alone, share of their energy",
           title="Layers in order of blame")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def load(table: pd.DataFrame, *, by: str = "candidate") -> Figure:
    """Requests per second and 99th percentile of the wait against the number of clients, of
    latency.under_load.

    Example: `plots.load(pd.DataFrame({"candidate": "int8", "clients": [1, 16], "requests_per_s":
    [50.0, 90.0], "p99_ms": [20.0, 180.0]}))`
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, part in table.groupby(by, sort=False):
        left.plot(part.clients, part.requests_per_s, "o-", label=name)
        right.plot(part.clients, part.p99_ms, "o-", label=name)
    for axes, title in ((left, "requests per second"), (right, "99th percentile of the wait, ms")):
        axes.set(xscale="log", xlabel="clients in a closed loop", ylabel=title)
        axes.set_xticks(sorted(set(table.clients)),
                        [str(count) for count in sorted(set(table.clients))])
        axes.minorticks_off()
    right.set_yscale("log")
    left.legend(frameon=False, fontsize=8)
    return figure


def throughput(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Examples per second by size of batch, a line per candidate and number of threads, of
    latency.grid.

    Example: `throughput(pd.DataFrame({"candidate": "int8", "threads": 1, "batch": [1, 4],
    "examples_per_s": [90.0, 240.0]}))`
    """
    ax = ax or _axes(7, 4)
    for k, (name, part) in enumerate(table.groupby("candidate", sort=False)):
        for threads, line in part.groupby("threads"):
            ax.plot(line.batch, line.examples_per_s,
                    "o" + ("-", "--", ":", "-.")[(threads - 1) % 4], color=f"C{k}",
                    label=f"{name}, threads {threads}")
    ax.set(xscale="log", xlabel="batch", ylabel="examples per second",
           title=table.attrs.get("machine", ""))
    ax.set_xticks(sorted(set(table.batch)), [str(size) for size in sorted(set(table.batch))])
    ax.minorticks_off()
    ax.title.set_fontsize(8)
    ax.legend(frameon=False, fontsize=8)
    return ax


def _axes(wide: float, high: float) -> Axes:
    return plt.subplots(figsize=(wide, high), dpi=100, layout="constrained")[1]
