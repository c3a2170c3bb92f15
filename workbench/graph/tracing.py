"""One tracer: any model as a graph of its layers, to be asked questions and run node by node.

torch.export records what the model computes on an example. Where an operator is that of a layer
with weights (convolution, linear, norm, embedding), its node is put back as a call of that layer,
by its name; all else stays an ATen operator in its functional form. So `node.op` is "call_module"
for layers, "call_function" with a `torch.ops.aten` target for the rest, "get_attr" for other
parameters and buffers. Each node's meta holds the shape (None for a length that may vary) and the
dtype of its value.
"""

import copy
import re
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from workbench.batches import Inputs, axes, call, named, outputs_by_name, repeated, tensors
from workbench.errors import UnsupportedModelError, quietly, reason
from workbench.graph.layers import evaluating

aten = torch.ops.aten
# operator: the class of layer that it computes, and the place of the weight among its arguments
LAYERS = {
    aten.conv1d.default: (nn.Conv1d, 1), aten.conv1d.padding: (nn.Conv1d, 1),
    aten.conv2d.default: (nn.Conv2d, 1), aten.conv2d.padding: (nn.Conv2d, 1),
    aten.conv3d.default: (nn.Conv3d, 1), aten.conv_transpose2d.input: (nn.ConvTranspose2d, 1),
    aten.linear.default: (nn.Linear, 1), aten.embedding.default: (nn.Embedding, 0),
    aten.batch_norm.default: (nn.modules.batchnorm._BatchNorm, 1),
    aten.layer_norm.default: (nn.LayerNorm, 2), aten.group_norm.default: (nn.GroupNorm, 2),
}
# how each is written to
SLICES = {aten.slice.Tensor: aten.slice_scatter.default,
          aten.select.int: aten.select_scatter.default}
# model: (what it was traced as, the graph)
_TRACED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def trace(model: nn.Module, example: Inputs) -> fx.GraphModule:
    """The graph of `model` as it computes in eval mode; its layers are the model's own, and so are
    their names and modes.

    example: inputs with at least one example; the graph takes any number of them, and any length of
    token sequences. What was traced is remembered as long as the model lives unchanged. A graph
    from here is returned as it is.

    Raises UnsupportedModelError where the model cannot be traced (a branch on values, an operator
    that torch.export does not know), ValueError for inputs that the model does not take.

    Example: `[n.target for n in trace(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(1,
    2)).graph.nodes][1] == "0"`
    """
    if isinstance(model, fx.GraphModule):
        return model
    inputs = named(model, example)
    state = _state(model, inputs)
    if model in _TRACED and _TRACED[model][0] == state:
        return _TRACED[model][1]
    graph = _traced(model, example, inputs)
    _TRACED[model] = state, graph
    return graph


def _state(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple:
    """What a remembered graph depends on."""
    modules = tuple((name, id(module), type(module)) for name, module in model.named_modules())
    tensors_of = tuple((name, id(value), value.shape)
                       for kind in (model.named_parameters, model.named_buffers)
                       for name, value in kind(remove_duplicate=False))
    dynamic = axes(inputs)
    read = tuple((name, value.dtype,
                  tuple(None if k in dynamic[name] else size for k, size in enumerate(value.shape)))
                 for name, value in inputs.items())
    return modules, tensors_of, read


def _traced(model: nn.Module, example: Inputs, inputs: Mapping[str, Tensor]) -> fx.GraphModule:
    probe = repeated(example, 2)  # a batch of one would be taken for a batch that is always one
    dynamic = {name: dict.fromkeys(places, torch.export.Dim.AUTO)
               for name, places in axes(inputs).items()}
    args, kwargs = ((), dict(probe)) if isinstance(probe, Mapping) else (tuple(tensors(probe)),
                                                                         None)
    shapes = dynamic if kwargs else tuple(dynamic.values())
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad():
            # what is wrong with the example itself is the caller's to know
            wanted = call(model, probe)
    except Exception as error:  # the model's own code, which may raise anything
        raise UnsupportedModelError(f"{type(model).__name__} does not run on the example "
                                    f"({reason(error)})") from error
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad(), quietly():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    # torch.export runs the model's own code, and has many kinds of its own
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be traced ({reason(error)}); "
                                    "write its forward without branches on values") from error
    fixed = [node.name for node in program.graph.nodes
             if node.name in program.graph_signature.user_inputs
             and is_concrete_int(node.meta["val"].shape[0])]
    if fixed:
        raise UnsupportedModelError(f"{type(model).__name__} fixes the number of examples of "
                                    f"{fixed[0]!r}; write its forward for any, with x.shape[0] "
                                    "instead of len(x)")
    graph = _Rebuilt(model, program).module()
    _compare(model, wanted, graph, probe)
    return graph


