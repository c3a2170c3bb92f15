import pytest
import torch

from workbench.methods import precision
from workbench.methods.precision import ARTICLES, Precision

DRAWN = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
VECTORS = torch.nn.functional.normalize(DRAWN * torch.logspace(0, -2, 12), dim=1)


def test_kmeans_levels_err_less_than_uniform_ones_at_the_same_bits():
    uniform, fitted = (precision.rounded(VECTORS, Precision(kind, 4))
                       for kind in ("uniform", "kmeans"))
    assert uniform.bits == fitted.bits == 48
    assert fitted.row(VECTORS)["sqnr_db"] > uniform.row(VECTORS)["sqnr_db"]


def test_bits_go_where_they_lower_the_error_most():
    widths = precision.allocated(VECTORS, 4, 7)
    assert widths.min() >= 4
    assert widths.max() <= 7
    assert widths.sum() == 12 * 5.5
    assert widths[:3].sum() > widths[-3:].sum()
    variable, flat = precision.rounded(VECTORS,
                                       Precision("variable", 4,
                                                 7)), precision.rounded(VECTORS,
                                                                        Precision("uniform", 6))
    assert variable.bits == 66
    # at half a bit less a number
    assert variable.row(VECTORS)["sqnr_db"] > flat.row(VECTORS)["sqnr_db"]


def test_more_bits_err_less_and_coded_is_below_packed_and_tables():
    for kind in ("uniform", "kmeans"):
        found = [precision.rounded(VECTORS, Precision(kind, b)) for b in (3, 5, 7)]
        assert [f.row(VECTORS)["sqnr_db"] for f in found] == sorted(f.row(VECTORS)["sqnr_db"]
                                                                    for f in found)
        assert all(f.coded_bits < f.bits + 8 * (4 * 2**7 + 8) / len(VECTORS) for f in found)


def test_each_modality_at_its_own_precision():
    values, table = precision.compare({"image": VECTORS, "text": VECTORS, "speech": VECTORS},
                                      ARTICLES)
    assert table.kind.tolist() == ["uniform", "kmeans", "variable"]
    assert table.bits.tolist() == [96, 72, 66]
    assert all(values[name].shape == VECTORS.shape for name in values)
    assert precision.shifted(ARTICLES, -2)["speech"] == Precision("variable", 2, 5)
    with pytest.raises(ValueError, match="none is given for 'smell'"):
        precision.compare({"smell": VECTORS}, ARTICLES)


@pytest.mark.parametrize("bad", [("magic", 8, 0), ("uniform", 1, 0), ("uniform", 8, 9),
                                 ("variable", 4, 0), ("variable", 7, 4)])
def test_bad_precisions_get_one_line(bad):
    with pytest.raises(ValueError, match="precision: "):
        Precision(*bad)


@pytest.mark.parametrize("vectors", [torch.ones(0, 4), torch.full((3, 4), torch.nan)])
def test_no_vectors_and_nan_get_one_line(vectors):
    with pytest.raises(ValueError, match="precision: there are no vectors, or one is NaN"):
        precision.rounded(vectors, Precision())
