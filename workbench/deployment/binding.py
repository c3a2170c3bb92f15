"""An ONNX file that is run hop after hop on memory of its own.

Asked a thousand times a second, a small network waits longer for the lookup and the copies of a run
than for its numbers. Here nothing is looked up: the state that one run writes is what the next one
reads, by turns in two places (ONNX Runtime's IO binding).
"""

from collections.abc import Mapping

from torch import Tensor

from workbench.deployment.sessions import OnnxSession


class Bound:
    """`session` with places for its one input, its outputs and its state, of fixed shapes.

    source: the input's name; samples, outputs: what a run was given and made, of which types and
    shapes are taken; state: which output goes into which input; now: the state to begin with, by
    input name.

    Example: `Bound(session, "samples", hop, made, {"present_gate": "past_gate"}, stream.now)`
    """

    def __init__(self, session: OnnxSession, source: str, samples: Tensor,
                 outputs: Mapping[str, Tensor], state: Mapping[str, str],
                 now: Mapping[str, Tensor]):
        self.run, self.turn = session.session.run_with_iobinding, 0
        self.samples = samples.contiguous().clone()
        self.outputs = {name: value.contiguous().clone() for name, value in outputs.items()}
        # two places: the next run reads that whose turn it is, and writes the other
        self.kept = [{name: now[name].contiguous().clone() for name in state.values()}
                     for _ in range(2)]
        self.bindings = []
        for read, written in (self.kept, self.kept[::-1]):
            binding = session.session.io_binding()
            for name, place in {source: self.samples, **read}.items():
                binding.bind_input(name, "cpu", 0, place.numpy().dtype.type, place.shape,
                                   place.data_ptr())
            behind = {output: written[name] for output, name in state.items()}
            for name, place in {**self.outputs, **behind}.items():
                binding.bind_output(name, "cpu", 0, place.numpy().dtype.type, place.shape,
                                    place.data_ptr())
            self.bindings.append(binding)

    def __call__(self, samples: Tensor) -> dict[str, Tensor]:
        """The outputs for samples of the shape and type of the first."""
        self.samples.copy_(samples)
        self.run(self.bindings[self.turn])
        self.turn = 1 - self.turn
        return {name: value.clone() for name, value in self.outputs.items()}

    def now(self) -> dict[str, Tensor]:
        """The state behind the last run, by input name, a copy."""
        return {name: value.clone() for name, value in self.kept[self.turn].items()}
