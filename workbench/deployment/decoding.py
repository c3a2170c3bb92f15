"""A decoder with its cache: a file that reads a prompt, or one more token, beside the keys and
values of all before it.

The cache holds, of each layer, keys and values (n, heads, seen, width): its bytes are 2 layers
heads width seen b, b = 4 in float32, and in int8 b = 1 and four bytes more for the scale of each
vector. Queries that share a head's keys are multiplied with them in one product, so that no key is
copied.

Sources: grouped queries Ainslie et al. 2023 (arXiv 2305.13245); a scale for each token's vector as
in KVQuant, Hooper et al. 2024 (arXiv 2401.18079), there by channel for keys.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from workbench.deployment import onnx, sessions
from workbench.errors import UnsupportedModelError

BITS = (32, 8)
LOWEST = -1e30  # added where a token must not look
LEAST = 1e-8  # of a scale, for a vector of zeros
LONGEST = "workbench.longest"  # under which a file tells for how many tokens it has positions


class Cached(nn.Module):
    """A causal language model of transformers that is given its cache and gives it back, longer by
    the tokens read.

    bits: 32 keeps keys and values as they are, 8 as integers with a float32 scale for each vector.
    layers: rounded layers, by name, that stand in the place of its own (`quantization.rounded`).

    Raises ValueError for other bits, UnsupportedModelError for a model whose attention takes no
    cache like this.

    Example: `Cached(models.load("wiki_decoder", data.load("wiki_text")), bits=8)`
    """

    def __init__(self, model: nn.Module, *, bits: int = 32,
                 layers: Mapping[str, nn.Module] | None = None):
        super().__init__()
        if bits not in BITS:
            raise ValueError(f"a cache of {bits} bits; expected one of {', '.join(map(str, BITS))}")
        if (not hasattr(getattr(model, "config", None), "num_hidden_layers")
            or not hasattr(model, "lm_head")):
            raise UnsupportedModelError(f"{type(model).__name__} is no causal language model of "
                                        "transformers; load one by models.load('hf:...', task) for "
                                        "a task of plain text")
        _register()
        self.model, self.bits = copy.deepcopy(model).eval(), bits
        for name, layer in (layers or {}).items():
            self.model.set_submodule(name, layer)
        config = self.model.config
        config._attn_implementation = "grouped"
        self.longest = config.max_position_embeddings
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.width = (getattr(config, "head_dim", None)
                      or config.hidden_size // config.num_attention_heads)
        self.parts = ("key", "value") if bits == 32 else ("key", "key_scale", "value",
                                                          "value_scale")
        self.layers = config.num_hidden_layers

    def empty(self, count: int, seen: int = 0) -> dict[str, Tensor]:
        """The cache of `count` sentences by input name: nothing yet, or zeros for `seen` tokens."""
        kind = torch.int8 if self.bits == 8 else torch.float32
        parts = {part: torch.zeros(count, self.heads, seen, 1) if part.endswith("scale") else
                 torch.zeros(count, self.heads, seen, self.width, dtype=kind)
                 for part in self.parts}
        return {f"past_{layer}_{part}": value for layer in range(self.layers)
                for part, value in parts.items()}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, asked: Tensor,
                **past: Tensor) -> dict[str, Tensor]:
        """input_ids int64 (n, T), attention_mask int64 (n, seen + T), the cache by name -> logits
        (n, K, vocabulary) and the cache, longer by T. asked: which of the T tokens are answered,
        int64 (n, K), the same in each row."""
        from transformers import Cache

        layers = [_layer_class()(*(past[f"past_{at}_{part}"] for part in self.parts))
                  for at in range(self.layers)]
        places = (attention_mask.cumsum(1) - 1).clamp_min(0)[:, attention_mask.shape[1]
                                                             - input_ids.shape[1]:]
        made = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=places,
                          use_cache=True, cache=Cache(layers=layers), logits_to_keep=asked[0])
        return {"logits": made.logits} | {f"present_{at}_{part}": value
                                          for at, layer in enumerate(layers)
                                          for part, value in zip(self.parts, layer.state,
                                                                 strict=True)}


@cache
def _layer_class() -> type:
    """What transformers asks for the keys and values of a layer; made when it is needed, as
    transformers is slow to import."""
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):
        """state: keys and values of the tokens before, with their scales where they are
        integers."""

        def __init__(self, *state: Tensor):
            super().__init__()
            self.state, self.is_initialized, self.keys = state, True, state[0]

        def get_seq_length(self) -> int:
            return self.keys.shape[-2]

        def update(self, keys: Tensor, values: Tensor, *_more, **_named) -> tuple[Tensor, Tensor]:
            whole = len(self.state) == 2
            new = (keys, values) if whole else (*_rounded(keys), *_rounded(values))
            self.state = tuple(torch.cat(pair, 2) for pair in zip(self.state, new, strict=True))
            self.keys = self.state[0]
            if whole:
                return self.state
            key, key_scale, value, value_scale = self.state
            return key.to(key_scale.dtype) * key_scale, value.to(value_scale.dtype) * value_scale

    return Layer


def _rounded(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., width) as int8 of the same shape and their scales (..., 1): the largest of each
    becomes 127."""
    scale = vectors.abs().amax(-1, keepdim=True).clamp_min(LEAST) / 127
    return (vectors / scale).round().to(torch.int8), scale


