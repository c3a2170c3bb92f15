"""Which single changes of the package no test notices: tokens drawn at random, each changed in a
copy of the repository.

    python benchmarks/mutations.py [--count 48] [--seed 0] [--rooms numbers methods] [--seconds 60]

A comparison is turned, a sum becomes a difference, a product a quotient, a number grows by one,
True becomes False, min max. First all tests and examples run once, the notebooks' aside, and
coverage notes which of them run which line (a quarter of an hour; --known FILE keeps it). Then the
tests that run the changed statement run, and then those of files that name its module, which may
have run it before any test, the shortest first, as many as took --seconds in all, until one fails;
a change that makes them take five times as long counts as noticed. Writes
reports/benchmarks/mutations.csv, a row a change, beside those of other seeds; survivors are
printed. Needs `pip install pytest-cov`.
"""

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
TURNED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+",
          "*": "/", "/": "*", "and": "or",
          "or": "and", "True": "False", "False": "True", "min": "max", "max": "min", "is": "is not",
          "not in": "in"}
ROOMS = ("numbers", "graph", "subjects", "methods", "deployment", "measures", "plans")


def main() -> None:
    """Draw, change, run, and print what survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="+", default=ROOMS)
    parser.add_argument("--seconds", type=float, default=60,
                        help="that the tests of one change may take")
    parser.add_argument("--known", type=Path, default=Path(tempfile.gettempdir()) / "mutations",
                        help="a folder: which test runs which line, measured where it is empty")
    options = parser.parse_args()
    places = [(path, *place) for room in options.rooms
              for path in sorted((ROOT / "workbench" / room).glob("*.py"))
              for place in _places(path)]
    drawn = random.Random(options.seed).sample(places, min(options.count, len(places)))
    out, rows = ROOT / "reports" / "benchmarks" / "mutations.csv", []
    kept = pd.read_csv(out).query("seed != @options.seed") if out.exists() else pd.DataFrame()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".*cache"))
        if not (options.known / "times.xml").exists():
            _measure(copy, options.known)
        told = Told(options.known)
        for number, (path, line, column, old, new) in enumerate(drawn, 1):
            module, tests = path.relative_to(ROOT), told.tests(path, line, options.seconds)
            noticed = _noticed(copy, module, (line, column, old, new), tests, 5 * options.seconds)
            text = path.read_text().splitlines()[line - 1].strip()
            rows.append({"seed": options.seed, "module": path.relative_to(ROOT / "workbench"),
                         "line": line, "change": f"{old} to {new}", "tests": len(tests),
                         "noticed": noticed, "text": text})
            word = "noticed" if noticed else "SURVIVED"
            print(f"{number} of {len(drawn)}: {word}, {rows[-1]['module']}:{line}, {old} "
                  f"to {new}: {text}", flush=True)
            pd.concat([kept, pd.DataFrame(rows)]).to_csv(out, index=False)
    share = sum(row["noticed"] for row in rows) / len(rows)
    print(f"noticed {share:.0%} of {len(rows)} changes (seed {options.seed}); {out}")


def _places(path: Path) -> list[tuple[int, int, str, str]]:
    """What can be changed: line, column, token, its substitute. Docstrings and annotations are left
    alone."""
    text = path.read_text()
    lines, found = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            token = lines[node.lineno - 1].encode()[node.col_offset:node.end_col_offset].decode()
            number = type(node.value) is not bool and node.lineno == node.end_lineno
            new = repr(node.value + 1) if number else TURNED.get(token)
            found += [(node.lineno, node.col_offset, token, new)] if new else []
        elif isinstance(node, (ast.Compare, ast.BinOp, ast.BoolOp)):
            left = {ast.Compare: "left", ast.BinOp: "left"}.get(type(node))
            first = getattr(node, left) if left else node.values[0]
            rest = lines[first.end_lineno
                         - 1][first.end_col_offset:] if first.end_lineno == node.lineno else ""
            token = re.match(
                r"\)*\s*(not in|<=|>=|==|!=|<|>|and|or|is|\+|-|\*(?!\*)|/(?!/))(?=[\s(])", rest)
            if token and lines[first.end_lineno - 1].isascii() and token[1] in TURNED:
                found.append((first.end_lineno, first.end_col_offset + token.start(1), token[1],
                              TURNED[token[1]]))
        elif isinstance(node, ast.Call) and isinstance(node.func,
                                                       ast.Name) and node.func.id in ("min", "max"):
            found.append((node.lineno, node.col_offset, node.func.id, TURNED[node.func.id]))
    return sorted(set(found))


class Told:
    """Which tests run which lines, and how long each takes; those that fail unchanged are left
    out."""

    def __init__(self, folder: Path):
        from coverage import CoverageData

        self.data = CoverageData(str(folder / "coverage"))
        self.data.read()
        self.seconds: dict[str, float] = {}
        for case in xml.parse(folder / "times.xml").iter("testcase"):
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            if not len(case):  # neither failed nor skipped
                self.seconds[name] = float(case.get("time", 0))

    def tests(self, path: Path, line: int, seconds: float) -> list[str]:
        """Those that run the statement at `line`, then those of test files that name the module:
        the shortest first, as many as take `seconds` in all."""
        file = next(name for name in self.data.measured_files()
                    if name.endswith(str(path.relative_to(ROOT))))
        by_line = self.data.contexts_by_lineno(file)
        run = {name.partition("|")[0] for at in _statement(path, line)
               for name in by_line.get(at, ())}
        near = {f"tests/{test.name}" for test in (ROOT / "tests").glob("test_*.py")
                if re.search(rf"\b{path.stem}\b", test.read_text())}
        every = sorted(self.seconds, key=lambda name: self.seconds[name])
        chosen = [name for name in every if name in run]
        chosen += [name for name in every if name not in run and name.partition("::")[0] in near]
        last = np.cumsum([self.seconds[name] for name in chosen]).searchsorted(seconds)
        return chosen[:last + 1]


def _statement(path: Path, line: int) -> range:
    """The lines of the innermost statement at `line`, of a compound one its head."""
    found = range(line, line + 1)
    for node in ast.walk(ast.parse(path.read_text())):  # the outer before the inner
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno
            if node.lineno <= line <= last:
                found = range(node.lineno, last + 1)
    return found


def _run(copy: Path, *options, **how) -> int:
    """The exit code of the copy's tests."""
    return subprocess.run([sys.executable, "-m", "pytest", *options], cwd=copy, check=False,
                          env={**os.environ, "PYTHONPATH": str(copy)} | how.pop("env", {}),
                          **how).returncode


