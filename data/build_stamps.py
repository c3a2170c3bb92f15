"""Build data/stamps/ from Debian's package tuxpaint-stamps-default.

    apt-get install tuxpaint-stamps-default        (or: apt-get download, dpkg-deb -x ... DIR)
    pip install soundfile resvg_py
    python data/build_stamps.py [--source DIR]

Every stamp with a picture, a description and a spoken description. Pictures: 64 x 64 RGB on white,
the whole stamp fitted in, as one lossless WebP contact sheet, 31 a row. Descriptions: every
language, one Parquet column each. Speech: log-mel spectrograms, 40 bands between 60 and 7,600 Hz,
16 kHz, Hann windows of 32 ms each 16 ms, 0 to -62 dB below the loudest value of the clip in steps
of 2 dB (0 to 31), silence at both ends cut; per language one PNG, a row a frame, all clips one
after the other. concepts.csv and clips.csv say what is where. The recordings of a few stamps are
kept as they are, to be listened to. Run twice, it writes the same bytes.
"""

import argparse
import csv
import hashlib
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.signal import resample_poly

SIDE, TILES = 64, 31
SPEECH = ("be", "bg", "ca", "el", "es", "fr", "ro", "ru")
RATE, WINDOW, HOP, BANDS, RANGE = 16_000, 512, 256, 40, (60.0, 7600.0)
STEP_DB, LEVELS, SILENCE_DB = 2, 32, 40
KEPT = ("animals/amphibians/frog", "animals/birds/penguin", "food/fruit/banana", "space/toyrocket")
OUT = Path(__file__).parent / "stamps"
LICENCE = """The pictures, descriptions and recordings in this folder are those of Tux Paint Stamps 2022-06-04
(https://tuxpaint.org, Copyright 2002-2022 Bill Kendrick and others), scaled, cut and turned into spectrograms by
../build_stamps.py, which is the preferred form for changing them. They are free software: you can redistribute and modify
them under the terms of the GNU General Public License, version 2, as published by the Free Software Foundation, or, at
your option, any later version. They are distributed in the hope that they will be useful, but WITHOUT ANY WARRANTY;
without even the implied warranty of MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE.

The text of the licence follows.

"""  # noqa: E501


