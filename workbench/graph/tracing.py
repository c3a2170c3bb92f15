"""One tracer: any model as a graph of its layers, to be asked questions and run node by node.

torch.export records what the model computes on an example. Where an operator is that of a layer with weights (convolution,
linear, norm, embedding), its node is put back as a call of that layer, by its name; all else stays an ATen operator in its
functional form. So `node.op` is "call_module" for layers, "call_function" with a `torch.ops.aten` target for the rest,
"get_attr" for other parameters and buffers. Each node's meta holds the shape (None for a length that may vary) and the
dtype of its value.
"""

import copy
import operator
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from workbench.batches import Inputs, answer, axes, call, named, repeated, tensors
from workbench.errors import UnsupportedModelError, reason
from workbench.graph.layers import evaluating

aten = torch.ops.aten
LAYERS = {  # operator: the class of layer that it computes, and the place of the weight among its arguments
    aten.conv1d.default: (nn.Conv1d, 1), aten.conv1d.padding: (nn.Conv1d, 1),
    aten.conv2d.default: (nn.Conv2d, 1), aten.conv2d.padding: (nn.Conv2d, 1),
    aten.conv3d.default: (nn.Conv3d, 1), aten.conv_transpose2d.input: (nn.ConvTranspose2d, 1),
    aten.linear.default: (nn.Linear, 1), aten.embedding.default: (nn.Embedding, 0),
    aten.batch_norm.default: (nn.modules.batchnorm._BatchNorm, 1),
    aten.layer_norm.default: (nn.LayerNorm, 2), aten.group_norm.default: (nn.GroupNorm, 2),
}
IN_PLACE = {aten.relu.default: aten.relu_.default, aten.add.Tensor: aten.add_.Tensor}
_TRACED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model: (what it was traced as, the graph)


