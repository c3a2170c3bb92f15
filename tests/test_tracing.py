"""The tracer: every kind of model becomes a graph of its own layers that computes the same, for any
batch and length."""

import pytest
import torch
from torch import nn

from workbench.batches import answer, call
from workbench.errors import UnsupportedModelError
from workbench.graph.kinds import ends, is_layer
from workbench.graph.running import Runner, _overwrites
from workbench.graph.tracing import trace
from workbench.subjects.networks import Towers


def decoder():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=50, use_cache=False)
    ids = torch.randint(0, 50, (3, 9))
    return transformers.LlamaForCausalLM(config), {"input_ids": ids,
                                                   "attention_mask": torch.ones_like(ids)}


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4,
                                     vocab_size=50, num_labels=3)
    ids = torch.randint(1, 50, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return transformers.BertForSequenceClassification(config), {"input_ids": ids,
                                                                "attention_mask": mask}


def vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5,
                             depth=2), torch.randn(3, 3, 32, 32)


def towers():
    parts = {"signal": nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True)),
             "station": nn.Embedding(5, 16)}
    return Towers(parts, nn.Linear(32, 3)), {"signal": torch.randn(6, 8),
                                             "station": torch.randint(0, 5, (6,))}


def mobile():
    import torchvision

    return torchvision.models.mobilenet_v2(num_classes=5), torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize("make", [decoder, bert, vit, towers, mobile])
def test_a_graph_computes_what_the_model_does_as_a_whole_and_node_by_node(make):
    model, inputs = make()
    model.eval()
    one = {name: value[:1, :5] if value.dtype == torch.int64 and value.dim() > 1 else value[:1]
           for name, value in inputs.items()} \
        if isinstance(inputs, dict) else inputs[:1]
    graph, values = Runner(model, one), {}
    with torch.no_grad():
        feed = graph.feed(inputs)
        for i in range(len(graph.nodes) - 1):
            graph.step(i, values, feed)
        expected = answer(call(model, inputs))
        torch.testing.assert_close(graph.output(values), expected)
        torch.testing.assert_close(answer(call(trace(model, one), inputs)), expected)
    modules = dict(model.named_modules())
    assert all(graph.modules[n.target].weight is modules[n.target].weight for n in graph.nodes
               if is_layer(n, graph.modules))


def test_a_mask_is_not_taken_for_the_ids():
    model, inputs = bert()
    model.eval()
    other = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
    graph = trace(model, inputs)
    with torch.no_grad():
        assert (graph(**inputs)["logits"][1] - graph(**other)["logits"][1]).abs().max() > 1e-6
        assert torch.equal(graph(**inputs)["logits"][0], graph(**other)["logits"][0])


def test_tracing_leaves_the_models_mode_and_is_done_once():
    model, inputs = towers()
    model.train()
    first = trace(model, inputs)
    assert all(module.training for module in model.modules())
    assert trace(model, inputs) is first
    model.head = nn.Linear(32, 3)
    assert trace(model, inputs) is not first


def test_a_layer_of_a_librarys_own_class_pads_once():
    import timm

    # convolutions that pad by themselves
    model = timm.create_model("tf_efficientnet_lite0", num_classes=4).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(trace(model, images)(images), model(images))


def test_what_cannot_be_traced_is_one_line():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedModelError,
                       match="Branching cannot be traced .*; write its forward without "
                       "branches on values"):
        trace(Branching(), torch.ones(2, 3))


@pytest.mark.parametrize(("inputs", "message"), [
    ({"signal": torch.zeros(1, 8)}, "input 'station' is missing"),
    ({"signal": torch.zeros(1, 8), "station": torch.zeros(1).long(), "sound": torch.zeros(1)},
     "input 'sound' is not the model's")])
def test_a_missing_or_unknown_input_is_named(inputs, message):
    model, known = towers()
    with pytest.raises(ValueError, match=message):
        Runner(model.eval(), known).feed(inputs)


