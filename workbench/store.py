"""What took long to make, kept under the hash of what made it.

Each result is a folder NAME-HASH with the files that made it up and `key.json`, which says of what
it is the result. It is made beside its place and renamed: whole or not at all. Processes may share
a store; who wants what another is making waits.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from workbench import files

ROOMS = ("numbers", "graph", "subjects", "methods", "deployment", "measures", "plans")


class Store:
    """A folder of results.

    Example: `Store("results").kept("scan", {"model": mark, "levels": [0.5]}, lambda folder:
    frame.to_csv(folder / "scan.csv"))`
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def kept(self, name: str, key: Mapping[str, object], make: Callable[[Path], object]) -> Path:
        """The folder of the result `name` of `key` (what JSON can hold); `make(folder)` fills it
        where there is none yet.

        Raises OSError where the store cannot be written; ValueError where there is a result of that
        hash which something else made.
        """
        place = self.place(name, key)
        if (place / "key.json").exists():
            _refuse_another(place, key)
            return place
        with self._lock(place) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / "key.json").exists():
                with tempfile.TemporaryDirectory(dir=self.folder, prefix=f".{place.name}.") as work:
                    new = Path(work) / place.name
                    new.mkdir()
                    make(new)
                    (new / "key.json").write_text(json.dumps(key, indent=1))
                    # of a process that was killed between two renames
                    shutil.rmtree(place, ignore_errors=True)
                    os.replace(new, place)
            (self.folder / f".{place.name}.lock").unlink(missing_ok=True)
        return place

    def _lock(self, place: Path) -> TextIO:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return open(self.folder / f".{place.name}.lock", "w")
        except OSError as error:
            why = (f"results cannot be kept in {self.folder} ({error.strerror}); give a folder "
                   "that can be written")
            raise OSError(why) from error

    def place(self, name: str, key: Mapping[str, object]) -> Path:
        """Where the result is, or would be."""
        mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{name}-{mark}"

    def stale(self, name: str, key: Mapping[str, object]) -> list[Path]:
        """Results of the same name that other things made: another model, other data, another state
        of the code."""
        here = self.place(name, key)
        return [path.parent for path in sorted(self.folder.glob(f"{name}-*/key.json"))
                if path.parent != here]


def _refuse_another(place: Path, key: Mapping[str, object]) -> None:
    """Two results of one hash: by chance next to never, else a file that was changed or cut
    short."""
    try:
        known = json.loads((place / "key.json").read_text())
    except json.JSONDecodeError:
        known = None
    asked = json.loads(json.dumps(key))
    if known != asked:
        parts = [name for name in asked if not isinstance(known, dict)
                 or known.get(name) != asked[name]]
        raise ValueError(f"{place} is the result of something else than is asked for "
                         f"({', '.join(parts) or 'more'} differ in its key.json): two results of "
                         "one hash; remove that folder")


def code() -> str:
    """A mark of the package's code, without the command line and the reports: with other code a
    result is another one.

    Example: `key = {"plan": "half", "code": code()}`
    """
    package = Path(__file__).parent
    paths = [*package.glob("*.py"),
             *(path for room in ROOMS for path in (package / room).rglob("*.py"))]
    marks = [f"{path.relative_to(package)} {files.sha256(path)}" for path in sorted(paths)
             if path.name != "__main__.py"]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:12]
