"""A chain that listens: samples through a ring buffer, a gate of speech, a network that spots
words, events with their times.

    ring = Ring(seconds=2); ring.write(samples)          one thread, as samples come
    listener.hear(ring.read(listener.hop))               another, hop by hop

Everything that a listener remembers can be saved and taken up again, so that whoever stops it loses
what was not saved yet.
"""

import array
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench import files
from workbench.deployment.streaming import Stream
from workbench.errors import listed, reason

AVERAGED = 10  # hops over which probabilities are averaged
REST_S = 0.6  # seconds behind an event in which none follows
HELD_S = 0.6  # seconds for which the gate stays open behind the last speech
BEFORE_S = 0.5  # seconds before it opened that are listened to as well
AT_ONCE = 2  # hops that are worked on with each hop until these are made up for


@dataclass(frozen=True)
class Event:
    """Something heard: at so many seconds, a word with its probability; meaning: what it stands
    for.

    Example: `Event(1.2, "one", 0.9).meaning == ""`
    """

    at_s: float
    word: str
    score: float
    meaning: str = ""


class Ring:
    """Samples between a thread that writes and one that reads; what finds no room is counted, never
    lost in silence.

    dropped: samples that found no room.

    Example: `Ring(0.1, rate=8000)`
    """

    def __init__(self, seconds: float = 2.0, *, rate: int = 8_000):
        if seconds <= 0:
            raise ValueError(f"a ring buffer of {seconds} seconds; expected more than 0")
        self.samples, self.begin, self.end = np.zeros(max(round(seconds * rate), 1),
                                                      np.float32), 0, 0
        self.dropped, self.closed, self._changed = 0, False, threading.Condition()

    def write(self, samples: np.ndarray) -> int:
        """Take in samples; returns how many of them found no room."""
        with self._changed:
            room = len(self.samples) - (self.end - self.begin)
            taken = samples[:room]
            self.samples[np.arange(self.end, self.end + len(taken)) % len(self.samples)] = taken
            self.end += len(taken)
            self.dropped += len(samples) - len(taken)
            self._changed.notify()
        return len(samples) - len(taken)

    def read(self, count: int) -> np.ndarray | None:
        """The next `count` samples, waited for; None once it is closed and holds fewer."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self.end - self.begin >= count)
            if self.end - self.begin < count:
                return None
            found = self.samples[np.arange(self.begin, self.begin + count) % len(self.samples)]
            self.begin += count
            return found

    def close(self) -> None:
        """Nothing more will be written."""
        with self._changed:
            self.closed = True
            self._changed.notify()


class Doubled:
    """Samples at twice the rate, hop by hop: a windowed sinc of 32 taps, 16 samples late.

    Example: `Doubled()(samples[:80]).shape == (160,)`
    """

    def __init__(self, taps: int = 32):
        places = np.arange(2 * taps) - taps + 0.5
        kernel = np.sinc(places / 2) * np.hamming(2 * taps)
        self.phases = np.stack([part / part.sum() for part in (kernel[1::2], kernel[::2])],
                               1).astype(np.float32)
        self.kept = np.zeros(taps - 1, np.float32)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        whole = np.concatenate([self.kept, samples])
        self.kept = whole[len(samples):]
        return (np.lib.stride_tricks.sliding_window_view(whole, len(self.phases))
                @ self.phases).reshape(-1)


class Gate:
    """Is there speech? A stream at 16 kHz asked chunk by chunk, samples at 8 kHz given in hops of
    any length.

    threshold: the probability from which on there is. speaking: the last answer.

    Example: `not Gate(streaming.Stream(chain.gate_file(Path("gate.onnx")))).hear(
    samples[:80])`
    """

    def __init__(self, stream: Stream, *, threshold: float = 0.3):
        self.stream, self.threshold = stream, threshold
        self.doubled, self.waiting, self.speaking = Doubled(), np.zeros(0, np.float32), False

    def hear(self, samples: np.ndarray) -> bool:
        """Whether there is speech, as far as is known now."""
        self.waiting = np.concatenate([self.waiting, self.doubled(samples)])
        while len(self.waiting) >= self.stream.hop:
            chunk, self.waiting = self.waiting[:self.stream.hop], self.waiting[self.stream.hop:]
            self.speaking = (float(self.stream(torch.from_numpy(chunk)[None]).flatten()[-1])
                             >= self.threshold)
        return self.speaking

    def state(self) -> dict[str, Tensor]:
        """What it remembers."""
        own = {"kept": torch.from_numpy(self.doubled.kept.copy()),
               "waiting": torch.from_numpy(self.waiting.copy()),
               "speaking": torch.tensor([self.speaking])}
        return own | {f"stream.{name}": value for name, value in (self.stream.now or {}).items()}

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state. Raises ValueError for that of another gate."""
        known = {name.removeprefix("stream."): value for name, value in state.items()
                 if name.startswith("stream.")}
        self.stream.resume(known) if known else self.stream.reset()
        self.doubled.kept, self.waiting = (state["kept"].numpy().copy(),
                                           state["waiting"].numpy().copy())
        self.speaking = bool(state["speaking"][0])


