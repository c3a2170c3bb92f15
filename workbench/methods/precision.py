"""Numbers of several modalities, each at a precision of its own, and the bits that they cost once
coded.

Vision 8 bits uniform, text 6 bits on levels that k-means finds, speech 4 to 7 bits, as much as each
dimension earns: the allocation of the articles, beside one uniform width for all. Allocation of
bits over dimensions: Huang & Schultheiss 1963 (the next bit goes where it lowers the squared error
most), measured and not assumed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.numbers import grid
from workbench.numbers.coding import coded_bytes
from workbench.numbers.grid import Scheme

KINDS = ("uniform", "kmeans", "variable")
FITTED = 200_000  # numbers that k-means levels are fitted to, evenly spread over all


@dataclass(frozen=True)
class Precision:
    """How vectors become integers. kind: "uniform" or "kmeans" levels at `bits`, one scale or table
    for all numbers; or "variable", uniform with `bits` to `most` bits a dimension, (bits + most) /
    2 in the mean, one scale a dimension.

    Example: `rounded(torch.randn(10, 8), Precision("uniform", bits=4)).bits == 32`
    """

    kind: str = "uniform"
    bits: int = 8
    most: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"precision: unknown kind {self.kind!r}; expected one of "
                             f"{', '.join(KINDS)}")
        if (not 2 <= self.bits <= 8 or (self.kind == "variable") != (self.most > 0) or self.most > 8
            or 0 < self.most < self.bits):
            raise ValueError(f"precision: {self.kind} with bits {self.bits} and most {self.most}; "
                             "expected 2 to 8 bits, and most, from bits to 8, for variable alone")


ARTICLES = {"image": Precision("uniform", 8), "text": Precision("kmeans", 6),
            "speech": Precision("variable", 4, 7)}


@dataclass(frozen=True)
class Rounded:
    """values: what the integers stand for, (n, d). integers: int64 (n, d). bits: packed bits a
    vector. coded_bits: bits a vector of the entropy-coded integers, tables of frequencies and
    scales included; they decode back bit for bit.

    Example: `precision.rounded(a, precision.ARTICLES["image"]).bits > 0`
    """

    values: Tensor
    integers: Tensor
    bits: float
    coded_bits: float

    def row(self, vectors: Tensor) -> dict[str, float]:
        """bits, coded_bits and sqnr_db = 10 log10(sum x^2 / sum (x - x')^2) of the vectors that
        were rounded."""
        error = (vectors - self.values).pow(2).sum().item()
        return {"bits": self.bits, "coded_bits": self.coded_bits,
                "sqnr_db": 10 * np.log10(vectors.pow(2).sum().item() / max(error, 1e-30))}


def rounded(vectors: Tensor, precision: Precision) -> Rounded:
    """Vectors (n, d) at a precision. Raises ValueError for no vectors, NaN, or a code that does not
    decode to itself.

    Example: `rounded(a, precision.ARTICLES["image"])`
    """
    if not vectors.numel() or not torch.isfinite(vectors).all():
        raise ValueError("precision: there are no vectors, or one is NaN or infinite")
    if precision.kind == "variable":
        widths = allocated(vectors, precision.bits, precision.most)
        tried = {b: _uniform(vectors, b, each=True) for b in widths.unique().tolist()}
        values, integers = (sum(torch.where(widths == b, found[i], 0) for b, found in tried.items())
                            for i in (0, 1))
        # a float32 scale and a byte for the width of each dimension
        bits, table = float(widths.sum()), 5 * len(widths)
        parts = [integers[:, widths == b].numpy() for b in tried]
    else:
        values, integers = (_uniform if precision.kind == "uniform" else _kmeans)(vectors,
                                                                                  precision.bits)
        bits, table = (float(precision.bits * vectors.shape[1]),
                       4 if precision.kind == "uniform" else 4 * 2**precision.bits)
        parts = [integers.numpy()]
    return Rounded(values, integers, bits,
                   8 * (sum(map(coded_bytes, parts)) + table) / len(vectors))


def allocated(vectors: Tensor, least: int, most: int) -> Tensor:
    """Bits of each dimension, int64 (d,), `least` to `most`, (least + most) / 2 in the mean: the
    next bit goes to the dimension whose measured squared error it lowers most.

    Example: `allocated(a, 2, 6).float().mean() == 4`
    """
    errors = torch.stack([(vectors - _uniform(vectors, bits, each=True)[0]).pow(2).sum(0)
                          for bits in range(least, most + 1)])
    gains = errors[:-1] - errors[1:]
    widths = torch.full((vectors.shape[1],), least)
    for _ in range(round(vectors.shape[1] * (most - least) / 2)):
        next_gain = torch.where(widths < most,
                                gains.gather(0,
                                             (widths - least).clamp_max(most - least - 1)[None])[0],
                                -torch.inf)
        widths[next_gain.argmax()] += 1
    return widths


def compare(vectors: Mapping[str, Tensor],
            precisions: Mapping[str, Precision]) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """The rounded vectors by modality and one row each: modality, kind, bits, coded_bits, sqnr_db.
    Raises ValueError for a modality without a precision.

    Example: `compare({"image": a}, {"image": precision.ARTICLES["image"]})`
    """
    missing = [name for name in vectors if name not in precisions]
    if missing:
        raise ValueError(f"precision: none is given for {missing[0]!r}; there are "
                         f"{', '.join(precisions)}")
    found = {name: rounded(part, precisions[name]) for name, part in vectors.items()}
    rows = [{"modality": name, "kind": precisions[name].kind, **part.row(vectors[name])}
            for name, part in found.items()]
    return {name: part.values for name, part in found.items()}, pd.DataFrame(rows)


def shifted(precisions: Mapping[str, Precision], by: int) -> dict[str, Precision]:
    """The same kinds with `by` bits more or fewer each, 2 to 8.

    Example: `shifted({"text": Precision(bits=8)}, -2)["text"].bits == 6`
    """
    def width(bits: int) -> int:
        return min(max(bits + by, 2), 8)

    return {name: Precision(p.kind, width(p.bits), width(p.most) if p.most else 0)
            for name, p in precisions.items()}


def uniform_for(names: Sequence[str], bits: int) -> dict[str, Precision]:
    """One uniform width for all modalities.

    Example: `uniform_for(["text"], 4)["text"].bits == 4`
    """
    return {name: Precision("uniform", bits) for name in names}


# each: a scale for each column
def _uniform(values: Tensor, bits: int, *, each: bool = False) -> tuple[Tensor, Tensor]:
    scheme = Scheme(bits)
    scale = grid.fit(values.T if each else values.reshape(1, -1), scheme, by="mse")[0].T
    low, high = scheme.limits
    integers = (values / scale).round().clamp(low, high)
    return integers * scale, (integers - low).long()


def _kmeans(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rows = values.reshape(1, -1)
    levels = grid.kmeans(rows[:, ::-(-rows.shape[1] // FITTED)], bits)
    places = grid.nearest(rows, levels)
    return levels.gather(1, places).reshape(values.shape), places.reshape(values.shape)
