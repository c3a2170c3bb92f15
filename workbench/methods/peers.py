"""vector-quantize-pytorch behind the face of `SharedCodebook`, so that the two are trained and judged alike."""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VectorQuantizePytorch(nn.Module):
    """The `VectorQuantize` of Phil Wang's library between the projections of `book`, a SharedCodebook, with its settings: size,
    heads on one table, cosine search, moving averages, k-means start, dead codes revived. `fit`, `encode`, `decode` as there.

    Raises ModuleNotFoundError where vector-quantize-pytorch is not installed.
    """

    def __init__(self, book: nn.Module):
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        if book.levels > 1:
            raise ValueError("vector-quantize-pytorch: levels above 1 are its ResidualVQ, which this wrapper does not know")
        self.inward, self.outward, self.heads, self.dim, self.size, self.levels = (
            book.inward, book.outward, book.heads, book.dim, book.size, 1)
        torch.manual_seed(book.seed)
        self.book = VectorQuantize(dim=book.dim, codebook_size=book.size, use_cosine_sim=book.cosine, decay=book.decay,
                                   kmeans_init=book.kmeans, threshold_ema_dead_code=book.revive, rotation_trick=False,
                                   commitment_weight=book.commitment)

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
