"""Streams: a network over time that answers hop by hop, as a module or as an ONNX file, and
computes what the whole one does.

`stream` converts a network (how, workbench.graph.streams tells), `export` writes it with its state
as named inputs and outputs, in 8 bits where the network is quantised, `Stream` feeds either.

Example: `streaming.Stream(streaming.export(streaming.stream(model, recording, hop=160),
"model.onnx"))(samples)`
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from workbench.batches import answer, count
from workbench.deployment import onnx, sessions, surgery
from workbench.deployment.binding import Bound
from workbench.errors import UnsupportedModelError, listed
from workbench.graph.hops import UNTIL, Timing, Track
from workbench.graph.streams import stream

__all__ = ["Stream", "export", "stream"]
TOLD = "workbench.stream"  # under which a file tells of its hop, its outputs and its state
PROOF_HOPS = 8  # that a file with states of 8 bits is compared on


class Stream(sessions.Stateful):
    """A network of `stream`, or a file of `export`, that is fed hop by hop and keeps its state, in
    `now`.

    hop: samples that it takes; late: by how many samples its answer comes late; every: samples that
    one step of it stands for; reach: of how many samples one is made. threads: as sessions.open has
    it.

    Raises ValueError for a model that does not stream.

    Example: `Stream("model.onnx", threads=1)(samples)`
    """

    _bound: Bound | None = None  # what a file runs on, from its second hop on

    def __init__(self, source, *, threads: int | None = None):
        session = sessions.open(source, threads=threads)
        module = getattr(session, "model", None)
        timing = module.meta.get("timing") if isinstance(module, fx.GraphModule) else _told(session)
        if timing is None:
            raise ValueError(f"{session.name} does not stream; convert it by "
                             "streaming.stream(model, example, hop=...)")
        super().__init__(session, {_behind(name): name for name in timing.start},
                         start=timing.start)
        self.timing, self.hop = timing, timing.hop
        answered = timing.tracks["logits" if "logits" in timing.tracks
                                 else next(iter(timing.tracks))]
        self.late, self.every, self.reach = (answered.late * answered.every, answered.every,
                                             answered.reach)
        self.reset()

    def __call__(self, samples: Tensor) -> Tensor:
        """The answer to one hop, (n, ...): as many steps as it holds, each `late` samples late."""
        return answer(self.outputs(samples))

    def outputs(self, samples: Tensor) -> dict[str, Tensor]:
        """All outputs of one hop by name. Raises ValueError for another number of samples."""
        bound = self._bound
        if bound and samples.shape == bound.samples.shape and samples.dtype == bound.samples.dtype:
            return bound(samples)
        if samples.shape[self.timing.axis] != self.hop:
            raise ValueError(f"{self.session.name} takes hops of {self.hop} samples, found "
                             f"{samples.shape[self.timing.axis]}")
        self.now = self.now or self._start(count(samples))
        made = super().outputs({self.timing.source: samples})
        if isinstance(self.session, sessions.OnnxSession):
            self._bound = Bound(self.session, self.timing.source, samples, made, self.state,
                                self.now)
        return made

    @property
    def now(self) -> dict[str, Tensor]:
        """The state behind the last hop, by name; empty before the first."""
        return self._now if self._bound is None else self._bound.now()

    @now.setter
    def now(self, state: dict[str, Tensor]) -> None:
        self._now, self._bound = state, None

    def whole(self, recording: Tensor) -> dict[str, Tensor]:
        """The outputs for whole recordings (n, ..., T) from their first sample, by name, as the
        network before its conversion gives them; afterwards it begins anew."""
        axis, samples = self.timing.axis, recording.shape[self.timing.axis]
        hops = max(-(-(track.length(samples) + track.late) * track.every // self.hop)
                   for track in self.timing.tracks.values())
        filled = torch.nn.functional.pad(recording,
                                         (0, 0) * (-axis - 1)
                                         + (0, max(hops * self.hop - samples, 0)))
        self.now = self._start(len(recording))
        if UNTIL in self.now:
            self.now[UNTIL] = torch.full_like(self.now[UNTIL], samples)
        made = [self.outputs(hop) for hop in filled.split(self.hop, axis)[:hops]]
        self.reset()
        return {name: made[-1][name] if track.axis is None else
                torch.cat([one[name] for one in made], track.axis).narrow(track.axis, track.late,
                                                                          track.length(samples))
                for name, track in self.timing.tracks.items()}

    def _start(self, recordings: int) -> dict[str, Tensor]:
        """The state before the first sample, of so many recordings side by side."""
        return {name: _repeated(value, recordings) for name, value in self.start.items()}

    def reset(self) -> None:
        """Begin anew, before the first sample, with any number of recordings."""
        self.now = {}

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `now` held. Raises ValueError for the state of another
        network."""
        for name, start in self.start.items():
            value = state.get(name)
            if value is None or value.shape[1:] != start.shape[1:] or value.dtype != start.dtype:
                found = "nothing" if value is None else f"{tuple(value.shape)} of {value.dtype}"
                raise ValueError(f"{self.session.name}: this is a state of another network: {name} "
                                 f"is {found}, expected {('n', *start.shape[1:])} of {start.dtype}")
        odd = [name for name in state if name not in self.start]
        if odd:
            raise ValueError(f"{self.session.name}: this is a state of another network: it keeps "
                             f"no {odd[0]!r}, only {listed(self.start)}")
        self.now = dict(state)


