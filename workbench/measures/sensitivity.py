"""How much accuracy goes when one layer is changed: every layer, several levels, the unchanged
prefix computed once.

The model is traced and run node by node. Where a change first touches the graph, a branch goes from
there to the end with the changed layers, while what stands before it is shared by all. `exact`
gives the counts of the plain loop; `fast` uses bfloat16 and a growing random subset, and stops each
point when its paired interval is narrow enough.

Sources: the scan as in Li et al. 2017 (arXiv 1608.08710, figure 2); taylor, mean |w dL/dw|,
Molchanov et al. 2019 (arXiv 1906.10771).
"""

import copy
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from workbench import files, machine
from workbench.batches import Batch, Inputs, answer, call, count, pairs
from workbench.errors import listed
from workbench.graph.branching import Branching
from workbench.graph.layers import Change, evaluating, named
from workbench.measures import cost
from workbench.measures.accuracy import finite, paired_interval, wilson
from workbench.subjects.objectives import Objective
from workbench.subjects.tasks import Split, expect_split

MODES = ("exact", "fast", "plain")
# A point of the fast scan is looked at after every LOOK examples from LEAST on, until its interval
# is narrow enough. With these figures 95 % hold over all looks, for all the gains and losses that
# were tried (a test draws them).
LEAST, LOOK, Z_OF_LOOKS, ADDED = 300, 100, 2.24, 4
# (layer, level) -> what changes; method.layers: the names it knows
Method = Callable[[str, float], Change]


@dataclass
class _Point:
    """One layer at one level, and what was counted so far: examples, how much of them is right, and
    of each example's change against the unchanged model the sum and the sum of squares."""

    layer: str
    level: float
    change: Change
    n: int = 0
    right: float = 0.0
    right_squares: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    distance: float = 0.0
    done: bool = field(default=False)

    def counts(self) -> list:
        """What a state keeps."""
        return [self.n, self.right, self.right_squares, self.total, self.squares, self.distance,
                self.done]


def scan(model: nn.Module, split: Split, method: Method, *, levels: Sequence[float],
         layers: Sequence[str] | None = None, mode: str = "exact", tolerance: float = 0.03,
         shard: tuple[int, int] = (0, 1), seed: int = 0, batch_size: int = 64,
         state: Path | str | None = None) -> pd.DataFrame:
    """One row per layer and level: how the share that is right changes when `method` changes that
    layer, alone, to that level.

    mode "exact": all examples, the counts of the plain loop; "fast": bfloat16 where the processor
    multiplies it, examples in random order by `seed`, each point until its change on the whole
    split is known to `tolerance` (a fraction, the half-width of a 95 % interval over all the looks
    at it, for each point by itself: the points of one scan see the same examples, and err
    together); "plain": each point evaluated by itself, slow, what the others are checked against.
    layers: those of method.layers by default. shard (k, m): every m-th layer from the k-th; `merge`
    puts shards together. state: a file from which a killed scan goes on.

    Columns: layer, layers (coupled ones, " + "), level, removed, of, top1 with interval,
    top1_change (paired, against the unchanged model on the same examples) with interval ("right"
    instead of "top1" where tokens count: the mean share of a sentence's tokens), distance (mean of
    |z' - z|^2 / |z|^2 of the logits: it tells apart what top-1 cannot), params, macs (of the
    changed model), n, note. attrs["evaluations"]: examples run through a branch; attrs["saved"]:
    the share that the plain loop would need more.

    Raises UnsupportedModelError where the model cannot be traced (use mode "plain"), ValueError for
    an unknown layer or mode, a level outside (0, 1], or a state of another scan.

    Example: `sensitivity.scan(model, task.test, channels.silencing(model, example=task.example),
    levels=[.3, .5, .7])`
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    if isinstance(levels, int | float):
        raise TypeError(f"levels is {levels}; give a list, [{levels}]")
    expect_split(split)
    if not levels or any(not 0 < level <= 1 for level in levels):
        raise ValueError(f"levels are {list(levels)}, expected at least one, each above 0 and at "
                         "most 1")
    known = list(getattr(method, "layers", named(model)))
    odd = [layer for layer in layers or [] if layer not in known]
    if odd:
        raise ValueError(f"the method knows no layer {odd[0]!r}; it knows {listed(known)}")
    chosen = list(layers or known)[shard[0]::shard[1]]
    points = [_Point(layer, level, method(layer, level)) for layer in chosen for level in levels]
    halved = mode == "fast" and machine.multiplies_bf16()  # elsewhere bfloat16 is slower
    runner = (functools.partial(_plain, model) if mode == "plain" else
              Branching(model, split.batch(torch.arange(min(2, len(split)))).inputs,
                        recount=not halved,
                        fused=not halved or torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    scanned = _Scan(model, split, points, mode, tolerance, seed, batch_size, halved,
                    Path(state) if state else None)
    scanned.run(runner)
    return scanned.frame()


def merge(shards: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The shards of one scan as one frame. Raises ValueError where a point stands in two of them.

    Example: `sensitivity.merge([curves])`
    """
    frame = pd.concat(list(shards), ignore_index=True)
    twice = frame[frame.duplicated(["layer", "level"])]
    if len(twice):
        raise ValueError(f"layer {twice.layer.iloc[0]} at level {twice.level.iloc[0]} stands in "
                         "two shards")
    return frame


