import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.measures import codes as codes_of
from workbench.methods import codebook
from workbench.methods.codebook import SharedCodebook, search
from workbench.numbers import coding


def cloud(count: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)),
                       dim=1)


def made(**other) -> SharedCodebook:
    return SharedCodebook(**({"size": 32, "dim": 8, "modalities": {"image": 16, "text": 16},
                              "heads": 2} | other))


@pytest.mark.parametrize("cosine", [True, False])
def test_search_in_tiles_finds_what_one_product_finds(cosine, monkeypatch):
    vectors, table = torch.randn(301, 8), torch.randn(77, 8)
    monkeypatch.setattr(codebook, "TILE", (64, 10))
    whole = (vectors @ table.T).argmax(1) if cosine else torch.cdist(vectors, table).argmin(1)
    assert torch.equal(search(vectors, table, cosine=cosine), whole)


@pytest.mark.parametrize("other", [{}, {"levels": 2}, {"cosine": False}, {"update": "gradient"},
                                   {"levels": 2, "update": "gradient"}])
def test_codes_decode_to_what_forward_gives_and_training_lowers_the_loss(other):
    book, batch = made(**other), {"image": cloud(200), "text": cloud(200, seed=1)}
    history = codebook.fit(book, batch, {name: torch.arange(200) for name in batch}, steps=60,
                           batch=128,
                           learning_rate=1e-2)
    assert history.loss.iloc[-5:].mean() < history.loss.iloc[1:6].mean()
    found = book(batch)
    for name in batch:
        codes = book.encode(name, batch[name])
        assert torch.equal(codes, found.codes[name])
        assert codes.shape == (200, 2 * book.levels)
        torch.testing.assert_close(book.decode(name, codes), found.values[name], atol=1e-5,
                                   rtol=1e-4)
    assert book.bits == 2 * book.levels * 5


def test_the_second_level_starts_from_what_the_first_leaves():
    book = made(levels=2)
    book.train()({"image": cloud(200), "text": cloud(200, seed=1)})
    first, second = book.table.norm(dim=-1).mean(1).tolist()
    assert second < 0.9 * first


def test_as_many_codes_as_pieces_start_on_the_pieces():
    book, pieces = made(size=8, cosine=False), torch.eye(8) * torch.arange(1, 9)[:, None]
    book._start(pieces)
    nearest = torch.cdist(pieces, book.table[0]).min(1).values
    torch.testing.assert_close(nearest, torch.zeros(8))


def test_the_gradient_goes_straight_through_to_the_vectors():
    book, vectors = made(), cloud(40).requires_grad_()
    book({"image": vectors, "text": cloud(40, seed=1)}).values["image"].sum().backward()
    assert vectors.grad.abs().sum() > 0


def test_the_same_seed_gives_the_same_book():
    def once():
        book = made(seed=3)
        batch = {"image": cloud(90), "text": cloud(90)}
        codebook.fit(book, batch, {name: torch.arange(90) for name in batch}, steps=5, batch=64)
        return book.state_dict()

    for one, two in zip(once().values(), once().values(), strict=True):
        assert torch.equal(one, two)


def test_moving_averages_are_those_of_the_formula():
    book = SharedCodebook(4, 2, modalities={"image": 2}, kmeans=False, revive=0, decay=0.9).train()
    book.inward["image"].weight.data = torch.eye(2)
    before, vectors = book.table[0].clone(), cloud(50, 2)
    codes = book({"image": vectors}).codes["image"][:, 0]
    counts, sums = torch.ones(4), before.clone()
    for code in range(4):
        mine = vectors[codes == code]
        counts[code], sums[code] = 0.9 + 0.1 * len(mine), 0.9 * sums[code] + 0.1 * mine.sum(0)
    torch.testing.assert_close(book.table[0], F.normalize(sums / counts[:, None], dim=1))


def test_dead_codes_come_back_where_the_vectors_are():
    # all in one corner: most random codes are never nearest
    vectors = {"image": F.normalize(cloud(300) + 0.5, dim=1)}
    used = {}
    for revive in (0, 0.5):
        book = SharedCodebook(64, 16, modalities={"image": 16}, kmeans=False, revive=revive)
        codebook.fit(book, vectors, {"image": torch.arange(300)}, steps=60, batch=300)
        used[revive] = codes_of.usage({"image": book.encode("image", vectors["image"])},
                                      64).used.iloc[0]
    assert used[0] < 0.5 < used[0.5]


