"""Do two models compute the same? One verdict over many images, and the first layer at which they
part.

For the outputs a, b (flattened) of one example: cosine = a.b / (|a| |b|); L2 = |a - b| / |a|, a
fraction of the reference's own; agreement = 1 where argmax a = argmax b, at every token that an
attention mask keeps. SQNR = 10 log10(sum a^2 / sum (a - b)^2), in dB.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench import files
from workbench.batches import Inputs, count, joined, mapped, rows
from workbench.deployment import sessions
from workbench.errors import UnsupportedModelError
from workbench.measures.accuracy import finite


@dataclass(frozen=True)
class Limits:
    """What counts as equivalent: the least cosine and the largest relative L2 of any example, the
    least agreement.

    Raises ValueError for one that no pair of models could meet or miss.

    Example: `equivalence.compare(folded, model, task.test,
    limits=equivalence.Limits(l2=1e-3)).passed`
    """

    cosine: float = 0.995
    l2: float = 1e-4
    agreement: float = 1.0

    def __post_init__(self):
        for name, low, high in (("cosine", -1.0, 1.0), ("l2", 0.0, float("inf")),
                                ("agreement", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"limit {name} is {getattr(self, name):g}, expected {low:g} to "
                                 f"{high:g}")


# where an average in floats lies between two integers, it may be rounded to either
QUANTISED = Limits(l2=1e-2)


@dataclass(frozen=True, repr=False)
class Equivalence:
    """Outputs of a candidate against a reference over n examples; l2 relative to the norm of the
    reference's outputs.

    Example: `equivalence.compare(model, model, task.test).passed`
    """

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
            {"name": "cosine, least of any example", "value": self.cosine_min,
             "limit": f">= {self.limits.cosine}",
             "passed": self.cosine_min >= self.limits.cosine},
            {"name": "relative L2 of the outputs, largest of any example", "value": self.l2_max,
             "limit": f"<= {self.limits.l2}",
             "passed": self.l2_max <= self.limits.l2},
            {"name": "top-1 agreement", "value": self.agreement,
             "limit": f">= {self.limits.agreement}",
             "passed": self.agreement >= self.limits.agreement},
        ]

    def __str__(self) -> str:
        word = "equivalent" if self.passed else "not equivalent"
        missed = [f"{check['name'].partition(',')[0]} {check['limit']}"
                  for check in self.checks() if not check["passed"]]
        rest = f"; asked: {', '.join(missed)}; by_layer shows where they part" if missed else ""
        return (f"{word}: least cosine {self.cosine_min:.6g}, largest relative L2 "
                f"{self.l2_max:.2g}, the same answer for {self.agreement:.2%} of {self.n:,}{rest}")

    __repr__ = __str__

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return all(check["passed"] for check in self.checks())

    def row(self) -> dict[str, float | int | bool]:
        """The figures for a table."""
        return {"cosine_mean": self.cosine_mean, "cosine_min": self.cosine_min,
                "l2_mean": self.l2_mean,
                "l2_max": self.l2_max, "agreement": self.agreement, "n": self.n,
                "equivalent": self.passed}


def compare(reference, candidate, inputs, *, limits: Limits | None = None,
            batch_size: int = 32) -> Equivalence:
    """The verdict on two models (anything that sessions.open takes) over `inputs`, batch by batch.

    inputs: a Split, inputs with the examples along axis 0, or an iterable of batches; nothing but
    sums is kept of them.

    Raises ValueError where there are no inputs, the outputs differ in shape, or NaN appears.

    Example: `equivalence.compare(model, "model.onnx", task.test).passed`
    """
    sums, n, least, most = torch.zeros(3, dtype=torch.float64), 0, float("inf"), 0.0
    for _, a, b in _pairs(reference, candidate, inputs, batch_size):
        if a.dim() == 1:  # one number an example
            a, b = a[:, None], b[:, None]
        agreed = (a.argmax(-1) == b.argmax(-1)).flatten(1).all(1) if a.dim() == 3 else \
            a.flatten(1).argmax(1) == b.flatten(1).argmax(1)
        cosine, distance = _near(a.flatten(1), b.flatten(1))
        sums += torch.stack([cosine.sum(), distance.sum(), agreed.sum()])
        least, most = min(least, cosine.min().item()), max(most, distance.max().item())
        n += len(a)
    cosines, distances, agreed = (sums / n).tolist()
    return Equivalence(cosines, least, distances, most, agreed, n, limits or Limits())


def by_layer(reference, candidate, inputs, *, limit: float = 0.995,
             batch_size: int = 32) -> pd.DataFrame:
    """One row per weighted layer in order of execution: layer, cosine (mean), sqnr_db, parted,
    first.

    `parted` where the mean cosine is below `limit`; `first` marks the first such layer: what stands
    before it is intact. A batch norm counts with the layer that it follows, so folding it changes
    nothing here.

    Raises UnsupportedModelError where the two have no layer names in common, ValueError as
    `compare` does.

    Example: `equivalence.by_layer(model, "damaged.onnx",
    task.test.subset(200)).query("first").layer`
    """
    one, other = sessions.open(reference), sessions.open(candidate)
    sums: dict[str, Tensor] = {}
    for batch in _batches(inputs, batch_size, f"layers of {other.name}"):
        before, after = one.activations(batch), other.activations(batch)
        common = [name for name in before if name in after]
        if not common:
            raise UnsupportedModelError(f"{one.name} and {other.name} have no layer name in common "
                                        f"({next(iter(before), 'none')} against "
                                        f"{next(iter(after), 'none')})")
        for name in common:
            a, b = before[name].flatten(1).double(), after[name].flatten(1).double()
            if a.shape != b.shape:
                raise ValueError(f"layer {name}: {one.name} puts out {a.shape[1]} numbers an "
                                 f"example, {other.name} {b.shape[1]}")
            new = torch.stack([_near(a, b)[0].sum(), (a**2).sum(), ((a - b) ** 2).sum(),
                               torch.tensor(float(len(a)))])
            sums[name] = sums.get(name, 0) + new
    rows = [{"layer": name, "cosine": (cosine / n).item(),
             "sqnr_db": (10 * torch.log10(power / error)).item()}
            for name, (cosine, power, error, n) in sums.items()]
    frame = pd.DataFrame(rows)
    frame["parted"] = ~(frame.cosine >= limit)
    frame["first"] = frame.parted & (frame.parted.cumsum() == 1)
    return frame


def batch_proof(model, sentences: Iterable[Inputs], *, batches: Sequence[int] = (1, 8, 32),
                padding: Sequence[int] = (0, 16, 64)) -> pd.DataFrame:
    """Does an answer depend on what else is in the batch? One row per size of batch and padding:
    batch, padding, cosine_min, agreement, n, each against the answer to the sentence alone and
    without padding.

    sentences: inputs of one sentence each, named tensors (1, L), zeros being padding. padding:
    tokens more than the longest of a batch needs. Where an answer is for each token, those of the
    sentence's own tokens count, and all have to agree. Raises ValueError where there are no
    sentences.

    Example: `equivalence.batch_proof("int8.onnx", [task.test.batch(torch.tensor([k])).inputs for k
    in range(64)])`
    """
    session, sentences = sessions.open(model), list(sentences)
    if not sentences:
        raise ValueError("batch_proof: there are no sentences")
    alone = [session(sentence)[0] for sentence in sentences]
    lines = []
    for size in batches:
        for more in padding:
            parts = [mapped(partial(F.pad, pad=(0, more)), joined(sentences[start:start + size]))
                     for start in range(0, len(sentences), size)]
            found = [row for part in files.progress(parts, title="batches", unit="batch")
                     for row in session(part)]
            found = [row[:len(own)] if row.dim() > 1 else row
                     for row, own in zip(found, alone, strict=True)]
            pairs = list(zip(alone, found, strict=True))
            cosines = [_near(own.flatten()[None], row.flatten()[None])[0].item()
                       for own, row in pairs]
            same = [torch.equal(own.argmax(-1), row.argmax(-1)) for own, row in pairs]
            lines.append({"batch": size, "padding": more, "cosine_min": min(cosines),
                          "agreement": sum(same) / len(same),
                          "n": len(sentences)})
    return pd.DataFrame(lines)


def shifts(reference, candidate, inputs, *, batch_size: int = 32) -> Tensor:
    """The largest change of an output, example by example, float32 (N,). Raises as `compare` does.

    Example: `equivalence.shifts(folded, quantised, task.test).median()`
    """
    return torch.cat([(a - b).abs().flatten(1).amax(1)
                      for _, a, b in _pairs(reference, candidate, inputs, batch_size)])


def disagreements(reference, candidate, inputs, *, limit: float,
                  batch_size: int = 32) -> pd.DataFrame:
    """One row per example to which the two give different answers: image (its place), reference and
    candidate (classes), margin, moved, limit, explained, layer.

    margin: between the reference's two best outputs; moved: the largest change of an output. limit:
    how far one output may move, to be measured elsewhere, on other roundings of the same network
    say (`shifts`); an image is `explained` where it moved no further. For others, `layer` is that
    at which the two models part most (least signal to noise), "" where layers have no names.

    Raises as `compare` does, and ValueError for a limit that is not positive.

    Example: `equivalence.disagreements(folded, quantised, task.test, limit=0.1)`
    """
    if not limit > 0:
        raise ValueError(f"limit is {limit}, expected more than 0")
    lines, seen = [], 0
    for batch, a, b in _pairs(reference, candidate, inputs, batch_size):
        a, b = a.flatten(1), b.flatten(1)
        best = a.topk(min(2, a.shape[1])).values
        for i in (a.argmax(1) != b.argmax(1)).nonzero()[:, 0].tolist():
            moved, layer = float((a[i] - b[i]).abs().max()), ""
            if moved > limit:
                with contextlib.suppress(UnsupportedModelError):
                    frame = by_layer(reference, candidate, [rows(batch, slice(i, i + 1))])
                    layer = str(frame.layer[frame.sqnr_db.idxmin()])
            lines.append({"image": seen + i, "reference": int(a[i].argmax()),
                          "candidate": int(b[i].argmax()),
                         "margin": float(best[i, 0] - best[i, -1]), "moved": moved, "limit": limit,
                         "explained": moved <= limit, "layer": layer})
        seen += len(a)
    return pd.DataFrame(lines,
                        columns=["image", "reference", "candidate", "margin", "moved", "limit",
                                 "explained", "layer"])


def _pairs(reference, candidate, inputs, size: int) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
    """Batches with the answers of both, float32 (n, ...), those of masked tokens zero."""
    first, second = sessions.open(reference), sessions.open(candidate)
    for batch in _batches(inputs, size, f"{first.name} against {second.name}"):
        a, b = (finite(session(batch), f"outputs of {session.name}") for session in (first, second))
        if a.shape != b.shape:
            raise ValueError(f"{first.name} puts out {a[0].numel()} numbers an example, "
                             f"{second.name} {b[0].numel()}")
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and a.dim() == 3 and mask.shape == a.shape[:2]:
            a, b = (values * mask[..., None] for values in (a, b))
        yield batch, a, b


def _near(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and relative distance, float64 (n,) each, of rows (n, d); two rows of zeros are the
    same.

    From three products accumulated in float64; the distance from the difference itself, which
    products would lose.
    """
    apart = (a - b).double()
    a, b = a.double(), b.double()
    product, scale = (a * b).sum(1), (a.square().sum(1) * b.square().sum(1)).sqrt()
    cosine = torch.where(scale > 0, product / scale.clamp_min(1e-300),
                         (a == b).all(1).double()).clamp(-1, 1)
    return cosine, apart.square().sum(1).sqrt() / a.square().sum(1).sqrt().clamp_min(1e-12)


def _batches(inputs, size: int, title: str) -> Iterator[Inputs]:
    """The inputs in batches, each looked through for NaN; of a Split, an input with its examples
    along axis 0, or as they come."""
    total = len(inputs) if hasattr(inputs, "batches") else None
    if hasattr(inputs, "batches"):
        batches: Iterable = (batch for batch, _ in inputs.batches(size))
    elif isinstance(inputs, Tensor | tuple | Mapping):
        total = count(inputs)
        batches = (rows(inputs, slice(start, start + size)) for start in range(0, total, size))
    else:
        batches = inputs
    seen = 0
    with files.progress(total=total, title=title, unit="example") as bar:
        for batch in batches:
            size_of = count(batch)
            seen += size_of
            if size_of:
                yield finite(batch, "inputs")
            bar.update(size_of)
    if not seen:
        raise ValueError("there are no examples to compare the models on")
