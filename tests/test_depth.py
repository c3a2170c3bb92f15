import pytest
import torch
from torch import nn

from workbench.errors import UnsupportedModelError
from workbench.graph.depth import without_blocks
from workbench.methods import depth, factorization
from workbench.methods.depth import Drop
from workbench.plans import recipe, steps
from workbench.subjects import data, models
from workbench.subjects.subject import Subject


class Block(nn.Module):
    """A residual block that adds a multiple of what it reads."""

    def __init__(self, width: int, much: float):
        super().__init__()
        self.one, self.two = nn.Linear(width, width,
                                       bias=False), nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.one.weight.copy_(torch.eye(width))
            self.two.weight.copy_(much * torch.eye(width))

    def forward(self, values, *, offset: float = 0.0):
        return values + self.two(self.one(values)) + offset


class Listed(nn.Module):
    """Blocks in a list, called with more than their input, as transformers' layers are."""

    def __init__(self, *much: float):
        super().__init__()
        self.blocks = nn.ModuleList(Block(4, each) for each in much)
        self.head = nn.Linear(4, 3)

    def forward(self, values):
        for block in self.blocks:
            values = block(values, offset=0.5)
        return self.head(values)


@pytest.fixture
def sequence():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4),
                         nn.Sequential(Block(4, 0.5), Block(4, 0.01), Block(4, 0.1)),
                         nn.Linear(4, 3)).eval()


@pytest.fixture
def batches():
    return [(torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), None)]


def test_blocks_of_a_sequence_keep_their_names_and_those_of_a_list_move_up(sequence):
    assert depth.blocks(sequence, torch.zeros(1, 6)) == ["1.0", "1.1", "1.2"]
    small = depth.drop(sequence, ["1.1"], example=torch.zeros(1, 6))
    assert "1.2.two.weight" in small.state_dict()
    assert "1.1.one.weight" not in small.state_dict()
    listed = Listed(0.5, 0.2, 0.1).eval()
    assert depth.blocks(listed, torch.zeros(1, 4)) == ["blocks.0", "blocks.1", "blocks.2"]
    short = depth.drop(listed, ["blocks.1"], example=torch.zeros(1, 4))
    assert len(short.blocks) == 2
    assert torch.equal(short.blocks[1].two.weight, listed.blocks[2].two.weight)
    assert len(listed.blocks) == 3  # the one given is left as it was


def test_what_is_left_computes_what_a_network_without_the_block_computes(sequence, batches):
    small = depth.drop(sequence, ["1.0"], example=batches[0][0])
    expected = sequence[2](sequence[1][2](sequence[1][1](sequence[0](batches[0][0]))))
    assert torch.allclose(small(batches[0][0]), expected)


def test_the_block_that_does_least_goes_first(sequence, batches):
    order = depth.order(sequence, batches)
    assert list(order.block) == ["1.1", "1.2"]
    assert order.distance.is_monotonic_increasing
    assert order.params.tolist() == [32, 32]
    without = depth.drop(sequence, ["1.1"], example=batches[0][0])
    whole = sequence(batches[0][0])
    assert order.distance[0] == pytest.approx(((without(batches[0][0]) - whole).norm()
                                               / whole.norm()).item(), rel=1e-5)


def test_a_look_at_the_answers_copies_no_weights(sequence):
    looked = without_blocks(sequence, ["1.1"], shared=True)
    assert looked[0].weight is sequence[0].weight
    assert without_blocks(sequence, ["1.1"])[0].weight is not sequence[0].weight


def test_stages_do_not_go_and_squeeze_and_excitation_goes_with_its_block():
    network = models.load("torchvision:efficientnet_b0", pretrained=False)
    found = depth.blocks(network, torch.zeros(1, 3, 64, 64))
    assert "features.3.1" in found
    assert not {"features.3", "features.3.1.block.2"} & set(found)


def test_nothing_to_leave_out_is_said(batches):
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with pytest.raises(UnsupportedModelError, match="no block of Sequential can be left out"):
        depth.order(plain, batches)
    with pytest.raises(ValueError, match="'9' is no block of Sequential"):
        depth.drop(plain, ["9"], example=torch.zeros(1, 6))
    with pytest.raises(ValueError, match="all 2 blocks of blocks would go"):
        depth.drop(Listed(0.1, 0.2), ["blocks.0", "blocks.1"], example=torch.zeros(1, 4))
    with pytest.raises(UnsupportedModelError, match="without 0"):
        depth.drop(plain, ["0"], example=torch.zeros(1, 6))


