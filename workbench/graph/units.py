"""A layer with what belongs to it: the batch norm and the activation quantiser behind it, and the
grid of its bias."""

import copy
from collections.abc import Mapping

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from workbench.graph.kinds import BATCHNORM, chain, is_idle, is_layer, source
from workbench.graph.layers import is_transposed
from workbench.graph.running import Runner
from workbench.numbers.quantizers import ActivationQuantizer, WeightQuantizer


class Unit:
    """A layer of a model with the norm and the quantiser behind it, and where they stand.

    Example: `Unit(Runner(model, x), 1).names[0] == "conv1"`
    """

    def __init__(self, graph: Runner, place: int):
        self.graph, self.place = graph, graph.nodes[place]
        nodes = _with_quantizer(self.place, graph.modules)
        self.names: list[str | None] = [self.place.target, None, None]
        plain = True
        for node in nodes:
            module = graph.modules[node.target] if node.op == "call_module" else None
            if isinstance(module, BATCHNORM) and plain and not self.names[1]:
                self.names[1] = node.target
            elif isinstance(module, ActivationQuantizer):
                self.names[2] = node.target
            else:
                plain = plain and is_idle(node, graph.modules)
        self.chain = [graph.order[node] for node in nodes]
        self.layer, self.norm, self.quantizer = (graph.modules[name] if name else None
                                                 for name in self.names)

    @property
    def weights(self) -> WeightQuantizer | None:
        """The quantiser of the layer's weights, or None."""
        return (self.layer.parametrizations.weight[0]
                if parametrize.is_parametrized(self.layer, "weight") else None)

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
        new.layer, new.norm, new.quantizer = (copy.deepcopy(part)
                                              for part in (self.layer, self.norm, self.quantizer))
        return new

    def run(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output, what comes out behind the activation, and the same on its grid."""
        raw = self.layer(inputs)
        values, last, before = {self.place: raw}, self.place, raw
        for i in self.chain:
            before = values[last]
            self.graph.step(i, values, {}, self.modules())
            last = self.graph.nodes[i]
        return raw, before if self.quantizer else values[last], values[last]


def units(graph: Runner) -> dict[str, Unit]:
    """The units of a traced model by the names of their layers, in order of execution.

    Example: `units(running.Runner(folded, x)).keys()`
    """
    return {node.target: Unit(graph, i) for i, node in enumerate(graph.nodes)
            if is_layer(node, graph.modules)}


def round_biases(model: fx.GraphModule) -> fx.GraphModule:
    """Put the biases of quantised layers, themselves, on the grid of what they join, s_x s_w, as
    integer kernels store them.

    Example: `round_biases(quantised)`
    """
    modules = dict(model.named_modules())
    for node in model.graph.nodes:
        layer = modules.get(node.target) if node.op == "call_module" else None
        if getattr(layer, "bias", None) is None or not parametrize.is_parametrized(layer, "weight"):
            continue
        if isinstance(layer, nn.Linear) and len(node.meta.get("shape", ())) > 2:
            continue  # a matrix product of token states: the runtime adds its bias in float
        if is_transposed(layer):
            continue  # as that of a transposed convolution, whose rows are its inputs
        weights, made = layer.parametrizations.weight[0], modules.get(source(node.args[0]).target)
        plain = weights.scheme.levels == "uniform" and weights.scheme.granularity != "group"
        if plain and isinstance(made, ActivationQuantizer):
            step = (made.scale * weights.scale).detach().flatten()
            layer.bias.data = (layer.bias.data / step).round() * step
    return model


def _with_quantizer(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """What follows the layer alone: norm, activation, quantiser."""
    found = chain(node, modules)
    last = found[-1] if found else node
    follower = next(iter(last.users)) if len(last.users) == 1 else None
    quantised = (follower is not None and follower.op == "call_module"
                 and isinstance(modules[follower.target], ActivationQuantizer))
    return [*found, follower] if quantised else found
