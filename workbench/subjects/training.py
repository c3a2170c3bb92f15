"""One training loop, for any model, objective and loss; it can be stopped anywhere and goes on to
the same weights.

Sources: SGD with Nesterov momentum and the cosine schedule of Loshchilov & Hutter 2017 (arXiv
1608.03983), one cycle, no restarts; AdamW Loshchilov & Hutter 2019 (arXiv 1711.05101); mixed
precision with gradient scaling of Micikevicius et al. 2018 (arXiv 1710.03740).
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from workbench import files, machine
from workbench.batches import Batch, call, count, mapped
from workbench.subjects import states
from workbench.subjects.objectives import IGNORED, Objective
from workbench.subjects.subject import Count, Subject
from workbench.subjects.tasks import Split, Task, augment, shuffled

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": None}
SAVE_EVERY_S = 60.0
SCHEDULES, OPTIMIZERS = ("cosine", "step", "constant"), ("sgd", "adamw")
# (model, batch, objective, progress 0-1) -> scalar
Loss = Callable[[nn.Module, Batch, Objective, float], Tensor]
# (model with its gradients, steps done, steps in all)
AfterStep = Callable[[nn.Module, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How to train. shift: largest random translation of pictures, pixels; flip: mirror half of
    them.

    optimizer: "sgd" (Nesterov, `momentum`) or "adamw". warmup: the fraction of the steps in which
    the rate climbs from 0. schedule: then "cosine" to zero, "step" (a tenth at 1/2 and at 3/4 of
    the steps), or "constant"; each step its own rate. precision: "fp32", "bf16" (autocast), "fp16"
    (autocast with the loss scaled and the gradients unscaled), or "auto": bf16 where the processor
    multiplies it in hardware, else fp32.

    Example: `Recipe(epochs=1, optimizer="adamw", learning_rate=1e-3)`
    """

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup: float = 0.0
    schedule: str = "cosine"
    precision: str = "auto"
    shift: int = 2
    flip: bool = True

    def __post_init__(self):
        for name, known in (("schedule", SCHEDULES), ("precision", tuple(PRECISIONS)),
                            ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"recipe: {name} is {getattr(self, name)!r}, expected one of "
                                 f"{', '.join(known)}")
        for name in ("epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"recipe: {name} is {getattr(self, name)!r}, expected more than 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"recipe: warmup is {self.warmup!r}, expected a fraction of the "
                             "steps, 0 <= warmup < 1")

    def rate(self, progress: float) -> float:
        """Learning rate when the fraction `progress` (0-1) of all steps is done."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        rest = (progress - self.warmup) / (1 - self.warmup)
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * rest)) / 2
        return (self.learning_rate
                * (0.1 ** ((progress >= 0.5) + (progress >= 0.75)) if self.schedule == "step"
                   else 1))

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes in, None for float32."""
        if self.precision == "auto":
            return torch.bfloat16 if machine.multiplies_bf16() else None
        return PRECISIONS[self.precision]

    def optimizer_of(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimizer over `parameters`, those that want no gradient left out."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(trained, self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(trained, self.learning_rate, momentum=self.momentum,
                               weight_decay=self.weight_decay, nesterov=self.momentum > 0)


@dataclass(frozen=True)
class Trained:
    """A trained model (last epoch, eval mode) and its history: one row an epoch.

    Example: `training.fit(model, task, recipe=recipe).history.validation_top1`
    """

    model: nn.Module
    history: pd.DataFrame

    def __repr__(self) -> str:
        return (f"Trained({type(self.model).__name__}, {len(self.history)} epochs, last loss "
                f"{self.history.loss.iloc[-1]:.4f})")