def test_a_step_drops_by_name_or_by_share_and_is_written_and_read(model, tiny):
    start = Subject(model, tiny)
    by_name = Drop(blocks=["layer3.*"]).apply(start)
    stages = {name.rpartition("conv1")[0] for name in by_name.model.state_dict()
              if name.startswith("layer3")}
    assert "layer3.0." in stages  # the first block of the stage makes its width, and stays
    assert not {"layer3.1.", "layer3.2."} & stages
    by_share = Drop(share=0.7, examples=50).apply(start)
    assert len(by_share.made["order"]) == 7 - round(0.7 * 7)
    told = recipe.dump([Drop(blocks=["layer3.2"])])
    assert list(recipe.parse(told).steps.values()) == [Drop(blocks=["layer3.2"])]
    for odd in ({}, {"blocks": ["a"], "share": 0.5}):
        with pytest.raises(ValueError, match="drop: give either blocks"):
            Drop(**odd)


def test_a_checkpoint_remembers_what_was_dropped(model, tiny, tmp_path):
    small = depth.drop(model, ["layer1.1", "layer3.2"], example=tiny.example)
    cut = steps.plan(Subject(small, tiny),
                     {"prune": recipe.STEPS["prune"](macs=0.7)})["prune"].model
    for number, kept in enumerate((small, cut)):
        models.save(kept, tmp_path / f"{number}.safetensors")
        again = models.load(tmp_path / f"{number}.safetensors", tiny)
        assert torch.equal(again(tiny.example), kept(tiny.example))


def test_a_table_of_embeddings_is_factored_by_name_only():
    torch.manual_seed(0)
    table = nn.Embedding(50, 12)
    with torch.no_grad():
        table.weight.copy_(torch.randn(50, 3) @ torch.randn(3, 12))
    network = nn.Sequential(table, nn.Flatten(), nn.Linear(24, 8)).eval()
    words = torch.randint(50, (5, 2))
    assert isinstance(factorization.factorize(network, rank=3)[0], nn.Embedding)
    small = factorization.factorize(network, rank=3, layers="0")
    assert torch.allclose(small(words), network(words), atol=1e-4)
    row = factorization.table(small, network).set_index("layer").loc["0"]
    assert (row["rank"], row.params) == (3, 3 * (50 + 12))
    assert row.error < 1e-5
    tied = nn.ModuleDict({"table": table, "out": nn.Linear(12, 50, bias=False)})
    tied["out"].weight = table.weight
    with pytest.raises(ValueError, match="no layer matches 'table'"):
        factorization.factorize(tied, rank=3, layers="table")


def test_a_teacher_alone_says_what_is_right_of_unlabelled_examples(tiny, model):
    from workbench.methods import distillation
    from workbench.subjects.objectives import IGNORED
    from workbench.subjects.tasks import with_unlabelled

    logits, taught = torch.randn(4, 10), torch.randn(4, 10)
    labels = torch.tensor([1, IGNORED, 3, IGNORED])
    soft = distillation.soft_targets(logits, taught)
    expected = 0.7 * soft + 0.3 * nn.functional.cross_entropy(logits[[0, 2]], labels[[0, 2]])
    assert torch.allclose(distillation.with_labels(logits, taught, labels), expected)
    alone = distillation.with_labels(logits, taught, torch.full((4,), IGNORED))
    assert torch.allclose(alone, 0.7 * soft)
    both = with_unlabelled(tiny.train, tiny.test)
    assert len(both) == len(tiny.train) + len(tiny.test)
    assert (both.targets[len(tiny.train):] == IGNORED).all()
    with pytest.raises(ValueError, match="not of the kind"):
        with_unlabelled(tiny.train, data.load("stamps").train)
    with pytest.raises(ValueError, match="'decoupled' needs the label"):
        distillation.Distil(recipe.training.Recipe(), kind="decoupled", unlabelled="wordnet")
    step = distillation.Distil(recipe.training.Recipe(epochs=1, learning_rate=0.01),
                               unlabelled="fashion_mnist",
                               unlabelled_examples=100, examples=128)
    history = step.apply(Subject(model, tiny)).made["history"]
    assert 0.5 < history.train_right.iloc[0] <= 1  # of those with labels