def test_where_a_relu_cuts_is_read_from_the_graph():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU6(), nn.Linear(2, 2), nn.Hardtanh(-2, 3),
                          nn.Linear(2, 2), nn.ReLU())
    found = [ends(node) for node in trace(model.eval(), torch.zeros(2, 2)).graph.nodes
             if ends(node)]
    assert found == [(0.0, 6.0), (-2.0, 3.0), (0.0, float("inf"))]


def test_a_norm_without_a_bias_is_a_layer_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 2)).eval()
    graph = trace(model, torch.zeros(2, 4)).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1", "2"]


def test_a_branch_overwrites_nothing_that_others_read():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            return self.b(torch.relu(self.norm(y)) + y) + y

    model, x = Residual().eval(), torch.randn(5, 4)
    graph, values = Runner(model, x), {}
    feed = graph.feed(x)
    with torch.no_grad():
        for i in range(graph.place["norm"]):
            graph.step(i, values, feed)
        kept = {node: value.clone() for node, value in values.items()}
        found = graph.finish(graph.place["norm"], dict(values), feed, {"norm": nn.Identity()})
        y = model.a(x)
        torch.testing.assert_close(found, model.b(torch.relu(y) + y) + y)
        assert all(torch.equal(values[node], value) for node, value in kept.items())


def test_a_sum_is_written_over_an_operand_of_its_own_kind_and_shape_only():
    a, wide, half = torch.ones(2), torch.ones(3, 2), torch.ones(2, dtype=torch.float16)
    assert _overwrites((a, a.clone()))
    assert not _overwrites((a, wide))
    assert not _overwrites((half, a))
    assert not _overwrites((a, 1.0))


class Odd(nn.Module):
    """Two layers with something between them that a graph of values may lose."""

    def __init__(self, change):
        super().__init__()
        self.a, self.b, self.change = nn.Linear(4, 4), nn.Linear(4, 2), change

    def forward(self, x):
        y = self.a(x)
        return self.b(self.change(y))


def _written(y):
    y[:, 0] = 0
    y[:, 1:].mul_(2)[:, 1:].add_(y[:, :2])
    return y


def test_slices_that_are_written_in_place_are_followed():
    model, x = Odd(_written).eval(), torch.randn(3, 4)
    torch.testing.assert_close(trace(model, x)(x), model(x))
    more = torch.randn(7, 4)
    torch.testing.assert_close(trace(model, x)(more), model(more))


class Within(nn.Module):
    """A forward in parts, of which one runs in a context or behind a branch."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way

    def forward(self, x):
        if self.way == "branch":
            return torch.cond(x.sum() > 0, self.first, self.second, (x,))
        with torch.autocast("cpu", dtype=torch.bfloat16,
                            enabled=self.way == "on"), torch.enable_grad():
            return self.second(self.first(x))


def test_what_runs_without_autocast_is_part_of_the_graph():
    model, x = Within("off").eval(), torch.randn(3, 4)
    graph = trace(model, x)
    torch.testing.assert_close(graph(x), model(x))
    assert [node.target for node in graph.graph.nodes
            if node.op == "call_module"] == ["first", "second"]


@pytest.mark.parametrize(("way", "message"), [("on", "turns autocast on"),
                                              ("branch", "a branch or loop within its graph")])
def test_autocast_and_branches_within_a_forward_are_refused(way, message):
    with pytest.raises(UnsupportedModelError, match=message):
        trace(Within(way).eval(), torch.randn(3, 4))


@pytest.mark.parametrize("change", [lambda y: (y.t().mul_(2), y)[1],
                                    lambda y: y + torch.randn_like(y)], ids=["view", "chance"])
def test_a_graph_that_answers_otherwise_is_refused(change):
    with pytest.raises(UnsupportedModelError, match="Odd: its traced graph answers otherwise than "
                       "the model does .*in place"):
        trace(Odd(change), torch.randn(3, 4))


def test_a_forward_that_fixes_the_number_of_examples_is_refused():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(len(x), -1)

    with pytest.raises(UnsupportedModelError, match="Fixed fixes the number of examples of 'x'; .* "
                       "instead of len"):
        trace(Fixed(), torch.randn(3, 4, 2))
