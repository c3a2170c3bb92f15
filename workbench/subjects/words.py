"""Spoken commands: clips, scenes of them amid noise and other speech, and how a word spotter is
trained on such scenes.

A scene is what a microphone hears: clips one after the other, with pauses, over a noise. Each frame
of 10 ms is labelled with the word that has just ended, for a quarter of a second, and with "none"
elsewhere; while a word is being said any answer is right.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench import files
from workbench.errors import reason
from workbench.subjects import embedded as shipped
from workbench.subjects.speech import HOP, RATE, resampled

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANSWERED = 25  # frames behind a word's end in which it is to be named
EARLY = 2  # frames before its end from which on it may be
QUIET = 1e-4  # least level of noise, of full scale
WHOLE, PIECES = 0.48, 0.12  # shares of a training scene's clips: commands, pieces of commands
NONE = 0.5  # weight of a frame without a word in training


@dataclass(frozen=True)
class Clip:
    """A recording. samples: float32 (T,) at 8 kHz; what: "command", "speech" or "effect"; word: of
    a command; voice: whose.

    Example: `Clip(samples, "command", word="one")`
    """

    samples: np.ndarray
    what: str
    word: str = ""
    voice: str = ""


@dataclass(frozen=True)
class Scene:
    """What a microphone hears. samples: float32 (T,); clean: before the noise; said: one row per
    clip, with what, word, voice, start_s and end_s.

    Example: `len(scene.labels()) == len(scene.samples) // 80`
    """

    samples: np.ndarray
    clean: np.ndarray
    said: pd.DataFrame

    def labels(self) -> np.ndarray:
        """What is to be named in each frame, int64 (T / 80,): a place in WORDS, their number for
        none, -1 where any is right."""
        found = np.full(len(self.samples) // HOP, len(WORDS))
        for row in self.said[self.said.what == "command"].itertuples():
            start, end = round(row.start_s * RATE / HOP), round(row.end_s * RATE / HOP)
            found[start:max(end - EARLY, 0)] = -1
            found[max(end - EARLY, 0):end + ANSWERED] = WORDS.index(row.word)
        return found


def embedded() -> list[Clip]:
    """The clips of data/speech: a voice that speaks the ten words, phrases in four languages,
    effects.

    Raises ValueError for a file that was changed, and as read_audio does.

    Example: `len(embedded()) > 0`
    """
    table = pd.read_csv(shipped.verified("speech", "clips.csv"), keep_default_na=False)
    samples = read_audio(shipped.verified("speech", "clips.wav"))[0]
    return [Clip(samples[row.start:row.end], row.what, row.word, row.voice)
            for row in table.itertuples()]


def digits(path: Path | str) -> list[Clip]:
    """Spoken digits of a Parquet file with columns digit, speaker and audio (the bytes of a WAV
    file).

    Raises FileNotFoundError for a file that is not there, ValueError for other columns, or a
    recording that is none.

    Example: `digits("spoken_digits.parquet")`
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; give a Parquet file with columns digit, "
                                "speaker, audio")
    table = pd.read_parquet(path)
    missing = {"digit", "speaker", "audio"} - set(table)
    if missing:
        raise ValueError(f"{path} has no column {min(missing)!r}; it has {', '.join(table)}")
    return [Clip(read_audio(io.BytesIO(row.audio), name=f"{path}, row {place}")[0], "command",
                 WORDS[row.digit], row.speaker)
            for place, row in enumerate(table.itertuples())]


def read_audio(source, *, rate: int = RATE, name: str | None = None) -> tuple[np.ndarray, int]:
    """Samples float32 (T,) of a sound file at `rate`, and the rate that it has itself.

    Raises ModuleNotFoundError without the package soundfile, FileNotFoundError for no file,
    ValueError for one that is no sound, empty, of several channels, or with samples that are no
    numbers.

    Example: `read_audio("said.wav", rate=16_000)`
    """
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("sound files need the package soundfile; pip install "
                                  "'workbench[speech]'") from error
    name = name or str(source)
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise FileNotFoundError(f"sound file {source} does not exist")
    try:
        samples, own = soundfile.read(source, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} is no sound file that can be read ({reason(error)}); give WAV, "
                         "FLAC or OGG") from error
    if not len(samples):
        raise ValueError(f"{name} holds no samples")
    if samples.shape[1] > 1:
        raise ValueError(f"{name} has {samples.shape[1]} channels; make one of them, for example "
                         "by sox IN OUT remix -")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: sample {int((~np.isfinite(samples)).argmax())} is no number")
    return resampled(samples[:, 0], own, rate), own