class Loop:
    """Steps of one optimizer over `parts`, which can be saved between two of them and taken up to
    the same weights.

    parts: by name what has a state (modules, regrowing masks). recipe: optimizer, rate and
    precision; its epochs are not looked at. steps: how many in all. identity: what the training is;
    a state of another one is refused. progress: plain numbers that are saved with the state, "step"
    among them. Every draw follows from (seed, step).

    Example: `Loop({"model": model}, model.parameters(), Recipe(epochs=1), steps=10, seed=0,
    identity={})`
    """

    def __init__(self, parts: Mapping, parameters: Iterable[Tensor], recipe: Recipe, *, steps: int,
                 seed: int, identity: dict, device: str = "cpu"):
        self.parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self.recipe, self.steps, self.seed, self.device = recipe, steps, seed, device
        self.identity = identity | asdict(recipe) | {"seed": seed, "steps": steps}
        self.optimizer = recipe.optimizer_of(parameters)
        self.scaler = torch.amp.GradScaler(device, enabled=recipe.precision == "fp16")
        self.progress: dict = {"step": 0, "rows": []}

    def run(self, loss: Callable[[int], Tensor], *, state: Path | str | None = None,
            title: str = "training", before_update: Callable[[], None] = lambda: None,
            after_update: Callable[[int, float, float], None] | None = None, each: int = 0) -> None:
        """Take the steps that are left. loss(step) gives the scalar to be lowered;
        after_update(steps done, loss, seconds).

        state: a file to go on from, saved once a minute, every `each` steps (0: never) and at the
        end.

        Raises ValueError where the loss is no longer finite, or `state` is damaged or belongs to
        another training.
        """
        state = Path(state) if state else None
        if state and state.exists():
            self.restore(state)
        bar = files.progress(total=self.steps, title=title, unit="step")
        bar.update(self.progress["step"])
        saved = time.monotonic()
        while self.progress["step"] < self.steps:
            started = machine.clock()
            value = self.advance(loss, before_update, title)
            step = self.progress["step"]
            if after_update:
                after_update(step, value, machine.clock() - started)
            bar.update()
            due = (step == self.steps or (each and step % each == 0)
                   or time.monotonic() - saved > SAVE_EVERY_S)
            if state and due:
                self.save(state)
                saved = time.monotonic()
        bar.close()

    def advance(self, loss: Callable[[int], Tensor], before_update: Callable[[], None],
                title: str) -> float:
        """One step: the loss, the scaled gradients, the update. Returns the loss."""
        step, dtype = self.progress["step"], self.recipe.dtype
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(step / self.steps)
        # what the network itself draws (dropout) follows from the step too
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, step))
            with torch.autocast(self.device, dtype=dtype or torch.bfloat16,
                                enabled=dtype is not None):
                value = loss(step)
            if not math.isfinite(value.item()):
                raise ValueError(f"{title}: the loss became {value.item()} at step {step} of "
                                 f"{self.steps}; lower learning_rate or use precision fp32")
            self.scaler.scale(value).backward()
        before_update()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.progress["step"] = step + 1
        return value.item()

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        states.save(path, self.parts, self.optimizer, self.identity,
                    self.progress | {"scaler": self.scaler.state_dict()})

    def restore(self, path: Path) -> None:
        """Take up what `save` wrote. Raises ValueError where it is damaged or of another
        training."""
        self.progress = states.restore(path, self.parts, self.optimizer, self.identity)
        self.scaler.load_state_dict(self.progress.pop("scaler"))


def fit(model: nn.Module, task: Task, *, recipe: Recipe, seed: int = 0,
        state: Path | str | None = None, loss: Loss | None = None,
        after_step: AfterStep | None = None, known: Path | str | None = None,
        device: str = "cpu") -> Trained:
    """Train a copy of `model` on task.train and return it as it stands after the last epoch.

    loss(model, batch, objective, progress) defaults to the objective's own; progress is the
    fraction of the steps done. A loss that is a module trains with the model, such as one with
    regressors; a copy of it, so that every call starts alike. after_step(model, step, steps) runs
    after each update, such as sparsity.Regrow, and its before_step(model), where it has one,
    between gradients and update. A copy of it runs; where it has a state_dict, that is saved with
    the rest.

    Every random choice follows from (seed, step), so the same seed gives the same weights, and a
    run that is killed and called again with the same `state` path goes on from the last save (each
    epoch's end, and once a minute) to the weights that it would have had. A state knows its start
    weights, examples, recipe and seed, and loss and after_step by their attribute `identity`, where
    they have one.

    known: a folder of finished trainings (`states.finish`); where this one is among them, its
    weights and history are taken from there. A loss or after_step without an `identity` could be
    any, so that nothing is taken.

    History: epoch, loss (mean), train_right (share that is right, of augmented pictures),
    validation_METRIC, learning_rate, seconds.

    Raises ValueError where the loss is no longer finite, or `state` belongs to another run.

    Example: `small = training.fit(small, task, recipe=Recipe(epochs=5, learning_rate=0.01)).model`
    """
    run = _Fit(model, task, recipe, seed, loss or own_loss(recipe), after_step, device)
    told = all(hasattr(given, "identity") for given in (loss, after_step) if given)
    if known and told and not (state and Path(state).exists()):
        run.loop.progress = (states.finished(run.model, run.loop.identity, known)
                             or run.loop.progress)
    run.loop.run(run.loss, state=state, each=run.epoch_steps, before_update=run.before_update,
                 after_update=run.after_update)
    return Trained(run.model.eval().to("cpu"), pd.DataFrame(run.loop.progress["rows"]))


