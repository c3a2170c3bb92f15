"""Export to ONNX with a dynamic batch axis.

Source: torch.onnx.export (the torch.export based exporter), which folds each batch norm into its convolution.
"""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from workbench import files, layers
from workbench.deployment import sessions

TOLERANCE = 1e-3  # largest relative L2 distance between torch and the export, per image, before `export` refuses


def export(model: nn.Module, example: Tensor, path: Path | str) -> Path:
    """Write `model` as an ONNX file that takes any batch size; return its path.

    The file is written once onnx.checker accepts it and batches of 1 and 7 (the example, repeated with noise) run on
    ONNX Runtime to torch's outputs; otherwise nothing is. example: float32 (n, C, H, W).

    Raises UnsupportedModelError where the model cannot be exported or the export computes something else.

    Example: `onnx.export(model, task.example, "resnet20.onnx")`
    """
    path = Path(path)
    session = sessions.open(model)
    batch = torch.export.Dim.DYNAMIC
    noise = torch.randn(7, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    probe = example[:1] + 0.1 * noise
    try:
        with _quietly():
            program = torch.onnx.export(session.model, (probe[:2],), dynamo=True, dynamic_shapes=({0: batch},),
                                        input_names=["images"], output_names=["logits"], verbose=False)
        proto = program.model_proto
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the exporter raises a dozen kinds, all of them about this model
        reason = str(error).strip().splitlines()[0]
        raise layers.UnsupportedModelError(f"{session.name} cannot be exported to ONNX: {reason}") from error
    with files.atomic(path) as new:
        onnx.save(proto, new)
        exported = sessions.open(new)
        for size in (1, 7):
            _check(session(probe[:size]), exported(probe[:size]), f"{path} at batch {size}")
    return path


def _check(expected: Tensor, found: Tensor, where: str) -> None:
    distance = (expected - found).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-12)
    if not np.isfinite(distance.max().item()) or distance.max() > TOLERANCE:
        raise layers.UnsupportedModelError(f"{where} puts out something else than the model: relative L2 distance "
                                           f"{distance.max():.3g}, at most {TOLERANCE} allowed")


@contextlib.contextmanager
def _quietly():
    """The exporter narrates on stdout and warns of its own internals; what matters is checked above."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
