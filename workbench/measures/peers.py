"""What others offer, to be measured beside ours: ONNX Runtime's and NNCF's quantisation,
vector-quantize-pytorch."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench import files
from workbench.batches import Batch, count, rows
from workbench.deployment import sessions
from workbench.errors import quietly

# ours: onnxruntime's
CALIBRATORS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}



class VectorQuantizePytorch(nn.Module):
    """The `VectorQuantize` of Phil Wang's library between the projections of `book`, a
    SharedCodebook, with its settings: size, heads on one table, cosine search, moving averages,
    k-means start, dead codes revived. `fit`, `encode`, `decode` as there.

    Raises ModuleNotFoundError where vector-quantize-pytorch is not installed.

    Example: `peers.VectorQuantizePytorch(book)`
    """

    def __init__(self, book: nn.Module):
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        if book.levels > 1:
            raise ValueError("vector-quantize-pytorch: levels above 1 are its ResidualVQ, which "
                             "this wrapper does not know")
        self.inward, self.outward, self.heads, self.dim, self.size, self.levels = (
            book.inward, book.outward, book.heads, book.dim, book.size, 1)
        torch.manual_seed(book.seed)
        self.book = VectorQuantize(dim=book.dim, codebook_size=book.size,
                                   use_cosine_sim=book.cosine, decay=book.decay,
                                   kmeans_init=book.kmeans, threshold_ema_dead_code=book.revive,
                                   rotation_trick=False, commitment_weight=book.commitment)

    def forward(self, batch: Mapping[str, Tensor]):
        pieces = torch.cat([self._inward(name, vectors) for name, vectors in batch.items()])
        straight, chosen, loss = self.book(pieces[None])
        values, codes, start = {}, {}, 0
        for name, vectors in batch.items():
            end = start + len(vectors) * self.heads
            values[name] = self.outward[name](straight[0, start:end].reshape(len(vectors), -1))
            codes[name] = chosen[0, start:end].view(-1, self.heads)
            start = end
        return SimpleNamespace(values=values, codes=codes, loss=loss.sum(), skipped=())

    def _inward(self, name: str, vectors: Tensor) -> Tensor:
        return F.normalize(self.inward[name](vectors).reshape(-1, self.dim), dim=1)

    @torch.inference_mode()
    def encode(self, name: str, vectors: Tensor) -> Tensor:
        return self.book(self._inward(name, vectors)[None])[1][0].view(-1, self.heads)

    @torch.inference_mode()
    def decode(self, name: str, codes: Tensor) -> Tensor:
        return self.outward[name](self.book.get_codes_from_indices(codes).flatten(1))


def quantize_static(source: Path | str, batches: Iterable[Batch], path: Path | str, *,
                    calibrator: str = "minmax", per_channel: bool = True,
                    prepared: bool = False) -> Path:
    """Write a copy of the float32 ONNX file `source`, quantised to 8 bits by ONNX Runtime's own
    tool; return its path.

    A peer of quantization.quantize. batches: inputs and targets for its calibration, "minmax",
    "entropy" or "percentile". prepared: `source` has been through its quant_pre_process, which is
    otherwise run first.

    Raises ValueError for an unknown calibrator or no examples, and as sessions.open does.

    Example: `peers.quantize_static("resnet20.onnx", task.validation.subset(200).batches(50),
    "static.onnx")`
    """
    from onnxruntime import quantization

    if calibrator not in CALIBRATORS:
        raise ValueError(f"unknown calibrator {calibrator!r}; ONNX Runtime has "
                         f"{', '.join(CALIBRATORS)}")
    session = cast(sessions.OnnxSession, sessions.open(source))
    feeds = [session.feed(inputs) for inputs, _ in batches]
    if not feeds:
        raise ValueError("calibration saw no examples; give at least one batch")
    reader = type("Reader", (quantization.CalibrationDataReader,),
                  {"get_next": lambda self: feeds.pop(0) if feeds else None})()
    with files.atomic(Path(path)) as new, tempfile.TemporaryDirectory() as folder, quietly():
        ready = Path(source) if prepared else Path(folder) / "prepared.onnx"
        if not prepared:
            quantization.quant_pre_process(source, ready,
                                           skip_symbolic_shape=_has_free_lengths(session))
        quantization.quantize_static(ready, new, reader, per_channel=per_channel,
                                     activation_type=quantization.QuantType.QUInt8,
                                     weight_type=quantization.QuantType.QInt8,
                                     calibrate_method=quantization.CalibrationMethod[
                                         CALIBRATORS[calibrator]])
        sessions.open(new)
    return Path(path)


def quantize_dynamic(source: Path | str, path: Path | str) -> Path:
    """Write a copy of the float32 ONNX file `source` with uint8 weights, its activations quantised
    as they come, by ONNX Runtime's own tool; return its path. Raises as sessions.open does.

    Example: `peers.quantize_dynamic("model.onnx", "dynamic.onnx")`
    """
    from onnxruntime import quantization

    session = sessions.open(source)
    with files.atomic(Path(path)) as new, tempfile.TemporaryDirectory() as folder, quietly():
        prepared = Path(folder) / "prepared.onnx"
        quantization.quant_pre_process(source, prepared,
                                       skip_symbolic_shape=_has_free_lengths(session))
        quantization.quantize_dynamic(prepared, new, weight_type=quantization.QuantType.QUInt8)
        sessions.open(new)
    return Path(path)


def quantize_nncf(source: Path | str, batches: Iterable[Batch], path: Path | str) -> Path:
    """Write a copy of the float32 ONNX file `source`, quantised to 8 bits by NNCF with its own
    defaults; return its path.

    A peer, and optional. batches: of inputs and targets. Raises ValueError where NNCF is not
    installed or there are no examples, and as sessions.open does.

    Example: `peers.quantize_nncf("model.onnx", batches, "nncf.onnx")`
    """
    try:
        import nncf
    except ImportError as error:
        raise ValueError("NNCF is not installed; pip install 'workbench[runtimes]'") from error

    session = cast(sessions.OnnxSession, sessions.open(source))
    feeds = [session.feed(rows(inputs, slice(k, k + 1))) for inputs, _ in batches
             for k in range(count(inputs))]
    if not feeds:
        raise ValueError("calibration saw no examples; give at least one batch")
    with files.atomic(Path(path)) as new, quietly():
        made = nncf.quantize(onnx.load(source), nncf.Dataset(feeds), subset_size=len(feeds))
        onnx.save(made, new)
        sessions.open(new)
    return Path(path)


def _has_free_lengths(session) -> bool:
    """Whether an input has a free axis besides the batch: symbolic shapes end there."""
    return any(sum(isinstance(size, str) for size in value.shape) > 1
               for value in session.inputs.values())
