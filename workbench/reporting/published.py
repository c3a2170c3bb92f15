"""Published figures beside ours: each is looked up in a table that a report left, never typed, and
the verdict is computed.

data/published/beside.csv says for each figure of articles.csv where ours is: report, table, where
(COLUMN=VALUE; ...), column; papers_beside.csv does so for papers.csv. `to` names the published
figure that it is a share of, or a change from (form "ratio" or "difference"; without it the
figure's own `baseline`), base the row of ours that corresponds; form "value" compares as it stands,
"saved" one less our share, "shown" is not compared, and `differs` says why.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from workbench.reporting.plots import BLUE, GREY, RED

KEY = ["id", "subject", "setting", "metric"]
PLACE_COLUMNS = ("form", "report", "table", "where", "column", "base", "to", "low", "high", "scale",
                 "better", "differs")
FORMS = ("ratio", "difference", "value", "saved", "shown", "none")
# colour, marker
MARKS = {"better": (BLUE, "o"), "equal": (GREY, "s"), "worse": (RED, "v"),
         "not comparable": (GREY, "x")}
# of a figure without an interval: how far it may lie from the published one and be called equal
NEAR = 0.01


def beside(articles: pd.DataFrame, places: pd.DataFrame, reports: Iterable[Path], *,
           written: Mapping[str, Path] | None = None) -> pd.DataFrame:
    """One row per published figure: KEY, value, unit, published (as it is compared), ours, low,
    high, n, from_, verdict, form, better, differs.

    articles: columns KEY, value, unit, and perhaps baseline, paper. places: as
    data/published/beside.csv. reports: folders of reports; a table is taken from the first that has
    it. written: folders of reports that are being written, by name, looked at first. verdict:
    "better" or "worse" where the interval of ours, or without one ours by more than a hundredth,
    lies beyond the published figure, "equal" where not; "not comparable" where the form is "shown",
    "missing" where ours is.

    Raises ValueError for a table that lacks a column, a figure that is told of twice or of which
    nothing is told, one without a value or a source, or an unknown form.

    Example: `beside(pd.read_csv("articles.csv"), pd.read_csv("beside.csv"),
    [Path("reports/full")])`
    """
    articles, places = (table.astype(object).where(table.notna(), "")
                        for table in (articles, places))
    for table, name, needed in ((articles, "articles", (*KEY, "value", "unit")),
                                (places, "beside", (*KEY, *PLACE_COLUMNS))):
        lacking = [column for column in needed if column not in table]
        if lacking:
            raise ValueError(f"{name}: no column {', '.join(lacking)}; there are "
                             f"{', '.join(map(str, table.columns))}")
        twice = table[table.duplicated(KEY)]
        if len(twice):
            raise ValueError(f"{name}: {' / '.join(twice.iloc[0][KEY])} stands there twice")
    values = articles.set_index(KEY).value
    if (values == "").any():
        raise ValueError(f"articles: {' / '.join(values.index[values == ''][0])} has no value")
    if "paper" in articles and (articles.paper == "").any():
        raise ValueError(f"articles: {' / '.join(articles[articles.paper == ''].iloc[0][KEY])} "
                         "names no source")
    for lacking, name, others in ((places, "articles", articles), (articles, "beside", places)):
        odd = lacking.merge(others[KEY], on=KEY, how="left",
                            indicator=True).query("_merge == 'left_only'")
        if len(odd):
            raise ValueError(f"{name}: nothing is told of {' / '.join(odd.iloc[0][KEY])}")
    baseline = articles.baseline if "baseline" in articles else pd.Series("", articles.index)
    joined = articles[[*KEY, "value", "unit"]].assign(baseline=baseline).merge(places, on=KEY)
    folders, written = list(reports), written or {}
    return pd.DataFrame([_row(figure, values, folders, written) for figure in joined.itertuples()])


def counted(table: pd.DataFrame) -> pd.Series:
    """How many figures have each verdict.

    Example: `counted(pd.DataFrame({"verdict": ["better", "equal"]}))["better"] == 1`
    """
    return table.verdict.value_counts().reindex(["better", "equal", "worse", "not comparable",
                                                 "missing"], fill_value=0)


def order(table: pd.DataFrame, by: str = "id", *, fewest: int = 4, samples: int = 1000,
          seed: int = 0) -> pd.DataFrame:
    """Whether ours stand in the order of the published: a row for each `by` with at least `fewest`
    figures beside ours, three of them different: by, figures, correlation (Spearman's, of the
    ranks) and low, high, its 95 % interval (bootstrap over figures).

    It asks less than a verdict: on other data, other pictures or another processor the order can
    hold where no figure does.

    Example: `published.order(table[table.metric == "top1_acc"], by="paper")`
    """
    draw, rows = np.random.default_rng(seed), []
    for name, part in table[table.ours.notna()].groupby(by, sort=False):
        if len(part) < fewest or min(part.ours.nunique(), part.published.nunique()) < 3:
            continue
        pairs = part[["published", "ours"]].astype(float).to_numpy()
        drawn = [_correlation(pairs[sample])
                 for sample in draw.integers(len(pairs), size=(samples, len(pairs)))]
        # a sample of one figure alone has no order
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        rows.append({by: name, "figures": len(part), "correlation": _correlation(pairs), "low": low,
                     "high": high})
    return pd.DataFrame(rows, columns=[by, "figures", "correlation", "low", "high"])


def _correlation(pairs: np.ndarray) -> float:
    ranks = pd.DataFrame(pairs).rank()
    return ranks[0].corr(ranks[1]) if (ranks.nunique() > 1).all() else float("nan")


def systems(named: pd.DataFrame, figures: pd.DataFrame,
            reports: Mapping[str, Path]) -> pd.DataFrame:
    """One row per system of the field, in words, for the front page: id, system, report, here,
    full, published, verdict.

    named: columns id, system, report, headline (a part of its name; the first one where it is
    empty). figures: of `beside`. reports: folders of reports "here" and "full", whose headlines the
    columns of these names hold.

    Example: `systems(pd.read_csv("systems.csv"), table, report.others)`
    """
    rows = []
    for system in named.astype(object).where(named.notna(), "").itertuples():
        own = figures[figures.id == system.id]
        compared = own[own.verdict.isin(["better", "equal", "worse"])]
        words = [f"{row.subject}, {row.metric}: {row.published:.3g}, ours {_interval(row)}"
                 for row in compared.itertuples()]
        counts = compared.verdict.value_counts()
        rows.append({"id": system.id, "system": system.system, "report": system.report,
                     **{name: _headline(folder, system.report, system.headline)
                        for name, folder in reports.items()},
                     "published": "; ".join(words)
                     or ("no figure that compares" if len(own) else "no figure"),
                     "verdict": ", ".join(f"{count} {word}" for word, count in counts.items())})
    return pd.DataFrame(rows)


def _interval(row) -> str:
    known = row.low is not None and not pd.isna(row.low)
    return f"{row.ours:.3g} [{row.low:.3g}, {row.high:.3g}]" if known else f"{row.ours:.3g}"


def _headline(folder: Path, report: str, part: str) -> str:
    """The text of a report's headline whose name has this part, "" where there is none."""
    path = folder / report / "run.json"
    if not path.exists():
        return ""
    known = [line for line in json.loads(path.read_text())["headlines"] if part in line["name"]]
    return f"{known[0]['name']}: {known[0]['text']}" if known else ""


