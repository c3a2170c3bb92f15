"""Integer arithmetic in PyTorch against ONNX Runtime's kernels, and against sums of integers
written out."""

import onnx as onnx_format
import onnxruntime
import pytest
import torch
from torch import nn

from workbench.deployment import integers, onnx, sessions
from workbench.errors import UnsupportedModelError
from workbench.measures import accuracy
from workbench.methods import quantization, reparameterization
from workbench.numbers.grid import Scheme
from workbench.numbers.quantizers import ActivationQuantizer, quantizers


def apart(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("weights", [quantization.INT8_WEIGHTS, Scheme(8),
                                     Scheme(4, granularity="channel"),
                                     Scheme(4, symmetric=False, granularity="channel")])
def test_a_network_answers_as_the_runtime_does_to_the_bit(model, task, tiny, tmp_path, weights):
    folded = reparameterization.fold_batchnorm(model, task.example)
    made = quantization.quantize(folded, list(task.validation.subset(100).batches(50)),
                                 weights=weights)
    session = sessions.open(onnx.export(made, task.example, tmp_path / "made.onnx"))
    images = torch.cat([images for images, _ in tiny.test.batches(100)])
    whole = integers.exact(made)
    with torch.no_grad():
        assert apart(whole(images), session(images)) < 1e-5
        assert apart(made(images),
                     session(images)) > 1e-3, "float sums go the other way now and then"
    kept = [name for name, _ in whole.named_modules() if name.startswith("integer_")]
    assert len(kept) == sum(1 for _ in quantizers(made)) - 1, "all but the average"


def test_four_bits_lie_in_the_file_as_four_and_answer_the_same(model, task, tiny, tmp_path):
    seen, sizes = list(task.validation.subset(100).batches(50)), {}
    for bits in (8, 4):
        made = quantization.quantize(model, seen, weights=Scheme(bits, granularity="channel"))
        path = onnx.export(made, task.example, tmp_path / f"{bits}.onnx")
        sizes[bits] = path.stat().st_size
        images = torch.cat([images for images, _ in tiny.test.batches(100)])
        with torch.no_grad():
            assert apart(integers.exact(made)(images), sessions.open(path)(images)) < 1e-5
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d))
    assert sizes[8] - sizes[4] > 0.45 * weights
    kinds = {value.data_type for value in onnx_format.load(tmp_path / "4.onnx").graph.initializer}
    assert onnx_format.TensorProto.INT4 in kinds
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    onnxruntime.InferenceSession(tmp_path / "4.onnx", options)
    opened = [node.op_type for node in onnx_format.load(tmp_path / "opened.onnx").graph.node]
    assert "Cast" not in opened, "unpacked when the file is opened"
    assert opened.count("QLinearConv") == 19


def test_a_sum_is_the_kernels_for_every_pair_of_integers():
    """QLinearAdd on all 256 x 256 pairs, where the order in which it multiplies and adds decides
    ties."""
    helper, kinds, pairs = onnx_format.helper, onnx_format.TensorProto, torch.cartesian_prod(
        torch.arange(256), torch.arange(256))
    draw = torch.Generator().manual_seed(0)
    for trial in range(40):
        scales = 0.005 + 0.045 * torch.rand(2, generator=draw)
        scales = torch.cat([scales,
                            scales.sum()[None] * (0.4 + 0.6 * torch.rand(1, generator=draw))])
        zeros = torch.randint(0, 200, (3,),
                              generator=draw) * torch.tensor([1, trial % 2, trial % 2])
        grids = []
        for scale, zero in zip(scales, zeros, strict=True):
            grids.append(ActivationQuantizer(quantization.UINT8_ACTIVATIONS, place="x"))
            grids[-1].scale.data, grids[-1].zero.data = scale, zero.float()
        stored = [onnx_format.numpy_helper.from_array(value, f"{kind}{k}") for k in range(3)
                  for kind, value in (("s", scales[k].numpy()),
                                      ("z", zeros[k].to(torch.uint8).numpy()))]
        names = ["a", "s0", "z0", "b", "s1", "z1", "s2", "z2"]
        shapes = [helper.make_tensor_value_info(name, kinds.UINT8, [None])
                  for name in ("a", "b", "y")]
        graph = helper.make_graph([helper.make_node("QLinearAdd", names, ["y"],
                                                    domain="com.microsoft")], "sum", shapes[:2],
                                  shapes[2:], stored)
        made = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17),
                                                                     helper.make_opsetid(
                                                                         "com.microsoft", 1)])
        session = onnxruntime.InferenceSession(made.SerializeToString(),
                                               providers=["CPUExecutionProvider"])
        a, b = (column.contiguous() for column in pairs.T)
        expected, = session.run(None, {"a": a.to(torch.uint8).numpy(),
                                       "b": b.to(torch.uint8).numpy()})
        found = integers._Sum(*grids)((a - zeros[0]) * scales[0],
                                      (b - zeros[1]) * scales[1]) / scales[2]
        assert torch.equal(found.round() + zeros[2], torch.from_numpy(expected).float())


