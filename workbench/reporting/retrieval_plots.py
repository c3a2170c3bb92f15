"""Plots of retrieval between modalities, of codes and of the bits that they cost; see plots."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench.reporting.plots import BLUE, GREY, RED

COLOURS = (BLUE, RED, "#2e7d32", "#b26a00", "#6a1b9a", "#5d4037", "#00838f", "#d81b60")


def recalls(table: pd.DataFrame) -> Figure:
    """Recall at 10 with its interval, a panel for each "held out", a line for each direction, a
    mark for each "codebook" where there is one, and chance as a grey tick, of
    retrieval.directions.

    Example: `recalls(pd.DataFrame({"held out": ["pictures"], "query": ["word"], "gallery":
    ["image"], "recall_at_10": [0.8], "recall_at_10_low": [0.7], "recall_at_10_high": [0.9],
    "chance_at_10": [0.1], "gallery_size": [100]}))`
    """
    parts = list(dict.fromkeys(table["held out"]))
    kinds = list(dict.fromkeys(table.codebook)) if "codebook" in table else [""]
    high = 1.9 * max(len(kinds), 2) ** 0.7 + 1.6
    figure, grid = plt.subplots(1, len(parts), figsize=(5.2 * len(parts), high), squeeze=False,
                                layout="constrained", sharey=True)
    for axes, part in zip(grid.flat, parts, strict=True):
        for k, (kind, colour) in enumerate(zip(kinds, COLOURS * len(kinds), strict=False)):
            rows = table[(table["held out"] == part) & ((table.codebook == kind) if kind else True)]
            at = np.arange(len(rows))[::-1] - 0.7 * (k - (len(kinds) - 1) / 2) / len(kinds)
            spread = (100
                      * np.array([rows.recall_at_10 - rows.recall_at_10_low,
                                  rows.recall_at_10_high - rows.recall_at_10]))
            axes.errorbar(100 * rows.recall_at_10, at, xerr=spread, fmt="o", color=colour,
                          markersize=4, label=kind or None)
        axes.plot(100 * rows.chance_at_10, np.arange(len(rows))[::-1], "|", color=GREY,
                  markersize=14, label="chance")
        axes.set_yticks(np.arange(len(rows))[::-1],
                        [f"{r.query} to {r.gallery}" for r in rows.itertuples()])
        axes.set(xlabel="recall at 10, %",
                 title=f"{part}: about {rows.gallery_size.mean():.0f} to choose from",
                 xlim=(0, None))
    grid[0, -1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def rates(table: pd.DataFrame, whole: float) -> Axes:
    """Mean recall at 10 over coded bits a vector, a line for each allocation, `whole` that of
    float32 vectors as a grey line.

    Example: `retrieval_plots.rates(pd.DataFrame({"allocation": "even", "coded_bits": [64, 128],
    "recall_at_10": [0.4, 0.5], "step": [1, 2]}), 0.6)`
    """
    axes = plt.subplots(figsize=(7, 4.2), layout="constrained")[1]
    for (name, rows), colour in zip(table.groupby("allocation", sort=False), cycle(COLOURS),
                                    strict=False):
        rows = rows.sort_values("coded_bits")
        axes.semilogx(rows.coded_bits, 100 * rows.recall_at_10, "o-", color=colour, label=name,
                      markersize=5)
        for row in rows.itertuples():
            axes.annotate(f"{row.step}", (row.coded_bits, 100 * row.recall_at_10),
                          textcoords="offset points", xytext=(4, -10), fontsize=7)
    axes.axhline(100 * whole, color=GREY, linewidth=1, label="float32")
    axes.set(xlabel="coded bits a vector, tables included",
             ylabel="recall at 10, %, mean of all directions",
             title="What the bits buy (numbers: bits, or steps below the articles' precision)")
    axes.title.set_fontsize(10)
    axes.legend(frameon=False)
    return axes


def spectrograms(mels: np.ndarray, titles: Sequence[str], *, columns: int = 3) -> Figure:
    """Log-mel spectrograms (n, bands, frames) in 0-1, low bands below.

    Example: `spectrograms(np.zeros((2, 40, 10)), ["one", "two"])`
    """
    rows = -(-len(mels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.4 * columns, 1.6 * rows), squeeze=False,
                                layout="constrained")
    for axes, mel, title in zip(grid.flat, mels, titles, strict=False):
        axes.imshow(mel, origin="lower", aspect="auto", cmap="magma")
        axes.set_title(title, fontsize=8)
        axes.set(xticks=[], yticks=[])
    return figure


def codes(shown: Sequence[dict], *, most: int = 8) -> Figure:
    """For single codes a line each: title, pictures uint8 (n, 3, H, W), words and clips (texts)
    that use it.

    Example: `codes([{"title": "code 7", "pictures": np.zeros((2, 3, 8, 8), np.uint8), "words":
    ["cat"], "clips": ["a cat"]}])`
    """
    figure, grid = plt.subplots(len(shown), most + 2, figsize=(1.0 * most + 6.4, 1.25 * len(shown)),
                                squeeze=False, layout="constrained",
                                width_ratios=[1] * most + [3.2, 3.2])
    for line, code in zip(grid, shown, strict=True):
        for axes, picture in zip(line, code["pictures"][:most], strict=False):
            axes.imshow(np.moveaxis(picture, 0, -1))
        line[0].set_title(code["title"], fontsize=8, loc="left")
        for axes, kind in ((line[-2], "words"), (line[-1], "clips")):
            axes.text(0, 1, "\n".join(text[:38] for text in code[kind]), va="top", fontsize=7,
                      transform=axes.transAxes)
            axes.set_title(kind, fontsize=8, loc="left")
    for axes in figure.axes:
        axes.set_axis_off()
    return figure
