"""One table of vectors for several modalities: each is projected, its nearest codes stand for it,
all learn the same table.

z = W_m x is cut into `heads` pieces of `dim` numbers; each piece is replaced by its nearest row of
the table, and what is left over by rows of the next table, `levels` times. A vector costs heads *
levels * log2(size) bits.

Sources: vector quantisation with straight-through gradients, commitment and moving averages van den
Oord et al. 2017 (arXiv 1711.00937); cosine search Yu et al. 2021 (arXiv 2110.04627); revival of
dead codes Dhariwal et al. 2020 (arXiv 2005.00341); residual levels Zeghidour et al. 2021 (arXiv
2107.03312).
"""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench import files
from workbench.subjects.training import Loop, Recipe

# similarities that a tile of the search holds, and codes at most: a megabyte of float32
TILE = 2**18, 2**13
UPDATES = ("ema", "gradient")
KMEANS_STEPS = 10


def search(vectors: Tensor, table: Tensor, *, cosine: bool = True) -> Tensor:
    """int64 (n,): the row of `table` (size, dim) nearest to each of `vectors` (n, dim), the first
    of equals.

    cosine: by the angle (both are expected at unit length), else by Euclidean distance. Tile by
    tile, so that memory does not grow with n * size: 65,536 codes and a million vectors need no
    more than the vectors and a megabyte.

    Example: `search(torch.eye(4), torch.eye(4)).tolist() == [0, 1, 2, 3]`
    """
    shift = None if cosine else -table.pow(2).sum(1) / 2
    wide = min(len(table), TILE[1])
    found = torch.empty(len(vectors), dtype=torch.int64)
    for rows, place in zip(vectors.split(max(TILE[0] // wide, 1)),
                           found.split(max(TILE[0] // wide, 1)), strict=True):
        best = None
        for start in range(0, len(table), wide):
            part = table[start:start + wide]
            near = rows @ part.T if cosine else torch.addmm(shift[start:start + wide], rows, part.T)
            value, code = near.max(1)
            if best is None:
                best, chosen = value, code
            else:
                better = value > best
                best, chosen = torch.where(better, value, best), torch.where(better, code + start,
                                                                             chosen)
        place.copy_(chosen)
    return found


@dataclass(frozen=True)
class Quantized:
    """values: by modality (n, width), with straight-through gradients; codes: int64 (n, levels *
    heads); loss: scalar; skipped: modalities that the batch lacked.

    Example: `book({"image": torch.randn(8, 256), "speech": torch.randn(8, 256)}).skipped == ()`
    """

    values: dict[str, Tensor]
    codes: dict[str, Tensor]
    loss: Tensor
    skipped: tuple[str, ...]


class SharedCodebook(nn.Module):
    """A table of `size` codes of `dim` numbers, shared by `modalities` (name -> width of its
    vectors).

    cosine: codes and pieces at unit length, compared by angle. update: "ema" (moving averages of
    decay `decay`), or "gradient" (the loss then pulls the codes to the pieces). revive: a code that
    is chosen, in the moving average, fewer times a batch than this is put where a random piece of
    the batch lies; 0 leaves it dead. commitment: weight of the pull of the pieces to their codes.
    The first batch in training starts the tables by k-means; every draw is by `seed`.

    Raises ValueError for sizes below 1, an unknown update, no modalities.

    Example: `book = SharedCodebook(1024, 32, modalities={"image": 256, "speech": 256}, heads=8)`
    """

    def __init__(self, size: int, dim: int, *, modalities: Mapping[str, int], heads: int = 1,
                 levels: int = 1, cosine: bool = True, update: str = "ema", decay: float = 0.95,
                 revive: float = 0.5, commitment: float = 0.25, kmeans: bool = True, seed: int = 0):
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("heads", heads), ("levels", levels),
                            ("modalities", len(modalities))):
            if value < 1:
                raise ValueError(f"codebook: {name} is {value}, expected at least 1")
        if update not in UPDATES:
            raise ValueError(f"codebook: unknown update {update!r}; expected one of "
                             f"{', '.join(UPDATES)}")
        self.settings = {"size": size, "dim": dim, "modalities": dict(modalities), "heads": heads,
                         "levels": levels,
                         "cosine": cosine, "update": update, "decay": decay, "revive": revive,
                         "commitment": commitment,
                         "kmeans": kmeans, "seed": seed}
        self.size, self.dim, self.heads, self.levels, self.cosine, self.seed = (size, dim, heads,
                                                                                levels, cosine,
                                                                                seed)
        self.update, self.decay, self.revive, self.commitment, self.kmeans = (update, decay, revive,
                                                                              commitment, kmeans)
        draw = torch.Generator().manual_seed(seed)
        self.inward, self.outward = nn.ModuleDict(), nn.ModuleDict()
        # the same draw for all: aligned vectors start aligned
        for name, width in modalities.items():
            wide, same = max(width, heads * dim), torch.Generator().manual_seed(seed)
            turn = torch.linalg.qr(torch.randn(wide, wide, generator=same))[0]
            self.inward[name] = nn.Linear(width, heads * dim, bias=False)
            self.outward[name] = nn.Linear(heads * dim, width, bias=False)
            with torch.no_grad():
                self.inward[name].weight.copy_(turn[:heads * dim, :width])
                self.outward[name].weight.copy_(turn[:heads * dim, :width].T)
        table = torch.randn(levels, size, dim, generator=draw)
        self.table = nn.Parameter(F.normalize(table, dim=2) if cosine else table,
                                  requires_grad=update == "gradient")
        self.register_buffer("counts", torch.ones(levels, size))
        self.register_buffer("sums", self.table.detach().clone())
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def bits(self) -> float:
        """Bits a vector, packed."""
        return self.heads * self.levels * math.log2(self.size)

    def forward(self, batch: Mapping[str, Tensor]) -> Quantized:
        """Quantise a batch, by modality (n, width), n the same for all; in training mode the tables
        learn.

        A modality that the batch lacks is skipped, with a warning. Raises ValueError for unequal
        lengths, an unknown modality, NaN, a zero vector under cosine search, a first batch of fewer
        pieces than codes.
        """
        self._check(batch)
        skipped = tuple(name for name in self.inward if name not in batch)
        if skipped:
            warnings.warn(f"codebook: no {', '.join(skipped)} in this batch; skipped", stacklevel=2)
        # (m, dim)
        pieces = torch.cat([self._inward(name, vectors) for name, vectors in batch.items()])
        if self.training and self.kmeans and not self.step:
            self._start(pieces.detach())
        rest, total, chosen, loss = pieces, torch.zeros_like(pieces), [], pieces.new_zeros(())
        for level in range(self.levels):
            table = self._codes(level)
            codes = search(rest.detach(), table.detach(), cosine=self._by_angle(level))
            picked = table[codes]
            loss = loss + self.commitment * (rest - picked.detach()).pow(2).mean()
            if self.update == "gradient":
                loss = loss + (rest.detach() - picked).pow(2).mean()
            if self.training:
                self._learn(level, rest.detach(), codes)
            total, rest = total + picked.detach(), rest - picked.detach()
            chosen.append(codes)
        if self.training:
            self.step += 1
        straight = pieces + (total - pieces).detach()
        values, codes, start = {}, {}, 0
        for name, vectors in batch.items():
            end = start + len(vectors) * self.heads
            values[name] = self.outward[name](straight[start:end].reshape(len(vectors), -1))
            codes[name] = torch.stack([c[start:end].view(-1, self.heads) for c in chosen],
                                      1).flatten(1)
            start = end
        return Quantized(values, codes, loss, skipped)

    def _inward(self, name: str, vectors: Tensor) -> Tensor:
        pieces = self.inward[name](vectors).reshape(-1, self.dim)
        return F.normalize(pieces, dim=1) if self.cosine else pieces

    # what is left over behind the first level has no unit length
    def _by_angle(self, level: int) -> bool:
        return self.cosine and level == 0

    def _codes(self, level: int) -> Tensor:
        learned = self.update == "gradient" and self._by_angle(level)
        return F.normalize(self.table[level], dim=1) if learned else self.table[level]

    def _check(self, batch: Mapping[str, Tensor]) -> None:
        unknown = [name for name in batch if name not in self.inward]
        if unknown or not batch:
            raise ValueError(f"codebook: modality {unknown[0] if unknown else 'none'!r} in the "
                             f"batch; it has {', '.join(self.inward)}")
        lengths = {name: len(vectors) for name, vectors in batch.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError("codebook: the batch has "
                             + ", ".join(f"{n} of {name}" for name, n in lengths.items())
                             + "; expected as many of each, row k of one concept")
        for name, vectors in batch.items():
            if not torch.isfinite(vectors).all():
                raise ValueError(f"codebook: a vector of {name} is NaN or infinite")
            zero = (vectors.detach() == 0).all(1)
            if self.cosine and zero.any():
                raise ValueError(f"codebook: vector {int(zero.nonzero()[0])} of {name} is zero and "
                                 "has no direction; leave it out or use cosine=False")

    @torch.no_grad()
    def _start(self, pieces: Tensor) -> None:
        if len(pieces) < self.size:
            raise ValueError(f"codebook: {self.size} codes cannot start from {len(pieces)} pieces "
                             "of the first batch; give a larger batch, a smaller codebook or "
                             "kmeans=False")
        for level in range(self.levels):
            by_angle = self._by_angle(level)
            table = pieces[torch.randperm(len(pieces),
                                          generator=self._draw(level))[:self.size]].clone()
            for _ in range(KMEANS_STEPS):
                codes = search(pieces, table, cosine=by_angle)
                counts = torch.bincount(codes, minlength=self.size)
                sums = torch.zeros_like(table).index_add_(0, codes, pieces)
                table = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], table)
                table = F.normalize(table, dim=1) if by_angle else table
            self.table[level], self.sums[level], self.counts[level] = table, table, 1.0
            pieces = pieces - table[search(pieces, table, cosine=by_angle)]

    @torch.no_grad()
    def _learn(self, level: int, pieces: Tensor, codes: Tensor) -> None:
        """Moving averages of how often each code is chosen and, for "ema", of what chose it; dead
        codes are revived."""
        hits = torch.bincount(codes, minlength=self.size)
        self.counts[level].lerp_(hits.to(pieces.dtype), 1 - self.decay)
        if self.update == "ema":
            sums = torch.zeros_like(self.sums[level]).index_add_(0, codes, pieces)
            self.sums[level].lerp_(sums, 1 - self.decay)
            mean = self.sums[level] / self.counts[level].clamp_min(1e-5)[:, None]
            self.table[level] = F.normalize(mean, dim=1) if self._by_angle(level) else mean
        dead = self.counts[level] < self.revive
        if self.revive and dead.any():
            dead = dead.nonzero()[:, 0]
            drawn = pieces[torch.randint(len(pieces), (len(dead),), generator=self._draw(level))]
            self.table[level, dead] = drawn
            self.sums[level, dead] = drawn * self.revive
            self.counts[level, dead] = self.revive

    def _draw(self, level: int) -> torch.Generator:
        return torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, int(self.step),
                                                                         level])
                                                 .generate_state(1)[0]))

    @torch.inference_mode()
    def encode(self, name: str, vectors: Tensor) -> Tensor:
        """Codes int64 (n, levels * heads), level by level, of the vectors (n, width) of one
        modality."""
        self._check({name: vectors})
        rest, chosen = self._inward(name, vectors), []
        for level in range(self.levels):
            codes = search(rest, self._codes(level), cosine=self._by_angle(level))
            rest = rest - self._codes(level)[codes]
            chosen.append(codes.view(-1, self.heads))
        return torch.stack(chosen, 1).flatten(1)

    @torch.inference_mode()
    def decode(self, name: str, codes: Tensor) -> Tensor:
        """The vectors (n, width) that codes (n, levels * heads) stand for."""
        parts = codes.view(len(codes), self.levels, self.heads)
        # (n, heads, dim)
        pieces = sum(self._codes(level)[parts[:, level]] for level in range(self.levels))
        return self.outward[name](pieces.flatten(1))

    def save(self, path: Path | str) -> None:
        """Write the tables, projections and settings as safetensors."""
        with files.atomic(path) as new:
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, new,
                      {"codebook": json.dumps(self.settings)})

    @classmethod
    def load(cls, path: Path | str) -> "SharedCodebook":
        """What `save` wrote, in eval mode. Raises FileNotFoundError, ValueError for a damaged or
        other file."""
        if not Path(path).exists():
            raise FileNotFoundError(f"codebook {path} does not exist")
        try:
            with safe_open(path, framework="pt") as stored:
                settings = json.loads((stored.metadata() or {})["codebook"])
                book = cls(settings.pop("size"), settings.pop("dim"), **settings)
                names = stored.keys()
                book.load_state_dict({name: stored.get_tensor(name) for name in names})
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"codebook {path} is damaged or no codebook "
                             f"({str(error).splitlines()[0]}); write it again") from error
        return book.eval()