def test_what_is_judged_is_what_the_file_answers(model, task, tiny, tmp_path):
    seen = list(task.validation.subset(100).batches(50))
    made = quantization.quantize(model, seen, weights=Scheme(3, granularity="channel"))
    again = quantization.quantize(reparameterization.fold_batchnorm(model, task.example), seen,
                                  weights=Scheme(3, granularity="channel"))
    path = onnx.export(made, task.example, tmp_path / "made.onnx", tolerance=1e-4)
    served, judged = (accuracy.evaluate(judge, tiny.test) for judge in (path, made))
    assert torch.equal(served.predictions, judged.predictions)
    images = tiny.test.batch().inputs
    assert apart(sessions.open(made)(images), sessions.open(path)(images)) < 1e-5
    assert apart(sessions.open(again)(images),
                 sessions.open(path)(images)) < 1e-5, "quantising folds the norms"
    floats = sessions.open(made, whole=False)
    with torch.no_grad():
        assert torch.equal(floats(images), made(images))
    assert list(floats.activations(images[:2])) == list(sessions.open(made).activations(images[:2]))
    with pytest.raises(ValueError, match="refuses a batch of shape"):
        sessions.open(made).activations(images[:, :, 0])


def test_zero_added_and_one_multiplied_do_not_part_file_and_module(tmp_path):
    """As in timm's MobileOne, whose sum of branches begins with the number 0; the exporter takes
    such nodes away."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
            self.last = nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.last(torch.relu(((self.first(x) + self.second(x)) + 0) * 1.0)).flatten(1)

    torch.manual_seed(0)
    x = torch.randn(24, 3, 8, 8)
    made = quantization.quantize(Branches(), [(x, torch.zeros(24))])
    path = onnx.export(made, x, tmp_path / "branches.onnx", tolerance=1e-5)
    assert apart(sessions.open(made)(x), sessions.open(path)(x)) < 1e-5


@pytest.mark.parametrize("steps", [-20, 0, 0.4, 0.6, 3])
def test_a_range_that_goes_beyond_a_cut_by_less_than_half_a_step_is_an_integer_kernels_still(
        steps, tmp_path):
    """As percentiles give it, whose ranges end where a bin of the histogram does."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3),
                             nn.Flatten()), 8 * torch.randn(24, 3, 8, 8)
    made = quantization.quantize(model, [(x, torch.zeros(24))])
    cut = [quantizer for name, quantizer in quantizers(made)
           if isinstance(quantizer, ActivationQuantizer)][1]
    cut.scale.data.fill_(6 / 255 * (1 + steps / 255))
    kernels = [node for node in integers.exact(made).graph.nodes
               if str(node.target).startswith("integer_")]
    assert len(kernels) == (3 if steps < 0.5 else 2)
    path = onnx.export(made, x, tmp_path / "cut.onnx")
    assert apart(sessions.open(made)(x), sessions.open(path)(x)) < 1e-6


def test_linear_layers_and_concatenations(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(24, 16), nn.Linear(24, 16, bias=False)
            self.c, self.d = nn.Linear(32, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.d(torch.relu(self.c(torch.cat([torch.relu(self.a(x)), self.b(x)], 1))))

    torch.manual_seed(0)
    model, x = Both().eval(), torch.randn(300, 24)
    made = quantization.quantize(model, [(x, None)])
    session = sessions.open(onnx.export(made, x, tmp_path / "both.onnx"))
    with torch.no_grad():
        assert apart(integers.exact(made)(x), session(x)) < 1e-5


def test_a_convolution_is_the_sum_of_its_integers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(),
                          nn.Conv2d(3, 2, 1)).eval()
    x = torch.randn(40, 2, 6, 6)
    made = quantization.quantize(model, [(x, None)])
    places = {node.name: made.get_submodule(node.target) for node in made.graph.nodes
              if node.name.startswith("quantizer_")}
    first, second = list(places.values())[:2]
    whole = integers.exact(made)
    name = next(name for name, _ in whole.named_modules() if name.startswith("integer_")
                and "input" not in name)
    layer, weights = made.get_submodule("0"), made.get_submodule("0").parametrizations.weight
    counted = ((x / first.scale).round() + first.zero).clamp(0, 255).long() - first.zero.long()
    # (n, 18, places)
    windows = nn.functional.unfold(counted.double(), 3, padding=1, stride=2).long()
    sums = torch.einsum("ok,nkp->nop", weights[0].integers(weights.original).flatten(1).long(),
                        windows)
    step = first.scale * weights[0].scale.flatten()
    sums = sums + (layer.bias / step).round().long()[:, None]
    expected = ((sums.float() * (step / second.scale)[:, None]).round() + second.zero).clamp(0, 255)
    with torch.no_grad():
        found = whole.get_submodule(name)(counted * first.scale) / second.scale + second.zero
    assert torch.equal(found.flatten(2).round(), expected)


@pytest.mark.parametrize("given", [{"activations": Scheme(8)},
                                   {"weights": Scheme(4, levels="kmeans")},
                                   {"weights": {"0": Scheme(8)}}, {"weights": None}])
def test_what_no_integer_kernel_computes_stays_as_it_was(given):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SiLU(),
                          nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(9, 1, 8, 8)
    made = quantization.quantize(model, [(x, None)], **given)
    with torch.no_grad():
        assert apart(integers.exact(made)(x), made(x)) < 0.01


@pytest.mark.parametrize("source",
                         [nn.Linear(3, 2), quantization.prepare(nn.Sequential(nn.Linear(3, 2)),
                                                                torch.randn(2, 3))])
def test_a_model_without_quantised_activations_is_refused(source):
    with pytest.raises(UnsupportedModelError, match=r"has no quantised activations; give what "
                       r"quantization\.quantize returns"):
        integers.exact(source)
