"""Convolutions fused with what follows them: the same numbers up to rounding, and a tie is decided
as the model decides it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from workbench.graph.branching import Branching
from workbench.graph.fusing import fusions
from workbench.graph.running import Runner


class Block(nn.Module):
    """Convolutions in all the company that a kernel can compute with them, and in some that it
    cannot."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.wide = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8)
        self.swish, self.curve = nn.Conv2d(8, 8, 1), nn.SiLU()
        self.hard, self.cut = nn.Conv2d(8, 8, 3, 1, 2, 2), nn.ReLU6()
        self.late, self.last, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.wide(self.depthwise(x)) + x)  # the sum is in the kernel
        z = self.curve(self.swish(y)) + self.cut(self.hard(y))
        # the sum is in the kernel, this activation behind it not
        z = nn.functional.relu6(self.late(z) + z)
        z = self.last(z) + y.mean((2, 3), keepdim=True)  # of another shape: not in the kernel
        return self.head(z.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Block().eval()
    for norm in (made.norm, made.wide):
        nn.init.uniform_(norm.weight)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return made


def test_fused_kernels_compute_what_the_nodes_do(model):
    x = torch.randn(4, 3, 16, 16)
    graph = Runner(model, x)
    found = fusions(graph)
    covered = {graph.nodes[i].target: (fused.activation[0], fused.other is not None)
               for i, fused in found.items()}
    assert covered == {"stem": ("relu", False), "depthwise": ("relu", True),
                       "swish": ("swish", False),
                       "hard": ("hardtanh", False), "late": ("none", True)}
    with torch.no_grad():
        torch.testing.assert_close(graph.finish(0, {}, graph.feed(x), {}, found), model(x))
        other = nn.Identity()  # a module of a kernel is replaced: the nodes run by themselves
        expected = graph.finish(0, {}, graph.feed(x), {"norm": other})
        torch.testing.assert_close(graph.finish(0, {}, graph.feed(x), {"norm": other}, found),
                                   expected)


def test_a_branch_near_a_tie_is_computed_as_the_model_does(model):
    x = torch.randn(4, 3, 16, 16)
    run = Branching(model, x, fused=True)
    same = {"stem": model.stem}
    with torch.no_grad():
        base, outputs = run(x, [same])
        assert run.again == 0
        torch.testing.assert_close(outputs[0], base)
        model.head.weight.data[1], model.head.bias.data[1] = model.head.weight[0] * (
            1 + 1e-7), model.head.bias[0]
        model.head.bias.data[:2] += 10  # now the two largest logits differ by rounding only
        base, outputs = run(x, [same])
    assert run.again == 1
    assert torch.equal(outputs[0], model(x))


@pytest.mark.parametrize(("logits", "near"), [([[1.0, 1.0]], True), ([[1.0, -1.0]], False),
                                              ([[1.0]], False)])
def test_two_answers_can_be_as_good_as_equal_and_one_cannot(logits, near):
    assert Branching._near_tie(SimpleNamespace(error=1e-7), torch.tensor(logits)) == near
