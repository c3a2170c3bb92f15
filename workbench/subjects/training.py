"""Training that can be stopped anywhere and goes on to the same weights.

Sources: SGD with Nesterov momentum and the cosine schedule of Loshchilov & Hutter 2017 (arXiv 1608.03983), one cycle,
no restarts; mixed precision with gradient scaling of Micikevicius et al. 2018 (arXiv 1710.03740).
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench import files, states
from workbench.subjects.data import Split, Task

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SAVE_EVERY_S = 60.0
SCHEDULES = ("cosine", "step", "constant")
Loss = Callable[[nn.Module, Tensor, Tensor, float], Tensor]  # (model, images, labels, progress 0-1) -> scalar
AfterStep = Callable[[nn.Module, int, int], None]  # (model with its gradients, steps done, steps in all)


@dataclass(frozen=True)
class Recipe:
    """How to train. shift: largest random translation, pixels; flip: mirror half of the images.

    schedule: "cosine" to zero, "step" (a tenth at 1/2 and at 3/4 of the steps), or "constant"; each step its own rate.
    precision: "fp32", "bf16" (autocast), or "fp16" (autocast with the loss scaled and the gradients unscaled).
    """

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    schedule: str = "cosine"
    precision: str = "bf16"
    shift: int = 2
    flip: bool = True

    def __post_init__(self):
        for name, known in (("schedule", SCHEDULES), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"recipe: {name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"recipe: {name} is {getattr(self, name)!r}, expected more than 0")

    def rate(self, progress: float) -> float:
        """Learning rate when the fraction `progress` (0-1) of all steps is done."""
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (0.1 ** ((progress >= 0.5) + (progress >= 0.75)) if self.schedule == "step" else 1)


@dataclass(frozen=True)
class Trained:
    """A trained model (last epoch, eval mode) and its history: one row an epoch."""

    model: nn.Module
    history: pd.DataFrame


def fit(model: nn.Module, task: Task, *, recipe: Recipe, seed: int = 0, state: Path | str | None = None,
        loss: Loss | None = None, after_step: AfterStep | None = None, device: str = "cpu") -> Trained:
    """Train a copy of `model` on task.train and return it as it stands after the last epoch.

    loss(model, images, labels, progress) defaults to cross entropy; progress is the fraction of the steps done. A loss
    that is a module trains with the model, such as one with regressors; a copy of it, so that every call starts alike.
    after_step(model, step, steps) runs after each update, such as sparsity.Regrow, and its before_step(model), where it
    has one, between gradients and update. A copy of it runs; where it has a state_dict, that is saved with the rest.

    Every random choice follows from (seed, step), so the same seed gives the same weights, and a run that is killed and
    called again with the same `state` path goes on from the last save (each epoch's end, and once a minute) to the
    weights that it would have had. A state knows its start weights, images, recipe and seed, and loss and after_step by
    their attribute `identity`, where they have one.

    History: epoch, loss (mean), train_top1 (of augmented images), validation_top1, learning_rate, seconds.

    Raises ValueError where the loss is no longer finite, or `state` belongs to another run.

    Example: `small = training.fit(small, task, recipe=Recipe(epochs=5, learning_rate=0.01)).model`
    """
    run = _Run(model, task, recipe, seed, loss or _cross_entropy(recipe), after_step, device)
    state = Path(state) if state else None
    if state and state.exists():
        run.restore(state)
    bar = files.progress(total=run.steps, title="training", unit="step")
    bar.update(run.step)
    saved = time.monotonic()
    while run.step < run.steps:
        run.advance()
        bar.update()
        if run.step % run.epoch_steps == 0:
            run.close_epoch()
            bar.set_postfix(run.rows[-1], refresh=False)
        if state and (run.step % run.epoch_steps == 0 or time.monotonic() - saved > SAVE_EVERY_S):
            run.save(state)
            saved = time.monotonic()
    bar.close()
    return Trained(run.model.eval().to("cpu"), pd.DataFrame(run.rows))


class _Run:
    """All that a training consists of between two steps; `save` and `restore` keep exactly that."""

    def __init__(self, model: nn.Module, task: Task, recipe: Recipe, seed: int, loss: Loss, after_step: AfterStep | None,
                 device: str):
        if not len(task.train):
            raise ValueError(f"{task.name} has no training images")
        self.task, self.recipe, self.seed, self.device = task, recipe, seed, device
        self.model = copy.deepcopy(model).train().to(device, memory_format=torch.channels_last)
        self.loss, self.after_step = copy.deepcopy(loss), copy.deepcopy(after_step)
        self.parts = {"model": self.model, "loss": self.loss, "after_step": self.after_step}  # what has a state to keep
        self.parts = {name: part for name, part in self.parts.items() if hasattr(part, "state_dict")}
        rule = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay, "nesterov": recipe.momentum > 0}
        trained = [*self.model.parameters(), *(self.loss.to(device).parameters() if isinstance(self.loss, nn.Module) else ())]
        self.optimizer = torch.optim.SGD(trained, recipe.learning_rate, **rule)
        self.scaler = torch.amp.GradScaler(device, enabled=recipe.precision == "fp16")
        self.epoch_steps = math.ceil(len(task.train) / recipe.batch_size)
        self.steps = self.epoch_steps * recipe.epochs
        self.step, self.rows, self.sums = 0, [], {"loss": 0.0, "hits": 0, "images": 0, "seconds": 0.0}
        self._order: tuple[int, Tensor] | None = None
        self.identity = asdict(recipe) | {"seed": seed, "task": task.name, "images": len(task.train),
                                          "labels": files.fingerprint([task.train.labels]),
                                          "start": files.fingerprint(model.state_dict().values()),
                                          "loss": getattr(loss, "identity", None),
                                          "after_step": getattr(after_step, "identity", None)}

    def advance(self) -> None:
        """One step: a batch, its loss, the scaled gradients, the update."""
        started = time.perf_counter()
        images, labels = self._batch()
        dtype = PRECISIONS[self.recipe.precision]
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step / self.steps)
        with torch.random.fork_rng(devices=[]):  # what the network itself draws (dropout) follows from the step too
            torch.manual_seed(_seed(self.seed, self.step))
            with torch.autocast(self.device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss, logits = self._loss_and_logits(images, labels)
            if not math.isfinite(loss.item()):
                raise ValueError(f"training: the loss became {loss.item()} at step {self.step} of epoch "
                                 f"{self.step // self.epoch_steps + 1}; lower learning_rate or use precision fp32")
            self.scaler.scale(loss).backward()
        if hasattr(self.after_step, "before_step"):
            self.after_step.before_step(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.after_step:
            self.after_step(self.model, self.step, self.steps)
        self.optimizer.zero_grad()
        self.sums["loss"] += loss.item() * len(labels)
        self.sums["hits"] += int((logits.argmax(1) == labels).sum())
        self.sums["images"] += len(labels)
        self.sums["seconds"] += time.perf_counter() - started

    def close_epoch(self) -> None:
        """Add the epoch's row and begin the next one's sums."""
        images = self.sums["images"]
        row = {"epoch": self.step // self.epoch_steps, "loss": self.sums["loss"] / images,
               "train_top1": self.sums["hits"] / images, "validation_top1": self._validate(),
               "learning_rate": self.optimizer.param_groups[0]["lr"], "seconds": round(self.sums["seconds"], 3)}
        self.rows.append(row)
        self.sums = dict.fromkeys(self.sums, 0) | {"loss": 0.0, "seconds": 0.0}

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        progress = {"step": self.step, "rows": self.rows, "sums": self.sums, "scaler": self.scaler.state_dict()}
        states.save(path, self.parts, self.optimizer, self.identity, progress)

    def restore(self, path: Path) -> None:
        """Take up what `save` wrote. Raises ValueError where it is damaged or of another run."""
        progress = states.restore(path, self.parts, self.optimizer, self.identity)
        self.step, self.rows, self.sums = progress["step"], progress["rows"], progress["sums"]
        self.scaler.load_state_dict(progress["scaler"])

    def _loss_and_logits(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits: list[Tensor] = []
        handle = self.model.register_forward_hook(lambda _module, _inputs, output: logits.append(output.detach()))
        try:
            return self.loss(self.model, images, labels, self.step / self.steps), logits[0]
        finally:
            handle.remove()

    def _batch(self) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(self.step, self.epoch_steps)
        if self._order is None or self._order[0] != epoch:
            shuffle = torch.Generator().manual_seed(_seed(self.seed, epoch, 1))
            self._order = epoch, torch.randperm(len(self.task.train), generator=shuffle)
        chosen = self._order[1][place * self.recipe.batch_size:(place + 1) * self.recipe.batch_size]
        draw = torch.Generator().manual_seed(_seed(self.seed, self.step, 2))
        images = augment(self.task.train.images[chosen], shift=self.recipe.shift, flip=self.recipe.flip, generator=draw)
        return self.task.train.normalise(images).to(self.device), self.task.train.labels[chosen].to(self.device)

    @torch.inference_mode()
    def _validate(self) -> float:
        split: Split = self.task.validation
        if not len(split):
            return float("nan")
        self.model.eval()
        hits = sum(int((self.model(x.to(self.device)).argmax(1).cpu() == y).sum()) for x, y in split.batches(500))
        self.model.train()
        return hits / len(split)


def augment(images: Tensor, *, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Images uint8 (n, C, H, W), each moved by up to `shift` pixels (zeros enter) and, by an even chance, mirrored."""
    n, _, high, wide = images.shape
    if shift:
        corner = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
        rows, columns = corner[0] + torch.arange(high), corner[1] + torch.arange(wide)  # (n, H), (n, W)
        padded = F.pad(images, (shift,) * 4).permute(0, 2, 3, 1)  # (n, H + 2 shift, W + 2 shift, C)
        images = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def _cross_entropy(recipe: Recipe) -> Loss:
    def loss(model: nn.Module, images: Tensor, labels: Tensor, _progress: float) -> Tensor:
        return F.cross_entropy(model(images).float(), labels, label_smoothing=recipe.label_smoothing)

    return loss


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])
