"""A network over time as one that takes a few samples at a time, a hop, beside what it keeps of
those before.

Each value of the graph has a place in time: its axis, how many samples one step of it stands for,
and by how many steps it comes late. A layer that slides over time with k taps, dilation d, stride s
and p zeros before the first sample makes step j of the steps j s - p to j s - p + (k - 1) d. Hop by
hop it comes

    late' = ceil(((k - 1) d - p - (s - 1) + late) / s)

steps late, and has to keep s late' + p - late steps of what it reads. Values that meet are made
equally late. Where a layer reads zeros before the first sample or behind the last, steps outside of
the recording are made zero, so that its first and last answers are those of the whole network, too.
Recurrent layers carry their state, averages over all time become those of what was heard.
"""

import copy
import math
from dataclasses import replace

import torch
from torch import fx, nn

from workbench.batches import Inputs, tensors
from workbench.errors import UnsupportedModelError
from workbench.graph.hops import ENDLESS, Timing, Track
from workbench.graph.kinds import is_idle
from workbench.graph.sliding import CONVOLUTIONS, POOLS, Sliding
from workbench.graph.tracing import trace

aten = torch.ops.aten
AVERAGES = {aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default}
REDUCING = AVERAGES | {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default}
# operators that work along one axis: the place of that axis among their arguments, and its default
ALONG = {
    aten.softmax.int: (1, -1), aten.log_softmax.int: (1, -1), aten.cat.default: (1, 0),
    aten.select.int: (1, 0),
    aten.slice.Tensor: (1, 0), aten.unbind.int: (1, 0), aten.split.Tensor: (2, 0),
    aten.split_with_sizes.default: (2, 0),
    aten.chunk.default: (2, 0)}
