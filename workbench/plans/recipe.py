"""Recipes: a plan as YAML, checked whole before anything runs.

    name: half in eight bits
    compression:
      - {type: prune, params: {macs: 0.5}}
      - {type: distil, params: {epochs: 2, learning_rate: 0.02}}
      - {type: quantize, params: {bits: 8}}

A type is a key of STEPS, its params are the fields of that class; what trains takes the fields of
training.Recipe beside them. The names and fields of the articles that this project grew from are
understood too (ALIASES). `model` and `data` may be named; the recipe is then for these alone.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, get_args, get_origin, get_type_hints

import pydantic
import yaml
from annotated_types import Gt
from torch import nn

from workbench.errors import nearest, reason
from workbench.graph.layers import matching, named
from workbench.methods.channels import Prune
from workbench.methods.depth import Drop
from workbench.methods.distillation import Distil
from workbench.methods.factorization import Factorize
from workbench.methods.fisher import Fisher
from workbench.methods.quantization import CALIBRATORS, Quantize
from workbench.methods.reparameterization import Equalize, Fold, Fuse, Reestimate
from workbench.methods.rounding import REPAIRS, Repair
from workbench.methods.sparsity import Sparsify
from workbench.plans.allocation import Mix
from workbench.plans.steps import Export, Load, numbered
from workbench.plans.tuning import Tune
from workbench.subjects import training
from workbench.subjects.subject import Step
from workbench.subjects.training import Train

STEPS: dict[str, type] = {
    "prune": Prune, "drop": Drop, "fisher": Fisher, "sparsify": Sparsify, "factorize": Factorize,
    "fuse": Fuse, "fold": Fold,
    "equalize": Equalize, "reestimate": Reestimate, "train": Train, "distil": Distil,
    "quantize": Quantize, "tune": Tune,
    "mix": Mix, "repair": Repair, "load": Load, "export": Export}
ALIASES = {  # the articles' name: ours, their fields' names in ours, what it means beside them
    "structured_pruning": ("prune", {"sparsity_ratio": "ratio", "target_layers": "layers"}, {}),
    "unstructured_pruning": ("sparsify", {"sparsity_ratio": "sparsity", "target_layers": "layers"},
                             {}),
    "quantization": ("quantize", {"target_layers": "layers"}, {}),
    "mixed_precision": ("mix", {}, {}),
    "weight_sharing": ("quantize", {"target_layers": "layers"},
                       {"levels": "kmeans", "activations": False}),
    "low_rank": ("factorize", {"target_layers": "layers"}, {}),
    "distillation": ("distil", {}, {}),
    "reparameterization": ("fuse", {}, {})}
NOT_WRITTEN = ("teacher", "state", "known")  # fields of steps that are objects, or the runner's own


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Named steps in their order, and what the recipe is for, where it says so.

    Example: `recipe.Recipe({"1 prune": Prune(macs=0.5)}, model="resnet20")`
    """

    steps: dict[str, Step]
    name: str = ""
    model: str = ""
    data: str = ""


