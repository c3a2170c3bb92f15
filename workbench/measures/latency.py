"""Milliseconds per run, candidates interleaved so that a slow minute of the machine falls on all of
them.

Each of `blocks` rounds runs every candidate in turn, in an order drawn anew, for at least
`block_ms`; the first runs of each turn are discarded, but for those of a tenth of a second or more.
A ratio is taken within a round, between neighbours in time, and its interval is a bootstrap over
rounds. Source for the pairing: Kalibera & Jones 2013, "Rigorous benchmarking in reasonable time".
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from workbench import files, machine
from workbench.batches import Inputs, count, repeated, rows
from workbench.deployment import batching, sessions

# discarded at the start of a turn: caches fill, the previous candidate's threads go to sleep
SETTLE_MS = 10.0
SETTLE_RUNS = 3
# a model that takes 10 times as long as that need not settle, and is run fewer than three times a
# turn: until it took 10 times the least duration
LONG_TURNS = 10
BUSY = 0.1  # share of the processors in others' hands from which on a measurement says so


def paired(candidates: Mapping[str, object], inputs: Inputs, *, threads: int | None = None,
           blocks: int = 20, block_ms: float = 20.0, seed: int = 0) -> pd.DataFrame:
    """One row per candidate, the first being the reference of the ratios.

    Columns: candidate, runtime, threads, batch, latency_ms (median), p95_ms, p99_ms, spread_ms
    (interquartile), ratio to the reference (median over rounds) with ratio_low and ratio_high (95
    %), runs; attrs["machine"] says where, and how busy others were if they took a tenth of the
    processors or more, which is printed as well: the figures are then not those of a quiet machine.

    inputs: one batch. threads: all cores by default; a `Session` keeps its own.

    Raises ValueError where there is no candidate, fewer than 5 rounds, or more threads than cores.

    Example: `latency.paired({"torch": model, "onnx": "model.onnx"}, task.example, threads=1)`
    """
    if not isinstance(candidates, Mapping):
        raise TypeError(f"candidates is a {type(candidates).__name__}; give {{name: model, ...}}")
    if not candidates:
        raise ValueError("there is no candidate to time; give {name: model, ...}")
    if blocks < 5:
        raise ValueError(f"blocks is {blocks}, expected at least 5, or the ratio's interval means "
                         "nothing")
    with machine.alone():
        opened = {name: sessions.open(model, threads=threads or machine.cores(), name=name)
                  for name, model in candidates.items()}
        taken = machine.others()
        times = _timed(opened, inputs, blocks, block_ms, seed)
        busy = taken()
    medians = {name: np.array([np.median(turn) for turn in turns]) for name, turns in times.items()}
    reference = next(iter(medians.values()))
    lines = []
    for name, session in opened.items():
        every = np.concatenate(times[name])
        low, middle, high = _median_interval(medians[name] / reference, seed)
        quarter, three_quarters = np.percentile(every, [25, 75])
        lines.append({"candidate": name, "runtime": session.runtime, "threads": session.threads,
                      "batch": count(inputs),
                     "latency_ms": np.median(every), "p95_ms": np.percentile(every, 95),
                      "p99_ms": np.percentile(every, 99),
                     "spread_ms": three_quarters - quarter, "ratio": middle, "ratio_low": low,
                      "ratio_high": high,
                     "runs": len(every)})
    frame = pd.DataFrame(lines)
    frame.attrs["machine"] = machine.describe()
    if busy >= BUSY:
        frame.attrs["machine"] += f"; other processes took {busy:.0%} of it meanwhile"
        print(f"latency: other processes took {busy:.0%} of the machine meanwhile; measure again "
              "when it is quiet")
    return frame


def grid(candidates: Mapping[str, object], example: Inputs, *, threads: Sequence[int],
         batches: Sequence[int], blocks: int = 10, seed: int = 0) -> pd.DataFrame:
    """`paired` for every number of threads and size of batch, with examples_per_s added.

    candidates: paths or modules, opened anew for each number of threads. example: repeated. Raises
    as `paired` does.

    Example: `latency.grid({"float32": "a.onnx", "int8": "b.onnx"}, task.example, threads=[1, 2],
    batches=[1, 8, 64])`
    """
    tables = [paired(candidates, repeated(example, size), threads=count, blocks=blocks, seed=seed)
              for count in threads for size in batches]
    frame = pd.concat(tables, ignore_index=True)
    frame["examples_per_s"] = 1e3 * frame.batch / frame.latency_ms
    frame.attrs["machine"] = machine.describe()
    return frame


def by_layer(candidates: Mapping[str, object], inputs: Inputs, *, threads: int = 1,
             runs: int = 50) -> pd.DataFrame:
    """One row per candidate and layer, from ONNX Runtime's own profile: candidate, layer, threads,
    latency_ms.

    candidates: ONNX files. Under the layer "(rest)" stands what is no layer's: additions, pooling,
    changes of layout and of number format. A profile's clock ticks in microseconds, and watching
    costs a few of them for each node.

    Raises TypeError for what is no file, UnsupportedModelError where a file names no layers, and as
    sessions.open does.

    Example: `latency.by_layer({"float32": "a.onnx", "int8": "b.onnx"}, task.example)`
    """
    lines = []
    for name, path in candidates.items():
        if not isinstance(path, str | Path):
            raise TypeError(f"{name} is {type(path).__name__}, expected an ONNX file: only ONNX "
                            "Runtime tells its layers' times")
        sessions.open(path, threads=threads)(inputs)  # what is wrong with either is said here
        with machine.alone():
            found = sessions.times(path, inputs, threads=threads, runs=runs)
        lines += [{"candidate": name, "layer": layer or "(rest)", "threads": threads,
                   "latency_ms": ms}
                 for layer, ms in found.items()]
    frame = pd.DataFrame(lines)
    frame.attrs["machine"] = machine.describe()
    return frame


def under_load(model, examples: Inputs | Sequence[Inputs], *,
               clients: Sequence[int] = (1, 4, 16, 64), size: int = 1, deadline_ms: float = 0.0,
               buckets: Sequence[int] = (), seconds: float = 2.0,
               threads: int | None = None) -> pd.DataFrame:
    """One row per number of clients in a closed loop: each sends one example, waits for its answer
    and sends the next.

    Columns: candidate, clients, size, deadline_ms, requests_per_s, mean_ms, p50_ms, p95_ms, p99_ms,
    mean_batch, padding, requests. examples: a batch, or a list of single ones (1, ...) of different
    lengths, taken in turn. size, deadline_ms, buckets: of the dynamic batches (batching.Batcher); a
    size of 1 is none. padding: share of what was computed that was padding. The first quarter of
    the time is not counted; requests count when they end, waits when they begin. Clients and model
    share this machine's cores. seconds: of each level, or longer where a slow model needs it to
    answer every client twice.

    Raises ValueError where a number of clients is below 1, and as Batcher and sessions.open do.

    Example: `latency.under_load("model.onnx", task.example, clients=[1, 4], seconds=0.1)`
    """
    if not clients or min(clients) < 1:
        raise ValueError(f"clients are {list(clients)}, expected numbers of at least 1")
    singles, lines = _singles(examples), []
    for number in files.progress(clients, title="load", unit="level"):
        with machine.alone(), batching.Batcher(model, size=size, deadline_ms=deadline_ms,
                                               buckets=buckets, threads=threads) as served:
            served.submit(singles[0]).result()
            asked = time.perf_counter()
            served.submit(singles[0]).result()
            started = time.perf_counter()
            long = max(seconds, 2 * number * (started - asked))
            every, opened, ended = _looped(served, singles, number, long)
            if not _counted(every, opened, ended).any():  # the machine stood still: once more
                every, opened, ended = _looped(served, singles, number, 4 * long)
        lines.append({"clients": number,
                      **_served(served, every, opened, ended, deadline_ms, before=2)})
    return pd.DataFrame(lines)[["candidate", "clients", *list(lines[0])[2:]]]


def at_rate(model, examples: Inputs | Sequence[Inputs], *, rates: Sequence[float], size: int = 1,
            deadline_ms: float = 0.0, buckets: Sequence[int] = (), seconds: float = 2.0,
            threads: int | None = None, seed: int = 0) -> pd.DataFrame:
    """One row per rate in an open loop: requests come at random moments (Poisson), `rate` of them a
    second, whatever the server does, and a wait counts from the moment at which the request was
    due.

    Columns and parameters as in `under_load`, rate in the place of clients. A server that is too
    slow falls behind, and its waits grow with `seconds`.

    Raises ValueError for a rate that is not positive, and as `under_load` does.

    Example: `latency.at_rate("model.onnx", task.example, rates=[50], seconds=0.1)`
    """
    if not rates or min(rates) <= 0:
        raise ValueError(f"rates are {list(rates)}, expected requests a second, more than 0")
    singles, lines, draw = _singles(examples), [], np.random.default_rng(seed)
    for rate in files.progress(rates, title="load", unit="rate"):
        due = np.cumsum(draw.exponential(1 / rate, max(int(rate * seconds), 20)))
        with machine.alone(), batching.Batcher(model, size=size, deadline_ms=deadline_ms,
                                               buckets=buckets, threads=threads) as served:
            served.submit(singles[0]).result()
            started = time.perf_counter()
            ends = _asked_at(served, singles, started + due)
        every = np.stack([started + due, ends], 1)
        row = _served(served, every, started + due[-1] / 4, ends.max(), deadline_ms)
        lines.append({"rate": rate, **row})
    return pd.DataFrame(lines)[["candidate", "rate", *list(lines[0])[2:]]]


def _asked_at(served: batching.Batcher, singles: list[Inputs], moments: np.ndarray) -> np.ndarray:
    """When each request ended that was sent at one of these moments."""
    ends, asked = np.zeros(len(moments)), []
    for place, moment in enumerate(moments):
        time.sleep(max(moment - time.perf_counter(), 0))
        future = served.submit(singles[place % len(singles)])
        future.add_done_callback(lambda _done, place=place:  # type: ignore[misc]
                                 ends.__setitem__(place, time.perf_counter()))
        asked.append(future)
    for future in asked:
        future.result()
    return ends


def _looped(served: batching.Batcher, singles: list[Inputs], clients: int,
            seconds: float) -> tuple[np.ndarray, float, float]:
    """When each request of a closed loop began and ended, (requests, 2), and between which moments
    they are counted."""
    started = time.perf_counter()
    opened, ended = started + seconds / 4, started + seconds
    with ThreadPoolExecutor(clients) as pool:
        turns = list(pool.map(lambda k: _client(served, singles, k, ended), range(clients)))
    return np.array([turn for own in turns for turn in own]), opened, ended


def _counted(every: np.ndarray, opened: float, ended: float) -> np.ndarray:
    """Which requests count: those that end between these moments, if one of all begins there."""
    inside = (every[:, 1] >= opened) & (every[:, 1] <= ended)
    return inside & (every[:, 0] >= opened).any()


def _singles(examples: Inputs | Sequence[Inputs]) -> list[Inputs]:
    """The examples one by one, without the batch axis."""
    if isinstance(examples, list):
        return [rows(example, 0) for example in examples]
    return [rows(examples, place) for place in range(count(examples))]


def _served(served: batching.Batcher, every: np.ndarray, opened: float, ended: float,
            deadline_ms: float, before: int = 1) -> dict:
    """A row of what a load gave. every: (requests, 2), when each began and ended. before: requests
    that were sent ahead of it."""
    done = int(_counted(every, opened, ended).sum())
    started_inside = every[every[:, 0] >= opened]  # to their end, which may come after the others'
    if not done:
        raise ValueError(f"no request began and ended within {ended - opened:.2g} seconds; give "
                         "more")
    waits = 1e3 * (started_inside[:, 1] - started_inside[:, 0])
    p50, p95, p99 = np.percentile(waits, [50, 95, 99])
    return {"candidate": served.session.name, "size": served.size, "deadline_ms": deadline_ms,
            "requests_per_s": done / (ended - opened), "mean_ms": waits.mean(), "p50_ms": p50,
            "p95_ms": p95, "p99_ms": p99,
            "mean_batch": float(np.mean(served.batches[before:])), "padding": served.padding,
            "requests": done}


def warn(table: pd.DataFrame, *, quantised: Sequence[str] = ()) -> list[str]:
    """Words where int8 does not pay on this machine: no VNNI or AMX, or a candidate of `quantised`
    slower than the reference at some threads and batch. table: of `paired` or `grid`.

    Example: `warn(frame)`
    """
    words = []
    formats = machine.hardware()["formats"]
    if not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(formats):
        words.append("this processor has neither VNNI nor AMX: its int8 products take several "
                     "instructions each, so that int8 may be slower than float32")
    for row in table[table.candidate.isin(quantised) & (table.ratio_low > 1)].itertuples():
        words.append(f"{row.candidate} is slower than the reference at {row.threads} threads and "
                     f"batch {row.batch}: {row.ratio:.2f}x the time [{row.ratio_low:.2f}, "
                     f"{row.ratio_high:.2f}]")
    return words


def peak_memory(candidates: Mapping[str, object], inputs: Inputs, *, threads: int = 1,
                runs: int = 5) -> pd.DataFrame:
    """One row per candidate: candidate, base_mb, peak_mb, own_mb, each measured in a fresh process
    of its own.

    base_mb: resident memory once the libraries are imported and the inputs are there; peak_mb: the
    most while the model is opened and run `runs` times; own_mb their difference. Candidates: ONNX
    files, or modules that can be pickled.

    Raises RuntimeError where the process fails, with its reason.

    Example: `peak_memory({"float32": "model.onnx"}, x, runs=1).own_mb[0] > 0`
    """
    lines = []
    for name, source in candidates.items():
        # what is wrong with it is said here, not in another process
        sessions.open(source, threads=threads)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            base, peak = pool.submit(_memory, source, inputs, threads, runs).result()
        lines.append({"candidate": name, "threads": threads, "batch": count(inputs),
                      "base_mb": base, "peak_mb": peak,
                     "own_mb": peak - base})
    return pd.DataFrame(lines)


def fastest(table: pd.DataFrame, *, least: float = 0.03) -> str | None:
    """The candidate of `paired` with the least ratio to the reference, or None where none gains.

    A gain counts where the whole interval of the ratio lies below 1 - least: a few per cent can
    come from where a graph happened to lie in memory.

    Example: `latency.fastest(frame)`
    """
    gaining = table[table.ratio_high < 1 - least]
    return None if gaining.empty else str(gaining.loc[gaining.ratio.idxmin(), "candidate"])


def _timed(opened: Mapping[str, sessions.Session], inputs: Inputs, blocks: int, block_ms: float,
           seed: int) -> dict[str, list[np.ndarray]]:
    """Milliseconds of each candidate's runs, turn by turn."""
    runs = {name: session.prepare(inputs) for name, session in opened.items()}
    for session in opened.values():
        session(inputs)  # checks the batch, and warms up
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
    return times


