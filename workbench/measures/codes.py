"""What the codes of a codebook are used for: how many, how evenly, by whom, and at how many bits
once coded."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.numbers.coding import coded_bytes, entropy


def usage(codes: Mapping[str, Tensor], size: int) -> pd.DataFrame:
    """One row a modality and one over "all": vectors, used (share of the codes that occur),
    perplexity (2^entropy), entropy_bits a code, coded_bits a vector (with the table of frequencies;
    decoded to see that they come back).

    Example: `codes.usage({"text": torch.randint(16, (100, 4))}, size=16)`
    """
    rows = []
    for name, found in [*codes.items(), ("all", torch.cat(list(codes.values())))]:
        symbols = found.numpy()
        bits = entropy(symbols)
        rows.append({"modality": name, "vectors": len(found),
                     "used": len(np.unique(symbols)) / size, "perplexity": 2**bits,
                     "entropy_bits": bits, "coded_bits": 8 * coded_bytes(symbols) / len(found)})
    return pd.DataFrame(rows)


def overlap(codes: Mapping[str, Tensor], *, seed: int = 0) -> pd.DataFrame:
    """One row a pair of modalities: same, the mean Jaccard index of the codes of one concept (row k
    of each), and other, that of concepts put together by chance.

    Example: `codes.overlap({"text": torch.randint(16, (100, 4)), "image": torch.randint(16, (100,
    4))})`
    """
    rows = []
    for one, two in combinations(codes, 2):
        shuffled = torch.randperm(len(codes[two]), generator=torch.Generator().manual_seed(seed))
        rows.append({"one": one, "two": two, "same": _jaccard(codes[one], codes[two]),
                     "other": _jaccard(codes[one], codes[two][shuffled])})
    return pd.DataFrame(rows)


def meanings(codes: Mapping[str, Tensor], concepts: Mapping[str, Tensor], *,
             count: int = 6) -> pd.DataFrame:
    """What single codes stand for: the (place, code) pairs that name the most concepts in all
    modalities at once, at most one a place. Columns: place, code, shared (how many concepts all
    modalities put there), share (of all that any does), concepts, and by modality the rows that use
    it, those of shared concepts first.

    Example: `meanings({"image": torch.randint(4, (80, 2))}, {"image": of_a}, count=1)`
    """
    rows = []
    for place in range(next(iter(codes.values())).shape[1]):
        users = {name: pd.Series(range(len(found))).groupby(found[:, place].numpy()).indices
                 for name, found in codes.items()}
        for code in set.intersection(*(set(by_code) for by_code in users.values())):
            there = {name: by_code[code] for name, by_code in users.items()}
            named = [set(concepts[name][torch.tensor(found)].tolist())
                     for name, found in there.items()]
            shared = set.intersection(*named)
            rows.append({"place": place, "code": int(code), "shared": len(shared),
                         "share": len(shared) / len(set.union(*named)),
                         "concepts": sorted(shared)} | there)
    table = pd.DataFrame(rows).sort_values(["shared", "share", "place"],
                                           ascending=[False, False, True])
    table = table.drop_duplicates("place").head(count).reset_index(drop=True)
    for name in codes:
        of = concepts[name].tolist()
        table[name] = [sorted(users, key=lambda row, of=of,  # type: ignore[misc]
                              known=shared: of[row] not in known)
                       for users, shared in zip(table[name], table.concepts, strict=True)]
    return table


def _jaccard(one: Tensor, two: Tensor) -> float:
    shared = [len(set(a) & set(b)) / len(set(a) | set(b))
              for a, b in zip(one.tolist(), two.tolist(), strict=True)]
    return float(np.mean(shared))
