"""Published figures beside ours: looked up, compared, counted."""

import html
import json
import re
import shutil
import subprocess

import pandas as pd
import pytest

from workbench import files
from workbench.reporting import pages, published
from workbench.subjects import embedded

FIGURES = pd.DataFrame([
    ("X1", "before", "", "latency", 100.0, "ms"), ("X1", "after", "", "latency", 50.0, "ms"),
    ("X1", "after", "", "accuracy lost", 1.0, "points"), ("X2", "other", "", "power", 3.0, "W"),
], columns=[*published.KEY, "value", "unit"])


def told(**changes) -> pd.DataFrame:
    """Where ours of FIGURES stand; changes: of the row of the latency after."""
    empty = dict.fromkeys(("report", "table", "where", "column", "base", "to", "low", "high",
                           "scale", "better", "differs"), "")
    place = {"report": "10_one", "table": "times"}
    after = {"form": "ratio", "where": "candidate=small", "column": "ratio", "to": "before / ",
             "better": "less"}
    rows = [
        {"metric": "latency", "subject": "before", "form": "shown", **place, "where": "row=1",
         "column": "ms"},
        {"metric": "latency", "subject": "after", **place, **after, "low": "low", "high": "high",
         **changes},
        {"metric": "accuracy lost", "subject": "after", "form": "value", **place,
         "where": "candidate=tiny | small",
         "column": "lost", "scale": "100", "better": "less"},
        {"metric": "power", "subject": "other", "id": "X2", "form": "none", "differs": "no meter"},
    ]
    return pd.DataFrame([{**empty, "id": "X1", "setting": "", **row} for row in rows])


@pytest.fixture
def folder(tmp_path):
    tables = tmp_path / "10_one" / "tables"
    tables.mkdir(parents=True)
    times = {"candidate": ["whole", "small"], "ms": [8.0, 3.0], "ratio": [1.0, 0.375],
             "low": [1.0, 0.3], "high": [1.0, 0.45]}
    pd.DataFrame({**times, "lost": [0.0, 0.0101],
                  "n": [500, 500]}).to_csv(tables / "times.csv", index=False)
    headlines = [{"name": "first", "text": "one"}, {"name": "of power", "text": "two"}]
    (tmp_path / "10_one" / "run.json").write_text(json.dumps({"headlines": headlines}))
    return tmp_path


@pytest.mark.parametrize(("changes", "ours", "verdict"), [
    ({}, 0.375, "better"), ({"better": "more"}, 0.375, "worse"), ({"high": "n"}, 0.375, "equal"),
    ({"column": "ms", "base": "row=1", "low": "", "high": ""}, 0.375, "better"),
    ({"form": "saved", "to": "", "low": "", "high": "", "better": "more"}, 0.625, "worse"),
    ({"form": "shown"}, 0.375, "not comparable"), ({"report": "11_two"}, None, "missing"),
    ({"where": "candidate=none"}, None, "missing"), ({"where": "colour=red"}, None, "missing"),
])
def test_a_figure_is_compared_by_its_interval(folder, changes, ours, verdict):
    table = published.beside(FIGURES, told(**changes), [folder / "empty", folder])
    assert table.metric.tolist() == FIGURES.metric.tolist()
    row = table.iloc[1]
    assert (row.ours, row.verdict) == (ours,
                                       verdict) or (pd.isna(row.ours)
                                                    and (ours, row.verdict) == (None, verdict))
    assert row.published == (50.0 if changes.get("form") in ("saved", "shown") else 0.5)
    assert table.verdict.tolist()[2:] == ["equal", "missing"], "one point lost, and 1.01"
    assert published.counted(table).sum() == 4


@pytest.mark.parametrize(("change", "named"), [
    (lambda figures, places: (pd.concat([figures, figures.iloc[:1]]), places),
     "X1 / before /  / latency stands there twice"),
    (lambda figures, places: (figures.iloc[1:], places),
     "articles: nothing is told of X1 / before"),
    (lambda figures, places: (figures, places.iloc[:-1]), "beside: nothing is told of X2 / other"),
    (lambda figures, places: (figures, places.assign(form="roughly")),
     "form 'roughly'; expected one of ratio"),
    (lambda figures, places: (figures.assign(value=[100.0, None, 1.0, 3.0]), places),
     "X1 / after /  / latency has no value"),
    (lambda figures, places: (figures.assign(paper=["a", "b", "", "c"]), places),
     "after /  / accuracy lost names no source"),
    (lambda figures, places: (figures.drop(columns="unit"), places),
     "articles: no column unit; there are"),
    (lambda figures, places: (figures, places.drop(columns=["form", "to"])),
     "beside: no column form, to; there are"),
])
def test_a_malformed_table_is_refused(folder, change, named):
    figures, places = change(FIGURES, told())
    with pytest.raises(ValueError, match=named):
        published.beside(figures, places, [folder])


@pytest.mark.parametrize(("form", "published_as"), [("ratio", 0.8), ("difference", -10.0),
                                                    ("value", 40.0)])
def test_a_figure_has_a_baseline_of_its_own(folder, form, published_as):
    figures = FIGURES.assign(value=[100.0, 40.0, 1.0, 3.0], baseline=[None, 50.0, None, None])
    table = published.beside(figures, told(form=form, to=""), [folder])
    assert table.published[1] == published_as


def test_the_report_that_is_being_written_is_looked_at_first(folder):
    own = folder / ".partial.10_one"
    (own / "tables").mkdir(parents=True)
    pd.DataFrame({"candidate": ["small"], "ratio": [0.9], "low": [0.8],
                  "high": [1.0]}).to_csv(own / "tables" / "times.csv")
    table = published.beside(FIGURES, told(), [folder], written={"10_one": own})
    assert (table.ours[1], table.verdict[1], table.from_[1]) == (0.9, "worse",
                                                                 "this run/10_one/times")
    assert table.ours[0] == 8.0, "a column that the new table lacks comes from the other"
    assert published.beside(FIGURES, told(), [folder],
                            written={"11_two": own}).ours[1] == 0.375, "another report's table"


