"""A table as a paper prints it, in Markdown and in LaTeX (booktabs, siunitx): what it means stands
in its column names.

NAME_low and NAME_high beside a column are its interval, NAME_sd its standard deviation over runs;
p_value marks the rows of a paired test. None of them becomes a column.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

# behind what is marked: a paired test tells it from its reference at this level
MARK, LEVEL = "*", 0.05


@dataclass(frozen=True)
class Paper:
    """How a table is printed. columns: what is shown, in this order, and its heading, with a unit
    where it has one. percent: columns of fractions, shown times 100. digits: behind the point, by
    column, 2 where not named. best: columns whose best value is bold, "most" or "least". marked:
    the column that the paired test's mark goes to. notes: lines beneath, of what differs.

    Example: `Paper("Eight bits", {"candidate": "Method", "top1": "Top-1, %"}, percent=["top1"],
    best={"top1": "most"})`
    """

    caption: str
    columns: Mapping[str, str]
    percent: Sequence[str] = ()
    digits: Mapping[str, int] = field(default_factory=dict)
    best: Mapping[str, str] = field(default_factory=dict)
    marked: str = ""
    notes: Sequence[str] = ()


def markdown(table: pd.DataFrame, paper: Paper) -> str:
    """The table in Markdown, its caption above and its notes beneath. Raises ValueError for a
    column that it lacks.

    Example: `markdown(pd.DataFrame({"method": ["ours"]}), Paper("Eight bits", {"method":
    "Method"}))`
    """
    rows = _cells(table, paper)
    lines = [list(paper.columns.values()),
             ["---" if _is_text(table[name]) else "---:" for name in paper.columns]]
    lines += [[f"**{cell.text()}**" if cell.best else cell.text() for cell in row] for row in rows]
    shown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return ("\n\n".join(part
                        for part in (f"**{paper.caption}**", shown,
                                     "  \n".join(_notes(table, paper))) if part) + "\n")


def latex(table: pd.DataFrame, paper: Paper, label: str) -> str:
    """The table as a LaTeX float; it needs \\usepackage{booktabs,siunitx}. Raises ValueError for a
    column that it lacks.

    Example: `latex(pd.DataFrame({"method": ["ours"]}), Paper("Eight bits", {"method": "Method"}),
    "eight")`
    """
    rows = _cells(table, paper)
    kinds = ["l" if _is_text(table[name]) else "r" for name in paper.columns]
    body = [" & ".join(cell.tex() for cell in row) + r" \\" for row in rows]
    heads = " & ".join(_escaped(heading) for heading in paper.columns.values()) + r" \\"
    notes = [rf"\par\smallskip\footnotesize {_escaped(note)}" for note in _notes(table, paper)]
    return "\n".join([r"\begin{table}", r"\centering", rf"\caption{{{_escaped(paper.caption)}}}",
                      rf"\label{{tab:{label}}}", rf"\begin{{tabular}}{{{''.join(kinds)}}}",
                      r"\toprule", heads, r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
                      *notes, r"\end{table}", ""])


@dataclass(frozen=True)
class _Cell:
    value: str
    around: tuple[str, ...] = ()  # a deviation, or both ends of an interval
    mark: str = ""
    best: bool = False

    def text(self) -> str:
        around = (f" [{self.around[0]}, {self.around[1]}]" if len(self.around) == 2
                  else "".join(f" ± {sd}" for sd in self.around))
        return self.value.replace("|", "\\|") + around + self.mark

    def tex(self) -> str:
        if not re.fullmatch(r"-?\d+(\.\d+)?", self.value):
            return _escaped(self.value) + self.mark
        # \num is not set in bold
        shape = (lambda number: number.replace("-", "$-$")) if self.best else r"\num{{{}}}".format
        numbers = [shape(number) for number in (self.value, *self.around)]
        around = (f" [{', '.join(numbers[1:])}]" if len(numbers) == 3
                  else "".join(rf" $\pm$ {number}" for number in numbers[1:]))
        written = numbers[0] + around + (rf"\textsuperscript{{{self.mark}}}" if self.mark else "")
        return rf"\textbf{{{written}}}" if self.best else written


def _cells(table: pd.DataFrame, paper: Paper) -> list[list[_Cell]]:
    missing = [name for name in (*paper.columns, *paper.best, *paper.percent) if name not in table]
    if missing:
        raise ValueError(f"paper table {paper.caption!r}: there is no column {missing[0]!r}; there "
                         f"are {', '.join(table)}")
    wrong = [what for what in paper.best.values() if what not in ("most", "least")]
    if wrong:
        raise ValueError(f"paper table {paper.caption!r}: best is {wrong[0]!r}, expected most or "
                         "least")
    best = {name: table[name].max() if what == "most" else table[name].min()
            for name, what in paper.best.items()}
    return [[_cell(table, row, name, paper, best) for name in paper.columns]
            for _, row in table.iterrows()]


def _cell(table: pd.DataFrame, row: pd.Series, name: str, paper: Paper,
          best: Mapping[str, float]) -> _Cell:
    if _is_text(table[name]):
        return _Cell(str(row[name]))
    if pd.isna(row[name]):
        return _Cell("--")

    def shown(value: float) -> str:
        return f"{value * (100 if name in paper.percent else 1):.{paper.digits.get(name, 2)}f}"

    ends = ("_sd",) if f"{name}_sd" in table else ("_low", "_high")
    beside = [row[f"{name}{end}"] for end in ends if f"{name}{end}" in table]
    marked = name == paper.marked and "p_value" in table and row.p_value < LEVEL
    around = tuple(map(shown, beside)) if len(beside) and not pd.isna(beside).any() else ()
    return _Cell(shown(row[name]), around, MARK if marked else "",
                 name in best and row[name] == best[name])


def _notes(table: pd.DataFrame, paper: Paper) -> list[str]:
    """What stands beneath: what brackets and marks mean, where there are any, and the notes."""
    own = []
    if any(f"{name}_sd" in table for name in paper.columns):
        own.append("mean ± standard deviation over runs")
    elif any(f"{name}_low" in table for name in paper.columns):
        own.append("in brackets: 95 % interval")
    if paper.marked and "p_value" in table:
        own.append(f"{MARK} told apart from the reference by a paired test, p < {LEVEL:g}")
    return ["; ".join(own)] * bool(own) + list(paper.notes)


def _is_text(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column)


def _escaped(text: str) -> str:
    """Text with what LaTeX reads as its own made plain."""
    plain = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    return (plain.replace("~", r"\textasciitilde{}").replace("^", r"\textasciicircum{}")
            .replace("±", r"$\pm$").replace("<", "$<$"))
