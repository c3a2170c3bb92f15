"""A traced model run node by node, from any node on, with other modules in the place of some."""

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from workbench.batches import Inputs, answer, tensors
from workbench.graph.tracing import plain, trace

aten = torch.ops.aten
IN_PLACE = {aten.relu.default: aten.relu_.default, aten.add.Tensor: aten.add_.Tensor}


class Runner:
    """A traced model to be run node by node: modules by name, where each is called, and where each
    value is last used.

    Example: `graph = Runner(model, x)`
    """

    def __init__(self, model: nn.Module, example: Inputs):
        self.traced = trace(model, example)
        self.nodes = list(self.traced.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.modules = dict(self.traced.named_modules())
        self.last_use = {user: i for i, node in enumerate(self.nodes)
                         for user in node.all_input_nodes}
        self.inputs = [node.target for node in self.nodes if node.op == "placeholder"]
        self.place = {node.target: i for i, node in reversed(list(enumerate(self.nodes)))
                      if node.op == "call_module"}
        self.calls = Counter(node.target for node in self.nodes if node.op == "call_module")

    def feed(self, inputs: Inputs) -> dict[str, Tensor]:
        """The inputs by the names of the graph. Raises ValueError where one is missing or
        unknown."""
        if isinstance(inputs, Mapping):
            odd = [name for name in (*inputs, *self.inputs) if name not in self.inputs
                   or name not in inputs]
            if odd:
                lacks = "is missing" if odd[0] in self.inputs else "is not the model's"
                raise ValueError(f"input {odd[0]!r} {lacks}; it takes {', '.join(self.inputs)}")
            return dict(inputs)
        return dict(zip(self.inputs, tensors(inputs), strict=True))

    def step(self, i: int, values: dict[fx.Node, object], feed: Mapping[str, Tensor],
             replaced: Mapping[str, nn.Module] | None = None) -> None:
        """Compute node i into `values` and drop those that nothing needs any more. replaced: other
        modules, by name."""
        node = self.nodes[i]
        args, kwargs = load(node.args, values), load(node.kwargs, values)
        if node.op == "call_module":
            other = (replaced or {}).get(node.target)
            values[node] = (self.modules[node.target] if other is None else plain(other))(*args,
                                                                                          **kwargs)
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
               replaced: Mapping[str, nn.Module], fused: Mapping[int, Any] | None = None) -> Tensor:
        """The answer from node `start` on, with other modules by name. A value that was made on the
        way and that nothing reads again is overwritten by the ReLU or the sum that reads it, which
        saves the memory and time of a new one.

        fused: convolutions by their place (`fusing.Fused`), each computed with what follows it.
        """
        made: set[fx.Node] = set()
        done: set[int] = set()
        for i in range(start, len(self.nodes) - 1):
            node, whole = self.nodes[i], (fused or {}).get(i)
            if i in done:
                self._drop(i, values)
            elif whole and not whole.names & replaced.keys():
                free = whole.other in made and self.last_use[whole.other] == whole.adding
                values[whole.last] = whole.run(values, overwrite=free)
                done |= whole.covered
                made.add(whole.last)
                self._drop(i, values)
            elif (node.target in IN_PLACE and node.args[0] in made
                  and self.last_use[node.args[0]] == i
                  and _overwrites(arguments := load(node.args, values))):
                values[node] = IN_PLACE[node.target](*arguments, **node.kwargs)
                self._drop(i, values)
                made.add(node)
            else:
                arguments = load(node.args, values)
                self.step(i, values, feed, replaced)
                if (node.op == "call_module" or node.target in IN_PLACE) and _is_new(values[node],
                                                                                     arguments):
                    made.add(node)
        return self.output(values)

    def output(self, values: Mapping[fx.Node, object]) -> Tensor:
        """The answer, once all nodes before the output are computed."""
        return answer(load(self.nodes[-1].args[0], values))


def _overwrites(arguments: tuple) -> bool:
    """Whether the first argument can take the result: all are of its shape and number format."""
    return all(isinstance(a, Tensor) and a.shape == arguments[0].shape
               and a.dtype == arguments[0].dtype for a in arguments)


def _is_new(value: object, arguments: tuple) -> bool:
    """Whether the value lies in memory of its own, and is not what an idle module passed on."""
    return (isinstance(value, Tensor)
            and all(value.data_ptr() != a.data_ptr() for a in arguments if isinstance(a, Tensor)))


def load(arguments, values: Mapping[fx.Node, object]):
    """The arguments of a node with their values in the place of nodes.

    Example: `running.load((node, 3), {node: 2}) == (2, 3)`
    """
    return fx.node.map_arg(arguments, lambda node: values[node])
