"""Export and sessions: any batch size, nothing half-written, one line for what is refused."""

import onnx as onnx_library
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from workbench import machine
from workbench.deployment import capture, nodes, onnx, sessions, surgery
from workbench.errors import UnsupportedModelError
from workbench.graph import layers
from workbench.measures import equivalence, peers
from workbench.methods.quantization import quantize

EXAMPLE = torch.zeros(1, 1, 28, 28)


@pytest.fixture
def exported(network, tmp_path):
    return onnx.export(network, EXAMPLE, tmp_path / "network.onnx")


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_one_file_serves_every_batch_size(network, exported, batch):
    images = torch.randn(batch, 1, 28, 28)
    assert torch.allclose(sessions.open(exported)(images), network(images), atol=1e-5)


def test_export_leaves_the_model_in_training_mode_if_it_was(network, tmp_path):
    onnx.export(network.train(), EXAMPLE, tmp_path / "network.onnx")
    assert network.training


def test_a_model_that_cannot_be_exported_leaves_no_file(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return x * float(x.sum().item() > 0) if x.sum() > 0 else x.flatten(1)

    with pytest.raises(UnsupportedModelError, match="Odd cannot be exported to ONNX"):
        onnx.export(Odd(), EXAMPLE, tmp_path / "odd.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_shapes_contradict_each_other_is_not_written(network, tmp_path, monkeypatch):
    finish = surgery.finish

    def spoilt(*given, **named):
        model = finish(*given, **named)
        model.graph.outputs[0].shape = ir.Shape([7, 7])
        return model

    monkeypatch.setattr(surgery, "finish", spoilt)
    with pytest.raises(UnsupportedModelError, match="cannot be exported to ONNX"):
        onnx.export(network, EXAMPLE, tmp_path / "odd.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_refused(exported):
    exported.write_bytes(exported.read_bytes()[:1000])
    with pytest.raises(ValueError, match="network.onnx is not an ONNX file that ONNX "
                       "Runtime can open"):
        sessions.open(exported)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 28, 28, 28), (784,)])
def test_a_batch_of_the_wrong_shape_is_refused_with_that_shape(network, exported, kind, shape):
    session = sessions.open(network if kind == "torch" else exported, name="mine")
    with pytest.raises(ValueError, match=r"mine refuses a batch of shape \(" + str(shape[0])):
        session(torch.zeros(shape))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sessions.open(tmp_path / "none.onnx")
    with pytest.raises(TypeError, match="is no model"):
        sessions.open(3)
    with pytest.raises(ValueError, match=f"expected 1 to {machine.cores()}"):
        sessions.open(torch.nn.Identity(), threads=machine.cores() + 1)
    with pytest.raises(ValueError, match=r"put out torch.Size\(\[1\]\) for 2 examples"):
        sessions.open(lambda x: x.sum().view(1))(torch.zeros(2, 3))


def test_a_file_without_layer_names_is_refused(network, exported):
    import onnx as standard

    stored = standard.load(str(exported))
    for tensor in stored.graph.initializer:
        for node in stored.graph.node:
            node.input[:] = [f"w_{tensor.name.replace('.', '_')}" if i == tensor.name else i
                             for i in node.input]
        tensor.name = f"w_{tensor.name.replace('.', '_')}"
    standard.save(stored, str(exported))
    with pytest.raises(UnsupportedModelError, match="no node has a weight called LAYER.weight"):
        sessions.open(exported).activations(EXAMPLE)


def test_named_layers_follow_globs_and_refuse_what_matches_nothing(model):
    assert list(layers.named(model, "layer3.2.*")) == ["layer3.2.conv1", "layer3.2.conv2"]
    with pytest.raises(ValueError, match=r"no layer matches 'layer9\.\*'; the layers are conv1, "
                       r"layer1.0.conv1"):
        layers.named(model, "layer9.*")


def test_replacing_a_layer_leaves_the_model(network):
    before = network[5].weight.clone()
    new = layers.replaced(network, "5", torch.nn.Identity())
    assert isinstance(new[5], torch.nn.Identity)
    assert torch.equal(network[5].weight, before)
    with pytest.raises(ValueError, match="no layer 'nine'"):
        layers.replaced(network, "nine", torch.nn.Identity())


def test_capture_takes_its_hooks_away(network):
    with pytest.raises(ZeroDivisionError), layers.capture(network):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in network.modules())


