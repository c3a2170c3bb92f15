"""The floors of the house, what importing costs, and that the places which pin versions agree."""

import ast
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "workbench"
GROUND = {"errors", "files", "machine", "batches", "store"}
BELOW = {  # what each room may import of the package
    "": set(), "errors": set(), "files": set(), "machine": set(), "store": {"files"},
    "batches": {"errors"}, "numbers": GROUND,
    "graph": GROUND | {"numbers"}, "subjects": GROUND | {"numbers", "graph"},
    "methods": GROUND | {"numbers", "graph", "subjects"},
    "deployment": GROUND | {"numbers", "graph"},
    "measures": GROUND | {"numbers", "graph", "subjects", "deployment"},
    "plans": GROUND | {"numbers", "graph", "subjects", "methods", "deployment", "measures"},
    "reporting": {"files", "machine"},
    "__main__": {"errors", "machine", "reporting", "measures", "plans", "subjects"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("workbench."):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("workbench")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_is_below_it(path):
    here = room(path)
    for name in imports(path):
        there = name.split(".")[1]
        assert there == here or there in BELOW[here], f"{path} imports {name}"
        if here == "methods":
            assert there != "methods", f"{path}: a method imports another"


def test_no_circle_runs_through_modules():
    modules = {".".join(("workbench", *path.relative_to(PACKAGE).with_suffix("").parts)): path
               for path in FILES}
    read = {name: imports(path) for name, path in modules.items()}
    needs = {name: {m for m in modules if any(f"{i}.".startswith(f"{m}.") for i in read[name])}
             - {name, "workbench"}
             for name in modules}
    while needs:
        free = {name for name, others in needs.items() if not others}
        assert free, f"a circle among {', '.join(sorted(needs))}"
        needs = {name: others - free for name, others in needs.items() if name not in free}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_fits_in_the_head(path):
    assert len(path.read_text().splitlines()) <= 420


def test_who_gives_no_seed_gets_0():
    found = re.findall(r"\bseed: (?:int|Count) = (\w+)", "".join(map(Path.read_text, FILES)))
    assert len(found) > 50
    assert set(found) == {"0"}


def test_ruff_finds_nothing_notebooks_and_lines_of_100_columns_included():
    made = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr


def test_the_types_agree():
    command = [sys.executable, "-m", "mypy", "workbench", "--cache-dir", ".mypy_cache"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr


def test_importing_the_package_loads_no_torch():
    code = "import workbench, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_onnx_runtime_tells_its_maker_nothing():
    code = ("import workbench, onnxruntime, os, sys; "
            "sys.exit(len(os.listdir('/proc/self/task')) - 1)")
    without = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    quiet = subprocess.run([sys.executable, "-c", code],
                           env=without | {"OPENBLAS_NUM_THREADS": "1"}, check=False)
    assert quiet.returncode == 0, "ONNX Runtime started a thread when it was imported: its reporter"


def test_the_command_line_helps_without_loading_torch_or_papermill():
    code = ("import sys, workbench.__main__; "
            "sys.exit(any(m in sys.modules for m in ('torch', 'papermill', 'pandas')))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    started = time.monotonic()
    shown = subprocess.run([sys.executable, "-m", "workbench", "--help"], capture_output=True,
                           text=True, check=True)
    assert "report" in shown.stdout
    # half a second on an idle machine; the import list above is the real check
    assert time.monotonic() - started < 5


def test_the_pins_agree_wherever_they_stand():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    makefile = (ROOT / "Makefile").read_text()
    pip = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    pins = {line for line in project["dependencies"] if "==" in line}
    assert pins == {"torch==2.14.1", "torchvision==0.29.1"}
    assert pins == {line for line in pip if "==" in line}
    assert set(re.findall(r"torch\w*==[\d.]+", makefile)) <= pins
    assert "--editable .[dev]" in pip
    assert "--editable '.[dev]'" in makefile
    python = project["requires-python"].removeprefix(">=")
    assert f"python={python}" in environment
    assert f"python{python}" in makefile


def test_notebooks_hold_no_output_and_define_nothing():
    import nbformat

    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert not cell.outputs, path
                assert cell.execution_count is None, path
                assert not re.search(r"^(def|class) ", cell.source, re.M), path
                if "parameters" not in cell.metadata.get("tags", []):
                    assert len(cell.source.splitlines()) <= 12, (path, cell.source)


def test_what_contributing_shows_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["A method", "A notebook", "A data set",
                                                            "A runtime"]
    known = {"__name__": "contributing"}
    for place, block in enumerate(blocks):
        # of our own page
        exec(compile(block, f"CONTRIBUTING.md, block {place + 1}", "exec"), known)
    assert known["table"].stage.tolist() == ["start", "threshold"]
    assert known["verdict"].passed
    assert known["score"].n == 20
    made = subprocess.run([sys.executable, "-m", "workbench", "report", "--notebooks", ".", "--out",
                           "site"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert "1 of 1 checks hold" in made.stdout, made.stderr


def test_what_is_read_cannot_run_code():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("eval", "exec", "yaml.load", "pd.read_pickle"), path
            if called == "torch.load":
                given = {key.arg: ast.unparse(key.value) for key in node.keywords}
                assert given.get("weights_only") == "True", path
