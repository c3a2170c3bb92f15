"""Detectors of speech side by side, ours and those that people use, and a listener run over a
recording.

A detector is called with one recording at 16 kHz, float32 (T,), and gives how sure it is of speech
in each 32 ms.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from workbench import files, machine
from workbench.batches import named
from workbench.deployment import onnx, sessions, streaming
from workbench.deployment.listening import Listener
from workbench.deployment.streaming import Stream
from workbench.measures import detection
from workbench.subjects import speech
from workbench.subjects.words import RATE, Scene

CHUNK, FAST = 512, 16_000  # samples of a chunk, and of a second
TRACED = 8  # hops of an example
# around a clip's ends, and below its loudest 10 ms, nobody can say whether there is speech
EDGE_S, PAUSE_DB = 0.1, 35.0
Detector = Callable[[np.ndarray], np.ndarray]


def truth(scene: Scene) -> np.ndarray:
    """Whether there is speech in each 32 ms, int (T / 32 ms,): 1 in commands and phrases, but for
    their pauses, 0, or -1 where it cannot be said.

    Example: `set(hearing.truth(scene)) <= {-1, 0, 1}`
    """
    count = len(scene.samples) * FAST // RATE // CHUNK
    found, wide = np.zeros(count, int), CHUNK * RATE // FAST
    power = (scene.clean[:count * wide].reshape(count, wide) ** 2).mean(1)
    for row in scene.said[scene.said.what != "effect"].itertuples():
        start, end = int(row.start_s * RATE / wide), int(np.ceil(row.end_s * RATE / wide))
        edge = int(np.ceil(EDGE_S * RATE / wide))
        found[max(start - edge, 0):end + edge] = -1
        loud = power[start:end] > power[start:end].max() * 10 ** (-PAUSE_DB / 10)
        found[start + edge:max(end - edge, start + edge)] = np.where(loud, 1,
                                                                     -1)[edge:max(end - start
                                                                                  - edge, edge)]
    return found


def of_stream(stream: Stream) -> Detector:
    """A streaming network of samples as a detector.

    Example: `hearing.of_stream(streaming.Stream("gate.onnx", threads=1))`
    """
    def detect(samples: np.ndarray) -> np.ndarray:
        return stream.whole(torch.from_numpy(samples[None, :len(samples) // CHUNK
                                                     * CHUNK]))["logits"].flatten().numpy()

    return detect


def silero() -> Detector:
    """silero-vad by its own ONNX file and its own wrapper's way: a chunk behind the 64 samples
    before it.

    Example: `len(hearing.silero()(np.zeros(1024, np.float32))) == 2`
    """
    session = sessions.open_file(speech.package_file("silero_vad", "data", "silero_vad.onnx"),
                                 "silero-vad", 1)

    def detect(samples: np.ndarray) -> np.ndarray:
        state, kept, found = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32), []
        for chunk in samples[:len(samples) // CHUNK * CHUNK].reshape(-1, 1, CHUNK):
            score, state = session.run(None,
                                       {"input": np.concatenate([kept, chunk], 1), "state": state,
                                        "sr": np.array(FAST)})
            kept = chunk[:, -64:]
            found.append(score[0, 0])
        return np.array(found)

    return detect


def pulsevad() -> Detector:
    """pulsevad's network in 8 bits with its own spectrum, as they come: 200 ms at a time, every 32
    ms. The package itself would import torchaudio, which neither needs.

    Example: `len(hearing.pulsevad()(np.zeros(1024, np.float32))) == 2`
    """
    spec = importlib.util.spec_from_file_location("pulsevad_frontend",
                                                  speech.package_file("pulsevad", "frontend_np.py"))
    front = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(front)
    network = speech.package_file("pulsevad", "data", "pulsevad_2.1k_int8.onnx")
    session, window = sessions.open_file(network, "pulsevad", 1), 3200
    source = session.get_inputs()[0].name

    def detect(samples: np.ndarray) -> np.ndarray:
        padded = np.pad(samples[:len(samples) // CHUNK * CHUNK], (window - CHUNK, 0))
        logits = [session.run(None,
                              {source: front.extract_log_mel_np(padded[at:at + window])})[0][0]
                  for at in range(0, len(padded) - window + 1, CHUNK)]
        return np.array([1 / (1 + np.exp(other - speaking)) for other, speaking in logits])

    return detect


def webrtcvad() -> Detector:
    """webrtcvad, 30 ms at a time: in how many of its four modes there is speech.

    Example: `len(hearing.webrtcvad()(np.zeros(1024, np.float32))) == 2`
    """
    import webrtcvad as package

    def detect(samples: np.ndarray) -> np.ndarray:
        modes, whole = [package.Vad(mode)
                        for mode in range(4)], (samples.clip(-1, 1) * 32_767).astype(np.int16)
        frames = whole[:len(whole) // 480 * 480].reshape(-1, 480)
        votes = (np.array([sum(vad.is_speech(frame.tobytes(), FAST) for vad in modes)
                           for frame in frames]) / 4)
        places = (np.arange(len(samples) // CHUNK) * CHUNK // 480).clip(max=len(votes) - 1)
        return votes[places]

    return detect


def timed(detectors: Mapping[str, Detector], recording: np.ndarray, *, blocks: int = 5,
          seed: int = 0) -> pd.DataFrame:
    """Time by candidate, their turns interleaved: chunk_ms (median over the turns, of one 32 ms),
    ratio to the first and its smallest and largest of a turn, real_time (seconds of computing a
    second of sound).

    Example: `hearing.timed({"webrtcvad": hearing.webrtcvad()}, np.zeros(16_000, np.float32),
    blocks=2).ratio[0] == 1`
    """
    draw, took = np.random.default_rng(seed), {name: [] for name in detectors}
    chunks = len(recording) // CHUNK
    with machine.alone():
        for detect in detectors.values():
            detect(recording[:CHUNK * 20])
        for _ in files.progress(range(blocks), title="detectors", unit="turn"):
            for name in draw.permutation(list(detectors)):
                began = time.perf_counter()
                detectors[name](recording)
                took[name].append(1e3 * (time.perf_counter() - began) / chunks)
    first = np.array(took[next(iter(took))])
    return pd.DataFrame([{"candidate": name, "chunk_ms": np.median(every),
                          "ratio": np.median(np.array(every) / first),
                          "ratio_low": (np.array(every) / first).min(),
                          "ratio_high": (np.array(every) / first).max(),
                          "real_time": np.median(every) / (1e3 * CHUNK / FAST)}
                         for name, every in took.items()])


def compared(network: nn.Module, recording: torch.Tensor, hop: int, *, path: Path,
             as_files: bool = True) -> dict[str, float]:
    """Write a network as a streaming file at `path`, and compare the stream with the whole network
    on a recording (1, T).

    as_files: both on ONNX Runtime; false for recurrent networks, whose whole file the exporter
    unrolls step by step: then both in torch. Returns frames and most_apart, the largest difference
    at any of them; hop, late and reach in samples; state_kb and file_kb.

    Example: `hearing.compared(models.load("word_spotter"), torch.zeros(1, 800), 80,
    path=Path("words.onnx"))`
    """
    few = recording[:, :TRACED * hop]  # recurrent layers are traced step by step
    streamed = streaming.stream(network, few, hop=hop)
    stream, whole = streaming.Stream(streaming.export(streamed, path), threads=1), network
    if as_files:
        source = next(iter(named(network, few)))
        whole = onnx.export(network, few, path.parent / f"{path.stem}_whole.onnx",
                            dynamic={source: {1: "time"}})
    right = sessions.open(whole)(recording)
    found = (stream if as_files else streaming.Stream(streamed)).whole(recording)["logits"]
    state = sum(value.numel() * value.element_size() for value in stream.timing.start.values())
    return {"on": "onnxruntime" if as_files else "torch", "frames": right.shape[-1],
            "most_apart": float((found - right).abs().max()), "hop": hop, "late": stream.late,
            "reach": stream.reach,
            "state_kb": state / 1e3, "file_kb": path.stat().st_size / 1e3}


def run(listener: Listener, scene: Scene) -> tuple[pd.DataFrame, np.ndarray, dict[str, float]]:
    """A listener over a scene: its events, the milliseconds of each hop, and a row that sums them
    up.

    Events: at_s, word, score, meaning. The row: hits, misses, false_alarms (`detection.scored`),
    per_hour with its interval, delay_ms (median, from a word's end), worked (share of the hops on
    which the spotter ran), and as `spread` has it.

    Example: `hearing.run(chain.listener("words.onnx"), scene)`
    """
    took, events = [], []
    hops = scene.samples[:len(scene.samples) // listener.hop * listener.hop].reshape(-1,
                                                                                     listener.hop)
    with machine.alone():
        for hop in files.progress(list(hops), title="listening", unit="hop"):
            began = time.perf_counter()
            events += listener.hear(hop)
            took.append(1e3 * (time.perf_counter() - began))
    table, times = _table(events), np.array(took)
    found = detection.scored(table, scene.said, hours=len(scene.samples) / RATE / 3600)
    delay = 1e3 * float(np.median(found.delay_s)) if found.delay_s else float("nan")
    row = {"hits": found.hits, "misses": found.misses, "false_alarms": found.false_alarms,
           "per_hour": found.per_hour,
           "per_hour_low": found.per_hour_low, "per_hour_high": found.per_hour_high,
           "delay_ms": delay,
           "worked": listener.worked / listener.hops}
    return table, times, row | spread(times, hop_ms=1e3 * listener.hop / listener.rate)


def spread(times: np.ndarray, *, hop_ms: float) -> dict[str, float]:
    """median_ms, p99_ms, max_ms of hops, and real_time: how much of a second a second of sound
    takes.

    Example: `spread(np.ones(100), hop_ms=10.0)["real_time"] == 0.1`
    """
    return {"median_ms": float(np.median(times)), "p99_ms": float(np.percentile(times, 99)),
            "max_ms": float(times.max()),
            "real_time": float(times.mean() / hop_ms)}


def told(logits: np.ndarray, listener: Listener) -> pd.DataFrame:
    """The events that a new listener without a gate would tell of a whole recording's logits
    (classes, T).

    Example: `hearing.told(logits, chain.listener("words.onnx"))`
    """
    events = []
    for frame in torch.from_numpy(logits).softmax(0).T.numpy():
        events += listener.decide(frame[None])
        listener.hops += 1
    return _table(events)


def thresholds(logits: np.ndarray, make: Callable[..., Listener], scene: Scene,
               tried: Sequence[float]) -> pd.DataFrame:
    """What a new listener without a gate would tell of a scene at each threshold: threshold, hits,
    misses, false_alarms (`detection.scored`).

    logits: of the whole scene (classes, T). make: gives a listener for `threshold=`.

    Example: `hearing.thresholds(logits, partial(chain.listener, "words.onnx"), scene, [0.5, 0.9])`
    """
    rows, hours = [], len(scene.samples) / RATE / 3600
    for value in tried:
        found = detection.scored(told(logits, make(threshold=value)), scene.said, hours=hours)
        rows.append((value, found.hits, found.misses, found.false_alarms))
    return pd.DataFrame(rows, columns=["threshold", "hits", "misses", "false_alarms"])


def _table(events: list) -> pd.DataFrame:
    rows = [(event.at_s, event.word, event.score, event.meaning) for event in events
            if event.word != "drift"]
    return pd.DataFrame(rows, columns=["at_s", "word", "score", "meaning"])
