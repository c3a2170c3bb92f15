"""What a notebook leaves behind: tables, figures, checks and headline figures, in the folder of its
report."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench import files, machine
from workbench.reporting import papers
from workbench.reporting.papers import Paper


class Report:
    """The report of the notebook `name`.

    In a batch run it writes to the folder that the runner gives (WORKBENCH_REPORT), otherwise to
    reports/lab/NAME. Everything that it is told stands in result.json there at once, so a crash
    loses nothing.

    Example: `report = Report("01_baseline"); report.table(frame, "accuracy")`
    """

    def __init__(self, name: str):
        self.folder = Path(os.environ.get("WORKBENCH_REPORT") or files.REPORTS / "lab" / name)
        # the kernel ends with its runner, also where it stands still at that time
        if machine.RUN in os.environ:
            machine.end_with_parent()
        self.checks: list[dict] = []
        self.headlines: list[dict] = []

    @property
    def scratch(self) -> Path:
        """A folder for the states of long work: it outlives a killed run; the runner empties it
        once all is done."""
        path = Path(os.environ.get("WORKBENCH_SCRATCH") or self.folder / "scratch")
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def others(self) -> dict[str, Path]:
        """Where the reports of other notebooks lie: "here", of this run, and "full", the committed
        ones of the full profile."""
        here = self.folder.parent if "WORKBENCH_REPORT" in os.environ else files.REPORTS
        return {"here": here, "full": files.REPORTS / "full"}

    def table(self, frame: pd.DataFrame, name: str, *, paper: Paper | None = None) -> pd.DataFrame:
        """Write `frame` to tables/NAME.csv and return it, so that a cell ends by showing it; with
        `paper` also as a paper prints it, NAME.md and NAME.tex. Raises ValueError as papers.latex
        does."""
        written = {"csv": frame.to_csv(index=False)}
        if paper:
            written |= {"md": papers.markdown(frame, paper),
                        "tex": papers.latex(frame, paper, name)}
        for kind, text in written.items():
            with files.atomic(self.folder / "tables" / f"{name}.{kind}") as new:
                new.write_text(text, encoding="utf-8")
        return frame

    def figure(self, drawn: Axes | Figure, name: str) -> None:
        """Write a figure to figures/NAME.png, in 256 colours, a third of the bytes; the notebook
        shows it at the end of the cell, as it does any plot."""
        from PIL import Image

        figure = drawn.get_figure() if isinstance(drawn, Axes) else drawn
        with files.atomic(self.folder / "figures" / f"{name}.png") as new:
            figure.savefig(new, dpi=110, bbox_inches="tight")
            with Image.open(new) as whole:
                few = whole.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            few.save(new, optimize=True)

    def check(self, name: str, value, *, at_least=None, at_most=None, equals=None) -> str:
        """Record one claim with its limit; exactly one limit is given. A value that is NaN does not
        pass.

        Returns the line that the notebook shows. Raises ValueError where no limit or several are
        given.
        """
        limits = [(kind, limit)
                  for kind, limit in ((">=", at_least), ("<=", at_most), ("=", equals))
                  if limit is not None]
        if len(limits) != 1:
            raise ValueError(f"check {name!r}: give exactly one of at_least, at_most, equals, "
                             f"found {len(limits)}")
        kind, limit = limits[0]
        passed = bool({">=": lambda: value >= limit, "<=": lambda: value <= limit,
                       "=": lambda: value == limit}[kind]())
        return self._record({"name": name, "value": _plain(value), "limit": f"{kind} {limit}",
                             "passed": passed})

    def verdict(self, name: str, checks: list[dict]) -> str:
        """Record the checks of a verdict, such as Equivalence.checks(), each under `name`."""
        return "\n".join(self._record(check
                                      | {"name": f"{name}: {check['name']}",
                                         "value": _plain(check["value"])})
                         for check in checks)

    def headline(self, name: str, value, *, text: str | None = None,
                 interval: Sequence[float] | None = None) -> None:
        """Record a figure for the index page: `text` is how it reads there, with its unit and
        interval.

        value: a number, or what has value, low and high, such as a Score or a Difference. interval:
        95 %, of a figure that is no time: in the quick profile the runner holds it against the
        committed full run's.
        """
        words = text or f"{value}"
        if hasattr(value, "low"):
            interval, value = (value.low, value.high), value.value
        told = {"name": name, "value": _plain(value), "text": words}
        if interval is not None:
            told |= dict(zip(("low", "high"), map(_plain, interval), strict=True))
        self.headlines.append(told)
        self._write()

    def _record(self, check: dict) -> str:
        self.checks.append(check)
        self._write()
        value = f"{check['value']:.6g}" if isinstance(check["value"], float) else check["value"]
        return f"{'✓' if check['passed'] else '✗'} {check['name']}: {value} ({check['limit']})"

    def _write(self) -> None:
        with files.atomic(self.folder / "result.json") as new:
            new.write_text(json.dumps({"checks": self.checks, "headlines": self.headlines},
                                      indent=1))


def _plain(value):
    """numpy and torch scalars as Python's own, which JSON can hold."""
    return value.item() if hasattr(value, "item") else value
