"""What slides over time, hop by hop: convolutions, pools, windows, and the zeros around a
recording."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import fx, nn

from workbench.errors import UnsupportedModelError
from workbench.graph.hops import HopGraph, Track
from workbench.numbers.quantizers import ActivationQuantizer

aten = torch.ops.aten
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default}
POOLS = {aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool1d.default,
         aten.avg_pool2d.default}


class Sliding:
    """A traced graph that is being written anew. new: the new node of each old one; tracks: of the
    old nodes that have steps of time; padded: zeros put around a recording, for the layer behind to
    read; heard: nodes of one value for all that was heard.

    Example: `Sliding(tracing.trace(nn.Sequential(nn.Conv1d(1, 1, 3)), torch.ones(1, 1, 9)),
    "mine", 8)`
    """

    _keep: Callable[..., None]  # the converter's, for a node that works on each step alone

    def __init__(self, traced: fx.GraphModule, name: str, hop: int):
        self.traced, self.name, self.graph = traced, name, HopGraph(hop)
        self.modules = dict(traced.named_modules())
        self.paddings = {name: _around(module) for name, module in self.modules.items()
                         if isinstance(module, nn.Conv1d | nn.Conv2d)}
        self.new: dict[fx.Node, fx.Node] = {}
        self.tracks: dict[fx.Node, Track] = {}  # of the old nodes
        # zeros put around a recording, for the layer behind to read
        self.padded: dict[fx.Node, tuple[int, int]] = {}
        self.heard: dict[fx.Node, Track] = {}  # one value for all that was heard, and of what

    def _convolve(self, node: fx.Node) -> None:
        _, weight, bias, stride, padding, dilation, groups = (node.args
                                                              + (None, (1,), (0,), (1,),
                                                                 1)[len(node.args) - 2:])
        if self._beside_time(node, weight.meta["shape"][2:], stride, padding):
            self._keep(node, zero=False)
            return
        read = self._slide(node, weight.meta["shape"][-1], stride[-1], dilation[-1],
                           (padding[-1], padding[-1]))
        known = fx.node.map_arg((weight, bias, stride), self.new.__getitem__)
        self.new[node] = self.graph.call_function(node.target,
                                                  (read, *known, [*padding[:-1], 0], dilation,
                                                   groups))

    def _beside_time(self, node: fx.Node, taps, stride, padding) -> bool:
        """Whether a convolution over two axes, of which time is the first, leaves each step of it
        alone."""
        return (self._track(node).axis == -2 and len(taps) == 2
                and (taps[0], stride[0], padding[0]) in ((1, 1, 0), (1, 1, (0, 0))))

    def _slide(self, node: fx.Node, taps: int, stride: int, dilation: int = 1,
               around: tuple[int, int] = (0, 0), fill: float = 0.0) -> fx.Node:
        """What a node that slides over time reads for the steps of this hop: some of the hop,
        behind what is kept. around: how many times `fill` it reads before the first step and behind
        the last."""
        source = node.args[0]
        track, value, reach, shape = (self.tracks[source], self.new[source], (taps - 1) * dilation,
                                      source.meta["shape"])
        if track.axis != -1:
            self._refuse(node, "slides over other axes than time; put time last")
        left, right = (a + b for a, b in zip(around, self.padded.get(source, (0, 0)), strict=True))
        steps = self.graph.steps(track)
        if steps % stride:
            raise ValueError(f"a hop of {self.graph.hop} samples gives {steps} steps at "
                             f"{self._called(node)}, which takes one of {stride}; use a multiple "
                             f"of {track.every * stride}")
        if ((left and track.late) or right) and (fill or not track.zero):
            value = self.graph.within(value, track, len(shape), fill)
        wait = reach - left - (stride - 1) + track.late
        late = max(math.ceil(wait / stride), 0)
        kept, spared = late * stride + left - track.late, late * stride - wait
        value = self.graph.joined(value, track, kept, source.meta, node.name, fill)
        if spared or kept < 0:
            value = self.graph.cut(value, -1, max(-kept, 0), max(kept, 0) + steps - spared)
        lengths = (*track.lengths, (left + right - reach - 1, stride))
        self.tracks[node] = Track(-1, track.every * stride, late, lengths,
                                  track.reach + reach * track.every)
        return value

    def _pool(self, node: fx.Node) -> None:
        largest = "max" in str(node.target)
        _, size, stride, padding, *rest = node.args + (None, (), (0,))[len(node.args) - 1:]
        dilation, stride = rest.pop(0) if largest and rest else (1,), stride or size
        if (rest and rest[0]) or (padding[-1] and rest[1:2] == [False]):
            self._refuse(node, "counts otherwise at the ends of a recording (ceil_mode, "
                         "count_include_pad); use the defaults")
        read = self._slide(node, size[-1], stride[-1], dilation[-1], (padding[-1],) * 2,
                           -math.inf if largest else 0.0)
        more = (dilation,) if largest else ()
        self.new[node] = self.graph.call_function(node.target,
                                                  (read, size, stride, [*padding[:-1], 0], *more))

    def _unfold(self, node: fx.Node) -> None:
        _, axis, size, step = node.args
        if self._from_end(node, axis) != self._track(node).axis:
            self._refuse(node, "unfolds another axis than time")
        read = self._slide(node, size, step)
        self.tracks[node] = track = replace(self.tracks[node], axis=-2)
        whole = self.graph.steps(track) == 1  # of one window there is nothing to copy
        self.new[node] = self.graph.call_function(*((aten.unsqueeze.default, (read, -2)) if whole
                                                    else
                                                    (node.target, (read, axis, size, step))))

    def _pad(self, node: fx.Node) -> None:
        source, sizes, *rest = node.args
        track = self._track(node)
        place = -2 * track.axis - 2
        if not any(sizes[place:place + 2]):
            self._keep(node)
            return
        if any(value not in ("constant", None, 0) for value in rest):
            self._refuse(node, "pads time by something else than zeros; pad by zeros")
        if (track.axis != -1 or min(sizes) < 0 or any(sizes[2:])
            or not all(map(self._slides, node.users))):
            self._refuse(node, "pads time for something else than a convolution; pad in front of "
                         "convolutions")
        self.padded[node], self.tracks[node], self.new[node] = (tuple(sizes[:2]), track,
                                                                self.new[source])

    def _slides(self, node: fx.Node) -> bool:
        """Whether a node reads time in windows, by itself or behind a quantiser, which leaves zeros
        what they are."""
        module = self.modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            return all(map(self._slides, node.users))
        averages = node.target in POOLS and "avg" in str(node.target)
        return (isinstance(module, nn.Conv1d | nn.Conv2d) or node.target in CONVOLUTIONS or averages
                or node.target is aten.unfold.default)

    def _copy(self, node: fx.Node, values: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
        return self.graph.node_copy(node, lambda old: (values or {}).get(old) or self.new[old])

    def _track(self, node: fx.Node) -> Track:
        """The place in time of the first timed value that a node reads."""
        return next(self.tracks[part] for part in node.all_input_nodes if part in self.tracks)

    def _from_end(self, node: fx.Node, axis: int) -> int:
        first = next(part for part in node.all_input_nodes if part in self.tracks)
        return axis - len(first.meta["shape"]) * (axis >= 0)

    def _called(self, node: fx.Node) -> str:
        return f"layer {node.target}" if node.op == "call_module" else str(node.name)

    def _refuse(self, node: fx.Node, reason: str) -> None:
        raise UnsupportedModelError(f"{self.name} cannot stream: {self._called(node)} {reason}")


def _around(module: nn.Conv1d | nn.Conv2d) -> list[tuple[int, int]]:
    """How many zeros a convolution puts before and behind each axis."""
    if module.padding == "same":
        whole = [(size - 1) * d
                 for size, d in zip(module.kernel_size, module.dilation, strict=True)]
        return [(size // 2, size - size // 2) for size in whole]
    return ([(0, 0)] * len(module.kernel_size) if module.padding == "valid"
            else [(size, size) for size in module.padding])