def apart(table: pd.DataFrame, *, title: str = "") -> Axes:
    """What is compared, one figure a row: how many times as good ours is as the published one, of
    `beside`, in ratios.

    A difference of points is left out: it has no ratio.

    Example: `apart(pd.DataFrame({"id": ["C8"], "subject": ["int8"], "setting": ["phone"], "metric":
    ["size"], "published": [0.25], "ours": [0.2], "verdict": ["better"], "form": ["ratio"],
    "better": ["less"]}))`
    """
    compared = table.verdict.isin(["better", "equal", "worse"]) & (table.form != "difference")
    rows = table[compared & (table.ours > 0)].iloc[::-1]
    colours = rows.verdict.map({verdict: colour for verdict, (colour, _) in MARKS.items()})
    times = np.where(rows.better == "less", rows.published / rows.ours, rows.ours / rows.published)
    axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1.2), layout="constrained")[1]
    at = np.arange(len(rows))
    axes.hlines(at, 1, times, color=colours, linewidth=2)
    for verdict, (_, marker) in MARKS.items():
        if verdict == "not comparable":
            continue
        chosen = (rows.verdict == verdict).to_numpy()
        axes.scatter(times[chosen], at[chosen], color=colours[chosen], marker=marker, label=verdict,
                     zorder=3)
    axes.axvline(1, color=GREY, linewidth=1)
    names = [", ".join(filter(None, (row.subject, row.setting, row.metric)))
             for row in rows.itertuples()]
    axes.set_yticks(at, [f"{system}  {name}" for system, name in zip(rows.id, names, strict=True)],
                    fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set(xscale="log", xlabel="times as good as published", title=title)
    axes.set_xticks(ticks := [0.25, 0.5, 1, 2, 4, 8], [f"{tick:g}" for tick in ticks])
    axes.legend(frameon=False, fontsize=8)
    return axes


def pairs(table: pd.DataFrame, ids: Mapping[str, str], *, title: str = "") -> Axes:
    """Published against ours, a panel for each of `ids` (id of the table: its title), with the
    interval of ours and the line on which the two agree; of `beside`.

    Example: `pairs(pd.DataFrame({"id": ["B0"], "published": [92.2], "ours": [92.1], "low": [91.6],
    "high": [92.6], "verdict": ["equal"]}), {"B0": "baselines"})`
    """
    shown = {name: table[(table.id == name) & table.ours.notna()] for name in ids}
    shown = {name: part for name, part in shown.items() if len(part)}
    grid = plt.subplots(1, max(len(shown), 1), figsize=(3.6 * max(len(shown), 1), 3.8),
                        layout="constrained", squeeze=False)[1][0]
    for axes, (name, part) in zip(grid, shown.items(), strict=False):
        if set(part.verdict) == {"not comparable"}:  # then only the order is to be seen
            axes.set(xscale="log", yscale="log")
            axes.tick_params(axis="x", which="minor", labelbottom=False)
        else:
            ends = [min(part.published.min(), part.ours.min()),
                    max(part.published.max(), part.ours.max())]
            axes.plot(ends, ends, color=GREY, linewidth=1)
        for verdict, (colour, marker) in MARKS.items():
            own = part[part.verdict == verdict].astype({"published": float, "ours": float})
            reach = [(own.ours - own.low.astype(float)).fillna(0),
                     (own.high.astype(float) - own.ours).fillna(0)]
            axes.errorbar(own.published, own.ours, yerr=reach, fmt=marker, color=colour,
                          markersize=4, linewidth=1, label=verdict)
        axes.set(title=ids[name], xlabel="published", ylabel="ours")
    grid[0].figure.suptitle(title)
    grid[0].legend(frameon=False, fontsize=8)
    return grid[0]


def _row(figure, values: pd.Series, reports: list[Path], written: Mapping[str, Path]) -> dict:
    if figure.form not in FORMS:
        raise ValueError(f"beside: {figure.id} / {figure.subject} / {figure.metric} has the form "
                         f"{figure.form!r}; expected one of {', '.join(FORMS)}")
    row = {key: getattr(figure, key) for key in KEY} | {"value": figure.value, "unit": figure.unit}
    row |= {"published": _published(figure, values), "ours": None, "low": None, "high": None,
            "n": None, "from_": ""}
    found = _ours(figure, reports, written) if figure.form != "none" else None
    return row | (found or {}) | {"verdict": _verdict(row["published"], found, figure),
                                  "form": figure.form,
                           "better": figure.better, "differs": figure.differs}


def _published(figure, values: pd.Series) -> float:
    """The published figure as it is compared: itself, or beside the one that it is a share of or a
    change from."""
    if figure.form in ("ratio", "difference") and not figure.to and figure.baseline != "":
        return (figure.value / figure.baseline if figure.form == "ratio"
                else figure.value - figure.baseline)
    if not figure.to or figure.form == "shown":
        return (1 + figure.value / 100 if figure.form == "ratio" and figure.unit == "%"
                and figure.value < 0 else figure.value)
    subject, _, setting = figure.to.rpartition(" / ")
    base = values[(figure.id, subject, setting, figure.metric)]
    return figure.value / base if figure.form == "ratio" else figure.value - base


def _ours(figure, reports: list[Path], written: Mapping[str, Path]) -> dict | None:
    """Ours from the first folder that has the table and the row, with its interval; None where none
    has."""
    own = [("this run", written[figure.report])] if figure.report in written else []
    for where, report in (*own, *((folder.name, folder / figure.report) for folder in reports)):
        paths = report / "tables" / f"{figure.table}.csv", report / f"{figure.table}.csv"
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            continue
        table = pd.read_csv(path)
        row = _found(table, figure.where)
        base = _found(table, figure.base) if figure.base else None
        if row is None or (figure.base and base is None) or figure.column not in table:
            continue
        scale = float(figure.scale or 1)
        value = (_compared(row[figure.column], None if base is None else base[figure.column],
                           figure.form) * scale)
        ends = [row[column] * scale for column in (figure.low, figure.high) if column]
        low, high = sorted(ends) if len(ends) == 2 else (None, None)
        count = row["n"] if "n" in table else None
        return {"ours": value, "low": low, "high": high, "n": count,
                "from_": f"{where}/{figure.report}/{figure.table}"}
    return None


def _compared(value: float, base: float | None, form: str) -> float:
    if base is None:
        return 1 - value if form == "saved" else value
    return value - base if form == "difference" else value / base


def _found(table: pd.DataFrame, where: str) -> pd.Series | None:
    """The first row for which all of `COLUMN=VALUE; ...` holds; a VALUE may be several, `one |
    other`; row=K is the Kth."""
    rows = table
    for condition in filter(None, (part.strip() for part in where.split(";"))):
        column, wanted = (part.strip() for part in condition.split("=", 1))
        if column == "row":
            rows = rows.iloc[int(wanted) - 1:int(wanted)]
            continue
        if column not in rows:
            return None
        rows = rows[rows[column].astype(str).isin([one.strip() for one in wanted.split("|")])]
    return rows.iloc[0] if len(rows) else None


def _verdict(published: float, found: dict | None, figure) -> str:
    if found is None:
        return "missing"
    if figure.form == "shown" or not figure.better:
        return "not comparable"
    low, high = (found["low"], found["high"]) if found["low"] is not None else (found["ours"],
                                                                                found["ours"])
    room = 0.0 if found["low"] is not None else NEAR * abs(published)
    if low - room <= published <= high + room:
        return "equal"
    return "better" if (high < published) == (figure.better == "less") else "worse"
