"""What a model reads and answers: one tensor or several with names, how it is called, which of its
outputs is the answer.

Inputs are a tensor (n, ...), a tuple of tensors, or a mapping of named tensors, each with the n
examples along axis 0. `call` is the only place that knows how a model is called with them, `answer`
the only one that chooses among its outputs.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from workbench.errors import listed

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
# of named outputs, the first of these is the answer
ANSWERS = ("logits", "last_hidden_state", "output")


class Batch(NamedTuple):
    """Examples and what is right for them. inputs: see above, or what a task stores; targets: the
    objective's, or None.

    Example: `Batch(torch.ones(2, 3), torch.tensor([0, 1])).targets`
    """

    inputs: Inputs
    targets: Tensor | None = None


def pairs(batches: Iterable) -> Iterator[Batch]:
    """Batches of inputs and targets, one after the other, as methods take them.

    Raises TypeError for the inputs alone, a tensor or names, or a whole split in their place.

    Example: `[inputs.shape for inputs, _ in pairs([(torch.ones(2, 3), None)])] == [(2, 3)]`
    """
    wanted = ("give several of inputs and targets, such as "
              "task.validation.subset(500).batches(50), or [(inputs, None)]")
    if isinstance(batches, Tensor | Mapping):
        raise TypeError("batches: found "
                        f"{'one tensor' if isinstance(batches, Tensor) else 'named tensors'}; "
                        f"{wanted}")
    if hasattr(batches, "batches"):
        raise TypeError(f"batches: found a whole {type(batches).__name__}; {wanted}")
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) > 2:
            raise TypeError(f"batches: found {type(batch).__name__} in the place of a batch; "
                            f"{wanted}")
        yield Batch(*batch)


def call(model: Callable, inputs: Inputs):
    """The outputs of `model` as it gives them: a mapping goes in by name, a tuple by place.

    Raises ValueError where the weights are of another type, or on another device, than the inputs;
    else what the model raises.

    Example: `call(torch.add, (torch.ones(2), torch.ones(2)))`
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    except RuntimeError as error:
        _refuse_other_kind(model, inputs, error)
        raise


def _refuse_other_kind(model: Callable, inputs: Inputs, error: Exception) -> None:
    """Raise ValueError where that may be why the model failed: its weights and its inputs differ in
    device or type."""
    weights = (next((p for p in model.parameters() if p.is_floating_point()), None)
               if isinstance(model, nn.Module) else None)
    for value in tensors(inputs) if weights is not None else ():
        if weights.device != value.device:
            raise ValueError(f"the model's weights are on {weights.device}, its inputs on "
                             f"{value.device}; use model.to({str(value.device)!r})") from error
        if weights.dtype != value.dtype and value.is_floating_point():
            way = "give inputs.float()" if value.dtype == torch.float64 else (
                f"use model.to({value.dtype})")
            raise ValueError(f"the model's weights are {weights.dtype}, its inputs {value.dtype}; "
                             f"{way}") from error


def answer(outputs, name: str | None = None) -> Tensor:
    """The tensor that counts among a model's outputs: the one called `name`, else its logits, else
    the first.

    outputs: a tensor, a tuple or list, or a mapping (a Hugging Face ModelOutput is one). Raises
    ValueError where there is no such output, TypeError where it is no tensor.

    Example: `answer({"logits": torch.ones(2, 3), "states": torch.ones(2, 4)}).shape == (2, 3)`
    """
    found = outputs
    if isinstance(outputs, Mapping):
        if name is not None and name not in outputs:
            raise ValueError(f"the model has no output {name!r}; it has {listed(outputs)}")
        first = next((key for key in (*ANSWERS, *outputs) if key in outputs), None)
        found = outputs.get(name or first)
    elif isinstance(outputs, tuple | list):
        found = answer(outputs[0]) if outputs else None
    if not isinstance(found, Tensor):
        raise TypeError(f"the model's answer is {type(found).__name__}, expected a tensor, a tuple "
                        "of tensors or named tensors; name one with Objective(output=...)")
    return found


def outputs_by_name(outputs) -> dict[str, Tensor]:
    """All tensors among a model's outputs: by their own names, "output" for a single one,
    "output_0", ... for a tuple.

    Example: `outputs_by_name({"logits": torch.ones(2, 3)}).keys() == {"logits"}`
    """
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if not isinstance(outputs, Mapping):
        outputs = {f"output_{place}": value for place, value in enumerate(outputs)}
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def count(inputs: Inputs) -> int:
    """How many examples there are.

    Example: `count({"input_ids": torch.ones(5, 7)}) == 5`
    """
    return len(next(iter(tensors(inputs))))


