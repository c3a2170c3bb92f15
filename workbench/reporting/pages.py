"""The pages: an index over all reports with its summary.json, each notebook, each committed report
and the reference as HTML. None needs a network."""

import csv
import datetime
import functools
import json
import os
from pathlib import Path

from workbench import files
from workbench.reporting import reference

_TEMPLATES = Path(__file__).parent
_FOLDED = """{% extends "basic/index.html.j2" %}
{% block input %}
<details class="code"><summary>code</summary>{{ super() }}</details>
{% endblock input %}"""


def write(out: Path, *, ran: list[str], failures: dict[str, str]) -> dict:
    """Write OUT/summary.json and OUT/index.html over every report in OUT; return the summary.

    ran: the notebooks of this run; failures: those that left no new report, with the reason; one
    that raised in an earlier run stays among them until it is run well.

    Example: `write(Path("reports"), ran=[], failures={})`
    """
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*/run.json"))]
    reports = [_entry(record) for record in records]
    stored = [json.loads(path.read_text()) for path in sorted(out.glob(".failed/*/run.json"))]
    failures = {record["name"]: record["error"] for record in stored} | failures
    summary = {
        "written": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "passed": all(entry["status"] == "passed" for entry in reports) and not failures,
        "checks": sum(len(entry["checks"]) for entry in reports),
        "checks_passed": sum(check["passed"] for entry in reports for check in entry["checks"]),
        "ran": ran, "failures": failures, "reports": reports,
        "machines": sorted({_machine(record) for record in records}),
    }
    with files.atomic(out / "summary.json") as new:
        new.write_text(json.dumps(summary, indent=1))
    with files.atomic(out / "index.html") as new:
        beside = {"committed": committed(out), "systems": _systems(out),
                  "rooms": reference.write(out, _render)}
        new.write_text(_render("index.html.j2", summary=summary, **beside), encoding="utf-8")
    return summary


def notebook_page(notebook, title: str, status: str) -> str:
    """HTML of an executed notebook, figures embedded, its code folded away, without scripts. The
    parameters that a run sets stand in place of the defaults.

    Example: `notebook_page(notebook, "01_baseline", "passed")`
    """
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    notebook = notebook.copy()
    notebook.cells = _joined([cell for cell in notebook.cells
                              if "injected-parameters" not in cell.metadata.get("tags", [])])
    exporter = HTMLExporter(raw_template=_FOLDED, exclude_input_prompt=True,
                            exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook)
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    return _render("notebook.html.j2", title=title, body=body, status=status, colours=colours)


def _joined(cells: list) -> list:
    """The cells, code that shows nothing joined with the code behind it: one click opens both.
    Parameters stay by themselves."""
    joined = []
    for cell in cells:
        last = joined[-1] if joined else None
        both = last is not None and last.cell_type == cell.cell_type == "code"
        if both and not last.outputs and "parameters" not in last.metadata.get("tags", []):
            joined[-1] = cell.copy()
            joined[-1].source = f"{last.source}\n\n{cell.source}"
        else:
            joined.append(cell)
    return joined


def _entry(record: dict) -> dict:
    """What the index says of one report: its record without what is long, each headline beside the
    previous run's."""
    before = {h["name"]: h["text"] for h in (record.get("previous") or {}).get("headlines", [])}
    headlines = [h | {"previous": before.get(h["name"])} for h in record["headlines"]]
    changed = [f"{h['name']}: {h['previous']} → {h['text']}" for h in headlines
               if h["previous"] not in (None, h["text"])]
    first = not record.get("previous")
    kept = ("name", "title", "status", "profile", "parameters", "checks", "figures", "tables",
            "started", "duration_s", "commit")
    return ({key: record[key] for key in kept}
            | {"headlines": headlines, "changed": changed, "first": first})


def _machine(record: dict) -> str:
    has, runs = record["hardware"], record["versions"]
    libraries = ", ".join(f"{name} {runs[name]}" for name in ("python", "torch", "onnxruntime")
                          if name in runs)
    return (f"{has['processor']}, {has['cores']} cores, {has['memory_gib']} GiB, "
            f"{', '.join(has['formats'])}; {libraries}")


def _systems(out: Path) -> list[dict[str, str]]:
    """The systems of the field as 90_articles sums them up; none where it has not run."""
    path = out / "90_articles" / "tables" / "systems.csv"
    if not path.exists():
        return []
    head, *rows = _rows(path)
    return [dict(zip(head, row, strict=True)) for row in rows]


def committed(out: Path) -> dict[str, dict[str, str]]:
    """A page in OUT/committed for each report that git keeps, without its notebook, of the full
    profile and of other models: by folder the address of each, seen from OUT.

    Example: `committed(Path("reports"))`
    """
    found: dict[str, dict[str, str]] = {}
    for path in sorted(files.REPORTS.glob("[a-z]*/*/run.json")):
        report, group = path.parent, path.parents[1].name
        if group == "smoke" or path.parents[1].resolve() == out.resolve():
            continue
        page = report / "index.html"  # of a run here
        if not page.exists():
            page = out / "committed" / f"{group}-{report.name}.html"
            record = json.loads(path.read_text())
            tables = {name: _rows(report / "tables" / name) for name in record["tables"]
                      if name.endswith(".csv")}
            with files.atomic(page) as new:
                new.write_text(_render("committed.html.j2", record=record, group=group,
                                       tables=tables, machine=_machine(record),
                                       folder=os.path.relpath(report, page.parent)),
                               encoding="utf-8")
        found.setdefault(group, {})[report.name] = os.path.relpath(page, out)
    return found


def _rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _render(template: str, **values) -> str:
    return _templates().get_template(template).render(style=(_TEMPLATES / "style.css").read_text(),
                                                      **values)


@functools.cache
def _templates():
    from jinja2 import Environment, FileSystemLoader

    return Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True,
                       lstrip_blocks=True)
