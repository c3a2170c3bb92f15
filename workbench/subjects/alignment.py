"""Encoders of several modalities trained to agree: one concept, one direction, whatever it is seen,
read or heard as.

The symmetric contrastive loss of every pair of modalities, temperature 0.07 to begin with and
learned: CLIP, Radford et al. 2021 (arXiv 2103.00020), after Zhang et al. 2020 (arXiv 2010.00747).
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench import files
from workbench.subjects import checkpoints, states, training

HOTTEST = math.log(100)  # of the learned scale, 1 / temperature


@dataclass(frozen=True)
class Items:
    """What an encoder reads, and of which concept. values: (n, ...); rows: concept, language (""
    for none), part.

    Example: `len(Items(a, pd.DataFrame({"concept": range(80)})).rows) == 80`
    """

    values: Tensor
    rows: pd.DataFrame

    def __post_init__(self):
        if len(self.values) != len(self.rows):
            raise ValueError(f"items: {len(self.values)} inputs and {len(self.rows)} rows; "
                             "expected as many")
        if self.values.is_floating_point() and not torch.isfinite(self.values).all():
            raise ValueError("items: an input is NaN or infinite")

    def take(self, keep) -> "Items":
        """Those where the bool array (n,) `keep` is true."""
        keep = np.asarray(keep, bool)
        return Items(self.values[torch.from_numpy(keep.copy())],
                     self.rows[keep].reset_index(drop=True))


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """How to align: `steps` of AdamW. batch_size: concepts a step, one item of each modality for
    each. temperature: the first; it is learned. precision: of the encoders.

    Example: `alignment.Recipe(steps=100)`
    """

    steps: int = 600
    batch_size: int = 256
    learning_rate: float = 2e-3
    optimizer: str = "adamw"
    weight_decay: float = 0.03
    warmup: float = 0.1
    precision: str = "fp32"
    temperature: float = 0.07

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"recipe: {name} is {getattr(self, name)!r}, expected more than 0")


def contrastive(one: Tensor, other: Tensor, scale: Tensor | float,
                groups: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of unit vectors (n, dim): mean cross entropy of scale one other^T, rows and
    columns, row k for row k.

    groups: int64 (n,); two rows of one group are neither right nor wrong for each other. Raises
    ValueError where the lengths differ.

    Example: `contrastive(nn.functional.normalize(a), nn.functional.normalize(a), 100.0) < 0.01`
    """
    if len(one) != len(other):
        raise ValueError(f"contrastive: batches of {len(one)} and {len(other)}; expected pairs, "
                         "row by row")
    logits = scale * one @ other.T
    if groups is not None:
        same = (groups[:, None] == groups[None]) & ~torch.eye(len(groups), dtype=torch.bool)
        logits = logits.masked_fill(same, -1e4)
    right = torch.arange(len(one))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def align(encoders: Mapping[str, nn.Module], items: Mapping[str, Items], groups: Tensor, *,
          recipe: Recipe | None = None, teacher: Mapping[str, Tensor] | None = None, teaching=None,
          seed: int = 0, state: Path | str | None = None) -> tuple[nn.ModuleDict, pd.DataFrame]:
    """Train copies of `encoders` on `items` of the same names (all of them: pass training parts)
    and return them in eval mode after the last step, with a history: step, loss, temperature,
    seconds.

    A step draws concepts, for each a language, and of every modality an item in that language, or
    else any. A concept that a modality lacks is left out of that modality's pairs. teacher: a
    teacher's vectors of the same items, by modality; teaching(student, teacher) -> scalar, of dicts
    of the step's vectors of both (row k of one concept in all), is then added to the loss
    (distillation.embeddings): of what all modalities have together, and of each modality alone, for
    a teacher also tells what a single picture or sentence is; with it, one modality will do. Every
    draw follows from (seed, step), so that a run that is killed and called again with the same
    `state` goes on to the same weights.

    Raises ValueError for names that differ, or a loss that is no longer finite.

    Example: `encoders, history = alignment.align({"image": ..., "text": ...}, items,
    known.meanings, recipe=Recipe(steps=600))`
    """
    run = _Run(encoders, items, groups, recipe or Recipe(), seed, teacher,
               teaching if teacher else None)
    run.loop.run(run.loss, state=state, title="alignment", after_update=run.after_update)
    return run.encoders.eval(), pd.DataFrame(run.loop.progress["rows"])