class Drift:
    """Level and noise of what is heard, in dB of full scale, and whether they have left what they
    were in the first seconds.

    The level is an exponential moving average of the hops' power, the noise one of their least in
    each second; a `shift` of so many dB against the mean of the first `settle_s` seconds is told
    once, and again when it is over.

    Example: `Drift(80).hear(samples[:80]) == ""`
    """

    def __init__(self, hop: int, *, rate: int = 8_000, settle_s: float = 5.0, shift: float = 12.0,
                 decay: float = 0.98):
        self.second, self.settle, self.shift, self.decay = (rate // hop, round(settle_s), shift,
                                                            decay)
        self.level, self.least, self.hops, self.seconds = 0.0, np.inf, 0, 0
        self.noise, self.first, self.silent, self.off = 0.0, 0.0, 0, False

    def hear(self, samples: np.ndarray) -> str:
        """What is to be told after this hop, "" for nothing."""
        power = float(np.dot(samples, samples)) / len(samples)
        self.level = power if not self.hops else self.decay * self.level + (1 - self.decay) * power
        self.least, self.hops = min(self.least, power), self.hops + 1
        if self.hops % self.second:
            return ""
        self.seconds, now, self.least = self.seconds + 1, _db(self.least), np.inf
        self.noise = now if self.seconds == 1 else 0.8 * self.noise + 0.2 * now
        if self.seconds <= self.settle:
            self.first += now / self.settle
            return ""
        self.silent = self.silent + 1 if now <= -119 else 0
        off = abs(self.noise - self.first) > self.shift
        told = ""
        if self.silent == 1:
            told = "no signal"
        elif off != self.off:
            told = (f"noise at {self.noise:.0f} dB, {self.first:.0f} dB at first; level "
                    f"{_db(self.level):.0f} dB" if off else
                    "noise as at first again")
        self.off = off
        return told


