"""The reference: a page for each room of the package, made of its docstrings."""

import ast
import functools
import html
import re
from dataclasses import dataclass, field
from pathlib import Path

from workbench import files

PACKAGE = Path(__file__).parents[1]
ROOMS = {"ground": "what a model reads and answers, atomic writes, results kept by what made "
                   "them, what this computer is",
         "numbers": "grids, quantisers, histograms, entropy coding, fronts of two numbers",
         "graph": "a traced model: its layers by name, what follows a layer, running it node by "
                  "node, channel groups and heads",
         "subjects": "tasks and objectives, data, models, training: what is compressed",
         "methods": "one way of compressing a file; each a function that returns a new model, "
                    "and a step that a plan can name",
         "deployment": "ONNX export, sessions with named inputs, outputs and state, integer "
                       "arithmetic, streams, other runtimes",
         "measures": "accuracy, cost, equivalence, latency, sensitivity, diagnosis, retrieval; "
                     "peers to measure beside",
         "plans": "steps in a row, recipes, the whole way to a file, which layer gets which "
                  "format, the search within limits",
         "reporting": "the runner, the pages, the plots"}


@dataclass(frozen=True)
class Entry:
    """A public function, class or method. head: its signature; text: its docstring as HTML.

    Example: `Entry("load", "load(name)", "<p>A model by name.</p>").parts == []`
    """

    name: str
    head: str
    text: str
    parts: list["Entry"] = field(default_factory=list)


def write(out: Path, render) -> dict[str, str]:
    """Write OUT/reference/ROOM.html for each room, by `render` (template and values to HTML);
    return the rooms and what is in each. Pages that are newer than the package stay.

    Example: `write(Path("out"), lambda template, **values: "")`
    """
    newest = max(path.stat().st_mtime for path in PACKAGE.rglob("*.py"))
    folder = out / "reference"
    for room, about in ROOMS.items():
        page = folder / f"{room}.html"
        if not page.exists() or page.stat().st_mtime < newest:
            with files.atomic(page) as new:
                written = render("reference.html.j2", room=room, about=about, rooms=ROOMS,
                                 modules=_modules(room, newest))
                new.write_text(written, encoding="utf-8")
    return ROOMS


@functools.cache
def _modules(room: str, newest: float) -> list[Entry]:
    """What is in a room, read once for a package whose newest file is of that time."""
    found = []
    for path in sorted((PACKAGE / room).glob("*.py") if room != "ground" else PACKAGE.glob("*.py")):
        if not path.stem.startswith("_"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            text = _html(ast.get_docstring(tree) or "")
            found.append(Entry(path.stem, "", text, _entries(tree)))
    return found


def _entries(tree: ast.Module | ast.ClassDef) -> list[Entry]:
    found = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node)
        if text:
            inner = _entries(node) if isinstance(node, ast.ClassDef) else []
            found.append(Entry(node.name, _signature(node), _html(text), inner))
    return found


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """As it is called: name(arguments) -> result; a class by its fields, or by __init__."""
    if isinstance(node, ast.FunctionDef):
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{node.name}({_arguments(node)}){result}"
    made = next((part for part in node.body if isinstance(part, ast.FunctionDef)
                 and part.name == "__init__"), None)
    fields = [ast.unparse(part) for part in node.body
              if isinstance(part, ast.AnnAssign) and "ClassVar" not in ast.unparse(part.annotation)]
    return f"{node.name}({_arguments(made) if made else ', '.join(fields)})"


def _arguments(node: ast.FunctionDef) -> str:
    return re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))


def _html(text: str) -> str:
    """A docstring's paragraphs, its code set as code, its example in a block of its own."""
    made = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        words = (re.sub(r"\s*\n\s*", " ", paragraph)
                 if not paragraph.lstrip().startswith(("- ", "* ")) else paragraph)
        example = re.fullmatch(r"Example: `([^`]+)`\.?", words)
        if example:
            made.append(f"<pre class='highlight'>{html.escape(example[1])}</pre>")
        else:
            made.append("<p>" + re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(words))
                        + "</p>")
    return "".join(made)