def export(network: nn.Module, path: Path | str, *, tolerance: float | None = None,
           told: Mapping[str, str] | None = None) -> Path:
    """Write a network of `stream` as an ONNX file; return its path. It takes any number of
    recordings side by side.

    Inputs: a hop of samples and the state (`past_...`); outputs: the network's, and the state
    behind the hop (`present_...`). What a quantised layer keeps is kept in 8 bits. told: what else
    the file says of itself. Raises as onnx.export does, ValueError for a network that does not
    stream.

    Example: `streaming.export(streaming.stream(model, recording, hop=160), "model.onnx")`
    """
    timing = getattr(network, "meta", {}).get("timing")
    if timing is None:
        raise ValueError(f"{type(network).__name__} does not stream; convert it by "
                         "streaming.stream(model, example, hop=...)")
    entry = next(node for node in network.graph.nodes if node.op == "placeholder")
    shape = [2, *entry.meta["shape"][1:]]
    shape[timing.axis] = timing.hop
    draw = torch.Generator().manual_seed(0)
    example = {timing.source: 0.1 * torch.randn(shape, generator=draw),
               **{name: _repeated(value, 2) for name, value in timing.start.items()}}
    written = onnx.export(network, example, path, tolerance=tolerance,
                          told=_metadata(timing, {}) | dict(told or {}))
    kept = _keep_integers(written, timing)
    if kept:
        _prove(network, written, shape, kept)
    return written


def _behind(name: str) -> str:
    """What the output is called that is the state behind a hop."""
    return name.replace("past", "present", 1)


def _repeated(value: Tensor, recordings: int) -> Tensor:
    return value.repeat(recordings, *[1] * (value.dim() - 1))


def _metadata(timing: Timing, fills: Mapping[str, int]) -> dict[str, str]:
    """What a file tells of itself. fills: the zero points of states in 8 bits, by name."""
    start = {name: fills.get(name, value.flatten()[0].item())
             for name, value in timing.start.items()}
    return {TOLD: json.dumps({"hop": timing.hop, "axis": timing.axis, "source": timing.source,
                              "start": start,
                              "tracks": {name: asdict(track)
                                         for name, track in timing.tracks.items()}})}


def _told(session: sessions.Session) -> Timing | None:
    """What a file tells of its stream, None where it is none."""
    if not isinstance(session, sessions.OnnxSession):
        return None
    known = session.session.get_modelmeta().custom_metadata_map.get(TOLD)
    if known is None:
        return None
    known = json.loads(known)
    kinds = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64,
             "tensor(uint8)": torch.uint8,
             "tensor(int8)": torch.int8}
    start = {name: torch.full((1, *session.inputs[name].shape[1:]), fill,
                              dtype=kinds[session.inputs[name].type])
             for name, fill in known["start"].items()}
    tracks = {name: Track(**{**track, "lengths": tuple(map(tuple, track["lengths"]))})
              for name, track in known["tracks"].items()}
    return Timing(known["hop"], known["axis"], known["source"], start, tracks)


def _keep_integers(path: Path, timing: Timing) -> list[str]:
    """Let the file at `path` keep the integers of what is quantised before it is kept; the names of
    these states."""
    model, fills = ir.load(path), {}
    for join in [node for node in model.graph if node.op_type == "Concat"
                 and len(node.inputs) == 2]:
        state, made = join.inputs[0], join.inputs[1].producer()
        if not state.is_graph_input() or made is None or made.op_type != "DequantizeLinear":
            continue
        fills[state.name] = _joined_integers(model, join, made)
    if fills:
        for value in (value for node in model.graph for value in node.outputs
                      if not value.is_graph_output()):
            value.type = value.shape = None  # not known any more
        model.metadata_props.update(_metadata(timing, fills))
        ir.save(model, path)
    return list(fills)


def _joined_integers(model: ir.Model, join: ir.Node, made: ir.Node) -> int:
    """Join the integers of a state and of a hop, and make floats of them behind that; their zero
    point."""
    integers, *grid = made.inputs
    zero, state = grid[1].const_value.numpy(), join.inputs[0]
    state.dtype = ir.DataType(grid[1].const_value.dtype)
    whole = ir.node("Concat", [state, integers],
                    attributes={"axis": join.attributes.get_int("axis", 0)})
    model.graph.insert_before(join, whole)
    for use in list(join.outputs[0].uses()):
        reader = use.node
        if reader.op_type != "Slice":
            floats = ir.node("DequantizeLinear", [whole.outputs[0], *grid])
            model.graph.insert_before(reader, floats)
            reader.replace_input_with(use.idx, floats.outputs[0])
            continue
        cut = ir.node("Slice", [whole.outputs[0], *reader.inputs[1:]])
        if reader.outputs[0].is_graph_output():
            surgery.replace(model, reader, cut)
            cut.outputs[0].dtype = state.dtype
        else:
            model.graph.insert_before(reader, cut)
            surgery.replace(model, reader, ir.node("DequantizeLinear", [cut.outputs[0], *grid]))
    if not join.outputs[0].uses():
        model.graph.remove(join, safe=True)
    return int(zero)


def _prove(network: nn.Module, path: Path, shape: list[int], kept: list[str]) -> None:
    """Raise UnsupportedModelError where the file with these states in 8 bits answers otherwise than
    the module, hop after hop."""
    draw, ours, file = torch.Generator().manual_seed(1), Stream(network), Stream(path)
    for place in range(PROOF_HOPS):
        samples = torch.randn(shape, generator=draw)
        wanted, found = ours(samples), file(samples)
        distance = float((wanted - found).norm() / wanted.norm().clamp_min(1e-12))
        if not distance <= onnx.QUANTISED_TOLERANCE:
            path.unlink()
            raise UnsupportedModelError(f"{path}: with {kept[0]} in 8 bits it answers hop {place} "
                                        "otherwise than the module: relative L2 distance "
                                        f"{distance:.3g}")