def taylor(model: nn.Module, batches: Iterable[Batch],
           objective: Objective | None = None) -> pd.DataFrame:
    """One row per weighted layer: layer, score = mean |w dL/dw| over its weights, with L the
    objective's loss.

    One backward pass a batch. Raises ValueError where there are no examples or a score is NaN.

    Example: `sensitivity.taylor(model, seen).sort_values("score")`
    """
    work, seen, asked = copy.deepcopy(model).eval(), 0, objective or Objective()
    for inputs, targets in pairs(batches):
        size = count(inputs)
        (size
         * asked.loss(asked.read(call(work, finite(inputs, "inputs")), targets),
                      targets)).backward()
        seen += size
    if not seen:
        raise ValueError("taylor found no examples in its batches")
    rows = []
    for name, layer in named(work).items():
        if layer.weight.grad is None:
            continue
        value = (layer.weight.detach() * layer.weight.grad / seen).abs().mean().item()
        if value != value:
            raise ValueError(f"layer {name}: its gradient is NaN; look at its weights")
        rows.append({"layer": name, "score": value})
    return pd.DataFrame(rows)


def redundant(scores: pd.DataFrame, threshold: float = 0.5, *, neighbours: int = 1) -> pd.DataFrame:
    """Which layers can shrink: `scores` (layer, score; in order of depth) with smoothed, limit and
    redundant added.

    scores: as `taylor` gives them, or a frame of `scan`: then a layer's score is the mean over its
    levels of how far the answers move (`distance`), and a layer of which nothing could be removed
    is left out.

    No layer is judged alone: smoothed_i is the mean of score i and the trend of its `neighbours` on
    each side, their median. The limit adapts to the network: `threshold` times the mean of all
    scores. A layer is redundant where its smoothed score is below the limit. (The articles give the
    idea, not the formula; this is ours.)

    Raises ValueError for NaN scores, no layer that could be judged, a threshold that is not
    positive, or fewer than no neighbours.

    Example: `sensitivity.redundant(curves)` with curves of `scan`
    """
    if "score" not in scores:
        free = scores[scores.removed > 0]
        scores = free.groupby("layer", sort=False).distance.mean().rename("score").reset_index()
    if scores.empty:
        raise ValueError("no layer can be judged: nothing could be removed of any")
    if scores.score.isna().any():
        raise ValueError(f"the score of layer {scores.layer[scores.score.isna()].iloc[0]} is NaN")
    if threshold <= 0 or neighbours < 0:
        raise ValueError(f"threshold is {threshold} and neighbours {neighbours}; expected more "
                         "than 0, and 0 or more")
    out = scores.reset_index(drop=True).copy()
    around = [out.score[[j for j in range(i - neighbours, i + neighbours + 1) if j != i
                         and 0 <= j < len(out)]].median()
              for i in range(len(out))]
    out["smoothed"] = (out.score + pd.Series(around).fillna(out.score)) / 2
    out["limit"] = threshold * out.score.mean()
    out["redundant"] = out.smoothed < out.limit
    return out