def test_the_order_is_told_with_its_interval():
    figures = pd.DataFrame({"id": ["A"] * 6 + ["B"] * 6 + ["C"] * 3 + ["D"] * 6,
                            "published": [1.0, 2, 3, 4, 5, 6] * 2 + [1, 2, 3, *range(6)],
                            "ours": [10.0, 11, 12, 13, 14, 15, 6, 5, 4, 3, 2, 1, 1, 2, 3, 1, 1, 1,
                                     1, 2, None]})
    found = published.order(figures).set_index("id")
    assert list(found.index) == ["A", "B"], "C has three figures, D two that differ"
    assert found.correlation.round(6).tolist() == [1.0, -1.0]
    assert (found.low <= found.correlation).all()
    assert (found.high >= found.correlation).all()


def test_published_and_ours_are_drawn_a_panel_each(folder):
    axes = published.pairs(published.beside(FIGURES, told(), [folder]), {"X1": "one", "X9": "none"})
    assert [one.get_title() for one in axes.figure.axes] == ["one"]


def test_systems_have_a_line_of_words(folder):
    named = pd.DataFrame({"id": ["X1", "X2", "X3"], "system": ["one", "two", "three"],
                          "report": ["10_one"] * 3,
                          "headline": ["", "power", "colour"]})
    table = published.beside(FIGURES, told(), [folder])
    lines = published.systems(named, table, {"here": folder, "full": folder / "full"})
    assert lines.here.tolist() == ["first: one", "of power: two", ""]
    assert lines.full.tolist() == [""] * 3
    words = "after, latency: 0.5, ours 0.375 [0.3, 0.45]; after, accuracy lost: 1, ours 1.01"
    assert lines.published[0] == words
    assert lines.verdict.tolist() == ["1 better, 1 equal", "", ""]
    assert published.apart(table).get_yticklabels()[-1].get_text() == "X1  after, latency"


def test_every_figure_of_the_articles_has_a_place_and_every_system_its_report():
    source = embedded.folder() / "published"
    figures, places, systems = (pd.read_csv(source / f"{name}.csv")
                                for name in ("articles", "beside", "systems"))
    table = published.beside(figures, places, [source.parents[1] / "reports" / "full"])
    assert len(table) == len(figures)
    assert set(figures.id) <= set(systems.id)
    shown = table[table.form != "none"]
    assert (shown.differs.fillna("") != "").all(), "what differs in the setting is said of each"
    notebooks = {path.stem for path in (source.parents[1] / "notebooks").glob("*.ipynb")}
    assert set(systems.report) <= notebooks


def test_every_figure_of_the_papers_has_a_source_a_place_and_a_word():
    source = embedded.folder() / "published"
    figures, places = (pd.read_csv(source / f"{name}.csv") for name in ("papers", "papers_beside"))
    full = source.parents[1] / "reports" / "full"
    table = published.beside(figures, places, [full, full.parent])
    assert len(table) == len(figures) == len(places)
    assert (table.differs != "").all()
    counted = places[(places.form != "none") & (places.report != "91_published")]
    assert not table[
        table.index.isin(counted.index)].ours.isna().any(), "what other reports hold is found there"


def test_what_git_keeps_of_full_runs_has_pages_and_the_front_page_links_to_them(tmp_path):
    found = pages.committed(tmp_path)
    assert {"full", "efficientnet_lite0", "resnet56_cifar10"} <= set(found)
    kept = files.REPORTS / "full" / "20_channel_pruning"
    page = tmp_path / found["full"][kept.name]
    assert page.is_file()
    told, record = page.read_text(), json.loads((kept / "run.json").read_text())
    assert all(html.escape(check["name"]) in told for check in record["checks"])
    for source in re.findall(r'(?:src|href)="([^"]+)"', told):
        if not source.startswith(".."):
            continue
        assert (page.parent / source).exists() or source == "../index.html", source
    assert "<th>macs_left</th>" in told
    pages.write(tmp_path, ran=[], failures={})
    assert found["full"][kept.name] in (tmp_path / "index.html").read_text()


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [1400, 520])
def test_the_front_page_opens_from_disk_and_fits_a_narrow_window(tmp_path, width):
    tables = tmp_path / "90_articles" / "tables"
    tables.mkdir(parents=True)
    words = "a student in 8 bits: 5.1x as fast, intents 98.6% of 700, sentences -4.00 points " * 2
    line = {"id": "A10", "system": "a small student", "report": "50_language_understanding",
            "here": words, "full": words,
            "published": words, "verdict": "2 better, 1 worse"}
    pd.DataFrame([line] * 3).to_csv(tables / "systems.csv", index=False)
    pages.write(tmp_path, ran=[], failures={})
    page = (tmp_path / "index.html").read_text()
    tell = ("<script>document.body.dataset.wide = document.documentElement.scrollWidth"
            " - window.innerWidth</script></body>")
    (tmp_path / "told.html").write_text(page.replace("</body>", tell))
    made = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu",
                           f"--window-size={width},900", "--dump-dom",
                           (tmp_path / "told.html").as_uri()], capture_output=True, text=True,
                           check=False, timeout=120)
    assert int(re.search(r'data-wide="(-?\d+)"',
                         made.stdout)[1]) <= 0, "nothing reaches beyond the window"
    assert made.stdout.count("2 better") == 3
    assert "<details" in made.stdout
