"""Train data/checkpoints/word_spotter-digits.safetensors: the ten English digits, spotted in a
stream.

    apt-get install flite espeak-ng asterisk-core-sounds-{fr,it,ru}-gsm tuxpaint-stamps-default \
        ktuberling-data sound-theme-freedesktop oxygen-sounds psi-plus-sounds lomiri-sounds \
        colobot-common-sounds
    pip install 'workbench[speech]'
    python data/build_word_spotter.py --digits spoken_digits.parquet [--source DIR]
        [--without SPEAKER] [--steps N] [--out FILE]

Commands: recordings of people (a Parquet file with digit, speaker and audio; the Free Spoken Digit
Dataset, CC BY-SA 4.0) and the voices of flite and espeak-ng. What is no command: sentences and
words nearly like digits in those voices, phrases in French, Italian and Russian, words in twenty
languages (ktuberling), effects and music of the other packages. What data/build_speech.py keeps for
tests is left out. Each clip is added again with its frequencies and its length changed, half of
these through the code of telephones (GSM 06.10). The phrases come in that code; if they alone did,
the code would tell what is no command. --without leaves a speaker out, for a test by speaker. Only
the weights are kept.
"""

import argparse
import io
import random
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from build_speech import VOICES, effect, effects, gsm, kept, phrases

from workbench.subjects import models, speech, words
from workbench.subjects.words import RATE, WORDS, Clip

HERE = Path(__file__).parent
# Hz
FLITE = {"kal": (75, 90, 110, 135), "awb": (100, 125, 150, 180), "rms": (80, 100, 125, 150),
         "slt": (140, 165, 190, 230)}
STRETCHES = (0.75, 1.0, 1.4, 1.8)
ESPEAK = [
    "m1", "m2", "m3", "m4", "m5", "m7", "f1", "f2", "f3", "f4",
    "f5", "adam", "anika", "Andy", "Annie", "belinda", "benjamin", "caleb", "david", "ed",
    "gustave", "iven", "john", "linda", "marcelo", "max", "michel", "pablo", "paul", "rob",
    "sandro", "shelby", "steph", "travis", "victor", "Mike", "Gene", "Denis", "Marco", "Alicia",
]
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan",
           "en-gb-x-gbcwmd")
ALIKE = [
    "wand", "toe", "far", "ache", "tree", "free", "thrive", "wine", "line", "mine", "nice",
    "sick", "fix", "mix", "heaven", "eleven", "sever", "zeal", "hero", "forty", "sixty", "seventy",
    "ninety", "twenty", "fire", "fine", "find", "tune", "do", "through", "threw", "night", "late",
    "straight", "great", "hate", "none", "nun", "run", "sun", "wonder", "seventh", "sixth",
]
SAME = {"won", "too", "for", "fore", "ate"}  # nobody hears that these are no numbers
SENTENCES, LONG = 200, 14  # of each engine, and their words
# seconds of a phrase; how far below the loudest lies what is cut at both ends
SHORTEST, SILENCE_DB = 0.3, 35
# below usr/share: spoken words, and what nobody speaks
SPOKEN = "ktuberling/sounds/*/*"
SOUNDS = ("sounds/freedesktop/**/*", "sounds/Oxygen*", "sounds/lomiri/**/*", "psi-plus/sound/**/*",
          "games/colobot/sounds/*", "games/colobot/music/*")
LONGEST = 20  # seconds that are taken of a sound
WINDOW, SHIFT = 320, 80  # samples that are added up where a clip is stretched, and their search