@pytest.fixture(scope="module")
def trained(model, task, tmp_path_factory):
    return onnx.export(model, task.example, tmp_path_factory.mktemp("onnx") / "resnet20.onnx")


@pytest.mark.parametrize("calibrator", list(peers.CALIBRATORS))
def test_the_runtimes_own_static_quantisation_answers_as_float_does(trained, tiny, tmp_path,
                                                                    calibrator):
    path = peers.quantize_static(trained, tiny.validation.batches(50), tmp_path / "static.onnx",
                                 calibrator=calibrator)
    images, _ = next(tiny.test.batches(200))
    same = sessions.open(path)(images).argmax(1) == sessions.open(trained)(images).argmax(1)
    assert same.float().mean() > 0.85
    assert path.stat().st_size < 0.6 * trained.stat().st_size


def test_the_runtimes_own_dynamic_quantisation_answers_as_float_does(trained, tiny, tmp_path):
    path = peers.quantize_dynamic(trained, tmp_path / "dynamic.onnx")
    images, _ = next(tiny.test.batches(200))
    assert (sessions.open(path)(images).argmax(1) == sessions.open(trained)(images).argmax(
        1)).float().mean() > 0.95


def test_static_quantisation_refuses_what_it_cannot_use(trained, tmp_path):
    with pytest.raises(ValueError, match="unknown calibrator 'mse'; ONNX Runtime has minmax, "
                       "entropy, percentile"):
        peers.quantize_static(trained, [], tmp_path / "s.onnx", calibrator="mse")
    with pytest.raises(ValueError, match="calibration saw no examples"):
        peers.quantize_static(trained, [], tmp_path / "s.onnx")
    with pytest.raises(FileNotFoundError):
        peers.quantize_dynamic(tmp_path / "none.onnx", tmp_path / "s.onnx")
    assert not list(tmp_path.iterdir())


def test_an_activation_that_the_integers_end_at_is_left_out_and_any_other_is_kept(tmp_path):
    import onnx as format

    from workbench.methods import quantization
    from workbench.numbers.quantizers import quantizers

    torch.manual_seed(0)
    images = 20 * torch.randn(40, 3, 8, 8)  # far beyond 6 on both sides
    # the last ends between integers
    for wide, kept in ((nn.ReLU6(), 0), (nn.ReLU(), 0), (nn.Hardtanh(-1.0, 3.0), 1)):
        net = nn.Sequential(nn.Conv2d(3, 6, 3), wide, nn.Conv2d(6, 4, 3), nn.Flatten()).eval()
        small = quantization.quantize(net, [(images, None)])
        path = onnx.export(small, images[:1], tmp_path / "small.onnx")
        kinds = [node.op_type for node in format.load(path).graph.node]
        assert kinds.count("Clip") + kinds.count("Relu") == kept
        with torch.no_grad():
            torch.testing.assert_close(sessions.open(path)(images), small(images), atol=0.2,
                                       rtol=0.02)
    narrow = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 4, 3), nn.Flatten()).eval()
    small = quantization.quantize(narrow, [(images, None)])
    list(dict(quantizers(small)).values())[1].scale.data.mul_(2)  # to 12: the cut at 6 is needed
    kinds = [node.op_type
             for node in format.load(onnx.export(small, images[:1],
                                                 tmp_path / "wide.onnx")).graph.node]
    assert kinds.count("Clip") == 1


class Attending(nn.Module):
    """Attention over x (N, 8, 16) with its numbers on so many axes, a mask or fewer keys than
    queries."""

    def __init__(self, way):
        super().__init__()
        self.way, self.made, self.few = way, nn.Linear(16, 48), nn.Linear(16, 32)

    def forward(self, x):
        parts, count = self.made(x).chunk(3, -1), x.shape[0]
        if self.way == "three axes":
            return F.scaled_dot_product_attention(*parts)
        if self.way == "five axes":
            return F.scaled_dot_product_attention(*(part.reshape(count, 2, 4, 2, 8).transpose(2, 3)
                                                    for part in parts)).flatten(1)
        parts = [part.reshape(count, 8, 2, 8).transpose(1, 2) for part in parts]
        if self.way == "few keys":
            few = (part.reshape(count, 8, 2, 8).transpose(1, 2)
                   for part in self.few(x).chunk(2, -1))
            many = self.made(x).reshape(count, 8, 6, 8).transpose(1, 2)
            return F.scaled_dot_product_attention(many, *few, enable_gqa=True).flatten(1)
        near = x.sum(-1)[:, None, None]
        more = {"plain": {}, "causal": {"is_causal": True}, "scaled": {"scale": 0.1},
                "float mask": {"attn_mask": near},
                "boolean mask": {"attn_mask": (near > -1) | torch.eye(8, dtype=torch.bool)}}
        return F.scaled_dot_product_attention(*parts, **more[self.way]).flatten(1)