def trace(model: nn.Module, example: Inputs) -> fx.GraphModule:
    """The graph of `model` as it computes in eval mode; its layers are the model's own, and so are their names and modes.

    example: inputs with at least one example; the graph takes any number of them, and any length of token sequences. What was
    traced is remembered as long as the model lives unchanged. A graph from here is returned as it is.

    Raises UnsupportedModelError where the model cannot be traced (a branch on values, an operator that torch.export does
    not know), ValueError for inputs that the model does not take.

    Example: `[n.target for n in trace(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(1, 2)).graph.nodes][1] == "0"`
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
    tensors_of = tuple((name, id(value), value.shape) for kind in (model.named_parameters, model.named_buffers)
                       for name, value in kind(remove_duplicate=False))
    dynamic = axes(inputs)
    read = tuple((name, value.dtype, tuple(None if k in dynamic[name] else size for k, size in enumerate(value.shape)))
                 for name, value in inputs.items())
    return modules, tensors_of, read


def _traced(model: nn.Module, example: Inputs, inputs: Mapping[str, Tensor]) -> fx.GraphModule:
    probe = repeated(example, 2)  # a batch of one would be taken for a batch that is always one
    dynamic = {name: dict.fromkeys(places, torch.export.Dim.AUTO) for name, places in axes(inputs).items()}
    args, kwargs = ((), dict(probe)) if isinstance(probe, Mapping) else (tuple(tensors(probe)), None)
    shapes = dynamic if kwargs else tuple(dynamic.values())
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad():
            call(model, probe)  # what is wrong with the example itself is the caller's to know
    except Exception as error:  # the model's own code, which may raise anything
        raise UnsupportedModelError(f"{type(model).__name__} does not run on the example ({reason(error)})") from error
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export runs the model's own code, and has many kinds of its own
        raise UnsupportedModelError(f"{type(model).__name__} cannot be traced ({reason(error)}); write its forward without "
                                    "branches on values") from error
    return _Rebuilt(model, program).module()


class _Rebuilt:
    """The exported program as a graph of the model's own layers."""

    def __init__(self, model: nn.Module, program):
        self.model, self.program, self.graph = model, program, fx.Graph()
        signature = program.graph_signature
        self.attributes = {**signature.inputs_to_parameters, **signature.inputs_to_buffers,
                           **signature.inputs_to_lifted_tensor_constants}
        self.inputs = set(signature.user_inputs)
        self.root: dict[str, object] = {}  # what the graph refers to, by name
        self.new: dict[fx.Node, object] = {}
        self.outputs = list(signature.user_outputs)

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
            made = self.graph.create_node("call_function", _functional(target), args, kwargs, name=node.name)
            if _functional(target) is not target:  # whoever reads the changed value later reads the result
                self.new[node.args[0]] = made
        self.new[node] = self._described(made, node)

    def _value(self, node: fx.Node):
        if node not in self.new:
            name = self.attributes[node.target]
            value = self.program.state_dict.get(name, self.program.constants.get(name))
            self.root[name] = _own(self.model, name, value)
            self.new[node] = self._described(self.graph.get_attr(name), node)
        return self.new[node]

    def _layer(self, node: fx.Node) -> tuple[str, nn.Module, fx.Node] | None:
        """Name and module of the layer that the operator computes, and what it reads; None where it is not a layer's."""
        if node.target not in LAYERS:
            return None
        kind, place = LAYERS[node.target]
        stack = node.meta.get("nn_module_stack")
        name = re.sub(r"@\d+", "", next(reversed(stack.values()))[0]) if stack else ""
        module = self.model.get_submodule(name) if name else None
        weight = node.args[place] if len(node.args) > place else None
        if not isinstance(module, kind) or (isinstance(weight, fx.Node) and weight.target not in self.attributes):
            return None  # the operator of a function, or of a layer that computes its weight first
        if isinstance(weight, fx.Node) and not _is_of(self.model, self.attributes[weight.target], module):
            return None
        return name, plain(module), node.args[1 if kind is nn.Embedding else 0]

    def _described(self, made: fx.Node, node: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            made.meta = {"shape": tuple(size if isinstance(size, int) else None for size in value.shape), "dtype": value.dtype}
        return made


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
    """The layer as torch's own class, on the same tensors, where a library's subclass does more around it."""
    base = next((kind for kind, _ in LAYERS.values() if isinstance(module, kind)), type(module))
    base = next((c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules") and issubclass(c, base)), base)
    if type(module).forward is base.forward:
        return module
    twin = copy.copy(module)
    twin.__class__ = base
    twin._modules, twin._parameters, twin._buffers = {}, dict(module._parameters), dict(module._buffers)
    return twin


def _is_of(model: nn.Module, name: str, module: nn.Module) -> bool:
    holder, _, key = name.rpartition(".")
    own = getattr(model.get_submodule(holder), key, None)
    return any(value is own for value in module._parameters.values()) if own is not None else False


def _own(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """The model's own tensor, so that the graph learns and moves with it; a constant of the trace as it is."""
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
    """Named outputs as a plain dictionary, so that the graph does not depend on the class that held them."""
    if isinstance(outputs, Mapping):
        return {name: value for name, value in outputs.items() if isinstance(value, fx.Node)}
    return outputs


class Runner:
    """A traced model to be run node by node: modules by name, where each is called, and where each value is last used."""

    def __init__(self, model: nn.Module, example: Inputs):
        self.traced = trace(model, example)
        self.nodes = list(self.traced.graph.nodes)
        self.modules = dict(self.traced.named_modules())
        self.last_use = {user: i for i, node in enumerate(self.nodes) for user in node.all_input_nodes}
        self.inputs = [node.target for node in self.nodes if node.op == "placeholder"]
        self.place = {node.target: i for i, node in reversed(list(enumerate(self.nodes))) if node.op == "call_module"}
        self.calls = Counter(node.target for node in self.nodes if node.op == "call_module")

    def feed(self, inputs: Inputs) -> dict[str, Tensor]:
        """The inputs by the names of the graph. Raises ValueError where one is missing or unknown."""
        if isinstance(inputs, Mapping):
            odd = [name for name in (*inputs, *self.inputs) if name not in self.inputs or name not in inputs]
            if odd:
                lacks = "is missing" if odd[0] in self.inputs else "is not the model's"
                raise ValueError(f"input {odd[0]!r} {lacks}; it takes {', '.join(self.inputs)}")
            return dict(inputs)
        return dict(zip(self.inputs, tensors(inputs), strict=True))

    def step(self, i: int, values: dict[fx.Node, object], feed: Mapping[str, Tensor],
             replaced: Mapping[str, nn.Module] | None = None) -> None:
        """Compute node i into `values` and drop those that nothing needs any more. replaced: other modules, by name."""
        node = self.nodes[i]
        args, kwargs = load(node.args, values), load(node.kwargs, values)
        if node.op == "call_module":
            other = (replaced or {}).get(node.target)
            values[node] = (self.modules[node.target] if other is None else plain(other))(*args, **kwargs)
        elif node.op == "call_function":
            values[node] = node.target(*args, **kwargs)
        elif node.op == "placeholder":
            values[node] = feed[node.target]
        else:
            values[node] = operator.attrgetter(node.target)(self.traced)
        self._drop(i, values)

    def _drop(self, i: int, values: dict[fx.Node, object]) -> None:
        """Forget the values that node i was the last to read."""
        for used in self.nodes[i].all_input_nodes:
            if self.last_use[used] == i:
                values.pop(used, None)

    def finish(self, start: int, values: dict[fx.Node, object], feed: Mapping[str, Tensor],
               replaced: Mapping[str, nn.Module]) -> Tensor:
        """The answer from node `start` on, with other modules by name. A value that was made on the way and that nothing reads
        again is overwritten by the ReLU or the sum that reads it, which saves the memory and time of a new one."""
        made: set[fx.Node] = set()
        for i in range(start, len(self.nodes) - 1):
            node, arguments = self.nodes[i], load(self.nodes[i].args, values)
            first = node.args[0] if node.target in IN_PLACE else None
            if first in made and self.last_use[first] == i and _overwrites(arguments):
                values[node] = IN_PLACE[node.target](*arguments, **node.kwargs)
                self._drop(i, values)
                made.add(node)
                continue
            self.step(i, values, feed, replaced)
            if (node.op == "call_module" or node.target in IN_PLACE) and _is_new(values[node], arguments):
                made.add(node)
        return self.output(values)

    def output(self, values: Mapping[fx.Node, object]) -> Tensor:
        """The answer, once all nodes before the output are computed."""
        return answer(load(self.nodes[-1].args[0], values))


def _overwrites(arguments: tuple) -> bool:
    """Whether the first argument can take the result: all are of its shape and number format."""
    return all(isinstance(a, Tensor) and a.shape == arguments[0].shape and a.dtype == arguments[0].dtype for a in arguments)


def _is_new(value: object, arguments: tuple) -> bool:
    """Whether the value lies in memory of its own, and is not what an idle module passed on."""
    return isinstance(value, Tensor) and all(value.data_ptr() != a.data_ptr() for a in arguments if isinstance(a, Tensor))


def load(arguments, values: Mapping[fx.Node, object]):
    """The arguments of a node with their values in the place of nodes."""
    return fx.node.map_arg(arguments, lambda node: values[node])
