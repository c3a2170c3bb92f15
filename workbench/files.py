"""Files written whole or not at all, checksums, and progress bars that a batch run can show."""

import atexit
import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

REPORTS = Path(__file__).parents[1] / "reports"  # of the clone that this package is installed from


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` when the block ends, remove it
    when it raises.

    Raises OSError where the folder cannot be written or the disk is full; `path` is then as it was.

    Example: `with files.atomic("table.csv") as new: frame.to_csv(new)`
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        new = Path(folder) / path.name
        yield new
        with open(new, "rb") as written:
            os.fsync(written.fileno())
        new.chmod(0o644)  # some writers make their files readable by the owner only
        os.replace(new, path)


def sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes.

    Example: `len(sha256(files.__file__)) == 64`
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(parts: Iterable) -> str:
    """Hexadecimal SHA-256 of tensors' bytes, shapes left out, and of text: what tells one start or
    one set of images from another.

    Example: `fingerprint([torch.ones(2)]) == fingerprint([torch.ones(2)])`
    """
    import torch

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.detach().cpu().reshape(-1)
                      .view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()


def progress(items: Iterable | None = None, *, total: int | None = None, title: str = "",
             unit: str = "it") -> tqdm:
    """A progress bar; in a batch run it goes to the file named by WORKBENCH_PROGRESS, which the
    runner shows.

    Example: `sum(files.progress([1, 2, 3], title="adding")) == 6`
    """
    target = os.environ.get("WORKBENCH_PROGRESS")
    return tqdm(items, total=total, desc=title, unit=unit, leave=False, mininterval=0.5,
                file=_opened(target) if target else None)


@functools.cache
def _opened(path: str):
    file = open(path, "w")  # noqa: SIM115  (one for all bars of the process)
    atexit.register(file.close)
    return file
