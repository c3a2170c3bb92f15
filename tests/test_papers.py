"""Tables as a paper prints them."""

import shutil
import subprocess

import pandas as pd
import pytest

from workbench.reporting.papers import Paper, latex, markdown
from workbench.reporting.report import Report

TABLE = pd.DataFrame({
    "candidate": ["float32", "8 bits, 50% & more"], "top1": [0.9461, 0.9425],
    "top1_low": [0.94, 0.936],
    "top1_high": [0.952, 0.948], "latency_ms": [0.38, 0.19], "top1_change": [0.0, -0.0036],
    "p_value": [1.0, 0.002], "size": [float("nan"), 3.0]})
SHOWN = {"candidate": "Method", "top1": "Top-1, %", "top1_change": "Change", "latency_ms": "ms",
         "size": "MB"}
PAPER = Paper("Eight bits", SHOWN,
              percent=["top1", "top1_change"], digits={"latency_ms": 3},
              best={"latency_ms": "least"},
              marked="top1_change", notes=["Fashion-MNIST instead of ImageNet"])


def test_markdown_has_intervals_marks_the_best_and_notes():
    assert markdown(TABLE, PAPER) == """**Eight bits**

| Method | Top-1, % | Change | ms | MB |
| --- | ---: | ---: | ---: | ---: |
| float32 | 94.61 [94.00, 95.20] | 0.00 | 0.380 | -- |
| 8 bits, 50% & more | 94.25 [93.60, 94.80] | -0.36* | **0.190** | 3.00 |

in brackets: 95 % interval; * told apart from the reference by a paired test, p < 0.05  \nFashion-MNIST instead of ImageNet
"""  # noqa: E501


def test_latex_is_of_booktabs_and_siunitx_and_escapes_what_is_its_own():
    written = latex(TABLE, PAPER, "eight")
    assert r"\begin{tabular}{lrrrr}" in written
    row = (r"8 bits, 50\% \& more & \num{94.25} [\num{93.60}, \num{94.80}] & "
           r"\num{-0.36}\textsuperscript{*} & \textbf{0.190} & \num{3.00} \\")
    assert row in written
    assert [written.index(part) for part in (r"\toprule", r"\midrule", r"\bottomrule")] == sorted(
        written.index(part) for part in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"\footnotesize Fashion-MNIST instead of ImageNet" in written


def test_a_deviation_over_runs_stands_behind_its_mean():
    table = pd.DataFrame({"order": ["PDQ"], "top1": [93.0], "top1_sd": [0.25], "top1_low": [1.0],
                          "top1_high": [2.0]})
    paper = Paper("Orders", {"order": "Order", "top1": "Top-1"}, digits={"top1": 1})
    assert "| PDQ | 93.0 ± 0.2 |" in markdown(table, paper)
    assert r"PDQ & \num{93.0} $\pm$ \num{0.2} \\" in latex(table, paper, "orders")
    assert "standard deviation" in markdown(table, paper)


@pytest.mark.parametrize(("paper", "named"), [
    (Paper("One", {"colour": "Colour"}), "there is no column 'colour'"),
    (Paper("One", {}, best={"top1": "highest"}), "best is 'highest'"),
    (Paper("One", {}, percent=["share"]), "there is no column 'share'"),
])
def test_what_the_table_lacks_is_refused(paper, named, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_REPORT", str(tmp_path))
    with pytest.raises(ValueError, match=f"paper table 'One': {named}"):
        Report("01_one").table(TABLE, "eight", paper=paper)
    assert not list(tmp_path.rglob("eight*")), "nothing half-written"


def test_a_report_leaves_the_table_three_times(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_REPORT", str(tmp_path))
    Report("01_one").table(TABLE, "eight", paper=PAPER)
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [
        "eight.csv", "eight.md", "eight.tex"]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no TeX here")
def test_a_tex_takes_it(tmp_path):
    head = "\\documentclass{article}\\usepackage{booktabs,siunitx}\\begin{document}"
    whole = head + latex(TABLE, PAPER, "x") + "\\end{document}"
    (tmp_path / "table.tex").write_text(whole)
    made = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"],
                          cwd=tmp_path, check=False,
                          capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:]
    assert (tmp_path / "table.pdf").stat().st_size > 1000