class _Scan:
    """The counts of all points over the batches seen so far; saved after each batch, so that a
    killed scan goes on."""

    def __init__(self, model, split, points, mode, tolerance, seed, batch_size, halved, state):
        self.model, self.split, self.points, self.mode, self.tolerance = (model, split, points,
                                                                          mode, tolerance)
        self.halved = halved
        self.batch_size, self.state, self.batch, self.evaluations, self.base_right, self.seen = (
            batch_size, state, 0, 0, 0.0, 0)
        self.fast = mode == "fast"
        self.order = torch.arange(len(split))
        if self.fast:
            self.order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        changed = (tensor for p in points for module in p.change.modules.values()
                   for tensor in module.state_dict().values())
        self.identity = [5, mode, tolerance, seed, batch_size, len(split), split.fingerprint,
                         files.fingerprint(model.state_dict().values()), files.fingerprint(changed),
                         [(p.layer, p.level, p.change.removed) for p in points]]
        for point in points:
            point.done = not point.change.modules

    def run(self, runner) -> None:
        """Count every batch, until the examples or the open points are at an end."""
        self._restore()
        batches = self.order.split(self.batch_size)
        open_points = [p for p in self.points if not p.done]
        with evaluating(self.model), files.progress(total=len(batches), title=f"{self.mode} scan",
                                                    unit="batch") as bar:
            bar.update(self.batch)
            for chosen in batches[self.batch:]:
                if not open_points and self.seen:
                    break
                inputs, targets = self.split.batch(chosen)
                finite(inputs, f"{self.split.objective.unit}s of {self.split.name}")
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.halved):
                    base, outputs = runner(inputs, [point.change.modules for point in open_points])
                finite(base, "outputs of the model")
                self._count(base, outputs, open_points, targets)
                open_points = [p for p in open_points if not p.done]
                self._save()
                bar.update()

    def frame(self) -> pd.DataFrame:
        """The table that `scan` describes."""
        costs = cost.table(self.model, self.split.batch(torch.arange(1)).inputs).set_index("layer")
        name = "top1" if self.split.objective.metric == "top1" else "right"
        rows = []
        for p in self.points:
            n, right = (p.n, p.right) if p.n else (self.seen, self.base_right)
            low, high = (self._share(p) if p.n
                         else self._share(_Point("", 0, p.change, n, right, right)))
            change_low, change_high = self._interval(p, whole=False) if p.n else (0.0, 0.0)
            left = pd.Series(p.change.left, dtype=float).reindex(costs.index).fillna(1.0)
            rows.append({"layer": p.layer, "layers": " + ".join(p.change.layers), "level": p.level,
                         "removed": p.change.removed, "of": p.change.of, name: right / n,
                         f"{name}_low": low,
                         f"{name}_high": high, f"{name}_change": p.total / n,
                         f"{name}_change_low": change_low,
                         f"{name}_change_high": change_high, "distance": p.distance / n,
                         "params": round((costs.params * left).sum()),
                         "macs": round((costs.macs * left).sum()), "n": n,
                         "note": p.change.note})
        frame = pd.DataFrame(rows)
        whole = max(len(self.points) * len(self.split), 1)
        frame.attrs |= {name: self.base_right / self.seen, "evaluations": self.evaluations,
                        "saved": 1 - self.evaluations / whole, "mode": self.mode}
        return frame

    def _count(self, base: Tensor, outputs: Sequence[Tensor], points: Sequence[_Point],
               targets: Tensor) -> None:
        asked, size = self.split.objective, len(base)
        right = asked.right(asked.read(base, targets), targets)
        energy = base.float().pow(2).flatten(1).sum(1).clamp_min(1e-30)
        self.base_right, self.seen, self.batch = (self.base_right + float(right.sum()),
                                                  self.seen + size, self.batch + 1)
        for point, output in zip(points, outputs, strict=True):
            now = asked.right(output, targets)
            point.distance += float(((output - base).float().pow(2).flatten(1).sum(1)
                                     / energy).sum())
            point.n, point.right = point.n + size, point.right + float(now.sum())
            point.right_squares += float(now.square().sum())
            point.total += float((now - right).sum())
            point.squares += float((now - right).square().sum())
            self.evaluations += size
            if self.fast and self.seen >= LEAST and self.seen // LOOK > (self.seen - size) // LOOK:
                low, high = self._interval(point)
                point.done = (high - low) / 2 <= self.tolerance

    def _share(self, point: _Point) -> tuple[float, float]:
        """The interval of what is right: Wilson's where each example is right or wrong, else the
        normal one."""
        if self.split.objective.metric == "top1":
            return wilson(round(point.right), point.n)
        mean = point.right / point.n
        half = 1.96 * max(point.right_squares / point.n - mean**2, 0) ** 0.5 / point.n**0.5
        return max(mean - half, 0.0), min(mean + half, 1.0)

    def _interval(self, point: _Point, *, whole: bool = True) -> tuple[float, float]:
        """For the change on the `whole` split, which a scan stops by, or on examples like these,
        which its table tells."""
        if not self.fast:
            return paired_interval(point.total, point.squares, point.n)
        return paired_interval(point.total, point.squares, point.n, z=Z_OF_LOOKS,
                               population=len(self.split) if whole else None, added=ADDED)

    def _save(self) -> None:
        if self.state:
            stored = {"identity": self.identity, "counts": [p.counts() for p in self.points],
                      "batch": self.batch,
                      "seen": self.seen, "base_right": self.base_right,
                      "evaluations": self.evaluations}
            with files.atomic(self.state) as new:
                new.write_text(json.dumps(stored))

    def _restore(self) -> None:
        if not (self.state and self.state.exists()):
            return
        try:
            stored = json.loads(self.state.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"scan state {self.state} is damaged ({error}); delete it to start "
                             "anew") from error
        if stored["identity"] != json.loads(json.dumps(self.identity)):
            raise ValueError(f"scan state {self.state} is of another scan; delete it or give "
                             "another path")
        for point, kept in zip(self.points, stored["counts"], strict=True):
            (point.n, point.right, point.right_squares, point.total, point.squares, point.distance,
             point.done) = kept
        self.batch, self.seen, self.base_right = (stored["batch"], stored["seen"],
                                                  stored["base_right"])
        self.evaluations = stored["evaluations"]


def _plain(model: nn.Module, inputs: Inputs,
           changes: Sequence[Mapping[str, nn.Module]]) -> tuple[Tensor, list[Tensor]]:
    """Each change by itself, the whole network every time: the oracle of the branching scan."""
    outputs = []
    for modules in changes:
        changed = copy.deepcopy(model)
        for name, module in modules.items():
            changed.set_submodule(name, module)
        outputs.append(answer(call(changed.eval(), inputs)))
    return answer(call(model, inputs)), outputs