class _Run:
    """A loop over steps that draw concepts, and an item of each modality for each."""

    def __init__(self, encoders: Mapping[str, nn.Module], items: Mapping[str, Items],
                 groups: Tensor, recipe: Recipe, seed: int, teacher: Mapping[str, Tensor] | None,
                 teaching):
        least = 1 if teaching else 2
        if set(encoders) != set(items) or len(encoders) < least:
            raise ValueError(f"align: encoders of {', '.join(encoders)} and items of "
                             f"{', '.join(items)}; expected two or more, or with a teacher one, of "
                             "the same names")
        self.encoders = copy.deepcopy(nn.ModuleDict(encoders)).train()
        self.scale = nn.ParameterDict(
            {"log": nn.Parameter(torch.tensor(-math.log(recipe.temperature)))})
        self.items, self.groups, self.recipe, self.seed = dict(items), groups, recipe, seed
        self.teacher, self.teaching = teacher, teaching
        self.places = {name: found.rows.groupby("concept").indices for name, found in items.items()}
        self.languages = {name: found.rows.language.to_numpy() for name, found in items.items()}
        self.concepts = np.unique(np.concatenate([list(places) for places in self.places.values()]))
        self.spoken = {c: sorted({language for name, places in self.places.items() if c in places
                                  for language in self.languages[name][places[c]] if language})
                       for c in self.concepts}
        identity = {"modalities": sorted(items),
                    "teacher": files.fingerprint(teacher.values()) if teacher else None,
                    "items": files.fingerprint(found.values for found in self.items.values()),
                    "start": files.fingerprint(self.encoders.state_dict().values()),
                    "teaching": states.told(teaching) if teaching else None}
        self.loop = training.Loop({"encoders": self.encoders, "scale": self.scale},
                                  [*self.encoders.parameters(), *self.scale.parameters()], recipe,
                                  steps=recipe.steps, seed=seed, identity=identity)

    def loss(self, step: int) -> Tensor:
        """The contrastive loss of every pair of modalities, and what the teacher adds."""
        drawn = self._draw(np.random.default_rng([self.seed, step]))
        vectors = {name: self.encoders[name](_trimmed(self.items[name].values[places])).float()
                   for name, (_, places) in drawn.items()}
        with torch.autocast("cpu", enabled=False):
            losses = []
            for one, other in combinations(vectors, 2):
                shared, a, b = np.intersect1d(drawn[one][0], drawn[other][0], return_indices=True)
                if len(shared) > 1:
                    losses.append(contrastive(vectors[one][a], vectors[other][b],
                                              self.scale["log"].exp(), self.groups[shared]))
            return sum(losses) + (self._taught(drawn, vectors) if self.teaching else 0.0)

    def after_update(self, step: int, loss: float, seconds: float) -> None:
        """Keep the temperature in bounds, and the step's row."""
        with torch.no_grad():
            self.scale["log"].clamp_(max=HOTTEST)
        warmth = math.exp(-self.scale["log"].item())
        row = {"step": step, "loss": loss, "temperature": warmth, "seconds": round(seconds, 3)}
        self.loop.progress["rows"].append(row)

    def _taught(self, drawn: Mapping, vectors: Mapping[str, Tensor]) -> Tensor:
        """The teaching of what all modalities have together, and of each modality alone."""
        shared = set.intersection(*(set(concepts) for concepts, _ in drawn.values()))
        rows = {name: np.isin(concepts, list(shared)) for name, (concepts, _) in drawn.items()}
        wanted = {name: self.teacher[name][places] for name, (_, places) in drawn.items()}
        together = self.teaching({name: vectors[name][rows[name]] for name in vectors},
                                 {name: wanted[name][rows[name]] for name in vectors})
        return (together
                + sum(self.teaching({name: vectors[name]}, {name: wanted[name]})
                      for name in vectors))

    def _draw(self, random: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By modality: the concepts that have it, and a place among its items for each."""
        concepts = np.sort(random.permutation(self.concepts)[:self.recipe.batch_size])
        wanted = [self.spoken[c][random.integers(len(self.spoken[c]))] if self.spoken[c] else ""
                  for c in concepts]
        drawn = {}
        for name, places in self.places.items():
            chosen = []
            for concept, language in zip(concepts, wanted, strict=True):
                if concept in places:
                    mine = places[concept]
                    same = mine[self.languages[name][mine] == language]
                    chosen.append((concept, random.choice(same if len(same) else mine)))
            if chosen:
                drawn[name] = tuple(np.array(chosen).T)
        return drawn


@torch.inference_mode()
def embed(encoders: Mapping[str, nn.Module], items: Mapping[str, Items], *,
          batch: int = 256) -> dict[str, Tensor]:
    """Unit vectors (n, dim) of all items, by modality; texts of like length go together.

    Example: `embed(encoders, items)`
    """
    found = {}
    for name, part in items.items():
        values = part.values
        order = (values
                 > 0).sum(1).argsort() if values.dtype == torch.int64 else torch.arange(len(values))
        parts = [encoders[name](_trimmed(values[places])) for places in order.split(batch)]
        found[name] = torch.cat(parts)[order.argsort()]
    return found


def _trimmed(values: Tensor) -> Tensor:
    """Texts (n, L) without the padding that all of them end in; other values as they are."""
    return values[:, :int((values > 0).any(0).sum())] if values.dtype == torch.int64 else values


def save(encoders: nn.ModuleDict, path: Path | str, told: Mapping) -> None:
    """Write the weights in 8 bits (`checkpoints.in_eight_bits`), with `told` (recipe, seed, ...) in
    the header.

    Example: `save(encoders, "towers.safetensors", {"seed": 0})`
    """
    with files.atomic(path) as new:
        save_file(checkpoints.in_eight_bits(encoders.state_dict()), new,
                  {"told": json.dumps(dict(told))})


def load(encoders: nn.ModuleDict, path: Path | str) -> nn.ModuleDict:
    """`encoders`, itself, with the weights that `save` wrote, of these modalities or more, in eval
    mode. Raises ValueError where they do not fit.

    Example: `load(encoders, "towers.safetensors")`
    """
    try:
        with safe_open(path, framework="pt") as stored:
            mine = [key for key in stored.keys() if key.split(".")[0] in encoders]  # noqa: SIM118
            tensors = {key: stored.get_tensor(key) for key in mine}
        encoders.load_state_dict(checkpoints.from_eight_bits(tensors))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"checkpoint {path} does not hold these encoders "
                         f"({str(error).splitlines()[0]})") from error
    return encoders.eval()