class _Fit:
    """A loop over the epochs of a task's training split."""

    def __init__(self, model: nn.Module, task: Task, recipe: Recipe, seed: int, loss: Loss,
                 after_step: AfterStep | None, device: str):
        if not len(task.train):
            raise ValueError(f"{task.name} has no training {task.objective.unit}s")
        self.task, self.recipe, self.seed, self.device = task, recipe, seed, device
        self.model = copy.deepcopy(model).train().to(device, memory_format=torch.channels_last)
        self.criterion, self.after_step = copy.deepcopy(loss), copy.deepcopy(after_step)
        trained = [*self.model.parameters()]
        trained += (self.criterion.to(device).parameters() if isinstance(self.criterion, nn.Module)
                    else ())
        if not any(parameter.requires_grad for parameter in trained):
            raise ValueError(f"no weight of {type(model).__name__} is to be trained; "
                             "model.requires_grad_(True) first")
        # a last example that is left over goes with the batch before: by itself it has no variance
        left = len(task.train) % recipe.batch_size
        alone = left == 1 and 1 < recipe.batch_size < len(task.train)
        self.epoch_steps = math.ceil(len(task.train) / recipe.batch_size) - alone
        targets = task.train.targets
        identity = {"task": task.name, "examples": len(task.train),
                    "targets": files.fingerprint([targets]) if isinstance(targets, Tensor)
                    else len(targets), "stored": task.train.fingerprint,
                    "start": states.mark(model.state_dict().values()),
                    "loss": getattr(loss, "identity", None),
                    "after_step": getattr(after_step, "identity", None)}
        parts = {"model": self.model, "loss": self.criterion, "after_step": self.after_step}
        self.loop = Loop(parts, trained, recipe, steps=self.epoch_steps * recipe.epochs, seed=seed,
                         identity=identity, device=device)
        self.loop.progress["sums"] = dict.fromkeys(("loss", "right", "labelled", "examples",
                                                    "seconds"), 0.0)
        self._order: tuple[int, Tensor] | None = None
        # of the last batch: how much was right, of how many with labels, of all
        self._now: tuple[float, int, int] = (0.0, 0, 0)

    def loss(self, step: int) -> Tensor:
        """The loss of the step's batch; how much of it is right is kept for the history."""
        batch = self._batch(step)
        outputs: list = []
        handle = self.model.register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output))
        try:
            value = self.criterion(self.model, batch, self.task.objective, step / self.loop.steps)
        finally:
            handle.remove()
        with torch.no_grad():
            logits = self.task.objective.read(outputs[0])
            labelled = (count(batch.inputs) if batch.targets.dim() != 1
                        else int((batch.targets != IGNORED).sum()))
            self._now = (float(self.task.objective.right(logits, batch.targets).sum()), labelled,
                         count(batch.inputs))
        return value

    def before_update(self) -> None:
        """What `after_step` wants to do with the gradients."""
        if hasattr(self.after_step, "before_step"):
            self.after_step.before_step(self.model)

    def after_update(self, step: int, loss: float, seconds: float) -> None:
        """Count the step, and close the epoch at its end."""
        if self.after_step:
            self.after_step(self.model, step, self.loop.steps)
        right, labelled, examples = self._now
        new = {"loss": loss * examples, "right": right, "labelled": labelled, "examples": examples,
               "seconds": seconds}
        sums = {key: value + new[key] for key, value in self.loop.progress["sums"].items()}
        if step % self.epoch_steps == 0:
            row = {"epoch": step // self.epoch_steps, "loss": sums["loss"] / sums["examples"],
                   "train_right": sums["right"] / max(sums["labelled"], 1),
                   f"validation_{self.task.objective.metric}": self._validate(),
                   "learning_rate": self.loop.optimizer.param_groups[0]["lr"],
                   "seconds": round(sums["seconds"], 3)}
            self.loop.progress["rows"].append(row)
            sums = dict.fromkeys(sums, 0.0)
        self.loop.progress["sums"] = sums

    def _batch(self, step: int) -> Batch:
        epoch, place = divmod(step, self.epoch_steps)
        if self._order is None or self._order[0] != epoch:
            shuffle = torch.Generator().manual_seed(seed_of(self.seed, epoch, 1))
            self._order = epoch, shuffled(self.task.train, self.recipe.batch_size, shuffle)
        end = (place + 1) * self.recipe.batch_size if place + 1 < self.epoch_steps else None
        chosen = self._order[1][place * self.recipe.batch_size:end]
        stored = self.task.train.stored(chosen)
        if (isinstance(stored.inputs, Tensor) and stored.inputs.dtype == torch.uint8
            and stored.inputs.dim() == 4):
            draw = torch.Generator().manual_seed(seed_of(self.seed, step, 2))
            moved = augment(stored.inputs, shift=self.recipe.shift, flip=self.recipe.flip,
                            generator=draw)
            stored = stored._replace(inputs=moved)
        made = self.task.train.prepare(stored)
        self.task.objective.check_targets(made.inputs, made.targets)
        return Batch(mapped(lambda value: value.to(self.device), made.inputs),
                     made.targets.to(self.device))

    @torch.inference_mode()
    def _validate(self) -> float:
        split: Split = self.task.validation
        if not len(split):
            return float("nan")
        asked, sums = self.task.objective, 0.0
        self.model.eval()
        for inputs, targets in split.batches(64):
            outputs = call(self.model, mapped(lambda value: value.to(self.device), inputs))
            sums = sums + asked.statistics(asked.read(outputs).cpu(), targets).sum(0)
        self.model.train()
        return float(asked.value(sums, len(split)))


