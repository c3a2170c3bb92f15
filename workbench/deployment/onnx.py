"""Export to ONNX with every axis named that may have any length; a quantised model with its own
integers and scales.

Source: torch.onnx.export (the torch.export based exporter), which folds each batch norm into its
convolution and writes each fake quantisation as QuantizeLinear and DequantizeLinear.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from workbench import files
from workbench.batches import (
    Inputs,
    axes,
    call,
    is_cache,
    mapped,
    named,
    outputs_by_name,
    repeated,
    tensors,
)
from workbench.deployment import capture, sessions, surgery
from workbench.deployment.attention import attention
from workbench.errors import UnsupportedModelError, quietly, reason
from workbench.graph.layers import named as named_layers
from workbench.numbers.quantizers import ActivationQuantizer, WeightQuantizer

# largest relative L2 distance between torch and the export, per example; more where float32 itself
# is coarser
TOLERANCE = 1e-3
# the same where something rounds in floats, and a value between two integers may go either way
QUANTISED_TOLERANCE = 0.2


def export(model: nn.Module, example: Inputs, path: Path | str, *,
           dynamic: Mapping[str, Mapping[int, str]] | None = None, tolerance: float | None = None,
           told: Mapping[str, str] | None = None) -> Path:
    """Write `model` as an ONNX file; return its path.

    example: inputs of the model; the file takes any number of examples, and token ids and masks of
    any length. Its inputs have the names of forward's parameters (or of the mapping), its outputs
    their own, "logits" for a single one. dynamic: further axes that may have any length, by input:
    {"mels": {2: "frames"}}. tolerance: the largest relative L2 distance between the file's outputs
    and the model's, per example; by default 1e-3, or four times what rounding to float32 changes in
    this model where that is more; for a quantised model 0.2. told: what else the file says of
    itself, its metadata.

    The file is written once onnx.checker accepts it and batches of 1 and 7 (the example, repeated
    with noise) run on ONNX Runtime to all of torch's outputs; otherwise nothing is. The weights of
    a model of quantization.quantize are stored as int8, those of 4 bits or fewer as int4, which the
    runtime unpacks when it opens the file, its biases as int32, its scales as they are; those of a
    linear layer with 4 or 8 bits by groups of 16, 32, 64, ... inputs are computed with as such
    (ONNX Runtime's MatMulNBits, which also rounds what it multiplies them with to 8 bits, by
    groups). Where only some layers are quantised, ONNX Runtime would round the float weights of the
    others itself, coarsely, and say nothing: the file tells `sessions.open` to leave them, and
    anyone else opens it with InferenceSession(path,
    disabled_optimizers=["WeightBiasQuantization"]).

    Raises UnsupportedModelError where the model cannot be exported or the export computes something
    else, ValueError for axes of an input that it lacks.

    Example: `onnx.export(model, task.example, "resnet20.onnx")`
    """
    path, session = Path(path), sessions.open(model)
    if not isinstance(session, sessions.TorchSession):
        raise TypeError(f"{session.name} is no torch module; only those can be exported")
    parts = [module for module in session.model.modules()
             if isinstance(module, ActivationQuantizer | WeightQuantizer)]
    whole, packed = (copy.deepcopy(session.model) if parts else session.model), {}
    if parts:
        packed = _freeze(whole)
    inputs = named(session.model, example)
    odd = [name for name in dynamic or {} if name not in inputs]
    if odd:
        raise ValueError(f"dynamic names the input {odd[0]!r}, which {session.name} lacks; it has "
                         f"{', '.join(inputs)}")
    places = {name: axes(inputs)[name] | dict((dynamic or {}).get(name, {})) for name in inputs}
    probe = _probe(example)
    allowed = tolerance if tolerance is not None else QUANTISED_TOLERANCE if parts else TOLERANCE
    try:
        with quietly():
            program = _exported(whole, repeated(probe, 2), list(inputs), places,
                                _outputs(session.model, probe))
        proto = ir.to_proto(surgery.finish(program.model, packed, quantised=bool(parts)))
        del proto.graph.value_info[:]  # the exporter's own shapes are wrong behind shared weights
        _name_axes(proto, places)
        if (parts
            and any(not parametrize.is_parametrized(layer, "weight")
                    for layer in named_layers(whole).values())):
            told = {sessions.DISABLED: "WeightBiasQuantization"} | dict(told or {})
        onnx.helper.set_model_props(proto, dict(told or {}))
        onnx.checker.check_model(proto, full_check=True)
    except UnsupportedModelError:
        raise
    except Exception as error:  # the exporter raises a dozen kinds, all of them about this model
        own = (error.__cause__ if isinstance(error, torch.onnx.OnnxExporterError)
               and error.__cause__ else error)
        raise UnsupportedModelError(f"{session.name} cannot be exported to ONNX: "
                                    f"{reason(own)}") from error
    with files.atomic(path) as new:
        onnx.save(proto, new)
        exported = sessions.open(new)
        for size in (1, 7):
            _same(session, exported, repeated(probe, size), f"{path} at batch {size}", allowed,
                  fixed=bool(parts) or tolerance is not None)
    return path


def _exported(model: nn.Module, example: Inputs, names: list[str], places: Mapping,
              outputs: list[str]):
    """The exporter's program, the axes of `places` free where the model lets them. Raises
    ValueError where it fixes the batch."""
    args, kwargs = ((), dict(example)) if isinstance(example,
                                                     Mapping) else (tuple(tensors(example)), None)
    if isinstance(model, fx.GraphModule) and kwargs:
        kwargs = {name: kwargs[name] for name in _order(model)}
    shapes = {name: dict.fromkeys(places[name], torch.export.Dim.AUTO) for name in kwargs or names}
    free = shapes if kwargs else tuple(shapes.values())
    plain = capture.captured(model, args, kwargs, free)
    translations = ({torch.ops.aten.scaled_dot_product_attention.default: attention}
                    | (capture.TRANSLATIONS if plain else {}))
    with capture.remembered_operators(), capture.as_typed(plain):
        program = torch.onnx.export(plain or model, args, kwargs=kwargs, dynamo=True,
                                    input_names=list(shapes), verbose=False, output_names=outputs,
                                    dynamic_shapes=free, custom_translation_table=translations)
    fixed = [value.name for value in program.model.graph.inputs if isinstance(value.shape[0], int)]
    if fixed:
        raise ValueError(f"its forward fixes the number of examples of {fixed[0]!r}; write it for "
                         "any batch")
    return program


def _order(graph: fx.GraphModule) -> list[str]:
    return [node.target for node in graph.graph.nodes if node.op == "placeholder"]


def _outputs(model: nn.Module, probe: Inputs) -> list[str]:
    """What the model's outputs are called."""
    with torch.inference_mode():
        made = outputs_by_name(call(model, repeated(probe, 1)))
    return ["logits"] if list(made) == ["output"] else list(made)


