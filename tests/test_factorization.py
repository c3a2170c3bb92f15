import pytest
import torch
from torch import nn

from workbench.errors import UnsupportedModelError
from workbench.methods import factorization


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 1),
                         nn.Flatten(),
                         nn.Linear(12 * 16, 20), nn.ReLU(), nn.Linear(20, 10)).eval()


@pytest.fixture
def images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_whole_rank_computes_the_same(net, images):
    for layer in (net[0], net[2], net[4]):
        f = next(iter(factorization._factors(nn.Sequential(layer), "*", None, None).values()))
        x = torch.randn(2, *((3, 8, 8) if layer is net[0] else (8, 4, 4) if layer is net[2]
                             else (192,)))
        assert torch.allclose(f.cut(len(f.values))(x), layer(x), atol=1e-4)


def test_the_factors_are_the_best_of_their_rank(net):
    small = factorization.factorize(net, rank=4, layers="4")
    product = small[4][1].weight @ small[4][0].weight
    tail = torch.linalg.svdvals(net[4].weight)[4:]
    # Eckart & Young
    assert (product - net[4].weight).norm().item() == pytest.approx(tail.norm().item(), rel=1e-4)
    row = factorization.table(small, net).set_index("layer").loc["4"]
    assert row["rank"] == 4
    assert row.params == 4 * (192 + 20) + 20
    assert row.error == pytest.approx((tail.norm() / net[4].weight.norm()).item(), rel=1e-4)


def test_images_make_the_outputs_nearer(net, images):
    low = torch.randn(192, 5) @ torch.randn(5, 64)  # inputs that lie in few directions
    layer = nn.Sequential(nn.Linear(192, 20))
    blind = factorization.factorize(layer, rank=3)
    seeing = factorization.factorize(layer, rank=3, batches=[(low.T, None)])
    errors = [(m(low.T) - layer(low.T)).norm() for m in (seeing, blind)]
    assert errors[0] < 0.8 * errors[1]


def test_energy_keeps_at_least_that_energy_and_no_rank_more(net):
    small = factorization.factorize(net, energy=0.8, layers="4")
    rank = len(small[4][0].weight)
    squares = torch.linalg.svdvals(net[4].weight).pow(2)
    share = squares.cumsum(0) / squares.sum()
    assert share[rank - 1] >= 0.8 > share[rank - 2]


@pytest.mark.parametrize("cost", ["params", "macs"])
def test_a_budget_is_kept_and_used(net, images, cost):
    from workbench.graph.layers import macs_of

    for budget in (0.3, 0.6, 0.95):
        small = factorization.factorize(net, share_of_layers=budget, cost=cost, example=images)
        whole, left = (macs_of(m, images) if cost == "macs"
                       else sum(p.numel() for n, p in m.named_parameters() if "weight" in n)
                       for m in (net, small))
        assert 0.6 * budget * whole <= left <= budget * whole
        assert small(images).shape == (6, 10)


def test_a_larger_budget_loses_less_energy(net):
    thin = [factorization.factorize(net, share_of_layers=share) for share in (0.3, 0.5, 0.7, 1.0)]
    errors = [(factorization.table(one, net).error ** 2).sum() for one in thin]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_a_layer_that_is_larger_as_a_whole_gets_no_more_ranks():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    even = factorization.table(factorization.factorize(net, share_of_layers=0.5), net)["rank"]
    net[1].weight.data *= 100
    found = factorization.table(factorization.factorize(net, share_of_layers=0.5), net)["rank"]
    assert found.tolist() == even.tolist()


def test_a_layer_of_zeros_leaves_the_others_their_ranks():
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32) for _ in range(6)]
    layers[2].weight.data *= 1e-8
    net = nn.Sequential(*layers)
    almost = factorization.table(factorization.factorize(net, share_of_layers=0.4), net)["rank"]
    layers[2].weight.data.zero_()
    found = factorization.table(factorization.factorize(net, share_of_layers=0.4), net)["rank"]
    assert (found.drop(2) >= almost.drop(2)).all()


def test_a_scan_over_ranks_says_what_went(net, images):
    method = factorization.truncating(net)
    change = method("4", 0.5)
    assert (change.removed, change.of, change.note) == (10, 20, "rank 10")
    assert method.layers == ["0", "2", "4", "6"]
    assert method("6", 0.01).modules == {}


def test_what_cannot_be_factored_says_why(net, images):
    half = {"share_of_layers": 0.5}
    for options, message in (({}, "one of rank, energy and share_of_layers"),
                             ({"rank": 2, "energy": 0.5}, "2 were given"),
                             ({"energy": 1.2}, "more than 0 and at most 1"),
                             ({"rank": 0}, "rank 0 is not possible"),
                             ({"share_of_layers": 0.001}, "too little even for rank 1"),
                             (half | {"cost": "macs"}, "needs an example"),
                             (half | {"cost": "hours"}, "unknown cost"),
                             ({"rank": {"9": 1}}, "layer 9"),
                             ({"rank": 2, "layers": "x*"}, "no layer matches"),
                             ({"rank": 2, "batches": []}, "no examples")):
        with pytest.raises(ValueError, match=message):
            factorization.factorize(net, **options)
    with pytest.raises(UnsupportedModelError, match="can be factored"):
        factorization.factorize(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), rank=1)
    net[4].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 4: its weights hold NaN"):
        factorization.factorize(net, rank=2)


def test_the_callers_model_stays_as_it_was(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    factorization.factorize(net, rank=2)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert before.keys() == net.state_dict().keys()