class Listener:
    """The chain behind the ring buffer. Called hop by hop with `hear`, it gives the events of each.

    spotter: a stream from samples to logits (n, classes, steps); classes: their names, the last for
    none. threshold: the averaged probability from which on a word is heard. gate: without one the
    spotter never rests. meaning: what a word stands for. worked: hops on which the spotter ran, of
    all that were heard: `hops`.

    Example: `Listener(streaming.Stream("words.onnx"), [*words.WORDS, "none"]).hear(samples[:80])`
    """

    def __init__(self, spotter: Stream, classes: Sequence[str], *, gate: Gate | None = None,
                 threshold: float = 0.8, meaning: Callable[[str], str] | None = None,
                 rate: int = 8_000):
        self.spotter, self.classes, self.gate, self.threshold = (spotter, list(classes), gate,
                                                                 threshold)
        self.meaning, self.rate, self.hop = meaning, rate, spotter.hop
        self.drift, self.hops, self.worked = Drift(spotter.hop, rate=rate), 0, 0
        self.open_until, self.quiet_until = -1, -1  # hops
        self.queue: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []

    def hear(self, samples: np.ndarray) -> list[Event]:
        """The events of the next hop. Raises ValueError for samples that are no numbers, and as
        `decide` does."""
        if not np.isfinite(samples).all():
            raise ValueError(f"the samples at {self.hops * self.hop / self.rate:.2f} s are no "
                             "numbers")
        told = self.drift.hear(samples)
        found = [Event(self.hops * self.hop / self.rate, "drift", 1.0, told)] if told else []
        self.queue.append(samples)
        if self._listening(samples):
            for place, one in enumerate(self.queue[:AT_ONCE]):
                found += self._spot(one, behind=len(self.queue) - 1 - place)
            del self.queue[:AT_ONCE]
        else:
            del self.queue[:-round(BEFORE_S * self.rate / self.hop)]
        self.hops += 1
        return found

    def _listening(self, samples: np.ndarray) -> bool:
        """Whether the gate lets this hop through."""
        if self.gate is None:
            return True
        if self.gate.hear(samples):
            # it was closed: what the spotter remembers is of long ago
            if self.hops > self.open_until:
                self.spotter.reset()
                self.scores.clear()
            self.open_until = self.hops + round(HELD_S * self.rate / self.hop)
        return self.hops <= self.open_until

    def _spot(self, samples: np.ndarray, *, behind: int) -> list[Event]:
        self.worked += 1
        return self.decide(self.spotter(torch.from_numpy(samples)[None])[0].softmax(0).T.numpy(),
                           behind=behind)

    def decide(self, scores: np.ndarray, *, behind: int = 0) -> list[Event]:
        """The events of a hop's probabilities (steps, classes), with those before it; behind: how
        many hops ago it was.

        Raises ValueError where these are not as many as the classes.
        """
        if scores.shape[1] != len(self.classes):
            raise ValueError(f"{self.spotter.session.name} gives {scores.shape[1]} probabilities, "
                             f"for {len(self.classes)} classes: {listed(self.classes)}")
        self.scores = (self.scores + list(scores))[-AVERAGED:]
        if self.hops < self.quiet_until:
            return []
        mean = np.sum(self.scores, 0) / AVERAGED
        best = int(mean[:-1].argmax())
        if mean[best] < self.threshold:
            return []
        self.quiet_until = self.hops + round(REST_S * self.rate / self.hop)
        word = self.classes[best]
        at = (self.hops + 1 - behind) * self.hop / self.rate
        return [Event(at, word, float(mean[best]), self.meaning(word) if self.meaning else "")]

    # to stop and go on

    def save(self, path: Path | str) -> None:
        """Write what it remembers to a file, whole or not at all."""
        from safetensors.torch import save_file

        numbers = [self.hops, self.worked, self.open_until, self.quiet_until]
        drift = [self.drift.level, self.drift.least, self.drift.hops, self.drift.seconds,
                 self.drift.noise, self.drift.first, self.drift.silent, self.drift.off]
        state = {"numbers": torch.tensor(numbers), 
                 "drift": torch.tensor(drift, dtype=torch.float64),
                 "queue": torch.from_numpy(np.array(self.queue, np.float32).reshape(-1, self.hop)),
                 "scores": torch.from_numpy(np.array(self.scores, np.float32)
                                            .reshape(-1, len(self.classes)))}
        state |= {f"spotter.{name}": value.contiguous()
                  for name, value in (self.spotter.now or {}).items()}
        state |= {f"gate.{name}": value.contiguous()
                  for name, value in (self.gate.state() if self.gate else {}).items()}
        with files.atomic(Path(path)) as new:
            save_file(state, new)

    def resume(self, path: Path | str) -> float:
        """Go on where the listener of a saved file stopped; returns how many seconds it had heard.

        Raises ValueError for a damaged file, or that of another chain.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
            numbers, drift = state["numbers"].tolist(), state["drift"].tolist()
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{path} is no state of a listener ({reason(error)}); remove it to "
                             "begin anew") from error
        if ("gate.kept" in state) != (self.gate
                                      is not None) or state["scores"].shape[1] != len(self.classes):
            raise ValueError(f"{path} is the state of another listener; it knows "
                             f"{state['scores'].shape[1]} answers and has "
                             f"{'a' if 'gate.kept' in state else 'no'} gate; this one knows "
                             f"{listed(self.classes)}")
        known = {name.removeprefix("spotter."): value for name, value in state.items()
                 if name.startswith("spotter.")}
        self.spotter.resume(known) if known else self.spotter.reset()
        if self.gate:
            self.gate.resume({name.removeprefix("gate."): value for name, value in state.items()
                              if name.startswith("gate.")})
        self.hops, self.worked, self.open_until, self.quiet_until = numbers
        self.queue, self.scores = list(state["queue"].numpy()), list(state["scores"].numpy())
        own = self.drift
        own.level, own.least, own.noise, own.first = drift[0], drift[1], drift[4], drift[5]
        own.hops, own.seconds, own.silent, own.off = (*(int(drift[k]) for k in (2, 3, 6)),
                                                      bool(drift[7]))
        return self.hops * self.hop / self.rate


def listen(listener: Listener, source: Callable[[Ring], None], *, ring: Ring | None = None,
           told: Callable[[Event], None] = lambda event: None,
           state: Path | None = None) -> dict[str, Any]:
    """Let one thread write samples (`source` is given the ring) while this one listens until it is
    closed.

    state: a file in which each second is remembered. Returns milliseconds, how long each hop took,
    and dropped, the samples for which the ring had no room. What `source` raises is raised here.

    Example: `listen(listener, paced(samples, hop=80))["dropped"] == 0`
    """
    ring, took, failed = ring or Ring(rate=listener.rate), array.array("d"), []

    def write() -> None:
        try:
            source(ring)
        except Exception as error:  # of a device or a file: it belongs to whoever listens
            failed.append(error)
        finally:
            ring.close()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        while (samples := ring.read(listener.hop)) is not None:
            began = time.perf_counter()
            events = listener.hear(samples)
            took.append(1e3 * (time.perf_counter() - began))
            for event in events:
                told(event)
            if state and len(took) % (listener.rate // listener.hop) == 0:
                listener.save(state)
    finally:
        ring.close()  # whoever fails, the source ends
    thread.join()
    if failed:
        raise failed[0]
    return {"milliseconds": np.array(took), "dropped": ring.dropped}


def paced(samples: np.ndarray, *, hop: int, rate: int = 8_000,
          pace: float | None = 1.0) -> Callable[[Ring], None]:
    """A source for `listen` that writes samples hop by hop as they would come: `pace` times real
    time; None as fast as they are read.

    Example: `paced(samples, hop=80, pace=None)`
    """
    def source(ring: Ring) -> None:
        began = time.perf_counter()
        for at in range(0, len(samples), hop):
            if pace:
                time.sleep(max(began + at / rate / pace - time.perf_counter(), 0))
            else:
                while ring.end - ring.begin > len(ring.samples) - hop and not ring.closed:
                    time.sleep(0.001)
            if ring.closed:  # nobody listens any more
                return
            ring.write(samples[at:at + hop])

    return source


def _db(power: float) -> float:
    return 10 * np.log10(max(power, 1e-12))
