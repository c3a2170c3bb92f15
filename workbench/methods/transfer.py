"""Ways of fitting a pretrained sentence encoder to a new task: all of its weights, low-rank
adapters, a few prompt vectors.

Sources: adapters of low rank Hu et al. 2021 (arXiv 2106.09685); prompt tuning Lester et al. 2021
(arXiv 2104.08691); both by the library peft. A smaller encoder to start from: depth.drop leaves
layers out, as DistilBERT is started (Sanh et al. 2019, arXiv 1910.01108), factorization.factorize
thins the table of tokens, and `trimmed` takes what short sentences do not need.
"""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import nn

KINDS = ("frozen", "prompts", "adapters", "full")
HEADS = ("intent", "tagging")


def tuned(encoder: nn.Module, kind: str, *, rank: int = 8,
          layers: Sequence[str] = ("query", "value"), prompts: int = 10,
          seed: int = 0) -> nn.Module:
    """A copy of a sentence encoder (subjects.encoders.Sentences) or a model that understands
    (subjects.understanding) in which `kind` is trained: "frozen" nothing, "prompts" so many vectors
    before the tokens, "adapters" of `rank` at the linear layers that end in one of `layers`, "full"
    everything. Heads are trained in any case.

    Raises ValueError for an unknown kind, ModuleNotFoundError without peft.

    Example: `transfer.merged(transfer.tuned(encoders.minilm()[0], "adapters"))`
    """
    if kind not in KINDS:
        raise ValueError(f"unknown transfer {kind!r}; expected one of {', '.join(KINDS)}")
    new = copy.deepcopy(encoder)
    new.requires_grad_(kind == "full")
    if kind in ("prompts", "adapters"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks transformers for names that are to go
            _with_peft(new, kind, rank, list(layers), prompts, seed)
    for head in (getattr(new, name) for name in HEADS if hasattr(new, name)):
        head.requires_grad_(True)
    return new


def merged(model: nn.Module) -> nn.Module:
    """A copy of a model that was tuned by adapters, with what they learned added to its weights:
    the layers that it had before.

    Raises ValueError where there are no adapters.

    Example: `transfer.merged(transfer.tuned(encoders.minilm()[0], "adapters"))`
    """
    new = copy.deepcopy(model)
    part = getattr(new, _inner(new))
    if not hasattr(part, "merge_and_unload"):
        raise ValueError(f"{type(model).__name__} has no adapters to merge; tune it by "
                         "tuned(model, 'adapters')")
    setattr(new, _inner(new), part.merge_and_unload())
    return new.requires_grad_(True)


def _with_peft(new: nn.Module, kind: str, rank: int, layers: list[str], prompts: int,
               seed: int) -> None:
    import peft

    config = (peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
              if kind == "adapters" else
              peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=prompts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        setattr(new, _inner(new), peft.get_peft_model(getattr(new, _inner(new)), config))


def _inner(model: nn.Module) -> str:
    """Which part of it is the pretrained encoder."""
    return "bert" if hasattr(model, "bert") else "encoder"


def trimmed(encoder: nn.Module, *, positions: int = 64, dropout: float = 0.1) -> nn.Module:
    """A copy of a sentence encoder that reads at most `positions` tokens, without the pooler, which
    sentences do not use.

    dropout: while it is trained; 0 for one that has a teacher and much to read.

    Raises ValueError for more positions than there are.

    Example: `transfer.trimmed(encoders.minilm()[0], positions=32)`
    """
    new = copy.deepcopy(encoder)
    embeddings = new.bert.embeddings
    known = embeddings.position_embeddings.weight
    if not 1 <= positions <= len(known):
        raise ValueError(f"trimmed: positions is {positions}, expected 1 to {len(known)}")
    embeddings.position_embeddings = nn.Embedding.from_pretrained(known[:positions].detach()
                                                                  .clone(), freeze=False)
    new.bert.pooler = None
    for module in new.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return new