def main() -> None:
    """Train and write the checkpoint, with its recipe in its header."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=Path, required=True)
    parser.add_argument("--source", type=Path, default=Path("/"))
    parser.add_argument("--without", default="")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path,
                        default=HERE / "checkpoints" / "word_spotter-digits.safetensors")
    asked = parser.parse_args()
    random.seed(0)
    people = [clip for clip in words.digits(asked.digits) if clip.voice != asked.without]
    draw, made, sentences = np.random.default_rng(0), spoken_digits(), other_speech()
    phrases_of, sounds = recorded(asked.source / "usr/share")
    commands = people + varied(people, 4, draw) + made + varied(made, 3, draw)
    others = [*sentences, *varied(sentences, 2, draw, length=(0.8, 1.3)),
              *phrases_of, *varied(phrases_of, 1, draw, size=(0.85, 1.2), length=(0.85, 1.2)),
              *sounds, *varied(sounds, 3, draw, size=(0.5, 2.0), length=(0.7, 1.4))]
    network = speech.word_spotter()
    losses = words.train(network, commands, others, steps=asked.steps)
    recipe = {"steps": asked.steps, "commands": len(commands), "others": len(others),
              "without": asked.without or "nobody",
              "last_loss": round(float(np.mean(losses[-50:])), 4)}
    models.save(network.half(), asked.out,
                notes={name: str(value) for name, value in recipe.items()})
    print(recipe)


def spoken_digits() -> list[Clip]:
    """The digits in the voices of both engines, at several pitches and speeds."""
    made = [Clip(cut(flite(word, voice, stretch, pitch)), "command", word, f"flite {voice}")
            for voice, pitches in FLITE.items() for word in WORDS for pitch in pitches
            for stretch in STRETCHES]
    for voice in ESPEAK:
        for accent in random.sample(ACCENTS, 3):
            speeds = [(random.choice((95, 130, 165, 200)), random.choice((30, 50, 70)))
                      for _ in WORDS]
            made += [Clip(cut(espeak(word, f"{accent}+{voice}", *how)), "command", word,
                          f"espeak {voice}")
                     for word, how in zip(WORDS, speeds, strict=True)]
    return made


def other_speech() -> list[Clip]:
    """Sentences without digits, and words that sound nearly like them."""
    table = pd.read_parquet(HERE / "wiki_topics" / "summaries.parquet")
    lines = table[next(name for name in table if "text" in name or "summ" in name)]
    made = []
    for place in range(2 * SENTENCES):
        said = [word for word in re.findall(r"[a-z]{3,}", lines.iloc[place * 11].lower())
                if word not in SAME.union(WORDS)][:LONG]
        voice = random.choice(ESPEAK)
        made.append(flite(" ".join(said), random.choice([*FLITE]), random.choice((0.85, 1.0, 1.2)),
                          0) if place % 2 else
                    espeak(" ".join(said), f"{random.choice(ACCENTS[:2])}+{voice}",
                           random.choice((140, 175, 210)), 50))
    for word in ALIKE:
        made += [cut(espeak(word, f"en-us+{voice}", 165, 50)) for voice in random.sample(ESPEAK, 6)]
        made += [cut(flite(word, voice, 1.0, 0)) for voice in FLITE]
    return [Clip(samples, "speech") for samples in made]


def recorded(source: Path) -> tuple[list[Clip], list[Clip]]:
    """Phrases and words, effects and music; not those that are kept for tests."""
    paths = [path for language in ("fr", "it", "ru") for path in phrases(source, VOICES[language])
             if not kept(path)]
    spoken = [gsm(path) for path in paths] + [cut(samples) for samples in heard(source, SPOKEN)]
    sounds = [effect(path) for path in effects(source) if not kept(path)]
    sounds += [samples for where in SOUNDS for samples in heard(source, where)]
    return ([Clip(samples, "speech") for samples in spoken if len(samples) > SHORTEST * RATE],
            [Clip(samples, "effect") for samples in sounds])


def heard(source: Path, where: str) -> list[np.ndarray]:
    """The samples of sound files, in the order of their names, those that are silent left out."""
    paths = sorted(path for path in source.glob(where)
                   if path.suffix in (".ogg", ".oga", ".wav", ".flac"))
    if not paths:
        raise FileNotFoundError(f"{source}/{where}: no sound file; install the packages above")
    found = [effect(path)[:LONGEST * RATE] for path in paths if not path.is_symlink()]
    return [samples for samples in found if len(samples) > RATE / 10
            and np.abs(samples).max() > 1e-3]


def varied(clips: Sequence[Clip], times: int, draw: np.random.Generator, *,
           size: tuple[float, float] = (0.85, 1.35),
           length: tuple[float, float] = (0.75, 1.5)) -> list[Clip]:
    """Each clip so many times, its frequencies times a number within `size`, its length within
    `length`, half of them telephoned."""
    found = []
    for clip in clips:
        for _ in range(times):
            higher, longer = (np.exp(draw.uniform(*np.log(bounds))) for bounds in (size, length))
            samples = stretched(clip.samples, higher * longer)
            places = np.arange(0, len(samples) - 1, higher)
            samples = np.interp(places, np.arange(len(samples)), samples).astype(np.float32)
            found.append(replace(clip, samples=telephoned(samples) if draw.random() < 0.5
                                 else samples))
    return found


def stretched(samples: np.ndarray, times: float) -> np.ndarray:
    """Samples that last so many times as long at the same pitch: windows added up where they are
    most alike (WSOLA, Verhelst and Roelands 1993)."""
    hop, at = WINDOW // 2, 0
    count, shape = max(int(len(samples) * times) // hop - 1, 1), np.hanning(WINDOW + 1)[:-1]
    padded = np.pad(samples, (hop, 4 * WINDOW))
    made, weight = np.zeros((2, (count + 1) * hop + WINDOW))
    for place in range(count):
        if place:
            first, goes_on = int(place * hop / times), padded[at + hop:at + hop + WINDOW]
            first = max(first - SHIFT, 0)
            near = np.lib.stride_tricks.sliding_window_view(
                padded[first:first + 2 * SHIFT + WINDOW], WINDOW)
            at = first + int((near @ goes_on).argmax())
        made[place * hop:place * hop + WINDOW] += shape * padded[at:at + WINDOW]
        weight[place * hop:place * hop + WINDOW] += shape
    return (made / np.maximum(weight, 0.1))[:int(len(samples) * times)].astype(np.float32)


def telephoned(samples: np.ndarray) -> np.ndarray:
    """Samples coded by GSM 06.10 and decoded, half as loud as can be at their peak."""
    file, peak = io.BytesIO(), 2 * max(float(np.abs(samples).max()), 1e-6)
    soundfile.write(file, np.pad(samples / peak, (0, -len(samples) % 320)), RATE, format="WAV",
                    subtype="GSM610")
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0][:len(samples)] * np.float32(peak)


def flite(text: str, voice: str, stretch: float, pitch: int) -> np.ndarray:
    """What flite says; pitch in Hz, 0 for the voice's own."""
    how = ["--setf", f"duration_stretch={stretch}", *(["--setf", f"int_f0_target_mean={pitch}"]
                                                      if pitch else [])]
    return said(lambda path: ["flite", "-voice", voice, *how, "-t", text, "-o", path])


def espeak(text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """What espeak-ng says, so many words a minute, its pitch between 0 and 99."""
    return said(lambda path: ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w",
                              path, text])


def said(command) -> np.ndarray:
    """The samples that a program writes."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(command(file.name), check=True, stderr=subprocess.DEVNULL)
        samples, rate = soundfile.read(file.name, dtype="float32")
    return speech.resampled(samples, rate)


def cut(samples: np.ndarray) -> np.ndarray:
    """Samples without the silence at both ends."""
    level = np.sqrt(np.convolve(samples**2, np.ones(80) / 80, "same"))
    loud = np.flatnonzero(level > level.max() * 10 ** (-SILENCE_DB / 20))
    return samples[max(loud[0] - 80, 0):loud[-1] + 160]


if __name__ == "__main__":
    main()
