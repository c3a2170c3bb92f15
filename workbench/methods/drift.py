"""Online calibration: notice when the inputs of a deployed model have drifted, say where, and
compensate.

Each layer's output has, per channel, a mean and a variance on the images it was calibrated on. A
running average of the same over the images that come is set against them; a layer that has moved
away is brought back by a scale and a shift, y' = (y - m) s0 / s + m0. No labels and no gradients
are needed.

Sources: the articles' online calibration; the statistics of batch norm taken anew on drifted
inputs, Li et al. 2017 (arXiv 1603.04779), here as a correction behind a layer, so that it also
serves a network whose norms are folded.
"""

from collections.abc import Iterable, Sequence

import pandas as pd
from torch import Tensor, nn

from workbench.batches import Batch, Inputs, answer, call, count, pairs
from workbench.graph.layers import evaluating, named

MOMENTUM = 0.5  # weight of the newest batch in the running average
# in standard deviations of the baseline, mean over channels; images like its own stay below 0.11
# here
LIMIT = 0.15


class Monitor:
    """A model that watches its layers while it is used: `monitor(inputs)` gives logits, compensated
    where it is asked.

    batches: what the baseline is taken from, targets not looked at. layers: globs of those watched.
    E[y] and E[y^2] of each channel run on with weight `momentum` for a batch as large as the
    baseline's, and less for a smaller one. A layer has drifted when the mean over its channels of
    |m - m0| / s0, or of |ln(s / s0)|, exceeds `limit`. With `compensate`, drifted layers are
    brought back. The model itself is left as it is, and watched only through this object; `close`
    takes the hooks off.

    Raises ValueError where there are no examples, for a limit that is not positive, or a momentum
    outside (0, 1).

    Example: `monitor = drift.Monitor(model, task.validation.batches(100)); monitor(images);
    monitor.table()`
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], *,
                 layers: str | Sequence[str] = "*", momentum: float = MOMENTUM,
                 limit: float = LIMIT, compensate: bool = False):
        if not limit > 0 or not 0 < momentum < 1:
            raise ValueError(f"monitor: limit is {limit} and momentum {momentum}; expected limit > "
                             "0 and 0 < momentum < 1")
        self.model, self.momentum, self.limit, self.compensate = model, momentum, limit, compensate
        self.baseline: dict[str, tuple[Tensor, Tensor]] = {}  # E[y] and E[y^2] by channel
        self.running: dict[str, tuple[Tensor, Tensor]] = {}
        self.first: dict[str, int] = {}  # the batch at which a layer was first found drifted
        self.batches, self._sums, self._weight, self._watching = 0, {}, 0.0, False
        self._handles = [layer.register_forward_hook(self._hook(name))
                         for name, layer in named(model, layers).items()]
        sizes = []
        try:
            for inputs, _ in pairs(batches):
                self._run(inputs)
                sizes.append(count(inputs))
            if not sizes:
                raise ValueError("monitor: the baseline saw no examples; give at least one batch")
        except BaseException:
            self.close()
            raise
        self.batch_size = sum(sizes) / len(sizes)
        self.baseline = {name: (total / n, squares / n)
                         for name, (total, squares, n) in self._sums.items()}

    def __call__(self, inputs: Inputs) -> Tensor:
        """Logits of a batch, whose statistics enter the running averages first."""
        self.batches += 1
        self._weight = 1 - (1 - self.momentum) ** (count(inputs) / self.batch_size)
        return self._run(inputs).clone()

    def reset(self) -> None:
        """Forget what has come since the baseline."""
        self.running, self.first, self.batches = {}, {}, 0

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def table(self) -> pd.DataFrame:
        """One row per layer: layer, mean_shift (of |m - m0| / s0), std_stretch (of |ln(s / s0)|),
        drifted, since (batch)."""
        rows = []
        for name in self.running:
            shift, stretch = self._apart(name)
            rows.append({"layer": name, "mean_shift": shift, "std_stretch": stretch,
                         "drifted": max(shift, stretch) > self.limit,
                         "since": self.first.get(name)})
        return pd.DataFrame(rows,
                            columns=["layer", "mean_shift", "std_stretch", "drifted", "since"])

    def _run(self, inputs: Inputs) -> Tensor:
        self._watching = True
        try:
            with evaluating(self.model):
                return answer(call(self.model, inputs))
        finally:
            self._watching = False

    def _apart(self, name: str) -> tuple[float, float]:
        (mean, std), (mean_now,
                      std_now) = (_mean_and_std(*here[name])
                                  for here in (self.baseline, self.running))
        return ((mean_now - mean).abs() / std).mean().item(), (std_now
                                                               / std).log().abs().mean().item()

    def _hook(self, name: str):
        def hook(module: nn.Module, _inputs, output: Tensor) -> Tensor | None:
            if not self._watching:
                return None
            axis = output.dim() - 1 if isinstance(module, nn.Linear) else 1
            values = output.movedim(axis, 0).flatten(1)  # (channels, n)
            if name not in self.baseline:
                total, squares, n = self._sums.get(name, (0.0, 0.0, 0))
                self._sums[name] = (total + values.sum(1), squares + values.pow(2).sum(1),
                                    n + values.shape[1])
                return None
            if not values.isfinite().all():
                return None  # no average takes that up again
            now, old = (values.mean(1), values.pow(2).mean(1)), self.running.get(name,
                                                                                 self.baseline[
                                                                                     name])
            self.running[name] = tuple(a + self._weight * (b - a)
                                       for a, b in zip(old, now, strict=True))
            if max(self._apart(name)) <= self.limit:
                return None
            self.first.setdefault(name, self.batches)
            return self._brought_back(name, output, axis) if self.compensate else None

        return hook

    def _brought_back(self, name: str, output: Tensor, axis: int) -> Tensor:
        (mean, std), (mean_now,
                      std_now) = (_mean_and_std(*here[name])
                                  for here in (self.baseline, self.running))
        shape = [-1 if place == axis else 1 for place in range(output.dim())]
        scale = std / std_now
        return output * scale.view(shape) + (mean - mean_now * scale).view(shape)


def _mean_and_std(mean: Tensor, mean_of_squares: Tensor) -> tuple[Tensor, Tensor]:
    return mean, (mean_of_squares - mean**2).clamp_min(1e-12).sqrt()
