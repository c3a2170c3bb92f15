"""Do two models compute the same? One verdict over many images, and the first layer at which they part.

For the outputs a, b (flattened) of one image: cosine = a.b / (|a| |b|); L2 = |a - b|, in units of the outputs (logits);
agreement = 1 where argmax a = argmax b. SQNR = 10 log10(sum a^2 / sum (a - b)^2), in dB.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from workbench import files
from workbench.deployment import sessions
from workbench.layers import UnsupportedModelError
from workbench.measures.accuracy import finite


@dataclass(frozen=True)
class Limits:
    """What counts as equivalent: the least cosine and the largest L2 of any image, the least share of equal top-1 answers."""

    cosine: float = 0.995
    l2: float = 1e-4
    agreement: float = 1.0


@dataclass(frozen=True)
class Equivalence:
    """Outputs of a candidate against a reference over n images; l2 in units of the outputs."""

    cosine_mean: float
    cosine_min: float
    l2_mean: float
    l2_max: float
    agreement: float
    n: int
    limits: Limits

    def checks(self) -> list[dict]:
        """Each figure that has a limit: name, value, limit, passed."""
        return [
            {"name": "cosine, least of any image", "value": self.cosine_min, "limit": f">= {self.limits.cosine}",
             "passed": self.cosine_min >= self.limits.cosine},
            {"name": "L2 of the outputs, largest of any image", "value": self.l2_max, "limit": f"<= {self.limits.l2}",
             "passed": self.l2_max <= self.limits.l2},
            {"name": "top-1 agreement", "value": self.agreement, "limit": f">= {self.limits.agreement}",
             "passed": self.agreement >= self.limits.agreement},
        ]

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return all(check["passed"] for check in self.checks())

    def row(self) -> dict[str, float | int | bool]:
        """The figures for a table."""
        return {"cosine_mean": self.cosine_mean, "cosine_min": self.cosine_min, "l2_mean": self.l2_mean,
                "l2_max": self.l2_max, "agreement": self.agreement, "n": self.n, "equivalent": self.passed}


def compare(reference, candidate, inputs, *, limits: Limits | None = None, batch_size: int = 256) -> Equivalence:
    """The verdict on two models (anything that sessions.open takes) over `inputs`, batch by batch.

    inputs: a Split, a tensor (N, C, H, W), or an iterable of batches; nothing but sums is kept of them.

    Raises ValueError where there are no inputs, the outputs differ in shape, or NaN appears.

    Example: `equivalence.compare(model, "model.onnx", task.test).passed`
    """
    cosines, distances, agreed, n, least, most = 0.0, 0.0, 0, 0, float("inf"), 0.0
    for images, *outputs in _pairs(reference, candidate, inputs, batch_size):
        a, b = (output.double() for output in outputs)
        cosine, distance = _cosine(a, b), (a - b).norm(dim=1)
        cosines, distances = cosines + cosine.sum().item(), distances + distance.sum().item()
        least, most = min(least, cosine.min().item()), max(most, distance.max().item())
        agreed, n = agreed + int((a.argmax(1) == b.argmax(1)).sum()), n + len(images)
    return Equivalence(cosines / n, least, distances / n, most, agreed / n, n, limits or Limits())


def by_layer(reference, candidate, inputs, *, limit: float = 0.995, batch_size: int = 64) -> pd.DataFrame:
    """One row per weighted layer in order of execution: layer, cosine (mean), sqnr_db, parted, first.

    `parted` where the mean cosine is below `limit`; `first` marks the first such layer: what stands before it is
    intact. A batch norm counts with the layer that it follows, so folding it changes nothing here.

    Raises UnsupportedModelError where the two have no layer names in common, ValueError as `compare` does.

    Example: `equivalence.by_layer(model, "damaged.onnx", task.test.subset(200)).query("first").layer`
    """
    one, other = sessions.open(reference), sessions.open(candidate)
    sums: dict[str, Tensor] = {}
    for images in _batches(inputs, batch_size, f"layers of {other.name}"):
        before, after = one.activations(images), other.activations(images)
        common = [name for name in before if name in after]
        if not common:
            raise UnsupportedModelError(f"{one.name} and {other.name} have no layer name in common "
                                        f"({next(iter(before), 'none')} against {next(iter(after), 'none')})")
        for name in common:
            a, b = before[name].flatten(1).double(), after[name].flatten(1).double()
            if a.shape != b.shape:
                raise ValueError(f"layer {name}: {one.name} puts out {a.shape[1]} numbers an image, {other.name} {b.shape[1]}")
            new = torch.stack([_cosine(a, b).sum(), (a**2).sum(), ((a - b) ** 2).sum(), torch.tensor(float(len(a)))])
            sums[name] = sums.get(name, 0) + new
    rows = [{"layer": name, "cosine": (cosine / n).item(), "sqnr_db": (10 * torch.log10(power / error)).item()}
            for name, (cosine, power, error, n) in sums.items()]
    frame = pd.DataFrame(rows)
    frame["parted"] = ~(frame.cosine >= limit)
    frame["first"] = frame.parted & (frame.parted.cumsum() == 1)
    return frame


def shifts(reference, candidate, inputs, *, batch_size: int = 256) -> Tensor:
    """The largest change of an output, image by image, float32 (N,). Raises as `compare` does."""
    return torch.cat([(a - b).abs().amax(1) for _, a, b in _pairs(reference, candidate, inputs, batch_size)])


def disagreements(reference, candidate, inputs, *, limit: float, batch_size: int = 256) -> pd.DataFrame:
    """One row per image to which the two give different answers: image (its place), reference and candidate (classes),
    margin, moved, limit, explained, layer.

    margin: between the reference's two best outputs; moved: the largest change of an output. limit: how far one output may
    move, to be measured elsewhere, on other roundings of the same network say (`shifts`); an image is `explained` where it
    moved no further. For others, `layer` is that at which the two models part most (least signal to noise), "" where
    layers have no names.

    Raises as `compare` does, and ValueError for a limit that is not positive.
    """
    if not limit > 0:
        raise ValueError(f"limit is {limit}, expected more than 0")
    rows, seen = [], 0
    for images, a, b in _pairs(reference, candidate, inputs, batch_size):
        best = a.topk(min(2, a.shape[1])).values
        for i in (a.argmax(1) != b.argmax(1)).nonzero()[:, 0].tolist():
            moved, layer = float((a[i] - b[i]).abs().max()), ""
            if moved > limit:
                with contextlib.suppress(UnsupportedModelError):
                    frame = by_layer(reference, candidate, images[i:i + 1])
                    layer = str(frame.layer[frame.sqnr_db.idxmin()])
            rows.append({"image": seen + i, "reference": int(a[i].argmax()), "candidate": int(b[i].argmax()),
                         "margin": float(best[i, 0] - best[i, -1]), "moved": moved, "limit": limit,
                         "explained": moved <= limit, "layer": layer})
        seen += len(images)
    return pd.DataFrame(rows, columns=["image", "reference", "candidate", "margin", "moved", "limit", "explained", "layer"])


def _pairs(reference, candidate, inputs, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of images with the outputs of both, float32 (n, d)."""
    first, second = sessions.open(reference), sessions.open(candidate)
    for images in _batches(inputs, size, f"{first.name} against {second.name}"):
        a, b = (finite(session(images), f"outputs of {session.name}").flatten(1) for session in (first, second))
        if a.shape != b.shape:
            raise ValueError(f"{first.name} puts out {a.shape[1]} numbers an image, {second.name} {b.shape[1]}")
        yield images, a, b


def _cosine(a: Tensor, b: Tensor) -> Tensor:  # (n, d), (n, d) -> (n,); two zero vectors are the same
    scale = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(scale > 0, (a * b).sum(1) / scale.clamp_min(1e-300), (a == b).all(1).double()).clamp(-1, 1)


def _batches(inputs, size: int, title: str) -> Iterator[Tensor]:
    count = len(inputs) if hasattr(inputs, "__len__") else None
    if hasattr(inputs, "batches"):
        batches: Iterable = (images for images, _ in inputs.batches(size))
    elif isinstance(inputs, Tensor):
        batches = inputs.split(size)
    else:
        batches, count = inputs, None
    seen = 0
    with files.progress(total=count, title=title, unit="image") as bar:
        for images in batches:
            seen += len(images)
            if len(images):
                yield finite(images, "images")
            bar.update(len(images))
    if not seen:
        raise ValueError("there are no images to compare the models on")
