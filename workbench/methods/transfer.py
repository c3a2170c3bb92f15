"""Ways of fitting a pretrained sentence encoder to a new task: all of its weights, low-rank adapters, a few prompt vectors.

Sources: adapters of low rank Hu et al. 2021 (arXiv 2106.09685); prompt tuning Lester et al. 2021 (arXiv 2104.08691); both by
the library peft. A smaller encoder: layers left out, as DistilBERT is started (Sanh et al. 2019, arXiv 1910.01108), and the
table of tokens factored as in ALBERT (Lan et al. 2019, arXiv 1909.11942), here by singular values.
"""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import nn

KINDS = ("frozen", "prompts", "adapters", "full")


def tuned(encoder: nn.Module, kind: str, *, rank: int = 8, prompts: int = 10, seed: int = 0) -> nn.Module:
    """A copy of a sentence encoder (subjects.encoders.Sentences) in which `kind` is trained: "frozen" nothing, "prompts" so
    many vectors before the tokens, "adapters" of `rank` at queries and values, "full" everything.

    Raises ValueError for an unknown kind, ModuleNotFoundError without peft.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown transfer {kind!r}; expected one of {', '.join(KINDS)}")
    new = copy.deepcopy(encoder)
    new.requires_grad_(kind == "full")
    if kind in ("prompts", "adapters"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks transformers for names that are to go
            return _with_peft(new, kind, rank, prompts, seed)
    return new


def _with_peft(new: nn.Module, kind: str, rank: int, prompts: int, seed: int) -> nn.Module:
    import peft

    config = (peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"]) if kind == "adapters" else
              peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=prompts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new.bert = peft.get_peft_model(new.bert, config)
    return new


class FactoredTable(nn.Module):
    """A table of `rank` numbers a token and the matrix that makes them whole; the best of its rank by singular values."""

    def __init__(self, table: nn.Embedding, rank: int):
        super().__init__()
        left, values, right = torch.linalg.svd(table.weight.detach(), full_matrices=False)
        self.table = nn.Embedding.from_pretrained(left[:, :rank] * values[:rank].sqrt(), freeze=False)
        self.outward = nn.Linear(rank, table.embedding_dim, bias=False)
        self.outward.weight = nn.Parameter((right[:rank] * values[:rank, None].sqrt()).T.contiguous())

    def forward(self, tokens):  # (n, L) -> (n, L, width)
        return self.outward(self.table(tokens))


def smaller(encoder: nn.Module, *, layers: Sequence[int], rank: int, positions: int = 64, dropout: float = 0.1) -> nn.Module:
    """A copy of a sentence encoder with these of its layers, its token table at `rank`, and `positions` places; `dropout`
    while it is trained, 0 for one that has a teacher and much to read.

    Raises ValueError for a layer that is not there or a rank above the table's width.
    """
    new = copy.deepcopy(encoder)
    bert = new.bert
    there = len(bert.encoder.layer)
    odd = [k for k in layers if not 0 <= k < there]
    if odd or not layers:
        raise ValueError(f"smaller: layer {odd[0] if odd else 'none'}; the encoder has layers 0 to {there - 1}")
    words = bert.embeddings.word_embeddings
    if not 1 <= rank <= words.embedding_dim:
        raise ValueError(f"smaller: rank is {rank}, expected 1 to {words.embedding_dim}")
    bert.encoder.layer = nn.ModuleList(bert.encoder.layer[k] for k in layers)
    bert.config.num_hidden_layers = len(layers)
    bert.embeddings.word_embeddings = FactoredTable(words, rank)
    bert.embeddings.position_embeddings = nn.Embedding.from_pretrained(
        bert.embeddings.position_embeddings.weight[:positions].detach().clone(), freeze=False)
    bert.pooler = None
    for module in new.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return new
