"""What goes wrong with a model: the one error that every room raises for it, and how a library's
own error is told."""

import contextlib
import difflib
import io
import logging
import os
import warnings
from collections.abc import Iterable


class UnsupportedModelError(Exception):
    """A model, or a layer of it, that a method cannot handle; the message names the layer and the
    way out.

    Example: `isinstance(UnsupportedModelError("layer head: ..."), Exception)`
    """


def reason(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing.

    Example: `reason(ValueError("no such file")) == "no such file"`
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """The name that is meant where one is misspelt, for a message; nothing where none is like it.
    Of names that are as like, the one that begins alike.

    Example: `nearest("prun", ["prune", "drop"]) == ", did you mean 'prune'"`
    """
    def likeness(one: str) -> tuple[float, int]:
        return (difflib.SequenceMatcher(None, one, name).ratio(),
                len(os.path.commonprefix([one, name])))

    near = difflib.get_close_matches(name, list(known))
    return f", did you mean {max(near, key=likeness)!r}" if near else ""


def listed(names, *, most: int = 6) -> str:
    """The first names of many, for a message.

    Example: `listed("abcdefgh") == "a, b, c, d, e, f, ... (8 in all)"`
    """
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


@contextlib.contextmanager
def quietly():
    """torch's exporters narrate, warn of their own internals and log whole graphs; what matters is
    checked by who calls them.

    Example: `with quietly(): torch.export.export(model, (x,))`
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(
            io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