def _client(served, singles: list[Inputs], place: int, until: float) -> list[tuple[float, float]]:
    turns = []
    while (before := time.perf_counter()) < until:
        served.submit(singles[(place + len(turns)) % len(singles)]).result()
        turns.append((before, time.perf_counter()))
    return turns


def _memory(source, inputs: Inputs, threads: int, runs: int) -> tuple[float, float]:
    import onnxruntime  # noqa: F401  (part of the base, whoever needs it)

    # so are torch's own pools
    torch.nn.functional.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))
    base = machine.resident()
    session = sessions.open(source, threads=threads)
    for _ in range(runs):
        session(inputs)
    return base, machine.peak()


def _turn(run: Callable[[], object], least_ms: float) -> np.ndarray:
    """Milliseconds of each run of one turn, without those of its settling."""
    times: list[float] = []
    started = counted = time.perf_counter_ns()
    settled = 0
    while True:
        before = time.perf_counter_ns()
        run()
        after = time.perf_counter_ns()
        passed = (after - started) / 1e6
        if passed < SETTLE_MS or (settled < SETTLE_RUNS and passed < LONG_TURNS * SETTLE_MS):
            settled, counted = settled + 1, after
            continue
        times.append((after - before) / 1e6)
        passed = (after - counted) / 1e6
        if passed >= least_ms and (len(times) >= 3 or passed >= LONG_TURNS * least_ms):
            return np.array(times)


def _median_interval(values: np.ndarray, seed: int) -> tuple[float, float, float]:
    draws = np.random.default_rng(seed).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(np.median(values)), float(high)
