"""Figures of what single methods do: criteria and cuts, zeros, bits, factors, teaching, a
training."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from workbench.reporting.plots import BLUE, GREY, RED, _axes


def criteria(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Top-1 against the ratio removed, a line per criterion with its 95 % interval; random orders
    in grey.

    Example: `criteria(pd.DataFrame({"criterion": "l1", "ratio": [0.1, 0.3], "top1": [0.9, 0.7],
    "top1_low": [0.89, 0.68], "top1_high": [0.91, 0.72], "n": 1000}))`
    """
    ax = ax or _axes(8, 4.5)
    for name, line in table.groupby("criterion", sort=False):
        chance = str(name).startswith("random")
        errors = [(line.top1 - line.top1_low) * 100, (line.top1_high - line.top1) * 100]
        ax.errorbar(line.ratio, line.top1 * 100, errors, capsize=2, marker="o", markersize=4,
                    label=name, color=GREY if chance else None, linestyle=":" if chance else "-")
    ax.set(xlabel="fraction of the channels removed", ylabel="top-1, %",
           title=f"Accuracy left, by criterion ({table.n.max():,} images)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def recovery(table: pd.DataFrame, baseline: float, *, ax: Axes | None = None) -> Axes:
    """Change of top-1 against the baseline after recovery, of each criterion and target (95 %,
    paired), over seeds; beneath each what it was as cut.

    Example: `recovery(pd.DataFrame({"criterion": ["l1"], "macs_left": [0.5], "top1_cut": [0.6],
    "top1_change": [-0.002], "top1_change_low": [-0.004], "top1_change_high": [0.0]}), 0.94)`
    """
    ax = ax or _axes(8, 4.5)
    names = list(dict.fromkeys(table.criterion))
    for (target, part), shade in zip(table.groupby("macs_left", sort=False),
                                     (BLUE, RED, GREY, "#137a4b") * 9, strict=False):
        shift = 0.15 * list(dict.fromkeys(table.macs_left)).index(target)
        at = part.criterion.map(names.index) + shift
        _recovered(ax, at, part, shade, f"{target:.0%} of the MACs")
        for place, here in part.groupby(at):
            where = place + 0.015 * (len(here) - 1), 100 * here.top1_change_low.min()
            ax.annotate(f"as cut {here.top1_cut.mean():.1%}", where, xytext=(0, -6), ha="center",
                        textcoords="offset points", va="top", fontsize=7, color=shade)
    ax.set_xticks(range(len(names)), names)
    return _against_baseline(ax, baseline)


def structure(table: pd.DataFrame, baseline: float, *, ax: Axes | None = None) -> Axes:
    """Change of top-1 against the baseline of each pattern of zeros, fixed and regrown, and of
    missing channels, recovered (95 %, paired); beneath them what they were as cut.

    Example: `structure(pd.DataFrame({"pattern": ["2:4"], "zeros": ["fixed"], "sparsity": [0.5],
    "top1_cut": [0.6], "top1_change": [-0.002], "top1_change_low": [-0.004], "top1_change_high":
    [0.0]}), 0.94)`
    """
    ax = ax or _axes(8, 4)
    names = list(dict.fromkeys(table.pattern))
    for (kind, part), shade, shift in zip(table.groupby("zeros", sort=False), (BLUE, RED, GREY),
                                          (-0.08, 0.08, 0), strict=False):
        _recovered(ax, part.pattern.map(names.index) + shift, part, shade,
                   "no zeros" if kind == "none" else kind)
    firsts = table.groupby("pattern", sort=False)[["sparsity", "top1_cut"]].first()
    told = [f"{row.Index}\n{row.sparsity:.0%} of the weights gone\nas cut {row.top1_cut:.1%}"
            for row in firsts.itertuples()]
    ax.set_xticks(range(len(names)), told, fontsize=8)
    return _against_baseline(ax, baseline)


def bits(table: pd.DataFrame, baseline: float, *, ax: Axes | None = None) -> Axes:
    """Top-1 against bits a weight, a line per scheme with its 95 % interval.

    Example: `bits(pd.DataFrame({"scheme": "channel", "bits": [4, 8], "top1": [0.9, 0.94],
    "top1_low": [0.89, 0.93], "top1_high": [0.91, 0.95], "n": 1000}), 0.94)`
    """
    ax = ax or _axes(8, 4.5)
    for name, line in table.groupby("scheme", sort=False):
        errors = [(line.top1 - line.top1_low) * 100, (line.top1_high - line.top1) * 100]
        ax.errorbar(line.bits, line.top1 * 100, errors, capsize=2, marker="o", markersize=4,
                    label=name)
    ax.axhline(baseline * 100, color=GREY, linestyle=":", label="float32")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.invert_xaxis()
    ax.set(xlabel="bits of each weight", ylabel="top-1, %",
           title=f"Quantised weights ({table.n.max():,} images)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def budgets(table: pd.DataFrame, baseline: float, *, ax: Axes | None = None) -> Axes:
    """Top-1 by share of the MACs that stays, by kind of factors; hollow as cut, filled with
    interval after recovery.

    Example: `budgets(pd.DataFrame({"factors": "outputs", "macs_left": [0.5], "top1": [0.93],
    "top1_low": [0.92], "top1_high": [0.94], "top1_cut": [0.8]}), 0.94)`
    """
    ax = ax or _axes(7, 4)
    ax.axhline(baseline * 100, color=GREY, linestyle=":", label="baseline")
    for k, (kind, part) in enumerate(table.groupby("factors", sort=False)):
        colour, errors = (BLUE, RED)[k % 2], [(part.top1 - part.top1_low) * 100,
                                              (part.top1_high - part.top1) * 100]
        ax.errorbar(part.macs_left * 100, part.top1 * 100, yerr=errors, fmt="o-", capsize=3,
                    color=colour, label=f"factors of the {kind}")
        ax.plot(part.macs_left * 100, part.top1_cut * 100, "o", markerfacecolor="none",
                color=colour)
    ax.set(xlabel="MACs left, %", ylabel="top-1, %",
           title="Hollow: as factored; filled: after recovery")
    ax.legend(frameon=False, fontsize=8)
    return ax


def teaching(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Paired difference of each way of teaching with labels only, in points, with its 95 %
    interval.

    Example: `teaching(pd.DataFrame({"taught_by": ["hint"], "top1_change": [0.003],
    "top1_change_low": [-0.002], "top1_change_high": [0.009]}))`
    """
    taught = table[table.taught_by != "labels only"]
    names = list(dict.fromkeys(taught.taught_by))
    ax = ax or _axes(7, 0.45 * len(names) + 1.4)
    errors = [(taught.top1_change - taught.top1_change_low) * 100,
              (taught.top1_change_high - taught.top1_change) * 100]
    ax.errorbar(taught.top1_change * 100, taught.taught_by.map(names.index), xerr=errors, fmt="o",
                capsize=3, color=BLUE)
    ax.axvline(0, color=GREY, linestyle=":")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xlabel="top-1 against fine-tuning on labels only, points (same test images)")
    return ax


def history(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What is right among the training examples and the metric on the validation examples, epoch by
    epoch, of training.fit.

    Example: `history(pd.DataFrame({"epoch": [1, 2], "train_right": [0.8, 0.9], "validation_top1":
    [0.82, 0.91]}))`
    """
    ax = ax or _axes(7, 4)
    column = next(name for name in table.columns if name.startswith("validation_"))
    ax.plot(table.epoch, table.train_right * 100, color=GREY,
            label="training examples (pictures augmented), right")
    ax.plot(table.epoch, table[column] * 100, color=BLUE,
            label=f"validation examples, {column.partition('_')[2]}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel="%",
           title=f"Training: last epoch {table[column].iloc[-1]:.2%} on validation")
    ax.legend(frameon=False)
    return ax


def _recovered(ax: Axes, at: pd.Series, part: pd.DataFrame, shade: str, label: str) -> None:
    """Points of paired changes with their intervals, those of one place side by side."""
    change, beside = part.top1_change, 0.03 * part.groupby(at).cumcount()
    errors = [(change - part.top1_change_low) * 100, (part.top1_change_high - change) * 100]
    ax.errorbar(at + beside, change * 100, errors, fmt="o", capsize=3, color=shade, label=label)


def _against_baseline(ax: Axes, baseline: float) -> Axes:
    ax.axhline(0, color=GREY, linestyle=":", label=f"baseline, {baseline:.2%}")
    ax.set(ylabel="change of top-1 after recovery, points")
    ax.margins(x=0.15, y=0.15)
    ax.legend(frameon=False, fontsize=8)
    return ax
