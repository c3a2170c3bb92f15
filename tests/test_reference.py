"""The reference made of the docstrings, and the story that the README opens with."""

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest

from workbench.reporting import pages, reference
from workbench.subjects import data

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    pages.write(out, ran=[], failures={})
    return out


def test_each_room_has_a_page_with_every_public_function_that_says_what_it_does(site):
    for room in reference.ROOMS:
        page = (site / "reference" / f"{room}.html").read_text()
        for path in sorted((ROOT / "workbench").glob(f"{room}/*.py" if room != "ground"
                                                     else "*.py")):
            for node in ast.parse(path.read_text()).body:
                named = isinstance(node,
                                   (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(
                                       "_")
                if named and not path.stem.startswith("_"):
                    assert f'id="{path.stem}.{node.name}"' in page, f"{path.stem}.{node.name}"
    rooms = {path.name for path in (ROOT / "workbench").iterdir()
             if (path / "__init__.py").exists()}
    assert rooms | {"ground"} == set(reference.ROOMS)


def test_the_front_page_leads_to_the_reference_and_no_link_is_dead(site):
    pages_of = [site / "index.html", *(site / "reference").glob("*.html")]
    for page in pages_of:
        for link in re.findall(r'href="([^"#:]+)(?:#[^"]*)?"', page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} leads to {link}"
    assert "reference/methods.html" in (site / "index.html").read_text()


def test_an_example_is_code_and_a_signature_is_whole(site):
    page = (site / "reference" / "methods.html").read_text()
    assert "quantize(model: nn.Module, batches: Iterable[Batch], *, weights:" in page
    assert "<pre class='highlight'>quantization.quantize(model, task.validation" in page
    assert "Prune(macs: Share | None = None" in page


def test_code_that_shows_nothing_opens_with_the_code_behind_it():
    code, two = nbformat.v4.new_code_cell, nbformat.v4.new_output("stream", text="two")
    cells = [code("a = 1", metadata={"tags": ["parameters"]}), code("b = 2"),
             code("b", outputs=[two]), code("c = 3")]
    page = pages.notebook_page(nbformat.v4.new_notebook(cells=cells), "one", "passed")
    assert page.count('<details class="code">') == 3, "the parameters, b with its answer, c"
    assert len(cells) == 4, "the notebook itself is left as it was"


def test_pages_newer_than_the_package_stay(site):
    page = site / "reference" / "graph.html"
    page.write_text("kept")
    pages.write(site, ran=[], failures={})
    assert page.read_text() == "kept"
    os.utime(page, (0, 0))
    pages.write(site, ran=[], failures={})
    assert "coupling" in page.read_text()


def test_the_story_of_the_readme_runs_and_has_fifteen_lines(tiny, tmp_path, monkeypatch, capsys):
    behind = (ROOT / "README.md").read_text().partition("## In fifteen lines")[2]
    story = behind.partition("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", story, re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda name: tiny)
    exec(compile(code, "README", "exec"), {})
    told = capsys.readouterr().out
    assert "points [" in told
    assert "latency_ms" in told
    assert "equivalent: least cosine" in told