def load(source: Path | str) -> Recipe:
    """The recipe of a YAML file, or one that comes with the package, by name.

    Raises FileNotFoundError for neither, ValueError for what is no recipe, naming file, step and
    field.

    Example: `steps.plan(Subject(model, task), recipe.load("half.yaml").steps)`
    """
    path = Path(source)
    if not path.exists():
        known = {found.stem: found
                 for found in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
        if str(source) not in known:
            raise FileNotFoundError(f"recipe {source} does not exist; give a YAML file, or one of "
                                    f"{', '.join(known)}")
        path = known[str(source)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text ({reason(error)}); a recipe is a YAML "
                         "file") from error
    return parse(text, where=str(path))


def parse(text: str, *, where: str = "recipe") -> Recipe:
    """The recipe of a YAML text. where: what a message calls it. Raises ValueError as `load`
    does.

    Example: `parse("compression: [{type: prune, params: {macs: 0.5}}]").steps`
    """
    try:
        told = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{where} is not valid YAML{line}: "
                         f"{getattr(error, 'problem', None) or reason(error)}") from error
    if not told:
        raise ValueError(f"{where} is empty; expected `compression:` and a list of steps")
    if (not isinstance(told, dict) or not isinstance(told.get("compression"), list)
        or not told["compression"]):
        raise ValueError(f"{where}: expected `compression:` and a list of steps, each {{type: ..., "
                         f"params: {{...}}}}")
    odd = [key for key in told if key not in ("compression", "name", "model", "data")]
    if odd:
        raise ValueError(f"{where}: unknown key {odd[0]!r}; expected compression, name, model, "
                         "data")
    steps = numbered(named for place, entry in enumerate(told["compression"], start=1)
                     for named in _steps(entry, f"{where}: step {place}"))
    return Recipe(steps, *(str(told.get(key) or "") for key in ("name", "model", "data")))


def dump(steps: Iterable[Step] | Mapping[str, Step], *, name: str = "") -> str:
    """The YAML that `parse` reads the same steps from; fields with their default value are left
    out.

    Example: `Path("half.yaml").write_text(recipe.dump([Prune(macs=0.5), Quantize(bits=8)]))`
    """
    types = {kind: key for key, kind in STEPS.items()}
    listed = [{"type": types[type(step)], "params": written(step)}
              for step in (steps.values() if isinstance(steps, Mapping) else steps)]
    told = ({"name": name} if name else {}) | {"compression": listed}
    return yaml.safe_dump(told, sort_keys=False, default_flow_style=None)


def written(step: Step) -> dict[str, object]:
    """What a recipe writes of a step: its fields that differ from their defaults, those of its
    training beside them.

    Example: `written(Prune(macs=0.5))`
    """
    params: dict[str, object] = {}
    for key, value in _changed(step).items():
        if isinstance(value, training.Recipe):
            params |= _changed(value) or {"epochs": value.epochs}
        elif key not in NOT_WRITTEN:
            params[key] = list(value) if isinstance(value, tuple) else value
    return params


def expect_layers(steps: Mapping[str, Step], model: nn.Module, *, where: str = "recipe") -> None:
    """Raise ValueError where globs of a step match no layer of `model`, as far as no step before it
    renames layers.

    Example: `expect_layers({"1 prune": Prune(macs=0.5)}, model)`
    """
    for name, step in steps.items():
        if isinstance(step, Factorize | Fuse | Drop):
            return
        for key in ("layers", "keep"):
            patterns = getattr(step, key, ())
            if patterns and patterns != "*" and not isinstance(step, Distil):
                try:
                    matching(named(model), patterns)
                except ValueError as error:
                    raise ValueError(f"{where}: {name}: {key}: {error}") from error


def _steps(entry: object, where: str) -> list[tuple[str, Step]]:
    """The steps that one entry stands for, each with its name."""
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        raise ValueError(f"{where}: found {entry!r}, expected {{type: ..., params: {{...}}}}")
    name, params = entry["type"], entry.get("params") or {}
    where = f"{where} ({name})"
    odd = [key for key in entry if key not in ("type", "params")]
    if odd:
        raise ValueError(f"{where}: unknown key {odd[0]!r}; a step has type and params, its fields "
                         "stand in params")
    if not isinstance(params, dict):
        raise ValueError(f"{where}: params is {params!r}, expected fields with their values")
    if name not in STEPS and name not in ALIASES:
        raise ValueError(f"{where}: unknown type{nearest(name, (*STEPS, *ALIASES))}; expected one "
                         f"of {', '.join(STEPS)}")
    kind, fields, beside = ALIASES.get(name, (name, {}, {}))
    params = beside | {fields.get(key, key): value for key, value in params.items()}
    back = {ours: theirs for theirs, ours in fields.items()}
    repair = None
    if name == "quantization" and "method" in params:
        method = params.pop("method")
        if method not in REPAIRS and method not in CALIBRATORS:
            raise ValueError(f"{where}: method is "
                             f"{method!r}{nearest(str(method), (*REPAIRS, *CALIBRATORS))}; "
                             f"expected one of {', '.join((*REPAIRS, *CALIBRATORS))}")
        repair = Repair(method) if method in REPAIRS else None
        params |= {} if repair else {"calibrator": method}
    made = _made(STEPS[kind], params, where, back)
    return [(name, made)] + ([(f"{name}, {repair.method}", repair)] if repair else [])


