"""Which channels of a network can only go together: those that an addition, a grouped convolution
or the heads of an attention couple.

The traced graph runs on labels: each output channel of a layer has one, operations that move values
move the labels, an addition makes those that meet one, and a layer that reads them notes at which
of its inputs. What an operation does that is not known here keeps the channels that reach it.

Source: the grouping is that of the dependency graph of Fang et al. 2023 (DepGraph, arXiv
2301.12900), here by channel instead of by layer, so that concatenations, splits and shuffles need
no rules of their own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from workbench.batches import Inputs, rows
from workbench.graph import cutting
from workbench.graph.attention import Heads, attentions
from workbench.graph.group import Group, Kept
from workbench.graph.kinds import BATCHNORM
from workbench.graph.layers import WEIGHTED, evaluating
from workbench.graph.running import Runner

# labels of what has no channels to remove, and of channels that are no layer's: inputs, parameters
NOTHING, FIXED = -1, 0
PARTS = (2, 3, 4, 8)  # that a split may have to keep equal

_SAME = {"relu", "relu6", "silu", "gelu", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "tanh",
         "clamp", "clamp_min", "clamp_max", "leaky_relu", "elu", "selu", "mish", "softplus", "exp",
         "log", "sqrt", "rsqrt", "neg", "abs", "square", "reciprocal", "erf", "_to_copy", "to",
         "type_as", "dropout", "clone", "contiguous", "detach", "alias"}
_JOINING = {"add", "sub", "mul", "div", "maximum", "minimum", "where", "pow", "rsub", "addcmul",
            "lerp"}
_MOVING = {"permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "cat", "stack", "flip",
           "repeat", "pad", "constant_pad_nd", "movedim", "getitem"}
# whose sizes the forward may have fixed
_REGROUPING = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "slice", "select",
               "narrow", "split", "split_with_sizes", "chunk", "unbind", "roll", "index_select",
               "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"}
_POOLING = {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
            "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d",
            "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"}
_REDUCING = {"mean", "sum", "amax", "amin", "var", "linalg_vector_norm"}


def groups(model: nn.Module, example: Inputs) -> list[Group]:
    """The groups of `model` in order of definition, those that cannot be cut among them, with the
    reason.

    Raises UnsupportedModelError where the model cannot be traced.

    Example: `[group.layer for group in coupling.groups(model, task.example) if not group.kept]`
    """
    heads = attentions(model, example)
    by_layer = {layer: head for head in heads for layer in head.made_by}
    labels = _Labels(model, example)
    found = labels.groups([name for name in labels.made if name not in by_layer])
    known = [_of_heads(head) for head in heads] + list(found)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    # also where heads can go
    doubtful = [group for group in known if not group.kept and found.get(group, group.channels > 1)]
    settled = dict(zip(doubtful, _tried(model, example, doubtful), strict=True))
    return sorted((settled.get(group, group) for group in known),
                  key=lambda group: order[group.layer])


def _of_heads(head: Heads) -> Group:
    return Group(head.layer, head.count, head.made_by, {}, head.read_by,
                 Kept.SPLIT if head.fixed else None, "head", head.numbers)


def _tried(model: nn.Module, example: Inputs, doubtful: Sequence[Group]) -> list[Group]:
    """The groups in the first form in which half of each can be taken out and the rest computes the
    same: channels one by one, or one of each of several parts that a split keeps equal; else
    kept."""
    if _works(model, example, doubtful):
        return list(doubtful)
    forms = {group: [group] if group.unit == "head" else group.forms(PARTS) for group in doubtful}
    return [next((form for form in forms[group] if form.channels > 1
                  and _works(model, example, [form])), replace(group, kept=Kept.FIXED))
            for group in doubtful]


def _works(model: nn.Module, example: Inputs, tried: Sequence[Group]) -> bool:
    known = {group.layer: group for group in tried}
    # the first half: uneven where a split wants even
    removed = {group.layer: range(group.channels // 2) for group in tried}
    try:
        cutting.verified(model, cutting.without(model, removed, known), removed, known, example)
    except Exception:  # of the model's own forward, which may raise anything
        return False
    return True


class _Labels:
    """The labels of all channels of a model: who makes, norms and reads them, which are one, and
    why some must stay.

    A label tensor has the dimensions of its value, of size 1 where the labels are the same all
    along.
    """

    def __init__(self, model: nn.Module, example: Inputs):
        self.graph, self.parent = Runner(model, example), [FIXED]
        self.reasons: dict[int, set[Kept]] = {}
        self.regrouped: set[int] = set()
        # by layer: labels of outputs, of what a norm or its inputs see
        self.made, self.normed, self.read = {}, {}, {}
        self.labels: dict[fx.Node, Any] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        example = rows(example, slice(0, 1))
        with evaluating(model):
            feed, values = self.graph.feed(example), {}
            for i, node in enumerate(self.graph.nodes[:-1]):
                self.graph.step(i, values, feed)
                value = values.get(node)
                self.shapes[node] = tuple(value.shape) if isinstance(value, Tensor) else ()
                self.labels[node] = self._visit(node, value)
                for used in node.all_input_nodes:
                    if self.graph.last_use[used] == i:
                        self.labels.pop(used, None)
            for node in self.graph.nodes[-1].all_input_nodes:
                self._keep(self.labels[node], Kept.OUTPUT)

    def groups(self, layers: Sequence[str]) -> dict[Group, bool]:
        """The groups that these layers make, each with whether an operation that may fix sizes
        regroups it."""
        root = torch.tensor([self._find(label) for label in range(len(self.parent))])
        reasons, regrouped = {}, {self._find(label) for label in self.regrouped}
        for label, why in self.reasons.items():
            reasons.setdefault(self._find(label), set()).update(why)
        at = {kind: {name: _places(root[labels.clamp_min(0)].where(labels >= 0, NOTHING))
                     for name, labels in part.items()}
              for kind, part in (("made", self.made), ("normed", self.normed), ("read", self.read))}
        found = {}
        for names in _connected({name: at["made"][name] for name in layers}):
            channels = list(dict.fromkeys(label for name in names for label in at["made"][name]))
            made, normed, read = ({name: table for name, places in at[kind].items()
                                   if (table := _table(places, channels)) is not None}
                                  for kind in ("made", "normed", "read"))
            why = (set().union(*(reasons.get(label, set()) for label in channels))
                   | (set() if read else {Kept.OUTPUT}))
            unit = "neuron" if isinstance(self.graph.modules[names[0]], nn.Linear) else "channel"
            group = Group(names[0], len(channels), {name: made[name] for name in names}, normed,
                          read, next((reason for reason in Kept if reason in why), None), unit)
            found[group] = not regrouped.isdisjoint(channels)
        return found

    def _visit(self, node: fx.Node, value):
        """The labels of a node's value; what has no channels (sizes, say) stands for itself."""
        if node.op == "placeholder":
            return self._of_shape(value, FIXED if value.is_floating_point() else NOTHING)
        if node.op == "get_attr":
            return self._of_shape(value, FIXED if value.numel() > 1 else NOTHING)
        if node.op == "call_module":
            return self._layer(node, self.graph.modules[node.target], value)
        name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
        given = [part for part in node.all_input_nodes if self.shapes[part]
                 or isinstance(self.labels.get(part), list | tuple)]
        if not isinstance(value, Tensor | list | tuple) or not given:
            return self._of_shape(value, NOTHING) if isinstance(value, Tensor) else value
        first = self.labels[given[0]]
        if name in _JOINING:
            return self._together([part for part in given if isinstance(self.labels[part], Tensor)],
                                  value)
        if name in _SAME or (name in _POOLING and not any(size > 1 for size in first.shape[2:])):
            return first
        if name in _REDUCING:
            return self._reduced(node, first, value)
        if name in _MOVING | _REGROUPING:
            return self._moved(node, name, value)
        for part in given:
            self._keep(self.labels[part], Kept.MIXED)
        return self._of_shape(value, FIXED)

    def _layer(self, node: fx.Node, module: nn.Module, value: Tensor) -> Tensor:
        name, source = node.target, node.args[0]
        seen = self.labels[source]
        if isinstance(module, BATCHNORM):
            self._note(self.normed, name, self._along(seen, 1, self.shapes[source][1]))
            return seen
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            self._keep(seen, Kept.NORMED)
            return seen
        if not isinstance(module, WEIGHTED):
            same = (value.shape == self.shapes[source]
                    and not any(True for _ in module.parameters(recurse=False)))
            if not same:
                self._keep(seen, Kept.OTHER)
            return seen if same else self._of_shape(value, FIXED)
        axis = -1 if isinstance(module, nn.Linear) else 1
        columns, outputs = self._along(seen, axis, self.shapes[source][axis]), value.shape[axis]
        if name not in self.made:
            self.made[name] = torch.arange(len(self.parent), len(self.parent) + outputs)
            self.parent += self.made[name].tolist()
        mine, parts = self.made[name], getattr(module, "groups", 1)
        if isinstance(module, nn.ConvTranspose2d):
            self._keep(columns, Kept.TRANSPOSED)
            self._keep(mine, Kept.TRANSPOSED)
        elif parts == len(columns) == outputs > 1:
            self._join(mine, columns)  # depthwise: it makes what it reads
        elif parts == len(columns) > 1:
            self._keep(columns, Kept.GROUPED)
            self._keep(mine, Kept.GROUPED)
        else:
            # groups keep equal sizes: one of each goes
            for labels in (columns, mine) if parts > 1 else ():
                self._join(labels.view(parts, -1), labels.view(parts, -1)[:1])
            self._note(self.read, name, columns.view(parts, -1)[0])
        shape = [1] * value.dim()
        shape[axis] = outputs
        return mine.view(shape)

    def _together(self, parts: Sequence[fx.Node], value: Tensor) -> Tensor:
        """The labels where several values meet, number by number; one that is stretched over the
        others' channels has none."""
        size = value.dim()
        given = [(self.labels[part].view([1] * (size - self.labels[part].dim())
                                         + list(self.labels[part].shape)),
                  [1] * (size - len(self.shapes[part])) + list(self.shapes[part]))
                 for part in parts]
        varying = [d for d in range(size) if any(labels.shape[d] > 1 for labels, _ in given)]
        met = None
        for labels, shape in given:
            if any(shape[d] == 1 < value.shape[d] for d in varying):
                self._keep(labels, Kept.MIXED)
                continue
            if met is not None:
                self._join(met, labels)
                met, labels = torch.broadcast_tensors(met, labels)
                met = met.where(met > FIXED, labels)
            else:
                met = labels
        return self._of_shape(value, NOTHING) if met is None else met

    def _reduced(self, node: fx.Node, labels: Tensor, value: Tensor) -> Tensor:
        """The labels behind a mean or sum over some axes; channels that it goes over must stay."""
        chosen = next((arg for arg in node.args[1:] if isinstance(arg, list | tuple)), None)
        axes = [axis % labels.dim() for axis in (chosen or range(labels.dim()))]
        if any(labels.shape[axis] > 1 for axis in axes):
            self._keep(labels, Kept.NORMED)
            return self._of_shape(value, NOTHING)
        kept = value.dim() == labels.dim()
        return (labels if kept
                else labels.reshape([size for d, size in enumerate(labels.shape) if d not in axes]))

    def _moved(self, node: fx.Node, name: str, value):
        """The labels behind an operation that moves values: the same, done to the labels."""
        def whole(part: fx.Node):
            labels = self.labels[part]
            return (labels.expand(self.shapes[part]).contiguous() if isinstance(labels, Tensor)
                    else labels)

        if name in _REGROUPING:
            for part in node.all_input_nodes:
                if isinstance(self.labels.get(part), Tensor):
                    self.regrouped.update(self.labels[part].unique().tolist())
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), whole)
        if name in ("pad", "constant_pad_nd"):
            source, sides = self.labels[node.args[0]], node.args[1]
            axes = [source.dim() - 1 - place // 2 for place, side in enumerate(sides) if side]
            if not any(source.shape[axis] > 1 for axis in axes):
                return source
            self._keep(source, Kept.PADDED)
            return _narrow(F.pad(whole(node.args[0]), sides, value=NOTHING))
        moved = node.target(*args, **kwargs)
        return ([_narrow(part) for part in moved] if isinstance(moved, list | tuple)
                else _narrow(moved))

    def _of_shape(self, value, label: int):
        if isinstance(value, list | tuple):
            return [self._of_shape(part, label) for part in value]
        return torch.full([1] * value.dim(), label) if isinstance(value, Tensor) else value

    def _along(self, labels: Tensor, axis: int, size: int) -> Tensor:
        """The labels of the channels along an axis, (size,); where they vary along others too, they
        must stay."""
        if labels.numel() != labels.shape[axis]:
            self._keep(labels, Kept.SPLIT)
            return torch.full([size], FIXED)
        return labels.flatten().expand(size)

    def _note(self, part: dict[str, Tensor], name: str, labels: Tensor) -> None:
        """What a layer sees; a layer that runs twice sees one and the same."""
        if name in part:
            self._join(part[name], labels)
        else:
            part[name] = labels

    def _join(self, one: Tensor, other: Tensor) -> None:
        """Make labels that meet one; those that meet what is fixed must stay."""
        pairs = torch.stack([part.flatten() for part in torch.broadcast_tensors(one, other)],
                            dim=1).unique(dim=0)
        for a, b in pairs.tolist():
            if a > FIXED and b > FIXED:
                self.parent[self._find(a)] = self._find(b)
            elif max(a, b) > FIXED and min(a, b) == FIXED:
                self.reasons.setdefault(max(a, b), set()).add(Kept.OTHER)

    def _find(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = label = self.parent[self.parent[label]]
        return label

    def _keep(self, labels, why: Kept) -> None:
        for part in labels if isinstance(labels, list | tuple) else [labels]:
            for label in part.unique().tolist() if isinstance(part, Tensor) else []:
                if label > FIXED:
                    self.reasons.setdefault(label, set()).add(why)


def _narrow(labels: Tensor) -> Tensor:
    """The labels with size 1 along the axes where they are the same all along."""
    for axis in range(labels.dim()):
        if labels.shape[axis] > 1 and bool((labels == labels.narrow(axis, 0, 1)).all()):
            labels = labels.narrow(axis, 0, 1)
    return labels


def _places(labels: Tensor) -> dict[int, list[int]]:
    """Where each label stands, those of layers only."""
    found: dict[int, list[int]] = {}
    for place, label in enumerate(labels.tolist()):
        if label > FIXED:
            found.setdefault(label, []).append(place)
    return found


def _table(places: Mapping[int, list[int]], channels: Iterable[int]) -> Tensor | None:
    """The places of these channels, int64 (channels, places), -1 where one has fewer; None where
    there are none."""
    lines = [places.get(channel, []) for channel in channels]
    most = max(map(len, lines))
    return torch.tensor([line + [-1] * (most - len(line)) for line in lines]) if most else None


def _connected(made: Mapping[str, Mapping[int, list[int]]]) -> list[list[str]]:
    """Layers that make a channel in common, together, in their order."""
    parts: list[tuple[set[int], list[str]]] = []
    for name, places in made.items():
        mine, names = set(places), [name]
        for part in [part for part in parts if not part[0].isdisjoint(mine)]:
            parts.remove(part)
            mine, names = part[0] | mine, part[1] + names
        parts.append((mine, names))
    return [names for _, names in parts]
