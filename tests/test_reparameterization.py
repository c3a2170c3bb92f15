import pytest
import torch
from torch import nn

from workbench.errors import UnsupportedModelError
from workbench.measures import accuracy, equivalence
from workbench.methods import reparameterization
from workbench.subjects import models
from workbench.subjects.networks import RepVGGBlock


@pytest.fixture(scope="module")
def branched(task):
    return models.load("repvgg_small", task)


def test_the_embedded_checkpoint_is_as_accurate_as_its_record_says(branched, tiny):
    top = accuracy.evaluate(branched, tiny.test)
    assert top.low <= 0.931 <= top.high


def test_fused_blocks_compute_the_same_in_logits(branched, tiny):
    fused = reparameterization.fuse_branches(branched)
    verdict = equivalence.compare(branched, fused, tiny.test)
    assert verdict.l2_max <= 1e-5
    assert verdict.agreement == 1
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 8


@pytest.mark.parametrize(("shape", "stride", "branches"), [
    ((3, 8), 1, True), ((8, 8), 1, True), ((8, 8), 2, True), ((3, 8), 1, False)])
def test_each_kind_of_block_is_fused_exactly(shape, stride, branches):
    torch.manual_seed(0)
    block = RepVGGBlock(*shape, stride, branches=branches).eval()
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    x = torch.randn(2, shape[0], 9, 9)
    with torch.no_grad():
        assert torch.allclose(block.fused()(x), block(x), atol=1e-4)


def test_blocks_of_timm_are_fused_by_their_own_method():
    timm = pytest.importorskip("timm")
    model = timm.create_model("repvgg_a0", num_classes=4).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        fused = reparameterization.fuse_branches(model)
        assert torch.allclose(fused(x), model(x), atol=1e-4)
    assert len(list(fused.parameters())) < len(list(model.parameters()))


def test_norms_of_timm_are_folded_and_leave_their_activation():
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", num_classes=4).eval()
    x = torch.randn(2, 3, 64, 64)
    model = reparameterization.reestimate_batchnorm(model, [(torch.randn(8, 3, 64, 64), None)])
    folded = reparameterization.fold_batchnorm(model, x)
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_a_model_without_branches_is_refused(model):
    with pytest.raises(UnsupportedModelError, match="no block with branches"):
        reparameterization.fuse_branches(model)


def test_statistics_taken_anew_are_those_of_the_batches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
                        nn.Linear(4 * 36, 3)).eval()
    batches = [(3 + 2 * torch.randn(50, 1, 8, 8), None) for _ in range(3)]
    before = net[1].running_mean.clone()
    new = reparameterization.reestimate_batchnorm(net, batches)
    inputs = torch.cat([net[0](images) for images, _ in batches])
    assert torch.allclose(new[1].running_mean, inputs.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(new[1].running_var,
                          torch.stack([net[0](x).var((0, 2, 3)) for x, _ in batches]).mean(0),
                          rtol=1e-4)
    assert torch.equal(net[1].running_mean, before)
    assert new[1].momentum == net[1].momentum
    assert not new.training


def test_statistics_need_norms_and_images(model):
    with pytest.raises(UnsupportedModelError, match="no batch norm"):
        reparameterization.reestimate_batchnorm(nn.Sequential(nn.Linear(2, 2)), [])
    with pytest.raises(ValueError, match="saw no batch of two or more examples"):
        reparameterization.reestimate_batchnorm(model, [])


def test_a_norm_that_always_follows_one_layer_is_folded_and_one_that_follows_two_stays():
    class Shared(torch.nn.Module):
        def __init__(self, other):
            super().__init__()
            self.a, self.b, self.norm = torch.nn.Linear(4, 4), torch.nn.Linear(
                4, 4), torch.nn.BatchNorm1d(4)
            self.norm.running_mean.normal_()
            self.other = other

        def forward(self, x):
            x = self.norm(self.a(x)).relu()
            return self.norm(self.b(x) if self.other else self.a(x))

    x = torch.randn(5, 4)
    for other in (False, True):
        model = Shared(other).eval()
        folded = reparameterization.fold_batchnorm(model, x)
        torch.testing.assert_close(folded(x), model(x))
        assert isinstance(folded.norm, torch.nn.BatchNorm1d) == other


class OverTokens(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(tokens)

    def forward(self, x):
        return self.norm(self.layer(x))


@pytest.mark.parametrize("tokens", [5, 8])
def test_a_norm_over_tokens_is_no_part_of_the_layer_before_it(tokens):
    torch.manual_seed(0)
    model, x = OverTokens(tokens), torch.randn(64, tokens, 6)
    model(x)
    model.eval()
    with torch.no_grad():
        folded = reparameterization.fold_batchnorm(model, x[:1])
        torch.testing.assert_close(folded(x), model(x))


def test_a_norm_without_statistics_of_its_own_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(reparameterization.fold_batchnorm(model, x)(x), model(x))


def test_a_last_batch_of_one_example_is_passed_over():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(9, 4)
    with_it, without = (reparameterization.reestimate_batchnorm(model, [(part, None) for part in x])
                        for x in (x.split(4), x[:8].split(4)))
    assert torch.equal(with_it[1].running_var, without[1].running_var)
    with pytest.raises(ValueError, match="no batch of two or more examples"):
        reparameterization.reestimate_batchnorm(model, [(x[:1], None)])