def scene(clips: Sequence[Clip], *, seconds: float, draw: np.random.Generator,
          pause: tuple[float, float] = (0.2, 1.0), noise: tuple[float, float] = (5.0, 30.0),
          level: tuple[float, float] = (-32.0, -14.0),
          speed: tuple[float, float] = (1.0, 1.0)) -> Scene:
    """The clips in their order, as many as there is room for, over a coloured noise.

    pause: seconds between two; noise: how many dB it lies below the clips' mean level; level: of
    each clip, in dB of full scale (root mean square); speed: how much faster a clip is played,
    drawn for each.

    Example: `words.scene(words.embedded()[:3], seconds=5.0,
    draw=np.random.default_rng(0)).samples.shape == (40_000,)`
    """
    samples, rows, at = np.zeros(round(seconds * RATE),
                                 np.float32), [], round(draw.uniform(*pause) * RATE)
    for clip in clips:
        values = _faster(clip.samples, draw.uniform(*speed))
        if at + len(values) > len(samples):
            break
        loud = 10 ** (draw.uniform(*level) / 20)
        samples[at:at + len(values)] += values * (loud / max(np.sqrt(np.mean(values**2)), QUIET))
        rows.append((clip.what, clip.word, clip.voice, at / RATE, (at + len(values)) / RATE))
        at += len(values) + round(draw.uniform(*pause) * RATE)
    hum = 10 ** ((np.mean(level) - draw.uniform(*noise)) / 20)
    noisy = (samples + np.float32(max(hum, QUIET)) * _coloured(len(samples), draw)).clip(-1, 1)
    return Scene(noisy, samples,
                 pd.DataFrame(rows, columns=["what", "word", "voice", "start_s", "end_s"]))


def programme(commands: Sequence[Clip], others: Sequence[Clip], *, minutes: float, every_s: float,
              draw: np.random.Generator) -> list[Clip]:
    """Clips for so many minutes with pauses of 0.8 s: a command about every `every_s` seconds,
    others in between, each clip as often as the next.

    Example: `words.programme([], words.embedded()[-5:], minutes=0.2, every_s=np.inf,
    draw=np.random.default_rng(0))`
    """
    chosen, seconds, due, turns = [], 0.0, every_s / 2, {True: [], False: []}
    while seconds < 60 * minutes:
        asked = seconds >= due
        due += every_s * asked
        if not turns[asked]:
            pool = commands if asked else others
            turns[asked] = [pool[k] for k in draw.permutation(len(pool))]
        chosen.append(turns[asked].pop())
        seconds += len(chosen[-1].samples) / RATE + 0.8
    return chosen


def _faster(samples: np.ndarray, speed: float) -> np.ndarray:
    if speed == 1:
        return samples
    places = np.arange(0, len(samples) - 1, speed)
    return np.interp(places, np.arange(len(samples)), samples).astype(np.float32)


def _coloured(count: int, draw: np.random.Generator) -> np.ndarray:
    """Noise whose power falls with frequency by 0 to 6 dB an octave, of mean square 1."""
    spectrum = np.fft.rfft(draw.standard_normal(count))
    spectrum /= np.maximum(np.fft.rfftfreq(count, 1 / RATE), 50) ** draw.uniform(0, 1)
    made = np.fft.irfft(spectrum, count)
    return (made / max(np.sqrt(np.mean(made**2)), 1e-12)).astype(np.float32)