def main() -> None:
    """Write the sheet, the tables, the spectrograms, the licence and the checksums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--licence", type=Path, default=Path("/usr/share/common-licenses/GPL-2"))
    asked = parser.parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    stems = [stem for path in sorted(asked.source.rglob("*.txt"))
             if picture_of(stem := path.with_suffix(""))
             and any(recording(stem, language) for language in SPEECH)]
    told = [descriptions(stem) for stem in stems]
    pictures = np.stack([picture(picture_of(stem)) for stem in stems])
    names = [str(stem.relative_to(asked.source)) for stem in stems]
    groups = near_duplicates([text["en"] for text in told], pictures)
    with (OUT / "concepts.csv").open("w", newline="") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["concept", "name", "category", "group"])
        rows.writerows((k, name, name.split("/")[0], group)
                       for k, (name, group) in enumerate(zip(names, groups, strict=True)))
    contact_sheet(pictures).save(OUT / "pictures.webp", lossless=True, quality=100, method=6)
    table = pd.DataFrame(told, dtype="string").sort_index(axis=1)
    table.to_parquet(OUT / "descriptions.parquet", compression="brotli", compression_level=11,
                     use_dictionary=False)
    clips = [row for language in SPEECH for row in write_speech(language, stems)]
    pd.DataFrame(clips).to_csv(OUT / "clips.csv", index=False)
    for name in KEPT:
        for language in SPEECH:
            if path := recording(asked.source / name, language):
                shutil.copy(path, OUT / f"{Path(name).name}_{language}.ogg")
    (OUT / "LICENCE").write_text(LICENCE + asked.licence.read_text())
    sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n"
            for f in sorted(OUT.glob("*.*"))]
    (OUT / "SHA256SUMS").write_text("".join(sums))


def picture_of(stem: Path) -> Path | None:
    """The picture beside a description: PNG, or where there is none, SVG."""
    return next((p for p in (stem.with_name(stem.name + kind) for kind in (".png", ".svg"))
                 if p.exists()), None)


def recording(stem: Path, language: str) -> Path | None:
    """The spoken description in a language."""
    path = stem.with_name(f"{stem.name}_desc_{language}.ogg")
    return path if path.exists() and path.stat().st_size else None


def descriptions(stem: Path) -> dict[str, str]:
    """The description by language: the first line is English, the others are LANGUAGE.utf8=TEXT."""
    first, *others = stem.with_name(stem.name + ".txt").read_text("utf-8",
                                                                  errors="replace").splitlines()
    pairs = (line.partition(".utf8=") for line in others)
    return {"en": first.strip()} | {language: text.strip() for language, mark, text in pairs if mark
                                    and text.strip()}


def picture(path: Path) -> np.ndarray:
    """uint8 (64, 64, 3): the stamp on white, scaled to fit, in the middle."""
    if path.suffix == ".svg":
        import resvg_py

        path = io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=256, dpi=96)))
    image = Image.open(path).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = SIDE / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size],
                         Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (SIDE, SIDE), "white")
    tile.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.array(tile)


def contact_sheet(pictures: np.ndarray) -> Image.Image:
    """The tiles row by row, the last row filled up with white."""
    rows = -(-len(pictures) // TILES)
    sheet = np.full((rows * TILES, SIDE, SIDE, 3), 255, np.uint8)
    sheet[:len(pictures)] = pictures
    return Image.fromarray(sheet.reshape(rows, TILES, SIDE, SIDE,
                                         3).swapaxes(1, 2).reshape(rows * SIDE, TILES * SIDE, 3))


def near_duplicates(english: list[str], pictures: np.ndarray) -> list[int]:
    """A number for each stamp, the same for those with one description or nearly one picture,
    mirrored or not."""
    group = list(range(len(english)))

    def join(a: int, b: int) -> None:
        low, high = sorted((group[a], group[b]))
        group[:] = [low if g == high else g for g in group]

    first: dict[str, int] = {}
    for k, text in enumerate(english):
        join(k, first.setdefault(re.sub(r"\W+", " ", text.lower()).strip(), k))
    small = pictures.reshape(-1, 16, 4, 16, 4, 3).mean((2, 4))
    grey = np.array([view.reshape(len(small), -1) for view in (small, small[:, :, ::-1])])
    centred = grey - grey.mean(2, keepdims=True)
    unit = centred / np.linalg.norm(centred, axis=2, keepdims=True).clip(1e-9)
    for view in unit:
        for a, b in np.argwhere(np.triu(unit[0] @ view.T > 0.97, 1)):
            join(a, b)
    return group


def write_speech(language: str, stems: list[Path]) -> list[dict]:
    """Write the spectrograms of a language; rows concept, language, start, frames, seconds of its
    clips."""
    import soundfile

    rows, parts, start = [], [], 0
    for concept, stem in enumerate(stems):
        if not (path := recording(stem, language)):
            continue
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            continue
        mels = log_mel(samples.mean(1), rate)
        if mels is None:
            continue
        rows.append({"concept": concept, "language": language, "start": start, "frames": len(mels)})
        parts.append(mels)
        start += len(mels)
    Image.fromarray(np.concatenate(parts)).save(OUT / f"speech_{language}.png", optimize=True)
    return rows


def log_mel(samples: np.ndarray, rate: int) -> np.ndarray | None:
    """uint8 (frames, 40), 31 the loudest value and each step 2 dB; None where the clip is
    silent."""
    divisor = np.gcd(rate, RATE)
    samples = resample_poly(samples, RATE // divisor, rate // divisor)
    if len(samples) < WINDOW or np.abs(samples).max() < 1e-3:
        return None
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW), axis=1)) ** 2 @ filters().T
    level = 10 * np.log10(power.clip(1e-10))
    loud = np.flatnonzero(level.max(1) > level.max() - SILENCE_DB)
    level = level[loud[0]:loud[-1] + 1] - level.max()
    return (np.round(level / STEP_DB) + LEVELS - 1).clip(0, LEVELS - 1).astype(np.uint8)


def filters() -> np.ndarray:
    """Triangles on the mel scale 2595 log10(1 + f / 700), (40, 257)."""
    low, high = (2595 * np.log10(1 + f / 700) for f in RANGE)
    edges = 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2595) - 1)
    place = np.fft.rfftfreq(WINDOW, 1 / RATE)
    rise = (place - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - place) / (edges[2:] - edges[1:-1])[:, None]
    return np.minimum(rise, fall).clip(0)


if __name__ == "__main__":
    main()
