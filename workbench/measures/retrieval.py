"""Retrieval between modalities: recall at k and the median rank of the first right answer, against
chance.

Intervals are percentiles of 1,000 bootstrap samples of the groups of the queries, whose languages
stand or fall together (Efron & Tibshirani 1993). Chance at k is exact: 1 - C(N - m, k) / C(N, k)
with m right answers among N.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.special import gammaln
from torch import Tensor

from workbench.subjects.alignment import Items

KS = (1, 5, 10)
SAMPLES = 1000


def ranks(queries: Tensor, gallery: Tensor, concepts: Tensor,
          gallery_concepts: Tensor) -> tuple[Tensor, Tensor]:
    """Rank, from 1, of the nearest right answer of each query, int64 (n,), and how many right
    answers there are.

    queries (n, dim), gallery (N, dim): unit vectors, compared by cosine; an answer of the query's
    concept is right. A wrong answer that is just as near counts as nearer, so that equal codes win
    nothing. Raises ValueError for an empty gallery, a query without right answer, NaN.

    Example: `ranks(a, a, of_a, of_a)[0].max() == 1`
    """
    if not len(queries) or not len(gallery):
        raise ValueError(f"retrieval: {len(queries)} queries in a gallery of {len(gallery)}; "
                         "expected at least one of each")
    near = queries @ gallery.T
    if not torch.isfinite(near).all():
        raise ValueError("retrieval: a vector is NaN or infinite")
    right = concepts[:, None] == gallery_concepts[None]
    if not right.any(1).all():
        raise ValueError("retrieval: a query has no right answer in the gallery")
    best = near.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((near >= best - 1e-6) & ~right).sum(1) + 1, right.sum(1)


def chance(right: Tensor, size: int, k: int) -> Tensor:
    """The share of k answers drawn without a look that hold one of `right` right ones among `size`,
    float64 (n,).

    Example: `chance(torch.tensor([1]), 10, 5).item() == 0.5`
    """
    right = right.double().numpy()
    rest, k = size - right, min(k, size)
    miss = np.where(rest >= k,
                    np.exp(gammaln(rest + 1) + gammaln(size - k + 1)
                           - gammaln(np.maximum(rest - k, 0) + 1)
                           - gammaln(size + 1)), 0.0)
    return torch.from_numpy(1 - miss)


def directions(vectors: Mapping[str, Tensor], items: Mapping[str, Items], groups: Tensor, part: str,
               *, whole: bool, languages: Sequence[str],
               pairs: Sequence[tuple[str, str]] | None = None, seed: int = 0) -> pd.DataFrame:
    """One row per direction between two modalities, over the queries of `part` in each of
    `languages`.

    groups: int64, by concept; those of a group are drawn together for the intervals. whole: the
    gallery holds every concept, else those of `part`. Modalities without language are asked about
    what the other side has in that language. Columns: query, gallery, queries, gallery_size,
    recall_at_1, recall_at_5, recall_at_10, each with _low and _high, median_rank, chance_at_10,
    times_chance.

    Example: `retrieval.directions(vectors, items, groups, "new concept", whole=True,
    languages=("en",))`
    """
    names = list(vectors)
    rows = [{"query": one, "gallery": other}
            | summary(answered(vectors, items, groups, part, one, other, whole, languages), seed)
            for one, other in pairs or [(a, b) for a in names for b in names if a != b]]
    return pd.DataFrame(rows)


def answered(vectors: Mapping[str, Tensor], items: Mapping[str, Items], groups: Tensor, part: str,
             one: str, other: str, whole: bool, languages: Sequence[str]) -> pd.DataFrame:
    """One row a query of the direction `one` to `other`: language, group, rank, chance_at_10,
    gallery_size.

    Example: `retrieval.answered(vectors, items, groups, "new concept", "english", "image", True,
    ("en",))`
    """
    parts = []
    for language in languages:
        asked, answers = (_in(items[name].rows, language) for name in (one, other))
        held = [items[name].rows.iloc[places] for name, places in ((one, asked), (other, answers))]
        new = [set(rows[rows.part == part].concept) for rows in held]
        spoken = [items[name].rows.language.iloc[0] != "" for name in (one, other)]
        chosen = new[0] & new[1] if all(spoken) else new[0] if spoken[0] else new[1]
        asked = asked[held[0].concept.isin(chosen).to_numpy()]
        if not whole:
            answers = answers[(held[1].part == part).to_numpy()]
        if not len(asked) or not len(answers):
            continue
        mine, theirs = (torch.tensor(items[name].rows.concept.to_numpy()[places])
                        for name, places in ((one, asked), (other, answers)))
        answerable = torch.isin(mine, theirs)
        rank, right = ranks(vectors[one][asked][answerable], vectors[other][answers],
                            mine[answerable], theirs)
        parts.append(pd.DataFrame({"language": language, "group": groups[mine[answerable]],
                                   "rank": rank,
                                   "chance_at_10": chance(right, len(answers), 10),
                                   "gallery_size": len(answers)}))
    if not parts:
        raise ValueError(f"retrieval: no {one} of {part!r} in {', '.join(languages)} with {other} "
                         "to find")
    return pd.concat(parts, ignore_index=True)


def summary(found: pd.DataFrame, seed: int = 0) -> dict:
    """Recalls with their 95 % bootstrap intervals, median rank and chance of the queries in `found`
    (see `answered`).

    Example: `retrieval.summary(pd.DataFrame({"rank": [1, 20], "group": [0, 1], "chance_at_10": 0.1,
    "gallery_size": 100}))["recall_at_10"] == 0.5`
    """
    row = {"queries": len(found), "gallery_size": round(found.gallery_size.mean())}
    hits = (found["rank"].to_numpy()[:, None] <= np.array(KS)).astype(float)
    for k, mean, (low, high) in zip(KS, hits.mean(0), interval(hits, found.group.to_numpy(), seed),
                                    strict=True):
        row |= {f"recall_at_{k}": mean, f"recall_at_{k}_low": low, f"recall_at_{k}_high": high}
    luck = found.chance_at_10.mean()
    return (row
            | {"median_rank": found["rank"].median(), "chance_at_10": luck,
               "times_chance": row["recall_at_10"] / luck})


def interval(values: np.ndarray, groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """95 % percentile intervals of the means of `values` (n, m), resampling whole `groups` (n,):
    (m, 2), low and high.

    Example: `interval(np.ones((4, 1)), np.arange(4))`
    """
    _, place = np.unique(groups, return_inverse=True)
    counts, sums = np.bincount(place), np.zeros((place.max() + 1, values.shape[1]))
    np.add.at(sums, place, values)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)),
                                                    SAMPLES)
    return np.percentile((drawn @ sums) / (drawn @ counts)[:, None], [2.5, 97.5], axis=0).T


def _in(rows: pd.DataFrame, language: str) -> np.ndarray:
    return np.flatnonzero(rows.language.isin(["", language]).to_numpy())
