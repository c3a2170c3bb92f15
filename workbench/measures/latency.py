"""Milliseconds per run, candidates interleaved so that a slow minute of the machine falls on all of them.

Each of `blocks` rounds runs every candidate in turn, in an order drawn anew, for at least `block_ms`; the first runs of
each turn are discarded. A ratio is taken within a round, between neighbours in time, and its interval is a bootstrap
over rounds. Source for the pairing: Kalibera & Jones 2013, "Rigorous benchmarking in reasonable time".
"""

import gc
import time
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from torch import Tensor

from workbench import files, machine
from workbench.deployment import sessions

SETTLE_MS = 10.0  # discarded at the start of a turn: caches fill, the previous candidate's threads go to sleep
SETTLE_RUNS = 3


def paired(candidates: Mapping[str, object], images: Tensor, *, threads: int | None = None, blocks: int = 20,
           block_ms: float = 40.0, seed: int = 0) -> pd.DataFrame:
    """One row per candidate, the first being the reference of the ratios.

    Columns: candidate, runtime, threads, batch, latency_ms (median), p95_ms, spread_ms (interquartile), ratio to the
    reference (median over rounds) with ratio_low and ratio_high (95 %), runs; attrs["machine"] says where.

    images: float32 (n, C, H, W), one batch. threads: all cores by default; a `Session` keeps its own.

    Raises ValueError where there is no candidate, fewer than 5 rounds, or more threads than cores.

    Example: `latency.paired({"torch": model, "onnx": "model.onnx"}, task.example, threads=1)`
    """
    if not candidates:
        raise ValueError("there is no candidate to time; give {name: model, ...}")
    if blocks < 5:
        raise ValueError(f"blocks is {blocks}, expected at least 5, or the ratio's interval means nothing")
    opened = {name: sessions.open(model, threads=threads, name=name) for name, model in candidates.items()}
    runs = {name: session.prepare(images) for name, session in opened.items()}
    for name, session in opened.items():
        session(images)  # checks the batch, and warms up
        _turn(runs[name], block_ms / 4)
    order, times = np.random.default_rng(seed), {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in files.progress(range(blocks), title="latency", unit="round"):
            for name in order.permutation(list(runs)):
                times[name].append(_turn(runs[name], block_ms))
    finally:
        if collecting:
            gc.enable()
    medians = {name: np.array([np.median(turn) for turn in turns]) for name, turns in times.items()}
    reference = next(iter(medians.values()))
    rows = []
    for name, session in opened.items():
        every = np.concatenate(times[name])
        low, middle, high = _median_interval(medians[name] / reference, seed)
        quarter, three_quarters = np.percentile(every, [25, 75])
        rows.append({"candidate": name, "runtime": session.runtime, "threads": session.threads, "batch": len(images),
                     "latency_ms": np.median(every), "p95_ms": np.percentile(every, 95),
                     "spread_ms": three_quarters - quarter, "ratio": middle, "ratio_low": low, "ratio_high": high,
                     "runs": len(every)})
    frame = pd.DataFrame(rows)
    frame.attrs["machine"] = machine.describe()
    return frame


def fastest(table: pd.DataFrame, *, least: float = 0.03) -> str | None:
    """The candidate of `paired` with the least ratio to the reference, or None where none gains.

    A gain counts where the whole interval of the ratio lies below 1 - least: a few per cent can come from where a
    graph happened to lie in memory.
    """
    gaining = table[table.ratio_high < 1 - least]
    return None if gaining.empty else str(gaining.loc[gaining.ratio.idxmin(), "candidate"])


def _turn(run: Callable[[], object], least_ms: float) -> np.ndarray:
    """Milliseconds of each run of one turn, without those of its settling."""
    times: list[float] = []
    started = counted = time.perf_counter_ns()
    settled = 0
    while True:
        before = time.perf_counter_ns()
        run()
        after = time.perf_counter_ns()
        if settled < SETTLE_RUNS or (after - started) / 1e6 < SETTLE_MS:
            settled, counted = settled + 1, after
            continue
        times.append((after - before) / 1e6)
        if len(times) >= 3 and (after - counted) / 1e6 >= least_ms:
            return np.array(times)


def _median_interval(values: np.ndarray, seed: int) -> tuple[float, float, float]:
    draws = np.random.default_rng(seed).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(np.median(values)), float(high)
