"""Figures of speech: a recording with what was heard in it, detectors of speech, words by voice,
the time of each hop."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from workbench.reporting.plots import BLUE, GREY, RED, _axes

COLOURS = {"command": BLUE, "speech": "#b8860b", "effect": "#2a7a5b"}


def heard(samples: np.ndarray, said: pd.DataFrame, events: pd.DataFrame, *, start_s: float,
          seconds: float, rate: int, ax: Axes | None = None) -> Axes:
    """The wave of some seconds, what was said in it (coloured spans) and what was heard (marks,
    each with its word).

    said: what, word, start_s, end_s; events: at_s, word.

    Example: `speech_plots.heard(scene.samples, scene.said, pd.DataFrame({"at_s": [1.0], "word":
    "one"}), start_s=0.0, seconds=2.0, rate=8_000)`
    """
    ax = ax or _axes(12, 4)
    part = samples[round(start_s * rate):round((start_s + seconds) * rate)]
    ax.plot(start_s + np.arange(len(part)) / rate, part, color=GREY, linewidth=0.4)
    top, drawn = 1.15 * max(np.abs(part).max(), 1e-3), set()
    for row in said[(said.end_s > start_s) & (said.start_s < start_s + seconds)].itertuples():
        ax.axvspan(row.start_s, row.end_s, color=COLOURS[row.what], alpha=0.25,
                   label=None if row.what in drawn else row.what)
        drawn.add(row.what)
        if row.word:
            ax.annotate(row.word, (row.start_s, -top), fontsize=8, color=COLOURS[row.what])
    for row in events[(events.at_s >= start_s) & (events.at_s < start_s + seconds)].itertuples():
        ax.axvline(row.at_s, color=RED, linewidth=1.2)
        ax.annotate(row.word, (row.at_s, top), fontsize=8, color=RED, ha="left")
    ax.set(xlabel="seconds", ylabel="samples", xlim=(start_s, start_s + seconds),
           ylim=(-1.3 * top, 1.5 * top),
           title="What was said (below) and what was heard (red, above)")
    ax.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)
    return ax


def detectors(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], areas: Mapping[str, float], *,
              ax: Axes | None = None) -> Axes:
    """Speech that is heard against other sound that is taken for it, a line a detector; the upper
    left corner alone is drawn.

    curves: share taken for speech, share heard; areas: under each curve.

    Example: `speech_plots.detectors({"ours": (np.array([0.0, 1.0]), np.array([0.0, 1.0]))},
    {"ours": 0.5})`
    """
    ax = ax or _axes(8, 6)
    for place, (name, (wrong, right)) in enumerate(curves.items()):
        colour, style = ("black", BLUE, RED, "#2a7a5b", "#b8860b", "#7a4fa3",
                         GREY)[place % 7], ("-", "--", ":", "-.")[place % 4]
        ax.plot(100 * wrong, 100 * right, color=colour, linestyle=style,
                label=f"{name} ({areas[name]:.4f})")
    ax.set(xlim=(0, 40), ylim=(60, 100.5),
           xlabel="other sound that is taken for speech, percent of frames",
           ylabel="speech that is heard, percent of frames",
           title="Detectors of speech (area under the curve)")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def hops(milliseconds: Mapping[str, np.ndarray], *, deadline_ms: float,
         ax: Axes | None = None) -> Axes:
    """How long each hop took, as a histogram on two logarithmic axes, with the deadline.

    Example: `hops({"ours": np.linspace(0.1, 1, 100)}, deadline_ms=10.0)`
    """
    ax = ax or _axes(9, 4.5)
    most = max(deadline_ms * 1.5, *(values.max() for values in milliseconds.values()))
    edges = np.geomspace(max(min(values.min() for values in milliseconds.values()), 1e-3), most, 80)
    for place, (name, values) in enumerate(milliseconds.items()):
        ax.hist(values, edges, histtype="step", color=(BLUE, RED, "black", "#2a7a5b")[place % 4],
                linewidth=1.4, linestyle=("-", "--", ":", "-.")[place % 4], label=f"{name}: median "
                f"{np.median(values):.2f}, 99 of 100 within {np.percentile(values, 99):.2f} ms")
    ax.axvline(deadline_ms, color="black", linestyle="--", linewidth=1)
    ax.annotate("deadline", (deadline_ms, 1), rotation=90, fontsize=8, xytext=(3, 5),
                textcoords="offset points")
    ax.set(xscale="log", yscale="log", xlabel="milliseconds a hop", ylabel="hops",
           title="The whole chain, one thread")
    ax.legend(frameon=False, fontsize=8)
    return ax


def voices(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Words named right, by voice, with the interval of each. table: voice, candidate, right, low,
    high.

    Example: `speech_plots.voices(pd.DataFrame({"voice": ["a"], "candidate": "int8", "right": 0.9,
    "low": 0.8, "high": 1.0}))`
    """
    ax = ax or _axes(8, 4)
    names, candidates = list(table.voice.unique()), list(table.candidate.unique())
    for place, (candidate, part) in enumerate(table.groupby("candidate", sort=False)):
        at = [names.index(voice) + (place - (len(candidates) - 1) / 2) * 0.15
              for voice in part.voice]
        ends = [100 * (part.right - part.low), 100 * (part.high - part.right)]
        ax.errorbar(at, 100 * part.right, yerr=ends, fmt="os^D"[place % 4],
                    color=(BLUE, RED, "black", "#2a7a5b")[place % 4], capsize=3, label=candidate)
    ax.set(xticks=range(len(names)), xticklabels=names, ylabel="words named right, percent (95 %)",
           ylim=(None, 101), title="Words of voices that were not trained on")
    ax.legend(frameon=False, fontsize=8)
    return ax
