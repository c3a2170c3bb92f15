"""Ways of fitting a pretrained sentence encoder to a new task: all of its weights, low-rank adapters, a few prompt vectors.

Sources: adapters of low rank Hu et al. 2021 (arXiv 2106.09685); prompt tuning Lester et al. 2021 (arXiv 2104.08691); both by
the library peft. A smaller encoder to start from: depth.drop leaves layers out, as DistilBERT is started (Sanh et al. 2019, arXiv
1910.01108), factorization.factorize thins the table of tokens, and `trimmed` takes what short sentences do not need.
"""

import copy
import warnings

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


def trimmed(encoder: nn.Module, *, positions: int = 64, dropout: float = 0.1) -> nn.Module:
    """A copy of a sentence encoder that reads at most `positions` tokens, without the pooler, which sentences do not use.

    dropout: while it is trained; 0 for one that has a teacher and much to read.

    Raises ValueError for more positions than there are.
    """
    new = copy.deepcopy(encoder)
    embeddings = new.bert.embeddings
    known = embeddings.position_embeddings.weight
    if not 1 <= positions <= len(known):
        raise ValueError(f"trimmed: positions is {positions}, expected 1 to {len(known)}")
    embeddings.position_embeddings = nn.Embedding.from_pretrained(known[:positions].detach().clone(), freeze=False)
    new.bert.pooler = None
    for module in new.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return new
