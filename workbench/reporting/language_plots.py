"""Figures of language: students by accuracy and time, what a cut loses, sentences that are let
in."""

from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes

from workbench.reporting.plots import BLUE, GREY, RED, _axes

METRICS = (("intent", BLUE, "o"), ("f1", RED, "s"), ("sentence", "#444444", "^"))
NAMES = {"intent": "intents", "f1": "F1 of slots", "sentence": "whole sentences"}


def students(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Accuracy of intents, slots and whole sentences against the time of one sentence, each with
    its interval.

    table: candidate, latency_ms; intent, f1 and sentence with _low and _high. Candidates that
    differ in ", seed N" alone have one name.

    Example: `students(pd.DataFrame({"candidate": ["int8"], "latency_ms": [3.0]} | {f"{m}{end}":
    [0.9] for m in ("intent", "f1", "sentence") for end in ("", "_low", "_high")}))`
    """
    ax = ax or _axes(9, 5)
    for metric, colour, marker in METRICS:
        ends = [100 * abs(table[f"{metric}_{end}"] - table[metric]) for end in ("low", "high")]
        ax.errorbar(table.latency_ms, 100 * table[metric], yerr=ends, fmt=marker, color=colour,
                    capsize=2, label=NAMES[metric])
    names = table.candidate.str.replace(r", seed \d+", "", regex=True)
    places = table.groupby(names)[["latency_ms", "intent_high"]].max().sort_values("latency_ms")
    for k, (name, place) in enumerate(places.iterrows()):  # neighbours' names at three heights
        ax.annotate(str(name), (place.latency_ms, 100 * place.intent_high), ha="center",
                    textcoords="offset points", xytext=(0, 5 + 9 * (k % 3)), fontsize=7,
                    color=GREY)
    ax.margins(y=0.1)
    ax.set(xscale="log", xlabel="milliseconds a sentence", ylabel="right, percent (95 %)",
           title="Smaller and faster")
    ax.legend(frameon=False, fontsize=8)
    return ax


def cuts(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What is lost against the time that is left, one line a metric; those that were taught again
    stand apart, hollow. table: candidate ("..., taught"), latency (share), and intent_change,
    f1_change and sentence_change with _low and _high.

    Example: `cuts(pd.DataFrame({"candidate": ["80%"], "latency": [0.8]} | {f"{m}_change{end}":
    [-0.01] for m in ("intent", "f1", "sentence") for end in ("", "_low", "_high")}))`
    """
    ax, taught = ax or _axes(8, 5), table.candidate.str.endswith(", taught")
    for metric, colour, marker in METRICS:
        change = f"{metric}_change"
        for rows, line, inside, more in ((table[~taught].sort_values("latency"), "-", colour, ""),
                                         (table[taught], "none", "white", ", taught again")):
            ends = [100 * abs(rows[f"{change}_{end}"] - rows[change]) for end in ("low", "high")]
            if len(rows):
                ax.errorbar(rows.latency, 100 * rows[change], yerr=ends, color=colour,
                            marker=marker, capsize=2, linestyle=line, markerfacecolor=inside,
                            label=NAMES[metric] + more)
    ax.axhline(0, color=GREY, linestyle=":")
    ax.axhline(-1, color=GREY, linestyle="--", linewidth=0.8)
    ax.set(xlabel="time of a sentence, as a share of the whole model's",
           ylabel="change, points (95 %)",
           title="Heads and neurons cut without training (dashed: a point lost)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def loads(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Requests a second against the wait of 99 of 100, a line a way of serving, from few clients to
    many.

    table: candidate, clients, requests_per_s, p99_ms.

    Example: `language_plots.loads(pd.DataFrame({"candidate": "int8", "clients": [1, 16],
    "requests_per_s": [50.0, 90.0], "p99_ms": [20.0, 180.0]}))`
    """
    ax = ax or _axes(9, 5)
    for place, (name, part) in enumerate(table.groupby("candidate", sort=False)):
        colour = (GREY, "black", BLUE, "#2a7a5b", "#b8860b", "#7a4fa3", RED)[place % 7]
        ax.plot(part.p99_ms, part.requests_per_s, marker="o^sDv*P"[place % 7], color=colour,
                label=name)
    for row in table[table.candidate == table.candidate.iloc[-1]].itertuples():
        ax.annotate(f"{row.clients} clients", (row.p99_ms, row.requests_per_s),
                    textcoords="offset points", xytext=(5, 5), fontsize=7)
    ax.set(xscale="log", xlabel="wait of 99 of 100 requests, milliseconds",
           ylabel="requests a second", title="Ways of serving sentences (upper left is better)",
           ylim=(0, None))
    ax.legend(frameon=False, fontsize=8)
    return ax


def contexts(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Milliseconds of one token against the tokens before it, a line a candidate. table: candidate,
    context, latency_ms.

    Example: `language_plots.contexts(pd.DataFrame({"candidate": "int8", "context": [16, 64],
    "latency_ms": [1.0, 1.5]}))`
    """
    ax = ax or _axes(8, 5)
    for place, (name, part) in enumerate(table.groupby("candidate", sort=False)):
        ax.plot(part.context, part.latency_ms, marker="osD^v*"[place % 6],
                color=("black", RED, BLUE, "#2a7a5b", GREY)[place % 5], label=name)
    ax.set(xscale="log", xlabel="tokens before it", ylabel="milliseconds a token",
           title="One token more", ylim=(0, None))
    places = sorted(table.context.unique())
    ax.set_xticks(places, [f"{place:,}" for place in places])
    ax.set_xticks([], minor=True)
    ax.legend(frameon=False, fontsize=8)
    return ax


def decoders(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Tokens a second, a bar a candidate, its perplexity as a share of float32's beside it.

    table: candidate, tokens_per_s, over.

    Example: `language_plots.decoders(pd.DataFrame({"candidate": ["float32"], "tokens_per_s": 40.0,
    "over": 1.0}))`
    """
    ax, rows = ax or _axes(8, 0.5 * len(table) + 1.5), table.iloc[::-1]
    ours = ~rows.candidate.str.contains("genai|transformers")
    ax.barh(rows.candidate, rows.tokens_per_s, color=[BLUE if own else GREY for own in ours])
    for row in rows.itertuples():
        known = "" if pd.isna(row.over) else f", {row.over:.3f}x the perplexity"
        ax.annotate(f"{row.tokens_per_s:,.0f}{known}", (row.tokens_per_s, row.candidate),
                    textcoords="offset points", xytext=(4, 0), va="center", fontsize=8)
    ax.set(xlabel="tokens a second, one sentence", title="Ours (blue) and others",
           xlim=(0, 1.5 * rows.tokens_per_s.max()))
    return ax


def rejected(curves: dict[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Share of the sentences in scope that are accepted against the share of others let in. curves:
    of rejection.roc, by name.

    Example: `rejected({"teacher": rejection.roc(np.array([0.9, 0.8]), np.array([0.2, 0.3]))})`
    """
    ax = ax or _axes(6, 5)
    for (name, curve), colour in zip(curves.items(), cycle((BLUE, RED, "#2a7a5b", "#b8860b")),
                                     strict=False):
        told = (f"{name}, area {curve.attrs['auc']:.3f} [{curve.attrs['auc_low']:.3f}, "
                f"{curve.attrs['auc_high']:.3f}]")
        ax.plot(100 * curve.let_in, 100 * curve.accepted, color=colour, label=told)
    ax.set(xlabel="sentences out of scope that are let in, percent",
           ylabel="sentences in scope that are accepted, percent",
           title="Rejecting what is out of scope")
    ax.legend(frameon=False, fontsize=8)
    return ax
