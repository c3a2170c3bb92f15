"""A traced model that runs once per batch, and from wherever a change begins once more to the
end."""

from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from workbench.batches import Inputs
from workbench.errors import UnsupportedModelError
from workbench.graph.fusing import fusions
from workbench.graph.layers import Masked
from workbench.graph.running import Runner

# two logits may tie where they lie closer than this many times the error of the fused kernels
NEAR = 16


class Branching:
    """A traced model that runs once per batch and branches wherever a change begins, `changes`
    being modules by name.

    fused: convolutions in a branch are computed with what follows them (`fusing`), which rounds
    otherwise than the model does. recount: a branch with an answer so near to a tie that rounding
    could decide it is then computed again as the model does: where the two largest logits lie
    closer than `NEAR` times the largest error seen, relative to the largest logit.

    Example: `len(Branching(model, x)(inputs, [{"layer1.1.conv2": nn.Identity()}])[1]) == 1`
    """

    def __init__(self, model: nn.Module, example: Inputs, *, fused: bool = False,
                 recount: bool = True):
        self.graph = Runner(model, example)
        self.fused = fusions(self.graph) if fused else {}
        self.recount, self.error, self.again = recount and bool(self.fused), 0.0, 0

    def __call__(self, inputs: Inputs,
                 changes: Sequence[Mapping[str, nn.Module]]) -> tuple[Tensor, list[Tensor]]:
        """The unchanged model's answer (n, ...), and that with each change."""
        feed, last = self.graph.feed(inputs), len(self.graph.nodes) - 1
        if self.recount and not self.error:
            self._learn(self.graph.finish(0, {}, feed, {}),
                        self.graph.finish(0, {}, feed, {}, self.fused))
        starts = [min(map(self._place, modules), default=last) for modules in changes]
        waiting: dict[int, list[int]] = {}
        for index, start in enumerate(starts):
            waiting.setdefault(start, []).append(index)
        values: dict[fx.Node, object] = {}
        outputs: list[Tensor | None] = [None] * len(changes)
        for i in range(last + 1):
            before = dict(values)
            if i < last:
                self.graph.step(i, values, feed)
            for index in waiting.get(i, ()):
                outputs[index] = self._branch(i, before, values, feed, changes[index])
        return self.graph.output(values), outputs

    def _branch(self, i: int, before: Mapping, after: Mapping, feed: Mapping,
                modules: Mapping[str, nn.Module]) -> Tensor:
        """The answer with some modules replaced, the first at node i; the values before that node
        and behind it are known."""
        node = self.graph.nodes[i]
        changed = modules.get(node.target)
        masked = isinstance(changed, Masked)  # what it computes is there already
        known = {**before, node: changed.of_output(after[node])} if masked else before
        output = self.graph.finish(i + masked, dict(known), feed, modules, self.fused)
        if self.recount and self._near_tie(output):
            again = self.graph.finish(i + masked, dict(known), feed, modules)
            self._learn(again, output)
            self.again += 1
            return again
        return output

    def _near_tie(self, output: Tensor) -> bool:
        if output.shape[-1] < 2:
            return False
        top = output.topk(2, dim=-1).values
        gap, largest = top[..., 0] - top[..., 1], output.abs().amax(-1)
        return not bool((gap > NEAR * self.error * largest).all())  # a NaN is computed again too

    def _learn(self, wanted: Tensor, got: Tensor) -> None:
        """Keep the largest error relative to an example's largest logit."""
        error = ((got - wanted).abs().amax(-1)
                 / wanted.abs().amax(-1).clamp_min(1e-30)).nan_to_num().max().item()
        self.error = max(self.error, error, 1e-8)

    def _place(self, name: str) -> int:
        if name not in self.graph.place:
            raise UnsupportedModelError(f"layer {name} is not called as a module of its own, so "
                                        "nothing can branch there; use mode 'plain'")
        return self.graph.place[name]
