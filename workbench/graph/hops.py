"""Where a value stands in time, and the graph that keeps what a stream has to remember from hop to
hop."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

aten = torch.ops.aten
# samples that came before this hop; samples of the whole recording
SEEN, UNTIL = "past_seen", "past_until"
ENDLESS = 2**40  # samples, where its end is not known yet


@dataclass(frozen=True)
class Track:
    """The place of a value in time. axis: of time, from the end, None where one value stands for
    all that was heard; every: samples a step; late: by how many steps it comes late.

    lengths: (added, stride) of the layers on the way, of which its length follows; reach: of how
    many samples a step is made, infinite behind a recurrent layer; zero: whether steps outside of
    the recording are zeros.

    Example: `Track(lengths=((2, 2), (0, 3))).length(100) == 18`
    """

    axis: int | None = -1
    every: int = 1
    late: int = 0
    lengths: tuple[tuple[int, int], ...] = ()
    reach: float = 1
    zero: bool = False

    def length(self, samples: int) -> int:
        """How many steps a recording of so many samples has."""
        for added, stride in self.lengths:
            samples = (samples + added) // stride + 1
        return samples


@dataclass(frozen=True)
class Timing:
    """What is known of a streaming network. hop: samples that it takes, along `axis` of the input
    called `source`; start: its state before the first sample, of one recording, by input name;
    tracks: of its outputs, by name.

    Example: `Timing(80, -1, "samples", {}, {}).hop == 80`
    """

    hop: int
    axis: int
    source: str
    start: Mapping[str, Tensor]
    tracks: Mapping[str, Track]


class HopGraph(fx.Graph):
    """A graph of one hop. inputs: of its state, by name; start: the state before the first sample;
    behind: that behind a hop.

    Example: `HopGraph(80).hop == 80`
    """

    def __init__(self, hop: int):
        super().__init__()
        self.hop, self.first = hop, None
        self.inputs: dict[str, fx.Node] = {}
        self.start: dict[str, Tensor] = {}
        self.behind: dict[str, fx.Node] = {}
        self._masks: dict[tuple, fx.Node] = {}

    def steps(self, track: Track) -> int:
        """How many steps of a value there are in a hop."""
        return self.hop // track.every

    def state(self, name: str, start: Tensor) -> fx.Node:
        """A new input, for what is kept of earlier hops."""
        name += "_" * sum(known.rstrip("_") == name for known in self.inputs)
        with self.inserting_after(next(reversed(self.inputs.values()), self.first)):
            self.inputs[name] = self.placeholder(name)
        self.start[name] = start
        return self.inputs[name]

    def seen(self) -> fx.Node:
        """How many samples came before, int64 (n,)."""
        if SEEN not in self.inputs:
            before = self.state(SEEN, torch.zeros(1, dtype=torch.int64))
            with self.inserting_after(before):
                self.behind[SEEN] = self.call_function(aten.add.Tensor, (before, self.hop))
        return self.inputs[SEEN]

    def length(self, track: Track) -> fx.Node:
        """How many steps the recording has in all, int64 (n,)."""
        if UNTIL not in self.inputs:
            until = self.state(UNTIL, torch.full((1,), ENDLESS))
            with self.inserting_after(until):
                self.behind[UNTIL] = self.call_function(aten.mul.Tensor, (until, 1))
        made = self.inputs[UNTIL]
        for added, stride in track.lengths:
            made = self.call_function(aten.add.Tensor, (made, added))
            made = self.call_function(aten.add.Tensor, (self._divided(made, stride), 1))
        return made

    def heard(self, track: Track) -> fx.Node:
        """How many steps of the recording there are up to the end of this hop, int64 (n,)."""
        passed = self._divided(self.call_function(aten.add.Tensor, (self.seen(), self.hop)),
                               track.every)
        late = self.call_function(aten.sub.Tensor, (passed, track.late))
        return self.call_function(aten.minimum.default, (late, self.length(track)))

    def within(self, value: fx.Node, track: Track, dims: int, fill: float) -> fx.Node:
        """The value, of so many axes, with `fill` at steps outside of the recording."""
        call, key = self.call_function, (track.every, track.late, track.lengths)
        if key not in self._masks:
            first = self._divided(self.seen(), track.every)
            slots = call(aten.arange.start, (-track.late, self.steps(track) - track.late))
            places = call(aten.add.Tensor, (call(aten.reshape.default, (first, [-1, 1])), slots))
            length = call(aten.reshape.default, (self.length(track), [-1, 1]))
            self._masks[key] = call(aten.logical_and.default, (call(aten.ge.Scalar, (places, 0)),
                                                               call(aten.lt.Tensor,
                                                                    (places, length))))
        shape = [-1] + [1] * (dims - 1)
        shape[track.axis] = self.steps(track)
        return call(aten.where.ScalarOther,
                    (call(aten.reshape.default, (self._masks[key], shape)), value, fill))

    def joined(self, value: fx.Node, track: Track, kept: int, like: Mapping, name: str,
               fill: float = 0.0) -> fx.Node:
        """The steps of this hop behind the last `kept` ones before it; like: shape and dtype of the
        value."""
        if kept <= 0:
            return value
        sizes = [1 if size is None else size for size in like["shape"]]
        sizes[0], sizes[track.axis] = 1, kept
        before = self.state(f"past_{name}", torch.full(sizes, fill, dtype=like.get("dtype")))
        whole = self.call_function(aten.cat.default, ([before, value], track.axis))
        self.behind[before.target] = self.cut(whole, track.axis, self.steps(track),
                                              self.steps(track) + kept)
        return whole

    def delayed(self, value: fx.Node, track: Track, steps: int, like: Mapping,
                name: str) -> tuple[fx.Node, Track]:
        """The value, so many steps later."""
        if not steps:
            return value, track
        whole = self.joined(value, track, steps, like, name)
        return self.cut(whole, track.axis, 0, self.steps(track)), replace(track,
                                                                          late=track.late + steps)

    def _divided(self, value: fx.Node, by: int) -> fx.Node:
        return (self.call_function(aten.div.Tensor_mode, (value, by), {"rounding_mode": "trunc"})
                if by > 1 else value)

    def cut(self, value: fx.Node, axis: int, start: int, end: int) -> fx.Node:
        """The steps from `start` to `end`."""
        return self.call_function(aten.slice.Tensor, (value, axis, start, end))
