"""Many plans from one model, each judged and kept."""

import pandas as pd
import pytest
import torch

from workbench.measures import accuracy
from workbench.methods.quantization import Quantize
from workbench.methods.rounding import Repair
from workbench.plans import ladder
from workbench.subjects import data, models
from workbench.subjects.subject import Subject


@pytest.fixture(scope="module")
def start():
    draw = torch.Generator().manual_seed(0)
    pictures, labels = torch.randn(240, 3, 16, 16,
                                   generator=draw), torch.randint(4, (240,), generator=draw)
    task = data.of((pictures[:160], labels[:160]), (pictures[160:], labels[160:]), name="noise")
    return Subject(models.load("resnet20", task, pretrained=False), task)


def test_every_rung_starts_from_the_same_model_and_stands_against_the_same_score(start, tmp_path):
    base = accuracy.evaluate(start.model, start.task.test)
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    rungs = {"8 bits": [Quantize(8, examples=16)], "3 bits": [Quantize(3, examples=16)],
             "3 bits, bias": [Quantize(3, examples=16), Repair("bias")]}
    table = ladder.climb(start, rungs, base=base, folder=tmp_path)
    assert table.rung.tolist() == list(rungs)
    assert all(torch.equal(value, before[name]) for name, value in start.model.state_dict().items())
    alone = accuracy.evaluate(Quantize(3, examples=16).apply(start).model, start.task.test)
    assert table.top1[1] == pytest.approx(alone.value, abs=1e-4)
    assert table.top1_change[1] == pytest.approx(accuracy.difference(base, alone).difference,
                                                 abs=1e-4)
    assert (table.n == 80).all()


def test_a_rung_that_was_judged_is_not_made_again(start, tmp_path, monkeypatch):
    base = accuracy.evaluate(start.model, start.task.test)
    first = ladder.climb(start, {"8 bits": [Quantize(8, examples=16)]}, base=base, folder=tmp_path)
    made = []
    monkeypatch.setattr(Quantize, "apply", lambda self, subject: made.append(self.bits) or subject)
    rungs = {"eight": [Quantize(8, examples=16)], "four": [Quantize(4, examples=16)]}
    again = ladder.climb(start, rungs, base=base, folder=tmp_path)
    assert made == [4], "the name may change, the steps count"
    pd.testing.assert_frame_equal(first.drop(columns="rung"), again.iloc[:1].drop(columns="rung"))
    assert not list(tmp_path.glob(".*")), "no lock stays"
