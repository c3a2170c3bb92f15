"""A layer with what belongs to it: the batch norm and the activation quantiser behind it, found in the traced graph."""

import copy

from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.layers import WEIGHTED, Stepper
from workbench.quantizers import ActivationQuantizer, WeightQuantizer

BATCHNORM = nn.modules.batchnorm._BatchNorm


class Unit:
    """A layer of a model with the norm and the quantiser behind it, and where they stand."""

    def __init__(self, graph: Stepper, place: int):
        node = graph.nodes[place]
        self.names: list[str | None] = [node.target, None, None]
        self.graph, self.chain, self.place = graph, [], node
        plain = True
        while len(node.users) == 1:
            node = next(iter(node.users))
            module = graph.modules.get(node.target) if node.op == "call_module" else None
            if isinstance(module, BATCHNORM) and plain and not self.names[1]:
                self.names[1] = node.target
            elif isinstance(module, ActivationQuantizer):
                self.names[2] = node.target
            elif _is_activation(node, module):
                plain = plain and isinstance(module, nn.Identity | nn.Dropout)
            else:
                break
            self.chain.append(graph.nodes.index(node))
            if self.names[2]:
                break
        self.layer, self.norm, self.quantizer = (graph.modules[name] if name else None for name in self.names)

    @property
    def weights(self) -> WeightQuantizer | None:
        """The quantiser of the layer's weights, or None."""
        return self.layer.parametrizations.weight[0] if parametrize.is_parametrized(self.layer, "weight") else None

    def requantize(self, scheme) -> None:
        """Fit the weights' scales anew, from the weights before rounding."""
        source = self.layer.parametrizations.weight
        source[0] = WeightQuantizer(source.original, scheme, layer=self.names[0])

    def modules(self) -> dict[str, nn.Module]:
        """The parts by their names in the model."""
        parts = (self.layer, self.norm, self.quantizer)
        return {name: part for name, part in zip(self.names, parts, strict=True) if name}

    def copy(self) -> "Unit":
        """Parts of its own, to be repaired."""
        new = copy.copy(self)
        new.layer, new.norm, new.quantizer = (copy.deepcopy(part) for part in (self.layer, self.norm, self.quantizer))
        return new

    def run(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output, what comes out behind the activation, and the same on its grid."""
        raw = self.layer(inputs)
        values, last, before = {self.place: raw}, self.place, raw
        for i in self.chain:
            before = values[last]
            self.graph.step(i, values, inputs, self.modules())
            last = self.graph.nodes[i]
        return raw, before if self.quantizer else values[last], values[last]


def units(graph: Stepper) -> dict[str, Unit]:
    """The units of a traced model by the names of their layers, in order of execution."""
    return {node.target: Unit(graph, i) for i, node in enumerate(graph.nodes)
            if node.op == "call_module" and isinstance(graph.modules[node.target], WEIGHTED)}


def _is_activation(node, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, nn.Identity | nn.Dropout | nn.ReLU | nn.ReLU6 | nn.Hardtanh)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in ("relu", "relu_", "relu6", "hardtanh", "clamp", "dropout")