def own_loss(recipe: Recipe) -> Loss:
    """The objective's own loss, with the recipe's label smoothing.

    Example: `own_loss(Recipe(label_smoothing=0.1))`
    """
    def loss(model: nn.Module, batch: Batch, objective: Objective, _progress: float) -> Tensor:
        logits = objective.read(call(model, batch.inputs), batch.targets)
        return objective.loss(logits, batch.targets, smoothing=recipe.label_smoothing)

    return loss


@dataclass(frozen=True)
class Train:
    """The step of a plan that trains: `recipe` on the task's training split, `examples` of it (all
    where 0), by `seed`.

    Example: `Train(Recipe(epochs=1), examples=64).apply(start)`
    """

    keeps_shape: ClassVar[bool] = True
    needs_examples: ClassVar[bool] = True
    recipe: Recipe
    examples: Count = 0
    seed: Count = 0
    state: str | None = None
    known: str | None = None

    def apply(self, subject: Subject) -> Subject:
        """The subject with its model trained."""
        task = few(subject.task, self.examples, seed=self.seed)
        trained = fit(subject.model, task, recipe=self.recipe, seed=self.seed, state=self.state,
                      known=self.known)
        return subject.with_model(trained.model)


def few(task: Task, examples: int, *, validation: int = 0, seed: int = 0) -> Task:
    """The task with so many training and validation examples drawn by `seed`, all where 0.

    Example: `len(few(task, 32, validation=8).train) == 32`
    """
    parts = {"train": examples, "validation": validation}
    drawn = {name: getattr(task, name).subset(size, seed=seed) for name, size in parts.items()
             if size}
    return replace(task, **drawn)


def seed_of(*words: int) -> int:
    """One seed that follows from several numbers.

    Example: `seed_of(1, 2) != seed_of(2, 1)`
    """
    return int(np.random.SeedSequence(words).generate_state(1)[0])


