"""Where the embedded data lie, and whether they are whole."""

import os
from pathlib import Path

from workbench import files


def folder() -> Path:
    """WORKBENCH_DATA, or data/ of the clone that this package is installed from.

    Example: `folder().is_dir()`
    """
    return Path(os.environ.get("WORKBENCH_DATA") or Path(__file__).parents[2] / "data")


def verified(*names: Path | str) -> Path:
    """The file of these folders and name in the data folder, or of a whole path, once its SHA-256
    is that in SHA256SUMS there.

    Raises FileNotFoundError where it is missing, ValueError where it is damaged.

    Example: `verified("fashion_mnist", "test_0.png").name == "test_0.png"`
    """
    path = folder().joinpath(*names)
    listing = path.parent / "SHA256SUMS"
    for wanted in (listing, path):
        if not wanted.exists():
            raise FileNotFoundError(f"embedded file {wanted} is missing; install from a clone (pip "
                                    "install -e .) or set WORKBENCH_DATA to its data folder")
    sums = {name: digest for digest, name in map(str.split, listing.read_text().splitlines())}
    if files.sha256(path) != sums.get(path.name):
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {listing}; restore it "
                         "with git checkout")
    return path
