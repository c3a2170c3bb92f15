"""Distillation losses: a student learns what a teacher puts out, not only the labels.

z_s, z_t: logits (n, K) of student and teacher; p = softmax(z / T). Sources: soft targets Hinton et
al. 2015 (arXiv 1503.02531); decoupled Zhao et al. 2022 (arXiv 2203.08679); hints Romero et al. 2015
(arXiv 1412.6550); attention transfer Zagoruyko & Komodakis 2017 (arXiv 1612.03928); relational Park
et al. 2019 (arXiv 1904.05068); relations between the tokens of a sentence MiniLMv2, Wang et al.
2021 (arXiv 2012.15828).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.batches import Batch, Inputs, call
from workbench.graph.layers import evaluating, watch
from workbench.subjects import data, networks, states
from workbench.subjects.objectives import IGNORED, Objective
from workbench.subjects.subject import Count, Globs, Subject
from workbench.subjects.tasks import with_unlabelled
from workbench.subjects.training import Recipe, few, fit

KINDS = ("soft_targets", "decoupled", "hint", "attention", "relational", "relations")
# a constant, or a function of the fraction of the steps done
Schedule = float | Callable[[float], float]


def soft_targets(student: Tensor, teacher: Tensor, *, temperature: float = 3.0) -> Tensor:
    """T^2 KL(p_t || p_s), mean over the batch; T^2 keeps the gradient's size as T grows. Zero where
    the two agree.

    Raises ValueError where the classes differ or the temperature is not positive.

    Example: `soft_targets(torch.ones(2, 5), torch.ones(2, 5)).item() == 0.0`
    """
    _check(student, teacher, temperature)
    mine, theirs = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(mine, theirs, reduction="batchmean", log_target=True)


def with_labels(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 3.0,
                alpha: float = 0.7) -> Tensor:
    """alpha soft_targets + (1 - alpha) cross entropy of the labels int64 (n,); those at IGNORED
    have the first part alone.

    Raises as `soft_targets` does, and ValueError for an alpha that is no fraction.

    Example: `with_labels(torch.randn(2, 5), torch.randn(2, 5), torch.tensor([0, 3])) > 0`
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected 0 (labels only) to 1 (teacher only)")
    told = (F.cross_entropy(student, labels, ignore_index=IGNORED, reduction="sum")
            / (labels != IGNORED).sum().clamp_min(1))
    return alpha * soft_targets(student, teacher, temperature=temperature) + (1 - alpha) * told


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 4.0,
              alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD): the two parts of KL(p_t || p_s), weighted apart.

    TCKD is the KL of (p_label, 1 - p_label), target against all others; NCKD that of the softmax
    over the others alone. Raises ValueError as `soft_targets` does, and for fewer than two classes.

    Example: `decoupled(torch.ones(2, 5), torch.ones(2, 5), torch.tensor([0, 3])).item() == 0.0`
    """
    _check(student, teacher, temperature)
    if student.shape[1] < 2:
        raise ValueError("decoupled distillation needs at least 2 classes")
    target = F.one_hot(labels, student.shape[1]).bool()

    # log (n, 2) of target and rest; log softmax (n, K - 1) of the rest
    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        logs = F.log_softmax(logits / temperature, 1)
        others = (logits / temperature)[~target].view(len(logits), -1)
        rest = torch.logsumexp(logs[~target].view(len(logits), -1), 1)
        return torch.stack([logs[target], rest], 1), F.log_softmax(others, 1)

    (binary_s, others_s), (binary_t, others_t) = parts(student), parts(teacher)
    tckd = F.kl_div(binary_s, binary_t, reduction="batchmean", log_target=True)
    nckd = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * tckd + beta * nckd)


def hint(student: Tensor, teacher: Tensor, *, regressor: nn.Module | None = None) -> Tensor:
    """Half the mean squared distance of two layers' outputs, of one shape, the student's through
    `regressor`.

    Raises ValueError where the shapes differ and no regressor brings them together.

    Example: `hint(torch.ones(2, 8), torch.ones(2, 8)).item() == 0.0`
    """
    student = regressor(student) if regressor else student
    if student.shape != teacher.shape:
        raise ValueError(f"hint: the student's features have shape {tuple(student.shape)}, the "
                         f"teacher's {tuple(teacher.shape)}; give a regressor between them, or "
                         "choose layers of one shape")
    return F.mse_loss(student, teacher) / 2


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """mean ((Q_s / |Q_s| - Q_t / |Q_t|)^2) with Q = mean over channels of the squared features (n,
    C, H, W).

    The numbers of channels may differ. Raises ValueError where height and width do.

    Example: `attention(images, images) == 0`
    """
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"attention: maps of {tuple(student.shape[2:])} and "
                         f"{tuple(teacher.shape[2:])} pixels; choose layers of one size")
    maps = [F.normalize(features.pow(2).mean(1).flatten(1), dim=1)
            for features in (student, teacher)]
    return (maps[0] - maps[1]).pow(2).mean()


def relational(student: Tensor, teacher: Tensor, *, distance: float = 25.0,
               angle: float = 50.0) -> Tensor:
    """distance * RKD-D + angle * RKD-A of embeddings (n, d_s) and (n, d_t); the two widths may
    differ.

    RKD-D: Huber loss of the pairwise distances, each divided by its mean over pairs that differ;
    RKD-A: of the cosines of the angles at each j between all i and k. Raises ValueError for fewer
    than two rows.

    Example: `relational(a, a) < 1e-6`
    """
    if len(student) < 2 or len(student) != len(teacher):
        raise ValueError("relational: needs two or more rows, the same in both; found "
                         f"{len(student)} and {len(teacher)}")
    losses = []
    for weight, relation in ((distance, _distances), (angle, _angles)):
        if weight:
            with torch.no_grad():
                wanted = relation(teacher.flatten(1))
            losses.append(weight * F.smooth_l1_loss(relation(student.flatten(1)), wanted))
    return sum(losses)


def relations(student: Tensor, teacher: Tensor, *, heads: int = 12,
              mask: Tensor | None = None) -> Tensor:
    """KL(R_t || R_s), mean over tokens and heads, with R = softmax(X X^T / sqrt(d)) how the tokens
    of a sentence (n, L, C) look to each other in each of `heads` parts of d = C / heads. Of queries
    or keys it is their attention, of values what they carry.

    The two widths may differ. mask: (n, L), 0 where there is no token. Raises ValueError where the
    lengths differ, or a width is no multiple of `heads`.

    Example: `relations(a[None], a[None], heads=4) < 1e-6`
    """
    if (student.dim() != 3 or student.shape[:2] != teacher.shape[:2] or student.shape[2] % heads
        or teacher.shape[2] % heads):
        raise ValueError(f"relations: found {tuple(student.shape)} and {tuple(teacher.shape)}; "
                         "expected sequences (n, L, C) of as many tokens, with C a multiple of "
                         f"{heads}")
    there = (torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if mask is None
             else mask.bool())

    def related(states: Tensor) -> Tensor:  # log R, (n, heads, L, L)
        parts = states.unflatten(2, (heads, -1)).transpose(1, 2)
        alike = parts @ parts.transpose(2, 3) / parts.shape[3] ** 0.5
        return alike.masked_fill(~there[:, None, None], -1e4).log_softmax(3)

    mine, theirs = related(student), related(teacher)
    apart = (theirs.exp() * (theirs - mine)).sum(3).transpose(1, 2)  # (n, L, heads)
    return apart[there].mean()


def embeddings(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], *,
               temperature: float = 5.0, scale: float = 20.0, features: float = 10.0) -> Tensor:
    """features * (1 - cosine of each vector and the teacher's) + soft_targets of the similarities
    of every two modalities.

    student, teacher: unit vectors (n, d) by modality, row k of one concept in all; the similarities
    are scale a b^T, whose rows and columns are softened at `temperature`. Source: TinyCLIP, Wu et
    al. 2023 (arXiv 2309.12314), with features after Romero et al. 2015. Raises ValueError where
    modalities, lengths or widths differ.

    Example: `alignment.align(student, items, meanings, teacher=vectors,
    teaching=distillation.embeddings)`
    """
    for name in student:
        if name not in teacher or student[name].shape != teacher[name].shape:
            there = tuple(teacher[name].shape) if name in teacher else "not there"
            raise ValueError(f"embeddings: {name} is {tuple(student[name].shape)} in the student "
                             f"and {there} in the teacher; expected the same")
    total = features * sum((1 - (student[name] * teacher[name]).sum(1)).mean() for name in student)
    for one, two in combinations(student, 2):
        mine, theirs = (scale * vectors[one] @ vectors[two].T for vectors in (student, teacher))
        total = (total
                 + sum(soft_targets(a, b, temperature=temperature)
                       for a, b in ((mine, theirs), (mine.T, theirs.T))) / 2)
    return total


def loss(teacher: nn.Module, kind: str = "soft_targets", *, temperature: Schedule = 3.0,
         alpha: Schedule = 0.7, weight: float = 1.0, layers: Sequence[str] | Mapping[str, str] = (),
         student: nn.Module | None = None, example: Inputs | None = None) -> nn.Module:
    """A loss for training.fit: (student, batch, objective, progress 0-1) -> scalar; the teacher is
    frozen in eval mode.

    "soft_targets": with_labels. "decoupled": cross entropy + weight * decoupled. "hint",
    "attention", "relational", "relations": with_labels + weight * the loss of the features of each
    of `layers` (module names in both, such as "layer2", or by the student's name the teacher's).
    temperature and alpha may fall or step through training: see `falling` and `stages`. student,
    example: for hints between layers of different widths, which then get the `regressors` of the
    two networks.

    Raises ValueError for an unknown kind or missing layers.

    Example: `training.fit(student, task, recipe=recipe, loss=distillation.loss(teacher))`
    """
    if kind not in KINDS:
        raise ValueError(f"unknown distillation {kind!r}; expected one of {', '.join(KINDS)}")
    on_features = {"hint": hint, "attention": attention, "relational": relational,
                   "relations": relations}.get(kind)
    if on_features and not layers:
        raise ValueError(f"distillation {kind!r} needs layers=(NAME, ...), modules of both "
                         "networks")
    pairs = dict(layers) if isinstance(layers, Mapping) else {layer: layer for layer in layers}
    between = (regressors(student, teacher, pairs, example) if kind == "hint"
               and student is not None else None)
    return _Teaching(teacher, kind, temperature, alpha, weight, pairs, on_features, between)


def regressors(student: nn.Module, teacher: nn.Module, layers: Mapping[str, str], example: Inputs,
               *, seed: int = 0) -> nn.ModuleDict:
    """What FitNets hints need for those of `layers` whose widths differ: from the student's width
    to the teacher's, a 1 x 1 convolution of feature maps (n, C, H, W), a linear layer of vectors
    (n, C) or sequences (n, L, C). Drawn by `seed`; training.fit trains them with the student.

    Raises ValueError for an unknown layer, or one that puts out anything else.

    Example: `regressors(student, teacher, {"layer1": "layer1"}, x)`
    """
    with watch(student, [*layers]) as mine, evaluating(student):
        call(student, example)
    with watch(teacher, [*layers.values()]) as theirs, evaluating(teacher):
        call(teacher, example)
    found = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer, told in layers.items():
            one, other = mine[layer], theirs[told]
            if one.dim() != other.dim() or one.dim() not in (2, 3, 4):
                raise ValueError(f"regressors: {layer} puts out {tuple(one.shape)}, the teacher's "
                                 f"{tuple(other.shape)}; expected feature maps (n, C, H, W), "
                                 "vectors (n, C) or sequences (n, L, C) of both")
            place = 1 if one.dim() == 4 else -1
            if one.shape[place] != other.shape[place]:
                found[_key(layer)] = (nn.Conv2d(one.shape[1], other.shape[1], 1, bias=False)
                                      if one.dim() == 4 else
                                      nn.Linear(one.shape[-1], other.shape[-1], bias=False))
    return found


class _Teaching(nn.Module):
    """The loss that `loss` describes; only the regressors are trained with the student, never the
    teacher."""

    def __init__(self, teacher, kind, temperature, alpha, weight, layers, on_features, regressors):
        super().__init__()
        # in a tuple, so that its weights are not this module's
        self._teacher = (copy.deepcopy(teacher).eval(),)
        self.kind, self.temperature, self.alpha, self.weight = kind, temperature, alpha, weight
        self.layers, self.on_features, self.regressors = layers, on_features, regressors
        self.identity = [kind, _told(temperature), _told(alpha), weight, list(layers.items()),
                         states.mark(teacher.state_dict().values())]
        if regressors:
            self.identity.append(states.mark(regressors.state_dict().values()))

    def forward(self, student: nn.Module, batch: Batch, objective: Objective,
                progress: float) -> Tensor:
        heat, share = (value(progress) if callable(value) else value
                       for value in (self.temperature, self.alpha))
        teacher, targets = self._teacher[0], batch.targets
        with torch.no_grad(), watch(teacher, [*self.layers.values()]) as theirs:
            wanted, _ = objective.decisions(objective.read(call(teacher, batch.inputs)).float(),
                                            targets)
        with watch(student, [*self.layers]) as mine:
            logits, labels = objective.decisions(objective.read(call(student, batch.inputs),
                                                                targets).float(), targets)
        if self.kind == "relations" and not isinstance(batch.inputs, Mapping):
            raise ValueError("distillation 'relations' is of token ids and their mask, named; "
                             "these inputs have no names")
        if self.kind == "decoupled":
            return (F.cross_entropy(logits, labels) + self.weight
                    * decoupled(logits, wanted, labels, temperature=heat))
        total = with_labels(logits, wanted, labels, temperature=heat, alpha=share)
        for layer, other in self.layers.items() if self.on_features else ():
            if self.kind == "relational" and len(targets) < 2:
                continue  # a last batch of one example has no relations
            # distances cancel in half precision
            with torch.autocast(logits.device.type, enabled=False):
                told = ({"mask": batch.inputs.get("attention_mask")} if self.kind == "relations"
                        else {})
                total = (total + self.weight
                         * self._of_features(layer, mine[layer].float(), theirs[other].float(),
                                             **told))
        return total

    def _of_features(self, layer: str, student: Tensor, teacher: Tensor,
                     **told: Tensor | None) -> Tensor:
        # of embeddings: each map's mean, (n, C)
        if self.kind == "relational" and student.dim() > 2:
            student, teacher = student.flatten(2).mean(2), teacher.flatten(2).mean(2)
        if self.kind == "hint" and self.regressors and _key(layer) in self.regressors:
            return hint(student, teacher, regressor=self.regressors[_key(layer)])
        return self.on_features(student, teacher, **told)

    def _apply(self, change, recurse=True):  # .to(device) moves the teacher too
        self._teacher[0]._apply(change, recurse)
        return super()._apply(change, recurse)


@dataclass(frozen=True)
class Distil:
    """The step of a plan that trains with a teacher: by default the subject's reference, the model
    before any step. Soft targets of sentences are asked for once and remembered.

    kind, temperature, alpha, weight, layers: as `loss` has them. examples, validation: of those
    splits, all where 0. unlabelled: other data, as data.load takes them, on whose training examples
    the teacher alone says what is right; `unlabelled_examples` of them, all where 0.

    Example: `Distil(Recipe(epochs=1), kind="hint", layers=["layer1"])`
    """

    keeps_shape: ClassVar[bool] = True
    needs_examples: ClassVar[bool] = True
    recipe: Recipe
    kind: Literal[KINDS] = "soft_targets"  # type: ignore[valid-type]
    temperature: Schedule = 3.0
    alpha: Schedule = 0.7
    weight: float = 1.0
    layers: Globs = ()  # type: ignore[assignment]  # a default can be no list
    teacher: nn.Module | None = None
    examples: Count = 0
    validation: Count = 0
    unlabelled: str = ""
    unlabelled_examples: Count = 0
    seed: Count = 0
    state: str | None = None
    known: str | None = None

    def __post_init__(self):
        if self.unlabelled and self.kind == "decoupled":
            raise ValueError("distil: kind 'decoupled' needs the label of every example; give "
                             "another kind, or none unlabelled")

    def apply(self, subject: Subject) -> Subject:
        """The subject taught."""
        teacher = self.teacher or subject.reference
        task = few(subject.task, self.examples, validation=self.validation, seed=self.seed)
        if self.unlabelled:
            more = data.load(self.unlabelled, preprocessing=task.train.prepare).train
            more = more.subset(self.unlabelled_examples or len(more), seed=self.seed)
            task = replace(task, train=with_unlabelled(task.train, more))
        if self.kind == "soft_targets" and networks.can_remember(task.train):
            teacher = networks.Remembered(teacher, task.train)
        teaching = loss(teacher, self.kind, temperature=self.temperature, alpha=self.alpha,
                        weight=self.weight, layers=self.layers, student=subject.model,
                        example=subject.example)
        trained = fit(subject.model, task, recipe=self.recipe, seed=self.seed, loss=teaching,
                      state=self.state, known=self.known)
        return subject.with_model(trained.model, history=trained.history)


def falling(start: float, end: float) -> Callable[[float], float]:
    """A schedule that goes from `start` to `end` in a straight line. Example: `falling(4.0,
    1.0)(0.5) == 2.5`"""
    return lambda progress: start + (end - start) * progress


def stages(*steps: tuple[float, float]) -> Callable[[float], float]:
    """A schedule in steps, each (from this fraction of training on, this value); the first is from
    0.

    `stages((0, 1.0), (0.3, 0.7))` for alpha fits the teacher's outputs alone, then adds the labels.

    Example: `stages((0.0, 4.0), (0.5, 1.0))(0.7) == 1.0`
    """
    if (not steps or steps[0][0] != 0
        or any(a[0] >= b[0] for a, b in zip(steps, steps[1:], strict=False))):
        raise ValueError(f"stages are {steps}; expected (fraction, value) pairs whose fractions "
                         "rise from 0")
    return lambda progress: [value for start, value in steps if start <= progress][-1]


def _told(value: Schedule):
    return [value(step / 8) for step in range(9)] if callable(value) else value


def _key(layer: str) -> str:  # a ModuleDict's keys hold no dots
    return layer.replace(".", "-")


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"the student puts out {tuple(student.shape)}, the teacher "
                         f"{tuple(teacher.shape)}; both need the same examples and classes")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")


# (n, d) -> (n, n), divided by the mean over pairs that differ
def _distances(rows: Tensor) -> Tensor:
    square = rows.pow(2).sum(1)
    apart = (square[:, None] + square[None] - 2 * rows @ rows.T).clamp_min(1e-12).sqrt()
    apart = apart * ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return apart / apart[apart > 0].mean()


# (n, d) -> cosines (n, n, n): at j, between the directions to i and to k
def _angles(rows: Tensor) -> Tensor:
    directions = F.normalize(rows[None] - rows[:, None], dim=2)
    return torch.bmm(directions, directions.transpose(1, 2))