def _grouped(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
             attention_mask: Tensor | None, scaling: float, **_more) -> tuple[Tensor, None]:
    """softmax(Q K^T scaling) V of (n, heads, T, width), the queries that share keys one below the
    other in one product."""
    count, heads, tokens, width = query.shape
    few = key.shape[1]
    stacked = query.reshape(count, few, -1, width) * scaling
    scores = stacked @ key.transpose(2, 3)
    if attention_mask is not None:
        seen = key.shape[2]
        scores = scores.reshape(count, few, heads // few, tokens, seen) + attention_mask[:, :, None]
        scores = scores.reshape(count, few, -1, seen)
    found = scores.softmax(-1) @ value
    return found.reshape(count, heads, tokens, width).transpose(1, 2), None


def _register() -> None:
    """Let transformers know the attention above, by the name "grouped"."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("grouped", _grouped)
    # float32 (n, 1, T, seen), 0 where a token sees another, once for all layers
    def mask(*given, **named) -> Tensor:
        seen = sdpa_mask(*given, **named | {"allow_is_causal_skip": False})
        return (seen.to(torch.float32) - 1) * -LOWEST

    ALL_MASK_ATTENTION_FUNCTIONS.register("grouped", mask)


def export(decoder: Cached, path: Path | str, *, tolerance: float | None = None) -> Path:
    """Write a decoder with its cache as one ONNX file, for prompts and single tokens alike; return
    its path.

    Inputs: input_ids, attention_mask, asked, past_LAYER_key and past_LAYER_value (with
    past_LAYER_key_scale and so on in int8); outputs: logits, present_LAYER_key and so on. Raises as
    onnx.export does.

    Example: `decoding.export(decoding.Cached(model, bits=8), "decoder.onnx")`
    """
    words = decoder.model.config.vocab_size
    ids = (torch.arange(1, 17) * words // 17).reshape(2, 8)  # of all the vocabulary
    mask, asked = torch.ones_like(ids), torch.tensor([[1, 2], [1, 2]])
    with torch.inference_mode():
        before = decoder(ids[:, :5], mask[:, :5], asked, **decoder.empty(2))
    past = {name.replace("present", "past"): value.clone() for name, value in before.items()
            if name != "logits"}
    example = {"input_ids": ids[:, 5:], "attention_mask": mask, "asked": asked, **past}
    free = ({name: {2: "seen"} for name in past}
            | {"attention_mask": {1: "seen and read"}, "asked": {1: "asked"}})
    return onnx.export(decoder, example, path, dynamic=free, tolerance=tolerance,
                       told={LONGEST: str(decoder.longest)})


@dataclass(frozen=True)
class Generated:
    """What was generated: tokens int64 (n, new), seconds for the prompt and for each token behind
    it, bytes of the cache.

    Example: `Generated(torch.zeros(1, 2), 0.1, (0.01, 0.01), 4096).cache_bytes == 4096`
    """

    tokens: Tensor
    prompt_s: float
    token_s: tuple[float, ...]
    cache_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sentences a second, the first left out, which the prompt gives."""
        return len(self.tokens) * len(self.token_s) / max(sum(self.token_s), 1e-12)


class Decoder:
    """A file of `export`, or a `Cached` module, opened to generate. threads: as sessions.open has
    it. longest: for how many tokens it has positions, and width: of a head, where a file of others
    (optimum, onnxruntime-genai) does not tell.

    Raises ValueError for a file that takes no cache.

    Example: `decoding.Decoder("decoder.onnx").generate(ids, new=20).tokens`
    """

    def __init__(self, source: Cached | Path | str, *, threads: int | None = None,
                 longest: int | None = None, width: int | None = None):
        self.session = cast(sessions.OnnxSession | sessions.TorchSession,
                            sessions.open(source, threads=threads))
        self.name, self.threads, module = (self.session.name, self.session.threads,
                                           getattr(self.session, "model", None))
        self.asks = isinstance(module, Cached) or "asked" in getattr(self.session, "inputs", {})
        if isinstance(module, Cached):
            self.longest, self.shapes = module.longest, {name: (tuple(value.shape[1:]), value.dtype)
                                                         for name, value in
                                                         module.empty(1).items()}
            return
        inputs = getattr(self.session, "inputs", {})
        self.shapes = {name: ((value.shape[1], 0, width or value.shape[3]),
                              torch.int8 if "int8" in value.type else torch.float32)
                       for name, value in inputs.items() if name.startswith("past_")}
        told = self.session.session.get_modelmeta().custom_metadata_map if inputs else {}
        if not self.shapes or not (longest or LONGEST in told):
            raise ValueError(f"{self.name} takes no cache, or does not tell for how many tokens; "
                             "write it by decoding.export(decoding.Cached(model), path), or give "
                             "longest=")
        self.longest = longest or int(told[LONGEST])

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, with those beside it that hold its weights."""
        path = Path(self.session.session._model_path)
        return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))

    def bytes_of(self, count: int, seen: int) -> int:
        """Bytes of the cache of `count` sentences of `seen` tokens, by the formula above."""
        return sum(count * seen * shape[0] * shape[2] * kind.itemsize
                   for shape, kind in self.shapes.values())

    def generate(self, ids: Tensor, *, new: int, mask: Tensor | None = None,
                 cache: bool = True) -> Generated:
        """The most likely tokens behind each prompt, one after the other (greedy).

        ids: int64 (n, T); shorter prompts are filled up at their front, with 0 in `mask` (n, T).
        cache: false reads everything anew for each token.

        Raises ValueError for a prompt of no tokens, no new tokens, or more in all than the model
        has positions for.
        """
        if ids.dim() != 2 or not ids.numel() or new < 1:
            raise ValueError(f"generate: a prompt of shape {tuple(ids.shape)} and {new} new "
                             "tokens; expected (n, T) and at least one token of each")
        if ids.shape[1] + new > self.longest:
            raise ValueError(f"generate: {ids.shape[1]} tokens and {new} new ones are more than "
                             f"the {self.longest} positions that {self.name} knows; shorten the "
                             "prompt")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape or not mask[:, -1].all():
            raise ValueError("generate: the mask must have the shape of the ids, and end in 1: "
                             "fill prompts up at their front")
        start, state, read, made, took = self._empty(len(ids)), None, ids, [], []
        for _ in range(new):
            began = time.perf_counter()
            logits, state = self._run(read, mask, state if cache and state else start)
            took.append(time.perf_counter() - began)
            made.append(logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(made[-1])], 1)
            read = made[-1] if cache else torch.cat([ids, *made], 1)
        return Generated(torch.cat(made, 1), took[0], tuple(took[1:]),
                         self.bytes_of(len(ids), mask.shape[1] - 1))

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What is most likely behind each token of whole sentences, (n, T, vocabulary)."""
        return self._run(input_ids, attention_mask, self._empty(len(input_ids)), every=True)[0]

    def step(self, count: int, *, seen: int, read: int = 1) -> Callable[..., Tensor]:
        """A function that reads `read` tokens of `count` sentences beside a cache of `seen` tokens,
        again and again: to be timed. What it is called with is not looked at.

        Raises ValueError for more tokens than the model has positions for.
        """
        if seen + read > self.longest:
            raise ValueError(f"step: {seen} tokens and {read} more are beyond the {self.longest} "
                             f"positions that {self.name} knows")
        ids, mask = torch.ones(count, read, dtype=torch.int64), torch.ones(count, seen + read,
                                                                           dtype=torch.int64)
        state = self._values({name: torch.ones(count, shape[0], seen, shape[2], dtype=kind)
                              for name, (shape, kind) in self.shapes.items()})
        return lambda *_given, **_named: self._run(ids, mask, state)[0]

    def _empty(self, count: int):
        return self._values({name: torch.zeros(count, *shape, dtype=kind)
                             for name, (shape, kind) in self.shapes.items()})

    def _values(self, cache: dict[str, Tensor]):
        """A cache as the runtime keeps it."""
        if isinstance(self.session, sessions.TorchSession):
            return cache
        from onnxruntime import OrtValue

        return {name: OrtValue.ortvalue_from_numpy(value.numpy()) for name, value in cache.items()}

    def _run(self, ids: Tensor, mask: Tensor, state, *, every: bool = False):
        """Logits, of the last token or of `every` one, and the cache behind these tokens, which
        stays with the runtime."""
        asked = torch.arange(0 if every else ids.shape[1] - 1, ids.shape[1]).expand(len(ids), -1)
        given = ({"input_ids": ids, "attention_mask": mask}
                 | ({"asked": asked.contiguous()} if self.asks else {}))
        if isinstance(self.session, sessions.TorchSession):
            made = self.session.outputs({**given, **state})
            return made.pop("logits"), dict(zip(self.shapes, made.values(), strict=True))
        own, names = self.session.session, self.session.output_names
        made = dict(zip(names, own.run_with_ort_values(names, state | self._values(given)),
                        strict=True))
        return torch.from_numpy(made.pop("logits").numpy()), dict(zip(self.shapes, made.values(),
                                                                      strict=True))