def _measure(copy: Path, folder: Path) -> None:
    """Run every test but the notebooks' with coverage, once."""
    folder.mkdir(parents=True, exist_ok=True)
    _run(copy, "--numprocesses", "logical", "--dist", "worksteal", "--ignore",
         "tests/test_reporting.py", "--cov", "workbench", "--cov-context", "test", "--cov-report",
         "", "--junitxml", folder / "times.xml", env={"COVERAGE_FILE": str(folder / "coverage")})


def _noticed(copy: Path, module: Path, change: tuple, tests: list[str], seconds: float) -> bool:
    """Whether one of these tests fails with this one change; the copy is put right again."""
    line, column, old, new = change
    target, whole = copy / module, (ROOT / module).read_text()
    lines = whole.splitlines(keepends=True)
    assert lines[line - 1][column:].startswith(old), (module, line, column, old)
    lines[line - 1] = lines[line - 1][:column] + new + lines[line - 1][column + len(old):]
    target.write_text("".join(lines))
    asked = copy / "asked.txt"
    asked.write_text("\n".join(tests))
    try:
        return bool(tests) and _run(copy, "-x", "-p", "no:cacheprovider", f"@{asked}",
                                    timeout=seconds, capture_output=True) != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        target.write_text(whole)


if __name__ == "__main__":
    main()