RECURRENT = {aten.lstm.input, aten.gru.input}
VIEWS = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}
TURNS = {aten.permute.default, aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
PRODUCTS = {aten.matmul.default, aten.linear.default, aten.bmm.default}
KEEPING_ZERO = {aten.relu.default, aten.hardtanh.default, aten.silu.default, aten.hardswish.default,
                aten.gelu.default, aten.tanh.default, aten.abs.default, aten.add.Tensor,
                aten.sub.Tensor, aten.cat.default, aten.slice.Tensor}


def stream(model: nn.Module, example: Inputs, *, hop: int, axis: int = -1) -> fx.GraphModule:
    """A copy of `model` that takes `hop` samples and its state (`past_...`) and gives its outputs
    and the state behind them (`present_...`), all by name; its `meta["timing"]` tells how late. A
    single output is called "logits".

    example: a recording (n, ..., T), time along `axis`, of which only the shape counts. The model
    may be one of quantization.quantize: it stays quantised.

    Raises UnsupportedModelError, naming the layer and the reason, for what cannot stream;
    ValueError for a hop that the strides do not divide.

    Example: `stream(torch.nn.Conv1d(1, 2, 3, padding=1), torch.zeros(1, 1, 99),
    hop=10).meta["timing"].tracks["logits"].late`
    """
    if len(tensors(example)) != 1:
        raise UnsupportedModelError("a stream is one tensor over time; this model takes several "
                                    "inputs")
    if hop < 1:
        raise ValueError(f"hop is {hop}, expected at least 1 sample")
    shape = tensors(example)[0].shape
    if not 0 < axis + len(shape) * (axis < 0) < len(shape):
        raise ValueError(f"axis is {axis}; time is one of the axes behind the first of an input "
                         f"{tuple(shape)}")
    whole = copy.deepcopy(trace(model, example)).eval()
    return _Converter(whole, type(model).__name__, hop).converted(axis - len(shape) * (axis >= 0))


class _Converter(Sliding):
    """Writes a traced graph anew, each node so that it does its work hop by hop."""

    def converted(self, axis: int) -> fx.GraphModule:
        for node in self.traced.graph.nodes:
            read = node.all_input_nodes
            if node.op == "placeholder":
                self.tracks[node], entry = Track(axis, zero=True), node.target
                self.new[node] = self.graph.first = self.graph.node_copy(node)
            elif node.op == "output":
                tracks = self._finish(node)
            elif any(part in self.tracks for part in read):
                self._convert(node)
            else:
                self.new[node] = self._copy(node)
                for part in read:
                    self.heard |= {node: self.heard[part]} if part in self.heard else {}
        made = fx.GraphModule(self.traced, self.graph, f"Streaming{self.name}")
        made.graph.eliminate_dead_code()
        made.recompile()
        made.meta["timing"] = Timing(self.graph.hop, axis, entry, self.graph.start, tracks)
        return made

    def _convert(self, node: fx.Node) -> None:
        target = node.target
        if any(part in self.heard for part in node.all_input_nodes):
            self._refuse(node, "joins each step with an average over all of the recording, of "
                         "which most is still to come")
        if any(part in self.padded for part in node.all_input_nodes) and not self._slides(node):
            self._refuse(node,
                         "reads time that was padded for it; pad only in front of convolutions")
        if node.op == "call_module":
            self._module(node, self.modules[target])
        elif target in CONVOLUTIONS:
            self._convolve(node)
        elif target in POOLS:
            self._pool(node)
        elif target is aten.unfold.default:
            self._unfold(node)
        elif target in RECURRENT:
            self._recur(node)
        elif target in REDUCING:
            self._reduce(node)
        elif target in (aten.pad.default, aten.constant_pad_nd.default):
            self._pad(node)
        elif target in ALONG:
            self._along(node)
        elif target in VIEWS:
            self._view(node)
        elif target in TURNS:
            self._turn(node)
        elif target in PRODUCTS:
            self._contract(node, 1 if node.args[0] in self.tracks else 2)
        elif (target is aten.sym_size.int
              and self._from_end(node, node.args[1]) != self._track(node).axis):
            self.new[node] = self._copy(node)
        elif (getattr(target, "__name__", "") == "getitem" or is_idle(node, self.modules)
              or target in CASTS):
            self._keep(node)
        elif isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            self._meet(node)
        else:
            self._refuse(node, "has no streaming form: it may look at all of a recording at once")

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            *others, around = self.paddings[node.target]
            if self._beside_time(node, module.kernel_size, module.stride,
                                 self.paddings[node.target]):
                self._keep(node, zero=False)
                return
            if any(before != behind for before, behind in others):
                self._refuse(node, "pads its other axis unevenly; use an odd kernel there")
            read = self._slide(node, module.kernel_size[-1], module.stride[-1], module.dilation[-1],
                               around)
            module.padding = (*(before for before, _ in others), 0)
            self.new[node] = self._copy(node, {node.args[0]: read})
        elif isinstance(module, nn.Linear):
            self._contract(node, 1)
        elif isinstance(module, nn.GroupNorm) or (isinstance(module, nn.LayerNorm) and
                                                  -self._track(node).axis
                                                  <= len(module.normalized_shape)):
            self._refuse(node, "normalises over time, of which most is still to come; use batch "
                         "norms, or norms over channels")
        elif isinstance(module, nn.ConvTranspose2d | nn.Conv3d | nn.Embedding):
            self._refuse(node, f"is a {type(module).__name__}, which has no streaming form here")
        else:
            norm = isinstance(module, nn.LayerNorm | nn.modules.batchnorm._BatchNorm)
            self._keep(node, zero=self._track(node).zero and not norm)

    def _recur(self, node: fx.Node) -> None:
        source, given, weights, _, layers, *_, both, batch_first = node.args
        track, call, several = self._track(node), self.graph.call_function, isinstance(given,
                                                                                       list | tuple)
        if both:
            self._refuse(node,
                         "reads backwards too, and so looks ahead without bound; use one direction")
        if track.axis != -2 or not batch_first:
            self._refuse(node, "recurs over another axis than time; give it (n, T, C), with "
                         "batch_first=True")
        if any(user.args[1] != 0 and user.users for user in node.users):
            self._refuse(node, "is asked for its state behind the last step; take the last of its "
                         "outputs instead")
        # the first step of a recording has to be the first of a hop
        ahead = -track.late % self.graph.steps(track)
        value, track = self.graph.delayed(self.new[source], track, ahead, source.meta, node.name)
        width = weights[1].meta["shape"][1]
        before = [self.graph.state(f"past_{node.name}_{place}", torch.zeros(1, layers, width))
                  for place in range(1 + several)]
        turned = [call(aten.transpose.int, (state, 0, 1)) for state in before]
        rest = fx.node.map_arg(tuple(node.args[2:]), self.new.__getitem__)
        self.new[node] = made = call(node.target, (value, turned if several else turned[0], *rest))
        for place, old in enumerate(before):
            state = call(aten.transpose.int, (call(_item, (made, place + 1)), 0, 1))
            if track.late:  # until then its state stands still
                begun = call(aten.ge.Scalar, (self.graph.seen(), track.late * track.every))
                state = call(aten.where.self,
                             (call(aten.reshape.default, (begun, [-1, 1, 1])), state, old))
            self.graph.behind[old.target] = state
        self.tracks[node] = replace(track, reach=math.inf, zero=False)

    def _reduce(self, node: fx.Node) -> None:
        """A mean or the largest over time becomes that of what was heard; over other axes nothing
        changes."""
        source, track, shape = node.args[0], self._track(node), node.args[0].meta["shape"]
        axes, stay = self._axes(node, len(shape))
        if track.axis not in axes:
            self._keep(node,
                       axis=track.axis + (0 if stay else sum(axis > track.axis for axis in axes)),
                       zero=False)
            return
        if node.target is aten.sum.dim_IntList or -len(shape) in axes:
            self._refuse(node,
                         "sums up all of a recording, or several of them; use a mean over time")
        largest, call = node.target is aten.amax.default, self.graph.call_function
        fill = -math.inf if largest else 0.0
        heard = self.graph.within(self.new[source], track, len(shape), fill)
        part = call(aten.amax.default if largest else aten.sum.dim_IntList, (heard, axes, stay))
        sizes = [1, *node.meta["shape"][1:]]
        before = self.graph.state(f"past_{node.name}", torch.full(sizes, fill))
        made = call(aten.maximum.default if largest else aten.add.Tensor, (before, part))
        self.graph.behind[before.target] = made
        if not largest:
            others = math.prod(shape[axis] for axis in axes if axis != track.axis)
            count = call(aten.mul.Tensor,
                         (call(aten.clamp_min.default, (self.graph.heard(track), 1)), others))
            made = call(aten.div.Tensor,
                        (made, call(aten.reshape.default, (count, [-1] + [1] * (len(sizes) - 1)))))
        self.new[node] = made
        self.heard[node] = replace(track, axis=None)

    def _axes(self, node: fx.Node, dims: int) -> tuple[list[int], bool]:
        """Over which axes a node reduces, from the end, and whether they stay, of one place."""
        if node.target in AVERAGES:
            if any(size != 1 for size in node.args[1]):
                self._refuse(node, "pools time to several places; pool it to one, or by windows of "
                             "a fixed length")
            return list(range(-len(node.args[1]), 0)), True
        given = node.args[1] if len(node.args) > 1 and node.args[1] else list(range(dims))
        return ([axis - dims * (axis >= 0) for axis in given],
                len(node.args) > 2 and node.args[2] is True)

    def _along(self, node: fx.Node) -> None:
        place, default = ALONG[node.target]
        axis, track = self._from_end(node,
                                     node.args[place] if len(node.args) > place
                                     else default), self._track(node)
        if axis != track.axis:
            self._meet(node,
                       axis=track.axis
                       + (axis > track.axis and node.target in (aten.select.int, aten.unbind.int)))
        elif node.target is aten.slice.Tensor:
            self._crop(node, track)
        else:
            self._refuse(node, "looks at all steps of a recording at once; take another axis, or "
                         "crop by x[..., a:-b]")

    def _crop(self, node: fx.Node, track: Track) -> None:
        """Steps left out at the ends: the same values, counted from another one."""
        start, end, step = node.args[2:] + (None, None, 1)[len(node.args) - 2:]
        start, whole = start or 0, end is None or end > ENDLESS
        if start < 0 or step != 1 or not (whole or end < 0):
            self._refuse(node, "takes steps that are not counted from both ends; crop time by "
                         "x[..., a:-b]")
        lengths = (*track.lengths, (-start + (0 if whole else end) - 1, 1))
        self.new[node] = self.new[node.args[0]]
        self.tracks[node] = replace(track, late=track.late + start, lengths=lengths, zero=False)

    def _view(self, node: fx.Node) -> None:
        """Another shape of the other axes; the steps of time, of which there are fewer in a hop,
        stay."""
        track, before, after = self._track(node), node.args[0].meta["shape"], node.meta["shape"]
        behind = math.prod(before[len(before) + track.axis + 1:])
        axis = next((place for place in range(-1, -len(after), -1)
                     if after[place] == before[track.axis]
                     and math.prod(after[len(after) + place + 1:]) == behind), None)
        if axis is None:
            self._refuse(node, f"gives time another shape, {before} to {after}; keep it an axis of "
                         "its own")
        sizes = [-1 if size is None else size for size in after]
        sizes[axis] = self.graph.steps(track)
        self.new[node] = self.graph.call_function(aten.reshape.default,
                                                  (self.new[node.args[0]], sizes))
        self.tracks[node] = replace(track, axis=axis)

    def _turn(self, node: fx.Node) -> None:
        """Axes in another order, one more or one less."""
        dims, track = len(node.args[0].meta["shape"]), self._track(node)
        order = list(range(dims))
        if node.target is aten.permute.default:
            order = [axis % dims for axis in node.args[1]]
        elif node.target is aten.transpose.int:
            a, b = node.args[1] % dims, node.args[2] % dims
            order[a], order[b] = order[b], order[a]
        elif node.target is aten.unsqueeze.default:
            order.insert(node.args[1] % (dims + 1), -1)
        elif node.args[0].meta["shape"][node.args[1] % dims] == 1:
            order.remove(node.args[1] % dims)
        if dims + track.axis not in order:
            self._refuse(node, "takes the axis of time away; give a longer example")
        self._keep(node, axis=order.index(dims + track.axis) - len(order))

    def _contract(self, node: fx.Node, place: int) -> None:
        """A matrix product, which sums over the last axis of its first factor, or over the last but
        one of its second."""
        if (self._track(node).axis == -place
            or sum(part in self.tracks for part in node.all_input_nodes) > 1):
            self._refuse(node, "mixes all steps of time; let it read one step at a time")
        self._keep(node, zero=False)

    def _meet(self, node: fx.Node, axis: int | None = None) -> None:
        """Values that meet step by step are made equally late."""
        parts = [part for part in node.all_input_nodes if part in self.tracks]
        tracks = [self.tracks[part] for part in parts]
        if len({(track.axis, track.every) for track in tracks}) > 1:
            self._refuse(node, "joins values whose steps are not those of the same time")
        latest = max(tracks, key=lambda track: track.late)
        for other in node.all_input_nodes:
            shape = other.meta.get("shape", ())
            if other not in parts and len(shape) >= -latest.axis and shape[latest.axis] != 1:
                self._refuse(node, "joins each step with a number of its own, which no recording "
                             "of another length has")
        values = {part: self.graph.delayed(self.new[part], track, latest.late - track.late,
                                           part.meta, node.name)[0]
                  for part, track in zip(parts, tracks, strict=True)}
        shifts = node.target in (aten.add.Tensor, aten.sub.Tensor) and len(parts) < 2
        zero = node.target in KEEPING_ZERO and not shifts and all(track.zero for track in tracks)
        self.new[node] = self._copy(node, values)
        self.tracks[node] = replace(latest, reach=max(track.reach for track in tracks), zero=zero,
                                    axis=axis or latest.axis)

    def _keep(self, node: fx.Node, **changed) -> None:
        """The node does its work on each step alone."""
        if node.args[0] in self.padded:
            self.padded[node] = self.padded[node.args[0]]
        self.new[node], self.tracks[node] = self._copy(node), replace(self._track(node), **changed)

    def _finish(self, node: fx.Node) -> dict[str, Track]:
        """Put out the outputs, with the state behind this hop; returns the tracks of the
        outputs."""
        given = node.args[0]
        if isinstance(given, list | tuple):
            given = {f"output_{place}": value for place, value in enumerate(given)}
        named = {"logits": given} if isinstance(given, fx.Node) else dict(given)
        cut = next((value for value in named.values() if value in self.padded), None)
        if cut is not None:
            self._refuse(cut, "pads time for something else than a convolution; pad in front of "
                         "convolutions")
        states = {name.replace("past", "present", 1): self.graph.behind[name]
                  for name in self.graph.inputs}
        self.graph.output({name: self.new[value] for name, value in named.items()} | states)
        constant = next((value for value in named.values() if value not in self.tracks
                         and value not in self.heard), None)
        if constant is not None:
            self._refuse(constant, "does not depend on the recording")
        return {name: self.tracks.get(value) or self.heard[value] for name, value in named.items()}

def _item(values, place: int):
    return values[place]