@pytest.mark.parametrize("way", ["plain", "three axes", "five axes", "causal", "scaled", "few keys",
                                 "float mask",
                                 "boolean mask"])
def test_attention_in_each_of_its_spellings_is_exported(way, tmp_path):
    torch.manual_seed(0)
    onnx.export(Attending(way).eval(), torch.randn(2, 8, 16), tmp_path / "model.onnx",
                tolerance=1e-5)


def test_an_export_is_judged_by_what_rounding_does_to_the_model_itself(tmp_path):
    """A layer norm far from zero: torch and the runtime both answer, and either rounds in its own
    way."""

    class Coarse(nn.Sequential):
        def forward(self, x):
            return F.layer_norm(super().forward(x) + 1e5, (512,), eps=1e-12)

    torch.manual_seed(0)
    model, x = Coarse(nn.Linear(512, 2048), nn.Linear(2048, 512)).eval(), torch.randn(2, 512)
    with pytest.raises(UnsupportedModelError, match="allow more by tolerance="):
        onnx.export(model, x, tmp_path / "model.onnx", tolerance=onnx.TOLERANCE)
    onnx.export(model, x, tmp_path / "model.onnx")


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, "timm"])
def test_activations_in_place_and_norms_with_their_own_are_not_taken_for_a_parting(norm, tmp_path):
    """As in timm's ResNets, whose norms an Identity and a ReLU in place follow."""
    import timm

    kind = timm.layers.BatchNormAct2d if norm == "timm" else norm
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), kind(4), nn.Identity(), nn.ReLU(inplace=True),
                          nn.Identity(), nn.Conv2d(4, 6, 3),
                          nn.ReLU(inplace=True), kind(6), nn.Flatten(),
                          nn.Linear(6 * 24 * 24, 10)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    path = onnx.export(model, EXAMPLE, tmp_path / "model.onnx")
    found = equivalence.by_layer(model, path, torch.randn(20, 1, 28, 28))
    assert not found.parted.any()
    assert found.sqnr_db.min() > 80


def test_a_refusal_of_the_runtime_says_which_axis(network, exported):
    with pytest.raises(ValueError, match="indices.*Got: 30 Expected: 28"):
        sessions.open(exported)(torch.zeros(2, 1, 30, 28))


