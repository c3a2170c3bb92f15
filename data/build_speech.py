"""Build data/speech/ from Debian's packages asterisk-core-sounds-{en,es,fr,it,ru}-gsm and
tuxpaint-stamps-default.

    apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-gsm tuxpaint-stamps-default
        # or: dpkg-deb -x ... DIR
    pip install soundfile
    python data/build_speech.py [--source DIR]

One sound file of all clips (8 kHz, GSM 06.10 in WAV, as the recordings themselves are) and
clips.csv, which says what is where: the ten digits of the English voice, phrases of the four others
that are no numbers, effects of the stamps that nobody speaks. A clip is taken by the checksum of
its name, so that data/build_word_spotter.py can leave the same ones out of training. Run twice, it
writes the same bytes.
"""

import argparse
import hashlib
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from workbench.subjects.speech import RATE, resampled
from workbench.subjects.words import WORDS

OUT = Path(__file__).parent / "speech"
VOICES = {"en": "en_US_f_Allison", "es": "es_MX_f_Allison", "fr": "fr_CA_f_June",
          "it": "it_IT_m_Carlo",
          "ru": "ru_RU_f_IvrvoiceRU"}
PHRASES, EFFECTS = 12, 40  # of each voice, and in all
SHORTEST, LONGEST = 1.0, 5.0  # seconds of a phrase
EFFECT = 2.5  # seconds of an effect that are kept
LICENCE = """The recordings in this folder are clips of others, cut, resampled to 8 kHz and coded by ../build_speech.py.

Voices: Asterisk core sounds 1.6.1 (http://downloads.asterisk.org/pub/telephony/asterisk/). English: Copyright 2003-2010 Allison
Smith, CC BY-SA 3.0. Spanish: Allison Smith, CC BY-SA 3.0. French: Copyright 2006-2008 June Wallack, CC BY-SA 3.0. Italian: CC BY
3.0. Russian: Copyright 2010 Maxim Topal, CC BY 3.0. (https://creativecommons.org/licenses/by-sa/3.0/,
https://creativecommons.org/licenses/by/3.0/)

Effects: Tux Paint Stamps 2022-06-04 (https://tuxpaint.org, Copyright 2002-2022 Bill Kendrick and others), free software under
the GNU General Public License, version 2 or later; the text of the licence is in ../stamps/LICENCE.
"""  # noqa: E501


def main() -> None:
    """Write the sound, the table, the licence and the checksums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/"))
    asked = parser.parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    parts, rows, at = [], [], 0
    for what, word, voice, samples in clips(asked.source / "usr/share"):
        parts.append(np.pad(samples, (0, -len(samples) % 320)))  # whole blocks of the code
        rows.append({"what": what, "word": word, "voice": voice, "start": at,
                     "end": at + len(samples)})
        at += len(parts[-1])
    soundfile.write(OUT / "clips.wav", np.concatenate(parts), RATE, format="WAV", subtype="GSM610")
    pd.DataFrame(rows).to_csv(OUT / "clips.csv", index=False)
    (OUT / "LICENCE").write_text(LICENCE)
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
            for path in sorted(OUT.iterdir())]
    (OUT / "SHA256SUMS").write_text("".join(sums))


def clips(source: Path):
    """What, word, voice and samples of each clip."""
    for place, word in enumerate(WORDS):
        spoken = source / f"asterisk/sounds/{VOICES['en']}/digits/{place}.gsm"
        yield "command", word, VOICES["en"], gsm(spoken)
    # English ones say "to" and "for", which nobody tells from numbers
    for voice in list(VOICES.values())[1:]:
        found = [(path, gsm(path)) for path in phrases(source, voice) if kept(path)]
        chosen = [samples for _, samples in found if SHORTEST <= len(samples) / RATE <= LONGEST][
            :PHRASES]
        yield from (("speech", "", voice, samples) for samples in chosen)
    chosen = [path for path in effects(source) if kept(path)][:EFFECTS]
    yield from (("effect", "", path.stem, effect(path)[:round(EFFECT * RATE)]) for path in chosen)


def kept(path: Path) -> bool:
    """Whether a clip is one for this folder, and not for training."""
    return zlib.crc32(path.name.encode()) % 4 == 0


def phrases(source: Path, voice: str) -> list[Path]:
    """A voice's recordings that are no numbers, letters or silence, in the order of their
    checksums."""
    folder = source / "asterisk/sounds" / voice
    found = [path for path in folder.rglob("*.gsm")
             if not {"digits", "silence", "letters", "phonetic"} & set(path.parts)]
    return sorted(found, key=lambda path: hashlib.sha256(path.name.encode()).digest())


def effects(source: Path) -> list[Path]:
    """The stamps' sounds that nobody speaks, in the order of their checksums; symbols and dreydls
    name letters."""
    stamps = source / "tuxpaint/stamps"
    found = [path for kind in ("ogg", "wav") for path in stamps.rglob(f"*.{kind}")
             if not path.name.startswith("dreydl") and "_desc" not in path.name
             and "symbols" not in path.parts]
    return sorted((path for path in found if len(effect(path)) > RATE / 10
                   and np.abs(effect(path)).max() > 1e-3),
                  key=lambda path: hashlib.sha256(path.name.encode()).digest())


def gsm(path: Path) -> np.ndarray:
    """The samples of a bare GSM file."""
    return soundfile.read(path, samplerate=RATE, channels=1, format="RAW", subtype="GSM610",
                          dtype="float32")[0]


def effect(path: Path) -> np.ndarray:
    """The samples of a sound file, its channels averaged."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return resampled(samples.mean(1), rate)


if __name__ == "__main__":
    main()