def _probe(example: Inputs) -> Inputs:
    """Seven examples: those given, again and again, numbers with noise; ids, masks and a cache,
    which belongs to them, as they are."""
    draw = torch.Generator().manual_seed(0)

    def one(value: Tensor) -> Tensor:
        return (value + 0.1 * torch.randn(value.shape, generator=draw) if value.is_floating_point()
                else value)

    seven = repeated(example, 7)
    if isinstance(seven, Mapping):
        return {name: value if is_cache(name) else one(value) for name, value in seven.items()}
    return mapped(one, seven)


def _name_axes(proto: onnx.ModelProto, places: Mapping[str, Mapping[int, str]]) -> None:
    """Call the free axes of inputs, and of outputs that share them, by their names."""
    new = {}
    for value in proto.graph.input:
        for place, size in enumerate(value.type.tensor_type.shape.dim):
            if size.dim_param and place in places.get(value.name, {}):
                new[size.dim_param] = places[value.name][place]
    for value in (*proto.graph.input, *proto.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in new:
                size.dim_param = new[size.dim_param]


def _same(session: sessions.TorchSession, exported: sessions.Session, batch: Inputs, where: str,
          allowed: float, *, fixed: bool) -> None:
    """Raise UnsupportedModelError where an output of the file is further than `allowed` from the
    module's; unless that is `fixed`, more where float32 itself is coarser."""
    found = exported.outputs(batch if isinstance(batch, Tensor) else named(session.model, batch))
    expected = session.outputs(batch)
    session.answered(expected, batch)  # which raises where there is no answer for each example
    for (name, wanted), made in zip(expected.items(), found.values(), strict=True):
        place, limit = where + (f", output {name}," if len(found) > 1 else ""), allowed
        distance = _distance(wanted, made, place)
        if distance > limit and not fixed:
            if _distance(wanted, session.outputs(batch)[name], place) > limit:
                raise UnsupportedModelError(f"{place} cannot be compared: the model itself puts "
                                            "out something else each time; take out what it draws")
            limit = max(limit, 4 * _rounding(session, batch, name))
        if distance > limit:
            raise UnsupportedModelError(f"{place} puts out something else than the model: relative "
                                        f"L2 distance {distance:.3g}, at most {limit:.3g} allowed; "
                                        "allow more by tolerance=, then equivalence.by_layer shows "
                                        "where they part")


def _distance(expected: Tensor, found: Tensor, where: str) -> float:
    """The relative L2 distance of the example whose outputs differ most; infinite where one is no
    number."""
    if expected.shape != found.shape:
        raise UnsupportedModelError(f"{where} puts out {tuple(found.shape)}, the model "
                                    f"{tuple(expected.shape)}")
    wanted, made = (value.double().reshape(len(value) if value.dim() else 1, -1)
                    for value in (expected, found))
    apart = torch.where(wanted == made, 0.0, wanted - made)  # both may be infinite
    distance = (apart.norm(dim=1)
                / wanted.nan_to_num(posinf=0, neginf=0).norm(dim=1).clamp_min(1e-12))
    return distance.nan_to_num(float("inf")).max().item()


def _rounding(session: sessions.TorchSession, batch: Inputs, name: str) -> float:
    """How far an output of the module is from the same in double precision; 0 where it cannot
    compute so."""
    double = mapped(lambda value: value.double() if value.is_floating_point() else value, batch)
    try:
        with torch.inference_mode():
            exact = outputs_by_name(call(copy.deepcopy(session.model).double(), double))[name]
    # of the model's own code, which may ask for float32
    except (RuntimeError, TypeError, ValueError):
        return 0.0
    return _distance(exact, session.outputs(batch)[name], session.name)


def _freeze(model: nn.Module) -> dict[str, surgery.Grouped]:
    """Let quantisers stand for ONNX's operators; what the kernel of groups wants of linear layers
    that have one, by name."""
    packed = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, ActivationQuantizer):
            module.freeze()
        elif parametrize.is_parametrized(module, "weight"):
            quantizer, source = (module.parametrizations.weight[0],
                                 module.parametrizations.weight.original)
            scheme = quantizer.scheme
            if (isinstance(module, nn.Linear) and scheme.granularity == "group"
                    and scheme.group in surgery.BLOCKS and scheme.bits in (4, 8)
                    and scheme.levels != "kmeans"):
                zero = None if scheme.symmetric else quantizer.zero
                packed[name] = (quantizer.integers(source), quantizer.scale.detach(), zero,
                                scheme.bits)
                plain = nn.Linear(module.in_features, module.out_features,
                                  bias=module.bias is not None)
                plain.load_state_dict({key: value
                                       for key, value in (("weight", module.weight),
                                                          ("bias", module.bias))
                                       if value is not None})
                # a parametrisation cannot be taken off a copy alone
                model.set_submodule(name, plain)
            else:
                quantizer.freeze(source)
    return packed
