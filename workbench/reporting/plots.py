"""Plots of the workbench's DataFrames: each takes a frame and returns Axes; none shows, saves or sets anything global."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, RED, GREY = "#1f5fa8", "#b3261e", "#8a97a5"


def images(pictures: np.ndarray, titles: Sequence[str], *, columns: int = 10) -> Figure:
    """A grid of pictures, uint8 (n, C, H, W) with C of 1 or 3, each under its title."""
    rows = -(-len(pictures) // columns)
    figure, grid = plt.subplots(rows, columns, squeeze=False, figsize=(columns * 1.05, rows * 1.25), layout="constrained")
    for axes, picture, title in zip(grid.flat, pictures, titles, strict=False):
        axes.imshow(np.moveaxis(picture, 0, -1).squeeze(), cmap="gray_r", interpolation="nearest")
        axes.set_title(title, fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def confusion(counts: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Counts of true class (rows) against predicted class (columns); the colour leaves the diagonal out."""
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
    ax.set(xlabel="predicted class", ylabel="true class", title="Test images by true and predicted class (colour: errors)")
    return ax


def cost(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of the multiply-accumulates and of the parameters, layer by layer, of cost.table."""
    ax = ax or _axes(8, 4)
    heavy = table[table.macs > 0]
    at = np.arange(len(heavy))
    ax.bar(at - 0.2, heavy.macs / table.macs.sum() * 100, 0.4, label="MACs", color=BLUE)
    ax.bar(at + 0.2, heavy.params / table.params.sum() * 100, 0.4, label="parameters", color=GREY)
    ax.set_xticks(at, heavy.layer, rotation=90, fontsize=8)
    ax.set(ylabel="share of the whole, %", title=f"Cost by layer ({table.macs.sum() / 1e6:.1f} M MACs, "
                                                 f"{table.params.sum() / 1e3:,.0f} k parameters)")
    ax.legend(frameon=False)
    return ax


def latency(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Median latency of latency.paired, a bar per candidate and row, with the 95th percentile as a tick."""
    ax = ax or _axes(7, 0.45 * len(table) + 1.2)
    names = [f"{r.candidate}, threads {r.threads}, batch {r.batch}" for r in table.itertuples()]
    at = np.arange(len(table))[::-1]
    ax.barh(at, table.latency_ms, color=BLUE, height=0.6)
    ax.plot(table.p95_ms, at, "|", color=RED, markersize=12, label="95th percentile")
    for y, value in zip(at, table.latency_ms, strict=True):
        ax.text(value, y, f" {value:.2f} ", va="center", ha="right", color="white", fontsize=9)
    ax.set_yticks(at, names)
    ax.set(xlabel="latency of one batch, ms (median)", title=table.attrs.get("machine", ""))
    ax.title.set_fontsize(9)
    ax.legend(frameon=False, loc="lower right")
    return ax


def layer_cosine(frames: dict[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """1 - cosine of each layer's output, log scale, of equivalence.by_layer, one line per candidate."""
    ax = ax or _axes(8, 4.5)
    for (name, frame), marker in zip(frames.items(), "os^Dv*" * len(frames), strict=False):
        loss = np.maximum(1 - frame.cosine.to_numpy(), 1e-16)
        ax.semilogy(range(len(frame)), loss, marker=marker, markersize=4, label=name)
        for place in np.flatnonzero(frame["first"]):
            ax.annotate(f"parts at {frame.layer[place]}", (place, loss[place]), textcoords="offset points",
                        xytext=(-8, 8), ha="right", color=RED)
    frame = next(iter(frames.values()))
    ax.set_xticks(range(len(frame)), frame.layer, rotation=90, fontsize=8)
    ax.set(ylabel="1 - cosine with the reference", title="Where the models part, layer by layer (lower is closer)")
    ax.axhline(1 - 0.995, color=GREY, linestyle=":", label="limit, cosine 0.995")
    ax.legend(frameon=False)
    return ax


def history(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Top-1 on the augmented training images and on the validation images, epoch by epoch, of training.fit."""
    ax = ax or _axes(7, 4)
    ax.plot(table.epoch, table.train_top1 * 100, color=GREY, label="training images (augmented)")
    ax.plot(table.epoch, table.validation_top1 * 100, color=BLUE, label="validation images")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel="top-1, %", title=f"Training: last epoch {table.validation_top1.iloc[-1]:.2%} on validation")
    ax.legend(frameon=False)
    return ax


def _axes(wide: float, high: float) -> Axes:
    return plt.subplots(figsize=(wide, high), dpi=100, layout="constrained")[1]