class InPlace(torch.nn.Module):
    """What is done in place is seen elsewhere, a norm has no scale of its own, or a pool is
    wide."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.second = kind, torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(
            4, 4, 1)
        self.norm = torch.nn.BatchNorm2d(4, affine=kind != "bare norm")
        self.pool = torch.nn.AdaptiveAvgPool2d(2 if kind == "wide pool" else 1)

    def forward(self, x):
        x = self.norm(self.first(x))
        if self.kind == "cast":
            return self.second(x) * (x > 0).to(torch.float32).to("cpu", torch.float32)
        if self.kind == "seen elsewhere":
            before, x = x, torch.relu_(x)
            return self.second(x) - 2 * before
        if self.kind == "a view":
            rows = x.reshape(len(x), 4, -1)
            rows.relu_()
            return self.second(x)
        return self.pool(self.second(torch.relu_(x)).add_(1.0))


@pytest.mark.parametrize("kind", ["plain", "cast", "seen elsewhere", "a view", "bare norm",
                                  "wide pool"])
def test_a_plain_graph_goes_the_short_way_and_only_that(kind, tmp_path):
    torch.manual_seed(0)
    model, example = InPlace(kind).eval(), torch.randn(3, 1, 8, 8)
    model.norm.running_mean.normal_()
    free = ({0: torch.export.Dim.AUTO},)
    assert (capture.captured(model, (example,), None,
                             free) is None) == (kind in ("a view", "wide pool"))
    # which holds it to the model's own answers
    path = onnx.export(model, example, tmp_path / "model.onnx")
    assert equivalence.compare(model, path, [example]).passed


@pytest.mark.parametrize("bits", [32, 8])
def test_the_short_way_writes_the_same_file(model, tiny, bits, tmp_path, monkeypatch):
    exported = model if bits == 32 else quantize(model, list(tiny.validation.batches(50)))
    short = onnx.export(exported, tiny.example, tmp_path / "short.onnx")
    monkeypatch.setattr(capture, "captured", lambda *_arguments: None)
    whole = onnx.export(exported, tiny.example, tmp_path / "long.onnx")
    kinds = [[node.op_type for node in onnx_library.load(path).graph.node]
             for path in (short, whole)]
    assert kinds[0] == kinds[1]
    assert torch.equal(sessions.open(short)(tiny.example), sessions.open(whole)(tiny.example))


class Remembering(torch.nn.Module):
    """A recurrent layer and what reads it."""

    def __init__(self, kind, **how):
        super().__init__()
        self.cells, self.read = kind(3, 5, batch_first=True,
                                     **how), torch.nn.Linear(5
                                                             * (1
                                                                + how.get("bidirectional", False)),
                                                             2)

    def forward(self, x):
        return self.read(self.cells(x)[0])


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
@pytest.mark.parametrize("how", [{}, {"num_layers": 2}, {"bidirectional": True}])
def test_a_recurrent_layer_is_written_without_shapes_that_are_computed(kind, how, tmp_path):
    torch.manual_seed(0)
    model, example = Remembering(kind, **how).eval(), torch.randn(3, 6, 3)
    path = onnx.export(model, example, tmp_path / "model.onnx")
    assert equivalence.compare(model, path, [example]).passed
    written = {node.op_type for node in onnx_library.load(path).graph.node}
    assert ("Reshape" in written) == how.get("bidirectional", False)


def test_the_exporters_table_is_built_once_and_a_files_own_operators_stay_its_own():
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with capture.remembered_operators():
        first = ONNXRegistry.from_torchlib(18)
        first.register_op(torch.ops.aten.relu.default, lambda x: x)
        second = ONNXRegistry.from_torchlib(18)
    assert len(first.get_decomps(torch.ops.aten.relu.default)) == 1 + len(second.get_decomps(
        torch.ops.aten.relu.default))
    assert second.functions.keys() == ONNXRegistry.from_torchlib(18).functions.keys()


def test_the_exporter_knows_every_operator_of_a_plain_graph():
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    known = ONNXRegistry.from_torchlib()
    # which the exporter takes out itself
    dropped = {torch.ops.aten._assert_tensor_metadata.default}
    assert {kind for kind in capture.PLAIN - dropped - set(capture.TRANSLATIONS)
            if not known.is_registered(kind)} == set()


def test_a_file_whose_nodes_share_a_weight_answers_alike_with_a_copy_for_each(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    twice = Twice().eval()
    assert nodes.with_own_weights(onnx.export(twice, torch.zeros(1, 4),
                                              tmp_path
                                              / "float.onnx")) is None, "float is no trouble"
    path = onnx.export(quantize(twice, [(torch.randn(16, 4), None)]), torch.zeros(1, 4),
                       tmp_path / "twice.onnx")
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(nodes.with_own_weights(path))
    read = [value for node in onnx_library.load(alone).graph.node for value in node.input]
    stored = [tensor.name for tensor in onnx_library.load(alone).graph.initializer]
    assert all(read.count(name) <= 1 for name in stored)
    inputs = torch.randn(3, 4)
    assert torch.equal(sessions.open(path)(inputs), sessions.open(alone)(inputs))


class Two(nn.Module):
    """A layer's answer, and `second` of the inputs."""

    def __init__(self, second):
        super().__init__()
        self.layer, self.second = nn.Linear(4, 3), second

    def forward(self, x):
        return {"logits": self.layer(x), "second": self.second(x)}


def test_every_output_of_a_file_is_compared(tmp_path):
    for more, said in (({}, "cannot be compared.*each time"),
                       ({"tolerance": 1e-3}, "puts out something else")):
        with pytest.raises(UnsupportedModelError, match=f"output second, {said}"):
            onnx.export(Two(torch.rand_like), torch.randn(1, 4), tmp_path / "two.onnx", **more)
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_infinite_where_they_should_be_are_the_same(tmp_path):
    masked = Two(lambda x: torch.where(x > 0, x, torch.full_like(x, float("-inf"))))
    path = onnx.export(masked, torch.randn(1, 4), tmp_path / "masked.onnx")
    assert "second" in sessions.open(path).outputs(torch.randn(2, 4))