def _made(kind: type, params: Mapping[str, object], where: str, back: Mapping[str, str]) -> Step:
    """A step of its class from checked fields."""
    try:
        checked = _schema(kind).model_validate({key: _number(value)
                                                for key, value in params.items()})
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: {_first(error, _schema(kind), back)}") from error
    values = checked.model_dump(exclude_unset=True)
    trains = {key: values.pop(key) for key in list(values) if key in _TRAINING
              and key not in _own(kind)}
    try:
        if "recipe" in _own(kind) and (trains or _needs_recipe(kind)):
            values["recipe"] = training.Recipe(**trains)
        return kind(**values)
    except ValueError as error:  # what only the fields together tell
        raise ValueError(f"{where}: {str(error).partition(': ')[2] or error}") from error


@cache
def _schema(kind: type) -> type[pydantic.BaseModel]:
    """What a recipe may write of a step: its own fields, and those of a training where it has
    one."""
    hints, fields = get_type_hints(kind, include_extras=True), {}
    for field in dataclasses.fields(kind):
        if field.name == "recipe":
            theirs = get_type_hints(training.Recipe, include_extras=True)
            fields |= {name: (theirs[name], default) for name, default in _TRAINING.items()}
        elif field.name not in NOT_WRITTEN and get_origin(hints[field.name]) is not ClassVar:
            default = ... if field.default is dataclasses.MISSING else field.default
            fields[field.name] = (_plain(hints[field.name]), default)
    return pydantic.create_model(kind.__name__,
                                 __config__=pydantic.ConfigDict(extra="forbid", strict=True),
                                 **fields)


_TRAINING = {field.name: field.default for field in dataclasses.fields(training.Recipe)}


def _own(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _needs_recipe(kind: type) -> bool:
    return next(field for field in dataclasses.fields(kind)
                if field.name == "recipe").default is dataclasses.MISSING


def _plain(hint):
    """The hint without functions, which YAML cannot write: a schedule is a number."""
    return (Annotated[float, Gt(0)] if any(get_origin(part) is Callable for part in get_args(hint))
            else hint)


def _number(value: object) -> object:
    """YAML takes 1e-3 for text."""
    return (float(value) if isinstance(value, str)
            and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value)


def _first(error: pydantic.ValidationError, schema: type[pydantic.BaseModel],
           back: Mapping[str, str]) -> str:
    """The first thing that is wrong, in one line."""
    found = error.errors()[0]
    field = str(found["loc"][0])
    if found["type"] == "extra_forbidden":
        takes = ", ".join(schema.model_fields) or "none"
        return f"unknown field {field!r}{nearest(field, schema.model_fields)}; it takes {takes}"
    if found["type"] == "missing":
        return f"{back.get(field, field)} is missing"
    expected = " or ".join(dict.fromkeys(re.sub(r"^[Ii]nput should be (a valid )?", "", part["msg"])
                                         for part in error.errors()
                                         if part["loc"][0] == field))
    return f"{back.get(field, field)} is {found['input']!r}, expected {expected}"


def _changed(value) -> dict[str, object]:
    """The fields of a dataclass that differ from their defaults."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)
            if field.default is dataclasses.MISSING or getattr(value, field.name) != field.default}