def train(network: nn.Module, commands: Sequence[Clip], others: Sequence[Clip], *,
          steps: int = 2000, batch: int = 32, seconds: float = 3.0, learning_rate: float = 4e-3,
          seed: int = 0) -> list[float]:
    """Train a word spotter, itself, on scenes made anew for each step; returns the loss of each
    step.

    About half of a scene's clips are commands, one in eight a piece of one, which is none.
    Cross-entropy over the frames, those without a word weighted by 0.5; AdamW, one cycle of the
    learning rate.

    Example: `train(speech.word_spotter(), commands, others, steps=1800)`
    """
    draw, losses = np.random.default_rng(seed), []
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    weights = torch.ones(len(WORDS) + 1)
    weights[-1] = NONE
    network.train().float()  # the spectrum, too, which is otherwise computed in double precision
    for _ in files.progress(range(steps), title="training", unit="step"):
        scenes = [_drawn(commands, others, seconds, draw) for _ in range(batch)]
        samples = torch.from_numpy(np.stack([one.samples for one in scenes]))
        targets = torch.from_numpy(np.stack([one.labels() for one in scenes]))
        loss = F.cross_entropy(network(samples), targets, weight=weights, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    network.eval()
    return losses


def _drawn(commands: Sequence[Clip], others: Sequence[Clip], seconds: float,
           draw: np.random.Generator) -> Scene:
    """A scene of clips drawn at random: whole commands, pieces of them, which are none, and others,
    of those that are long a piece, at times backwards."""
    clips = []
    for _ in range(6):
        kind = draw.random()
        pool = commands if kind < WHOLE + PIECES else others
        clip = pool[int(draw.integers(len(pool)))]
        if kind >= WHOLE:
            clip = _piece(clip, draw)
        tilt = draw.uniform(-0.7, 0.7)  # brighter or duller, as rooms and microphones make it
        clips.append(replace(clip,
                             samples=clip.samples + tilt
                             * np.r_[0, clip.samples[:-1]].astype(np.float32)))
    return scene(clips, seconds=seconds, draw=draw, pause=(0.03, 0.7), noise=(3.0, 35.0),
                 level=(-38.0, -10.0), speed=(0.8, 1.25))


def _piece(clip: Clip, draw: np.random.Generator) -> Clip:
    """What is no command: the beginning or end of one, up to 0.4 of it, or 0.3 to 1.5 s of another
    clip, one in four backwards."""
    if clip.what == "command":
        count = max(int(len(clip.samples) * draw.uniform(0.2, 0.4)), 1)
        return Clip(clip.samples[:count] if draw.random() < 0.5 else clip.samples[-count:],
                    "speech")
    count = min(round(draw.uniform(0.3, 1.5) * RATE), len(clip.samples))
    start = draw.integers(len(clip.samples) - count + 1)
    samples = clip.samples[start:start + count]
    return replace(clip, samples=samples[::-1] if draw.random() < 0.25 else samples)


def accuracy(network: nn.Module, clips: Sequence[Clip], *, seed: int = 0,
             noise: float = 20.0) -> pd.DataFrame:
    """One row per clip said alone, at -23 dB over a noise `noise` dB below: word, voice, named
    ("none" where nothing was).

    Named is the word whose probability, averaged over ten frames, is greatest around the clip's
    end.

    Example: `words.accuracy(models.load("word_spotter"), words.embedded()[:2]).word[0] == "zero"`
    """
    draw, rows = np.random.default_rng(seed), []
    for clip in clips:
        seconds = 1.0 + len(clip.samples) / RATE
        one = scene([clip], seconds=seconds, draw=draw, pause=(0.4, 0.4), noise=(noise, noise),
                    level=(-23.0, -23.0))
        end = round(one.said.end_s[0] * RATE / HOP)
        with torch.inference_mode():
            scores = averaged(network(torch.from_numpy(one.samples)[None]).softmax(1)[0])
        best = scores[:-1, max(end - 10, 0):end + ANSWERED + 5]
        value, word = best.max(1).values.max(0)
        rows.append((clip.word, clip.voice, WORDS[int(word)] if value > 0.5 else "none",
                     float(value)))
    return pd.DataFrame(rows, columns=["word", "voice", "named", "score"])


def averaged(scores: Tensor, frames: int = 10) -> Tensor:
    """Scores (classes, T) averaged over each frame and those before it, `frames` in all.

    Example: `averaged(torch.ones(2, 20)).shape == (2, 20)`
    """
    return F.avg_pool1d(F.pad(scores[None], (frames - 1, 0)), frames, 1)[0]