def tensors(inputs: Inputs) -> Sequence[Tensor]:
    """The tensors of inputs, in their order.

    Example: `len(tensors((torch.ones(2), torch.zeros(2)))) == 2`
    """
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple) else [inputs]


def mapped(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`change` of each tensor.

    Example: `mapped(torch.Tensor.float, {"a": torch.ones(2).half()})["a"].dtype == torch.float32`
    """
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return tuple(map(change, inputs)) if isinstance(inputs, tuple) else change(inputs)


def rows(inputs: Inputs, places) -> Inputs:
    """The examples at `places`, a slice or int64 tensor.

    Example: `rows({"a": torch.arange(4)}, slice(2))["a"].tolist() == [0, 1]`
    """
    return mapped(lambda value: value[places], inputs)


def repeated(inputs: Inputs, size: int) -> Inputs:
    """`size` examples: the first ones, from the start again where there are fewer.

    Example: `repeated(torch.ones(1, 3), 5).shape == (5, 3)`
    """
    return rows(inputs, torch.arange(size) % count(inputs))


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Batches one behind the other; where lengths along axis 1 differ, the shorter end in zeros.

    Example: `joined([torch.ones(1, 3), torch.ones(2, 3)]).shape == (3, 3)`
    """
    def one(values: Sequence[Tensor]) -> Tensor:
        if values[0].dim() > 1 and len({value.shape[1] for value in values}) > 1:
            return rnn.pad_sequence([row for value in values for row in value], batch_first=True)
        return torch.cat(list(values))

    first = parts[0]
    if isinstance(first, Mapping):
        return {name: one([part[name] for part in cast(Sequence[Mapping[str, Tensor]], parts)])
                for name in first}
    return tuple(map(one, zip(*parts, strict=True))) if isinstance(first, tuple) else one(parts)


def named(model: Callable, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs by the names that the model's forward gives them.

    Raises ValueError for a name that it does not have, or where there are more inputs than it
    takes.

    Example: `named(torch.nn.Linear(2, 2), torch.ones(1, 2)).keys() == {"input"}`
    """
    function = model.forward if isinstance(model, nn.Module) else model
    parameters = inspect.signature(function).parameters
    known = [name for name, p in parameters.items()
             if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    open_ended = not known or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if isinstance(inputs, Mapping):
        keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        odd = [name for name in inputs if name not in known and not open_ended
               and not (keywords and is_cache(name))]
        if odd:
            raise ValueError(f"{type(model).__name__} has no input {odd[0]!r}; it takes "
                             f"{listed(known)}")
        return dict(inputs)
    values = tensors(inputs)
    if len(values) > len(known) and not open_ended:
        raise ValueError(f"{type(model).__name__} takes {len(known)} inputs ({listed(known)}), "
                         f"found {len(values)}")
    known += [f"input_{place}" for place in range(len(known), len(values))]
    return dict(zip(known, values, strict=False))


def is_cache(name: str) -> bool:
    """Whether an input of this name holds what a model has read before: `past_...`, as in
    transformers.

    Example: `is_cache("past_0_key")`
    """
    return name.startswith("past_")


def check(inputs: Inputs) -> None:
    """Raise ValueError where inputs are not as many, or a mask has another shape than the tokens
    that it is for. Beside a cache it is longer, by what was read before.

    Example: `check({"input_ids": torch.ones(2, 7).long(), "attention_mask": torch.ones(2,
    7).long()})`
    """
    sizes = {len(value) for value in tensors(inputs)}
    if len(sizes) > 1:
        raise ValueError(f"the inputs have {', '.join(map(str, sorted(sizes)))} examples; expected "
                         "as many of each")
    if isinstance(inputs, Mapping) and "input_ids" in inputs and not any(map(is_cache, inputs)):
        for name, value in inputs.items():
            if (name.endswith("mask") and value.dim() == 2
                and value.shape != inputs["input_ids"].shape):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, input_ids "
                                 f"{tuple(inputs['input_ids'].shape)}; expected the same")


def axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Which axes may have any length, by input: the first ("batch"), and the second of token ids
    and masks ("sequence").

    Example: `axes({"input_ids": torch.ones(2, 7, dtype=torch.int64)}) == {"input_ids": {0: "batch",
    1: "sequence"}}`
    """
    words = any(value.dim() == 2 and not value.is_floating_point() for value in inputs.values())
    return {name: {0: "batch"} | ({1: "sequence"} if words and value.dim() == 2 else {})
            for name, value in inputs.items()}