def _compare(model: nn.Module, wanted, graph: fx.GraphModule, probe: Inputs) -> None:
    """Raise UnsupportedModelError where the graph does not answer as the model did."""
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad():
            found = outputs_by_name(graph(*tensors(probe)))
    except Exception as error:  # of any operator in the graph
        raise UnsupportedModelError(f"{type(model).__name__}: its traced graph does not run "
                                    f"({reason(error)}); write its forward without changing a "
                                    "slice or view in place") from error
    for name, value in outputs_by_name(wanted).items():
        if name in found and not _agree(found[name], value):
            raise UnsupportedModelError(f"{type(model).__name__}: its traced graph answers "
                                        f"otherwise than the model does (in {name}); write its "
                                        "forward without changing a slice or view in place, and "
                                        "without chance in eval mode")


def _agree(found: Tensor, wanted: Tensor) -> bool:
    scale = (wanted.abs().nan_to_num(0.0, 0.0).max().item() if wanted.is_floating_point()
             and wanted.numel() else 0.0)
    same = (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    return same and torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


class _Rebuilt:
    """The exported program as a graph of the model's own layers."""

    def __init__(self, model: nn.Module, program):
        self.model, self.program, self.graph = model, program, fx.Graph()
        signature, renamed = program.graph_signature, _inlined(program.graph_module)
        self.attributes = {**signature.inputs_to_parameters, **signature.inputs_to_buffers,
                           **signature.inputs_to_lifted_tensor_constants}
        self.inputs = set(signature.user_inputs)
        self.root: dict[str, object] = {}  # what the graph refers to, by name
        self.new: dict[fx.Node, object] = {}
        self.outputs = [renamed.get(name, name) for name in signature.user_outputs]

    def module(self) -> fx.GraphModule:
        """The graph, its dead ends gone."""
        for node in self.program.graph.nodes:
            self._put(node)
        by_name = {node.name: new for node, new in self.new.items()}
        flat = [by_name.get(value, value) for value in self.outputs]
        outputs = pytree.tree_unflatten(flat, self.program.call_spec.out_spec)
        self.graph.output(_plain_outputs(outputs))
        graph = fx.GraphModule(_holding(self.root), self.graph, type(self.model).__name__)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        if hasattr(self.model, "origin"):
            graph.origin = self.model.origin
        return graph

    def _put(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.name in self.inputs:
                self.new[node] = self._described(self.graph.placeholder(node.target), node)
            return  # parameters and buffers are fetched where they are used
        if node.op != "call_function" or "_assert" in str(node.target):
            return
        if node.target is aten.dropout.default and not node.args[2]:  # nothing, in eval mode
            self.new[node] = self._value(node.args[0])
            return
        layer = self._layer(node)
        if layer:
            name, module, source = layer
            self.root[name] = module
            made = self.graph.call_module(name, (self._value(source),))
        else:
            target, args = node.target, fx.node.map_arg(node.args, self._value)
            kwargs = fx.node.map_arg(node.kwargs, self._value)
            made = self.graph.create_node("call_function", _functional(target), args, kwargs,
                                          name=node.name)
            if _functional(target) is not target:
                self._changed(node.args[0], made)
        self.new[node] = self._described(made, node)

    def _changed(self, node: fx.Node, made: fx.Node) -> None:
        """Whoever reads `node` later reads `made`; so does whoever reads a value of which it is a
        slice, or the same one."""
        self.new[node] = made
        source = node.args[0] if node.op == "call_function" else None
        if node.target in SLICES:
            args = (self._value(source), made, *fx.node.map_arg(node.args[1:], self._value))
            self._changed(source,
                          self._described(self.graph.call_function(SLICES[node.target], args),
                                          source))
        elif source is not None and _functional(node.target) is not node.target:
            self._changed(source, made)

    def _value(self, node: fx.Node):
        if node not in self.new:
            if node.target not in self.attributes:
                raise UnsupportedModelError(f"{type(self.model).__name__} has a branch or loop "
                                            f"within its graph ({node.target}); write its forward "
                                            "without torch.cond, map or while_loop")
            name = self.attributes[node.target]
            value = self.program.state_dict.get(name, self.program.constants.get(name))
            self.root[name] = _own(self.model, name, value)
            self.new[node] = self._described(self.graph.get_attr(name), node)
        return self.new[node]

    def _layer(self, node: fx.Node) -> tuple[str, nn.Module, fx.Node] | None:
        """Name and module of the layer that the operator computes, and what it reads; None where it
        is not a layer's."""
        if node.target not in LAYERS:
            return None
        kind, place = LAYERS[node.target]
        stack = node.meta.get("nn_module_stack")
        name = re.sub(r"@\d+", "", next(reversed(stack.values()))[0]) if stack else ""
        module = self.model.get_submodule(name) if name else None
        weight = node.args[place] if len(node.args) > place else None
        if (not isinstance(module, kind)
            or (isinstance(weight, fx.Node) and weight.target not in self.attributes)):
            return None  # the operator of a function, or of a layer that computes its weight first
        if (isinstance(weight, fx.Node)
            and not _is_of(self.model, self.attributes[weight.target], module)):
            return None
        return name, plain(module), node.args[1 if kind is nn.Embedding else 0]

    def _described(self, made: fx.Node, node: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            made.meta = {"shape": tuple(size if isinstance(size, int) else None
                                        for size in value.shape), "dtype": value.dtype}
        return made


def _inlined(program: fx.GraphModule) -> dict[str, str]:
    """Put what a forward does within `torch.autocast` or `torch.no_grad` into the program itself,
    where torch.export has made it a graph of its own. Returns the new names of the values that came
    out of those."""
    renamed = {}
    for node in list(program.graph.nodes):
        if not str(node.target).startswith("wrap_with_"):
            continue
        if "autocast" in str(node.target) and node.args[2]:
            raise UnsupportedModelError("its forward turns autocast on for a part of it; leave "
                                        "that to whoever calls the model")
        place = next(k for k, arg in enumerate(node.args) if isinstance(arg, fx.Node)
                     and arg.op == "get_attr")
        inner = program.get_submodule(node.args[place].target).graph
        given = dict(zip(inner.find_nodes(op="placeholder"), node.args[place + 1:], strict=True))
        with program.graph.inserting_before(node):
            made = program.graph.graph_copy(inner, given)
        for user in list(node.users):  # each takes one of the values
            value = made[user.args[1]] if isinstance(made, tuple | list) else made
            renamed[user.name] = value.name
            user.replace_all_uses_with(value)
            program.graph.erase_node(user)
        program.graph.erase_node(node)
    return renamed


def _holding(values: Mapping[str, object]) -> nn.Module:
    """A module that holds layers and tensors at their dotted names."""
    root = nn.Module()
    for name, value in values.items():
        *path, key = name.split(".")
        holder = root
        for part in path:
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        if isinstance(value, nn.Module):
            holder.add_module(key, value)
        elif isinstance(value, nn.Parameter):
            holder.register_parameter(key, value)
        elif not hasattr(holder, key):
            holder.register_buffer(key, value)
    return root


def plain(module: nn.Module) -> nn.Module:
    """The layer as torch's own class, on the same tensors, where a library's subclass does more
    around it, or where it pads by reflection, say, which is a node of its own.

    Example: `plain(nn.Linear(3, 2))`
    """
    base = next((kind for kind, _ in LAYERS.values() if isinstance(module, kind)), type(module))
    base = next((c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules")
                 and issubclass(c, base)), base)
    padded = getattr(module, "padding_mode", "zeros") != "zeros"
    if type(module).forward is base.forward and not padded:
        return module
    twin = copy.copy(module)
    twin.__class__ = base
    twin._modules, twin._parameters, twin._buffers = ({}, dict(module._parameters),
                                                      dict(module._buffers))
    if padded:
        twin.padding_mode, twin.padding = "zeros", (0,) * len(module.kernel_size)
        twin._reversed_padding_repeated_twice = [0, 0] * len(module.kernel_size)
    return twin


def _is_of(model: nn.Module, name: str, module: nn.Module) -> bool:
    holder, _, key = name.rpartition(".")
    own = getattr(model.get_submodule(holder), key, None)
    return any(value is own for value in module._parameters.values()) if own is not None else False


def _own(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """The model's own tensor, so that the graph learns and moves with it; a constant of the trace
    as it is."""
    holder, _, key = name.rpartition(".")
    try:
        return getattr(model.get_submodule(holder), key)
    except AttributeError:
        return value


def _functional(target):
    """The operator that returns a new value, for one that works in place."""
    name, overload = getattr(target, "_opname", ""), getattr(target, "_overloadname", "default")
    if not name.endswith("_") or name.endswith("__") or target.namespace != "aten":
        return target
    return getattr(getattr(aten, name.rstrip("_"), None), overload, target)


def _plain_outputs(outputs):
    """Named outputs as a plain dictionary, so that the graph does not depend on the class that held
    them."""
    if isinstance(outputs, Mapping):
        return {name: value for name, value in outputs.items() if isinstance(value, fx.Node)}
    return outputs