def fit(book: nn.Module, vectors: Mapping[str, Tensor], concepts: Mapping[str, Tensor], *,
        steps: int = 300, batch: int = 256, learning_rate: float = 1e-3, teaching=None,
        seed: int = 0) -> pd.DataFrame:
    """Train `book`, itself, on aligned unit vectors (n_m, width) of each modality and the concept
    int64 (n_m,) of each; leaves it in eval mode and returns step, loss, used (share of the codes
    chosen in the step).

    A step draws concepts that all modalities have, and of each modality one vector. The loss: 1 -
    cosine of a vector and what stands for it, the book's own, and teaching(stand-ins, vectors) ->
    scalar, of dicts by modality, row k of one concept in all, such as distillation.embeddings,
    which keeps their similarities. Raises ValueError where the modalities share no concept.

    Example: `codebook.fit(book, {"image": a, "speech": b}, {"image": of_a, "speech": of_b},
    steps=300)`
    """
    places = {name: pd.Series(range(len(c))).groupby(c.numpy()).indices
              for name, c in concepts.items()}
    shared = np.array(sorted(set.intersection(*(set(found) for found in places.values()))))
    if len(shared) < 2:
        raise ValueError(f"codebook: {', '.join(vectors)} share {len(shared)} concepts; expected "
                         "at least 2")
    recipe = Recipe(learning_rate=learning_rate, optimizer="adamw", weight_decay=0.0,
                    precision="fp32")
    loop = Loop({"book": book}, book.parameters(), recipe, steps=steps, seed=seed, identity={})
    used: list[float] = []

    def loss(step: int) -> Tensor:
        random = np.random.default_rng([seed, step])
        drawn = random.permutation(shared)[:batch]
        chosen = {name: vectors[name][[random.choice(found[c]) for c in drawn]]
                  for name, found in places.items()}
        made = book(chosen)
        values = {name: F.normalize(part, dim=1) for name, part in made.values.items()}
        used.append(len(torch.cat([codes.flatten() for codes in made.codes.values()]).unique())
                    / book.size)
        total = (made.loss
                 + sum((1 - (values[name] * chosen[name]).sum(1)).mean() for name in values))
        return total + teaching(values, chosen) if teaching else total

    def kept(step: int, value: float, _seconds: float) -> None:
        loop.progress["rows"].append({"step": step, "loss": value, "used": used[-1]})

    book.train()
    loop.run(loss, title="codebook", after_update=kept)
    book.eval()
    return pd.DataFrame(loop.progress["rows"])


def stand_ins(books: nn.Module | Mapping[str, nn.Module],
              vectors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By modality the codes (n, levels * heads) of unit vectors (n, width), and the unit vectors
    that stand for them.

    books: one for all modalities, or one each.

    Example: `stand_ins(book, {"image": nn.functional.normalize(a), "speech":
    nn.functional.normalize(b)})[0]["image"].shape == (80, 8)`
    """
    books = books if isinstance(books, Mapping) else dict.fromkeys(vectors, books)
    codes = {name: books[name].encode(name, part) for name, part in vectors.items()}
    return codes, {name: F.normalize(books[name].decode(name, found), dim=1)
                   for name, found in codes.items()}
