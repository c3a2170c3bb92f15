"""Understanding a sentence in parts that can be replaced: an encoder, a head for the intent, a head
for the tags.

The answer is one tensor (n, tokens, width), as `objectives.Understanding` reads it: the intent in
the first place, then a tag for each token. Source: JointBERT, Chen et al. 2019 (arXiv 1902.10909).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from workbench.batches import answer
from workbench.subjects.objectives import Understanding as Asked
from workbench.subjects.tasks import Task

# factor and modulus of each: together they tell 256,027 tokens apart
HASHES = ((7919, 509), (104729, 503))


class Understanding(nn.Module):
    """`encoder` gives states (n, tokens, width) of token ids and mask; the intent is read from
    their mean, each tag from its own.

    answers: how many answers either head can give, the number of intents or of tags, whichever is
    greater. Tokens behind the end of a sentence change nothing.

    Example: `model.encoder = HashedConvolutions()` puts another encoder of the same width in its
    place.
    """

    def __init__(self, encoder: nn.Module, width: int, answers: int, *, dropout: float = 0.1):
        super().__init__()
        if hasattr(encoder, "pooler"):
            encoder.pooler = None  # what sentences are compared by, not understood
        self.encoder, self.states, self.dropout = encoder, nn.Identity(), nn.Dropout(dropout)
        self.intent, self.tagging = nn.Linear(width, answers), nn.Linear(width, answers)

    # int64 (n, L) each -> (n, L, answers)
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = answer(self.encoder(input_ids=input_ids, attention_mask=attention_mask))
        mask = attention_mask[:, :, None].to(states.dtype)
        states = self.states(states * mask)
        mean = states.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return torch.cat([self.intent(self.dropout(mean)),
                          self.tagging(self.dropout(states))[:, 1:]], 1)


class HashedConvolutions(nn.Module):
    """Subwords hashed into a small table, then separable convolutions over the sentence, each added
    to what it read.

    A token's vector is the sum of two rows, one a hash; two tokens share both only beyond 256,027
    entries of a vocabulary. Source: hash embeddings, Svenstrup et al. 2017 (arXiv 1709.03933).

    Example: `sum(p.numel() for p in HashedConvolutions().parameters()) < 100_000`
    """

    def __init__(self, *, narrow: int = 48, width: int = 64, kernel: int = 5, blocks: int = 5,
                 dropout: float = 0.1):
        super().__init__()
        self.table = nn.Embedding(sum(size for _, size in HASHES), narrow)
        self.widen, self.dropout = nn.Linear(narrow, width), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width,
                                    bias=False), nn.Conv1d(width, width, 1, bias=False),
                          nn.BatchNorm1d(width), nn.ReLU()) for _ in range(blocks))

    # int64 (n, L) each -> (n, L, width)
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        (one, first), (other, second) = HASHES
        found = self.table(input_ids * one % first) + self.table(input_ids * other % second + first)
        mask = attention_mask[:, None].to(found.dtype)
        states = self.widen(self.dropout(found)).transpose(1, 2) * mask
        for block in self.blocks:
            states = states + block(states) * mask
        return states.transpose(1, 2)


def head(encoder: nn.Module, width: int, task: Task) -> Understanding:
    """The encoder with new heads for the task. Raises ValueError where the task asks for something
    else than an understanding.

    Example: `head(encoder, 384, commands)`
    """
    if not isinstance(task.objective, Asked):
        raise ValueError(f"{task.name} asks for {type(task.objective).__name__}; an understanding "
                         "needs sentences with an intent and a tag for each word")
    model = Understanding(encoder, width,
                          max(len(task.objective.intents), len(task.objective.tags)))
    model.origin = {"classes": str(len(task.classes)), "answers": str(model.intent.out_features)}
    return model


def hashed_cnn(task: Task | None, header: dict[str, str] | None = None) -> Understanding:
    """Fewer than 100,000 parameters: `HashedConvolutions` with two heads, for a task or as a
    checkpoint's header says.

    Example: `hashed_cnn(None, {"classes": "4", "answers": "4"})`
    """
    encoder = HashedConvolutions()
    width = encoder.widen.out_features
    model = (head(encoder, width, task) if header is None
             else Understanding(encoder, width, int(header["answers"])))
    known = header or {}
    model.origin = (getattr(model, "origin", {})
                    | {key: known[key] for key in ("classes", "answers") if key in known})
    model.origin |= {"architecture": "hashed_cnn", "source": "minilm"}
    return model


SMALL: dict[str, Callable[..., Understanding]] = {"hashed_cnn": hashed_cnn}
