"""Which single changes of the package no test notices: tokens drawn at random, each changed in a
copy of the repository.

    python benchmarks/mutations.py [--count 48] [--seed 0] [--rooms numbers methods] [--seconds 300]

A comparison is turned, a sum becomes a difference, a product a quotient, a number grows by one,
True becomes False, min max. The test files that name the changed module most, or what is changed in
it (where none does: what imports it) run until one fails, then the examples of that module; a
change that makes either take longer than --seconds counts as noticed. Writes
reports/benchmarks/mutations.csv, a row a change, beside those of other seeds; survivors are
printed. 48 changes take an hour or two.
"""

import argparse
import ast
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
    parser.add_argument("--seconds", type=float, default=300,
                        help="that the tests of one change may take")
    options = parser.parse_args()
    places = [(path, *place) for room in options.rooms
              for path in sorted((ROOT / "workbench" / room).glob("*.py"))
              for place in _places(path)]
    drawn = random.Random(options.seed).sample(places, min(options.count, len(places)))
    out, rows = ROOT / "reports" / "benchmarks" / "mutations.csv", []
    kept = pd.read_csv(out).query("seed != @options.seed") if out.exists() else pd.DataFrame()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "reports",
                                                                  ".*cache"))
        for number, (path, line, column, old, new) in enumerate(drawn, 1):
            noticed = _noticed(copy, path.relative_to(ROOT), line, column, old, new,
                               options.seconds)
            text = path.read_text().splitlines()[line - 1].strip()
            rows.append({"seed": options.seed, "module": path.relative_to(ROOT / "workbench"),
                         "line": line, "change": f"{old} to {new}", "noticed": noticed,
                         "text": text})
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


def _noticed(copy: Path, module: Path, line: int, column: int, old: str, new: str,
             seconds: float) -> bool:
    """Whether a test of the copy fails with this one change; the copy is put right again."""
    target, whole = copy / module, (ROOT / module).read_text()
    lines = whole.splitlines(keepends=True)
    assert lines[line - 1][column:].startswith(old), (module, line, column, old)
    lines[line - 1] = lines[line - 1][:column] + new + lines[line - 1][column + len(old):]
    target.write_text("".join(lines))
    try:
        # not_run is a test of its own: where a module has no example, one is chosen even so
        tests = [_telling(copy, module, line),
                 ["tests/test_examples.py", "-k", f"{module.stem}. or not_run"]]
        return any(subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p",
                                   "no:cacheprovider", *some], cwd=copy, timeout=seconds,
                                  capture_output=True, check=False).returncode
                   for some in tests)
    except subprocess.TimeoutExpired:
        return True
    finally:
        target.write_text(whole)


def _telling(copy: Path, module: Path, line: int) -> list[str]:
    """The three test files that name the module most (where none does: what it defines or what
    imports it), and the two that name what is changed, or who uses it."""
    tests = [path for path in (copy / "tests").glob("test_*.py")
             if path.name not in ("test_reporting.py", "test_architecture.py", "test_examples.py")]
    text = (ROOT / module).read_text()
    parts = {node.name: node for node in ast.parse(text).body
             if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    changed = [name for name, node in parts.items() if node.lineno <= line <= node.end_lineno]
    near = {name for name, node in parts.items() if changed and re.search(
        rf"\b{changed[0]}\b", ast.get_source_segment(text, node))}

    def most(names: set[str], count: int) -> list[str]:
        asked = rf"\b({'|'.join(names)})\b"
        named = {str(path): len(re.findall(asked, path.read_text())) for path in tests}
        return [path for path in sorted(named, key=named.get, reverse=True)[:count] if named[path]]

    names, room = {module.stem}, [module]
    while True:
        chosen = most(names, 3) or most(names | set(parts), 3)
        if chosen:
            return [*dict.fromkeys([*chosen, *(most(near, 2) if near else [])])]
        known = rf"\b({'|'.join(path.stem for path in room)})\b"
        room = [path.relative_to(ROOT) for path in (ROOT / "workbench").rglob("*.py")
                if path.stem not in names and any(re.search(known, line) for line
                                                  in path.read_text().splitlines()
                                                  if line.startswith(("from ", "import ")))]
        names |= {path.stem for path in room}


if __name__ == "__main__":
    main()