def test_a_missing_modality_is_skipped_and_said():
    with pytest.warns(UserWarning, match="no text in this batch; skipped"):
        found = made()({"image": cloud(40)})
    assert found.skipped == ("text",)
    assert set(found.values) == {"image"}


@pytest.mark.parametrize(("batch", "told"), [
    ({"image": cloud(40), "text": cloud(39)}, "40 of image, 39 of text"),
    ({"image": cloud(40), "smell": cloud(40)}, "'smell'.*image, text"),
    ({}, "image, text"),
    ({"image": torch.cat([cloud(3), torch.zeros(1, 16)]), "text": cloud(4)},
     "vector 3 of image is zero"),
    ({"image": torch.full((4, 16), torch.nan), "text": cloud(4)}, "image is NaN"),
    ({"image": cloud(4), "text": cloud(4)}, "32 codes cannot start from 16 pieces"),
])
def test_bad_batches_get_one_line(batch, told):
    with pytest.raises(ValueError, match=told):
        made().train()(batch)


def test_bad_settings_and_bad_files_get_one_line(tmp_path):
    for other, told in (({"size": 0}, "size is 0"), ({"update": "magic"}, "unknown update 'magic'"),
                        ({"modalities": {}}, "0")):
        with pytest.raises(ValueError, match=told):
            made(**other)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        SharedCodebook.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(ValueError, match="cut.safetensors is damaged"):
        SharedCodebook.load(tmp_path / "cut.safetensors")


def test_saved_and_loaded_it_chooses_the_same_codes(tmp_path):
    book = made(levels=2)
    book.train()({"image": cloud(40), "text": cloud(40)})
    book.eval().save(tmp_path / "book.safetensors")
    again = SharedCodebook.load(tmp_path / "book.safetensors")
    assert torch.equal(again.encode("text", cloud(9)), book.encode("text", cloud(9)))


def test_usage_and_overlap_of_known_codes():
    codes = {"image": torch.tensor([[0, 1], [2, 3]]), "text": torch.tensor([[0, 1], [2, 1]])}
    table = codes_of.usage(codes, 8).set_index("modality")
    assert table.used.to_dict() == {"image": 0.5, "text": 3 / 8 + 1 / 8 - 1 / 8, "all": 0.5}
    assert table.perplexity["image"] == pytest.approx(4)
    assert codes_of.overlap(codes).same.iloc[0] == pytest.approx((1 + 1 / 3) / 2)


def test_the_peer_chooses_the_same_codes_from_the_same_table():
    pytest.importorskip("vector_quantize_pytorch")
    from workbench.measures.peers import VectorQuantizePytorch

    book = made(kmeans=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = VectorQuantizePytorch(book).eval()
        peer.book._codebook.embed.data.copy_(book.table.data)
        assert torch.equal(peer.encode("image", cloud(60)), book.encode("image", cloud(60)))
        codes = book.encode("image", cloud(6))
        torch.testing.assert_close(peer.decode("image", codes), book.decode("image", codes))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2000), min_size=1, max_size=400))
def test_codes_decode_back(symbols):
    assert coding.decode(coding.encode(np.array(symbols))).tolist() == symbols


def test_coded_size_lies_near_the_entropy_and_is_never_above_packed():
    draw = np.random.default_rng(0)
    skewed = draw.geometric(0.4, 20_000) - 1
    stream = coding.encode(skewed)
    assert 1.0 <= 8 * len(stream) / (len(skewed) * coding.entropy(skewed)) < 1.02
    flat = draw.integers(0, 1024, 500)
    assert len(coding.encode(flat)) <= 500 * 10 / 8 + 7


@pytest.mark.parametrize("symbols", [[], [-1], [2**24]])
def test_what_cannot_be_coded_gets_one_line(symbols):
    with pytest.raises(ValueError, match="whole numbers"):
        coding.encode(np.array(symbols, np.int64))


def test_cut_bytes_get_one_line():
    with pytest.raises(ValueError, match="cut"):
        coding.decode(coding.encode(np.arange(3000) % 7)[:12])




def test_meanings_are_the_codes_that_name_concepts_in_all_modalities():
    codes = {"image": torch.tensor([[0], [1], [1]]), "text": torch.tensor([[1], [1], [2], [0]])}
    concepts = {"image": torch.tensor([7, 8, 9]), "text": torch.tensor([8, 9, 7, 5])}
    best = codes_of.meanings(codes, concepts).iloc[0]
    assert (best.place, best.code, best.shared, best.share, best.concepts) == (0, 1, 2, 1.0, [8, 9])
    assert best.text == [0, 1]
