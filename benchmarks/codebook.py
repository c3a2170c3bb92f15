"""The shared codebook beside vector-quantize-pytorch and a bare matrix product with argmax, all in
one run.

    pip install -e '.[peers]'
    python benchmarks/codebook.py [--rounds 20] [--threads 2] [--large]

16,384 vectors of 64 numbers, 1,024 codes, cosine search, CPU; a training step is forward, moving
averages and backward. Candidates take turns, in an order drawn anew each round; ratios are medians
of the rounds' ratios. --large also searches 65,536 codes for a million vectors and reports the
memory that it took. Writes reports/benchmarks/codebook.csv.
"""

import argparse
import random
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from workbench import files, machine
from workbench.methods.codebook import SharedCodebook, search

VECTORS, DIM, SIZE = 16_384, 64, 1_024
OUT = Path(__file__).parents[1] / "reports" / "benchmarks" / "codebook.csv"


def main() -> None:
    """Time the candidates in turns, compare their codes, print and write the table."""
    from vector_quantize_pytorch import VectorQuantize

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--large", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(VECTORS, DIM), dim=1)
    book = SharedCodebook(SIZE, DIM, modalities={"all": DIM}, kmeans=False, revive=0)
    book.inward["all"].weight.data, book.outward["all"].weight.data = torch.eye(DIM), torch.eye(DIM)
    peer = VectorQuantize(dim=DIM, codebook_size=SIZE, use_cosine_sim=True, decay=0.95,
                          rotation_trick=False)
    peer._codebook.embed.data.copy_(book.table.data)
    table = book.table[0].detach().clone()
    book.eval(), peer.eval()
    with torch.inference_mode():
        same = float((book.encode("all",
                                  vectors) == peer(vectors[None])[1][0][:, None]).float().mean())

    inference = {"matrix product and argmax": lambda: (vectors @ table.T).argmax(1),
                 "search": lambda: search(vectors, table),
                 "workbench": lambda: book.encode("all", vectors),
                 "vector-quantize-pytorch": lambda: peer(vectors[None])}
    with torch.inference_mode():
        rows = timed(inference, asked.rounds, "inference")
    book.train(), peer.train()
    training = {"matrix product and argmax": lambda: (vectors @ table.T).argmax(1),
                "workbench": lambda: step(lambda x: (found := book({"all": x})).values["all"].sum()
                                          + found.loss, vectors),
                "vector-quantize-pytorch": lambda: step(lambda x: (found := peer(x[None]))[0].sum()
                                                        + found[2].sum(), vectors)}
    rows += timed(training, asked.rounds, "training step")
    if asked.large:
        rows.append(large())
    theirs = metadata.version("vector-quantize-pytorch")
    told = f"{machine.describe()}, vector-quantize-pytorch {theirs}"
    frame = pd.DataFrame(rows).assign(threads=asked.threads, same_codes=same, machine=told)
    with files.atomic(OUT) as new:
        frame.to_csv(new, index=False)
    print(frame.drop(columns="machine").to_string(index=False))


def step(loss, vectors: torch.Tensor) -> None:
    """Forward and backward to the vectors."""
    loss(vectors.clone().requires_grad_()).backward()


def timed(candidates: dict, rounds: int, what: str) -> list[dict]:
    """Rows what, candidate, median_ms, to_limit and to_peer (medians of each round's ratio, with
    their quartiles)."""
    for call in candidates.values():
        call()
    taken = {name: [] for name in candidates}
    order, draw = list(candidates), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            started = time.perf_counter()
            candidates[name]()
            taken[name].append(time.perf_counter() - started)
    seconds = {name: np.array(found) for name, found in taken.items()}
    limit, peer = seconds["matrix product and argmax"], seconds["vector-quantize-pytorch"]
    return [{"what": what, "candidate": name, "median_ms": round(1e3 * np.median(found), 2),
             "to_limit": round(np.median(found / limit), 3),
             "peer_to_this": round(np.median(peer / found), 2),
             "peer_to_this_low": round(np.percentile(peer / found, 25), 2)}
             for name, found in seconds.items()]


def large() -> dict:
    """A million vectors against 65,536 codes: seconds, and megabytes beyond the vectors."""
    vectors, table = F.normalize(torch.randn(1_000_000, DIM),
                                 dim=1), F.normalize(torch.randn(65_536, DIM), dim=1)
    before, started = machine.resident(), time.perf_counter()
    search(vectors, table)
    return {"what": "65,536 codes, 1,000,000 vectors", "candidate": "search",
            "seconds": round(time.perf_counter() - started, 1),
            "megabytes": round((machine.resident() - before) / 2**20, 1)}


if __name__ == "__main__":
    main()
