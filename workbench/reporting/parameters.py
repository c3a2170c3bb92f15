"""Which notebooks run, with which parameters (a notebook's own, a profile's, the user's), and what
they depend on."""

import ast
import contextlib
import glob
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from workbench import files, machine
from workbench.reporting.execution import Job

PROFILES = ("smoke", "quick", "full")
_TYPES: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str,
                                              "bool": bool, "list": list,
                                               "dict": dict}


def plan(names: Sequence[str], *, folder: Path, profile: str = "quick",
         settings: Sequence[str] = ()) -> list[Job]:
    """The jobs for the notebooks `names` (all in `folder`, where none is named), with their
    parameters.

    The parameters cell gives the defaults, profiles.yaml the profile's, settings ("name=value",
    YAML) the user's.

    Raises ValueError for a notebook, profile or parameter that is unknown, or a value of another
    type than stated; FileNotFoundError where there is no such folder.

    Example: `plan(["01_baseline"], folder=Path("notebooks"), settings=["images=500"])`
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; expected one of {', '.join(PROFILES)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of notebooks {folder}; run from the clone, or give "
                                "--notebooks")
    known = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    if not known:
        raise FileNotFoundError(f"folder {folder} holds no notebook (*.ipynb)")
    for name in names:
        if name.removesuffix(".ipynb") not in known:
            raise ValueError(f"unknown notebook {name!r}; there are "
                             f"{', '.join(known) or 'none in ' + str(folder)}")
    chosen = [name.removesuffix(".ipynb") for name in names] or list(known)
    profiles = _profiles(folder / "profiles.yaml", known)
    given = dict(_setting(text) for text in settings)
    declared = {name: _declared(known[name]) for name in chosen}
    for key in given:
        if not any(key in parameters for parameters in declared.values()):
            offered = sorted({parameter for parameters in declared.values()
                              for parameter in parameters})
            raise ValueError(f"unknown parameter {key!r}; {', '.join(chosen)} take "
                             f"{', '.join(offered) or 'none'}")
    base = _base_fingerprint()
    jobs = []
    for name in chosen:
        wanted = (profiles.get(profile, {}).get(name) or {}) | {k: v for k, v in given.items()
                                                                if k in declared[name]}
        parameters = _merged(name, declared[name], wanted)
        source = _with_kernel(known[name].read_text(encoding="utf-8"))
        mark = hashlib.sha256(f"{base}{_code(source)}{json.dumps(parameters)}"
                              f"{_files_of(parameters, folder)}".encode())
        jobs.append(Job(name, source, parameters, profile, mark.hexdigest(),
                        str(folder.resolve().parent),
                        tuple(key for key in given if key in declared[name])))
    return jobs


def _profiles(path: Path, known: Mapping[str, Path]) -> dict:
    """What profiles.yaml sets, by profile and notebook; nothing where a folder has none."""
    if not path.exists():
        return {}
    try:
        stored = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    for profile, notebooks in stored.items():
        if profile not in PROFILES:
            raise ValueError(f"{path}: unknown profile {profile!r}; expected {', '.join(PROFILES)}")
        for name in notebooks or {}:
            if name not in known:
                raise ValueError(f"{path}: profile {profile} names the unknown notebook {name!r}")
    return {profile: notebooks or {} for profile, notebooks in stored.items()}


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} is not name=value")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text!r}: the value is not valid YAML "
                         f"({str(error).splitlines()[0]})") from error


def _declared(path: Path) -> dict[str, tuple[str, object]]:
    """Type and default of each line `name: type = value  # meaning, unit` of the parameters
    cell."""
    import papermill

    try:
        with (contextlib.redirect_stderr(io.StringIO()),
              tempfile.NamedTemporaryFile("w", suffix=".ipynb") as copied):
            copied.write(_with_kernel(path.read_text(encoding="utf-8")))
            copied.flush()
            found = papermill.inspect_notebook(copied.name)
    # damaged JSON, no kernel named, an unknown format: each library has its own kind
    except Exception as error:
        raise ValueError(f"{path} is no notebook that can be run ({str(error).splitlines()[0]}); "
                         "save it again") from error
    try:
        return {name: (entry["inferred_type_name"], ast.literal_eval(entry["default"]))
                for name, entry in found.items()}
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: a default in its parameters cell is no plain value "
                         f"({error})") from error


def _with_kernel(source: str) -> str:
    """A notebook's text that names its kernel, Python 3 where it names none."""
    told = json.loads(source)
    if told.setdefault("metadata", {}).get("kernelspec"):
        return source
    told["metadata"]["kernelspec"] = {"name": "python3", "language": "python",
                                      "display_name": "Python 3"}
    return json.dumps(told)


def _merged(notebook: str, declared: Mapping[str, tuple[str, object]],
            wanted: Mapping[str, object]) -> dict:
    parameters = {name: default for name, (_, default) in declared.items()}
    for name, value in wanted.items():
        if name not in declared:
            raise ValueError(f"profiles.yaml: {notebook} has no parameter {name!r}; it takes "
                             f"{', '.join(declared)}")
        kind = declared[name][0]
        base = kind.split("[")[0]
        if base == "float" and isinstance(value, str):  # YAML takes 1e-4 for text
            with contextlib.suppress(ValueError):
                value = float(value)
        fits = (isinstance(value, _TYPES.get(base, object))
                and not (base in ("int", "float") and isinstance(value, bool)))
        if not fits:
            raise ValueError(f"{notebook}: parameter {name!r} expects {kind}, found {value!r}")
        parameters[name] = value
    return parameters


def _base_fingerprint() -> str:
    """Of all that every notebook depends on: the package, the embedded data, the versions, the
    processor."""
    package = Path(__file__).parents[1]
    data = Path(os.environ.get("WORKBENCH_DATA") or package.parent / "data")
    code = (path for kind in ("py", "j2", "css") for path in package.rglob(f"*.{kind}"))
    paths = sorted(code) + sorted(path for path in data.rglob("*") if path.is_file())
    marks = [f"{path.name} {files.sha256(path)}" for path in paths]
    return json.dumps([marks, machine.versions(), machine.hardware()])


def _code(source: str) -> str:
    return json.dumps([[cell["cell_type"], cell["source"]] for cell in json.loads(source)["cells"]])


def _files_of(parameters: Mapping[str, object], folder: Path) -> str:
    """Names, sizes and times of the files that text parameters point to ("folder:PATH", "NAME@PATH"
    or a path)."""
    marks = []
    texts = [text for value in parameters.values()
             for text in (value if isinstance(value, list) else [value])]
    for text in texts:
        if isinstance(text, str) and text:
            bare = text.removeprefix("folder:").removeprefix("timm:local-dir:").rpartition("@")[2]
            for match in sorted(glob.glob(str(folder.parent / bare))):
                path = Path(match)
                within = sorted(path.rglob("*")) if path.is_dir() else [path]
                marks += [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in within]
    return json.dumps(marks)
