"""Tasks of one's own, objectives and their metrics; a module of one's own; and what the README
shows."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench.batches import call
from workbench.deployment import onnx, sessions
from workbench.measures import accuracy
from workbench.plans import steps
from workbench.plans.checkup import checkup
from workbench.subjects import data, models
from workbench.subjects.objectives import IGNORED, NextToken, Objective, Tagging, objective
from workbench.subjects.subject import Subject
from workbench.subjects.tasks import Split
from workbench.subjects.training import Recipe, Train

ROOT = Path(__file__).parents[1]
TAGS = ("O", "B-city", "I-city", "B-day")


def test_f1_is_seqevals():
    from seqeval.metrics import f1_score

    torch.manual_seed(0)
    asked, targets = Tagging(tags=TAGS, whole=False), torch.randint(0, 4, (30, 8))
    targets[:, 5:] = torch.where(torch.rand(30, 3) < 0.5, IGNORED, targets[:, 5:])
    chosen = torch.where(torch.rand(30, 8) < 0.7, targets.clamp_min(0),
                         torch.randint(0, 4, (30, 8)))
    logits = nn.functional.one_hot(chosen, 4).float()
    kept = [[k for k in range(8) if line[k] != IGNORED] for line in targets]
    wanted, found = ([[TAGS[line[k]] for k in places]
                      for line, places in zip(lines, kept, strict=True)]
                     for lines in (targets, chosen))
    score = accuracy.scored(asked.statistics(logits, targets), asked)
    assert score.value == pytest.approx(f1_score(wanted, found))
    assert score.low < score.value < score.high


def test_perplexity_is_exp_of_the_mean_loss_and_nothing_guessed_is_even():
    torch.manual_seed(0)
    asked, targets, logits = NextToken(), torch.randint(0, 10, (6, 7)), torch.randn(6, 7, 10)
    targets[2, 4:] = IGNORED
    score = accuracy.scored(asked.statistics(logits, targets), asked)
    assert score.value == pytest.approx(math.exp(asked.loss(logits, targets).item()), rel=1e-5)
    even = accuracy.scored(asked.statistics(torch.zeros(6, 7, 10), targets), asked)
    assert even.value == pytest.approx(10)
    change = accuracy.difference(even, score)
    assert change.difference == pytest.approx(score.value - 10)
    assert change.low <= change.difference <= change.high


def test_a_paired_bootstrap_of_a_model_with_itself_is_nothing():
    asked = Tagging(tags=TAGS)
    score = accuracy.scored(torch.tensor([[1.0, 2, 1], [0, 1, 2], [2, 2, 2]]).double(), asked)
    same = accuracy.difference(score, score)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_examples_of_one_speaker_stand_or_fall_together():
    right = torch.tensor([1.0, 0] * 50).double()[:, None]
    alone = accuracy.scored(right, Objective())
    one_speaker_each = accuracy.scored(right, Objective(unit="speaker"),
                                       units=torch.tensor([0, 1] * 50))
    assert one_speaker_each.high - one_speaker_each.low > 4 * (alone.high - alone.low)


def test_tokens_that_do_not_count_change_nothing():
    asked, logits = Tagging(tags=TAGS), torch.randn(2, 5, 4)
    targets = torch.tensor([[0, 1, 2, IGNORED, IGNORED], [3, 0, 0, 0, 1]])
    other = logits.clone()
    other[0, 3:] += 9
    assert torch.equal(asked.loss(logits, targets), asked.loss(other, targets))
    assert torch.equal(asked.right(logits, targets), asked.right(other, targets))


def two_inputs(n: int = 240):
    draw = torch.Generator().manual_seed(0)
    signal, station = torch.randn(n, 6, generator=draw), torch.randint(0, 2, (n,), generator=draw)
    return (signal, station), ((signal[:, 0] > 0).long() + station) % 2


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.place, self.out = nn.Linear(6, 32), nn.Embedding(2, 32), nn.Linear(32, 2)

    def forward(self, signal, station):
        return {"state": station,
                "logits": self.out(torch.relu(self.read(signal) * self.place(station)))}


def test_a_tuple_of_tensors_goes_through_training_plan_export_and_int8(tmp_path):
    task = data.of(two_inputs(2000), name="own")
    model = models.wrap(Both(), task)
    stages = steps.plan(Subject(model, task),
                        [Train(Recipe(epochs=12, batch_size=64, learning_rate=0.02,
                                      optimizer="adamw"))])
    frame = steps.compare(stages, folder=tmp_path)
    assert frame.stage.tolist() == ["start", "train"]
    assert frame.top1.iloc[1] > 0.9
    found = checkup(stages["train"], folder=tmp_path, blocks=5)
    assert found.row["cosine_min"] > 0.99999
    assert found.row["agreement"] == 1
    assert abs(found.row["int8_top1_change"]) < 0.05
    outputs = sessions.open(found.files["float32"]).outputs(dict(zip(("signal", "station"),
                                                                     task.test.batch().inputs,
                                                                     strict=True)))
    assert list(outputs) == ["state", "logits"]


def test_a_datasets_of_torchs_kind_is_a_task():
    (signal, station), target = two_inputs(40)
    task = data.of(torch.utils.data.TensorDataset(signal, target))
    assert (len(task.train), len(task.validation), len(task.test)) == (29, 3, 8)
    places = [int((signal == value).all(1).nonzero()) for value in task.test.inputs]
    assert places == sorted(places)
    assert torch.equal(task.test.targets, target[places])


def test_what_the_kind_of_number_or_the_name_of_an_axis_asks_for(tmp_path):
    with pytest.raises(ValueError, match=r"its inputs torch.float64; give inputs.float\(\)"):
        call(nn.Linear(3, 2), torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="dynamic names the input 'inptu', which Linear lacks; it "
                       "has input"):
        onnx.export(nn.Linear(3, 2).eval(), torch.zeros(1, 3), tmp_path / "x.onnx",
                    dynamic={"inptu": {1: "frames"}})


def test_a_table_that_lacks_a_row_is_no_fault_of_the_tokenizer():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(100, 4), nn.Embedding(8, 4)

        def forward(self, input_ids):
            return self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))

    session = sessions.open(Placed().eval())
    with pytest.raises(ValueError, match="one of its tables, of 8 rows, has no row for what it is "
                       "asked; ids are at most 47, inputs 20 long"):
        session({"input_ids": torch.full((1, 20), 47)})
    with pytest.raises(ValueError, match="the largest id is 147, its vocabulary has 100 entries"):
        session({"input_ids": torch.full((1, 4), 147)})


def test_a_state_is_fed_back(tmp_path):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(3, 4)

        def forward(self, frame, state):
            new = self.cell(frame, state)
            return {"output": new * 2, "new_state": new}

    cell, frames, start = Cell().eval(), torch.randn(5, 2, 3), torch.zeros(2, 4)
    path = onnx.export(cell, {"frame": frames[0], "state": start}, tmp_path / "cell.onnx")
    state, expected = start, []
    with torch.no_grad():
        for frame in frames:
            state = cell.cell(frame, state)
            expected.append(2 * state)
    for source in (cell, path):
        stream = sessions.Stateful(source, {"new_state": "state"}, start={"state": start})
        for _ in range(2):
            torch.testing.assert_close([stream({"frame": frame}) for frame in frames], expected)
            stream.reset()
    with pytest.raises(ValueError, match="no start is given for 'memory'"):
        sessions.Stateful(cell, {"new_state": "memory"}, start={"state": start})
    with pytest.raises(ValueError, match="has no output 'gone' to feed back; it has "
                       "output, new_state"):
        sessions.Stateful(path, {"gone": "state"}, start={"state": start})({"frame": frames[0]})


@pytest.mark.parametrize(("call", "message"), [
    (lambda: objective("regression"), "unknown objective 'regression'; expected one of class, "
     "tags, next_token"),
    (lambda: data.of((torch.zeros(3, 2), torch.zeros(4))), "3 inputs and 4 targets"),
    (lambda: data.of((torch.tensor([[1.0], [math.nan]]), torch.zeros(2))), "example 1 holds NaN"),
    (lambda: data.of(7), "found int; expected"),
    (lambda: models.wrap(nn.Linear(5, 2), data.of((torch.zeros(30, 6), torch.zeros(30).long()))),
     "Linear does not run on the task's"),
    (lambda: models.wrap(nn.Identity(), data.of((torch.zeros(30, 6, 2), torch.zeros(30).long()))),
     r"Identity: the model's answer has shape"),
    (lambda: accuracy.evaluate(nn.Linear(6, 2),
                               data.of((torch.zeros(30, 6), torch.full((30,), 3))).test),
     "knows 2 classes, a target is class 3"),
    (lambda: next(Split(torch.ones(2, 5).long(), torch.zeros(2, 4).long(),
                        objective=Tagging(tags=TAGS)).batches()),
     r"targets have shape \(2, 4\), the tokens \(2, 5\)"),
    (lambda: models.load("resnet20", data.of((torch.zeros(30, 6), torch.zeros(30).long())),
                         pretrained=False),
     "this network reads pictures"),
])
def test_bad_input_gets_one_line(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def own_model_section() -> str:
    return (ROOT / "README.md").read_text().partition("## Your own model")[2].partition("\n## ")[0]


def test_the_readme_shows_the_first_section_of_the_notebook():
    cells = json.loads((ROOT / "notebooks" / "03_your_own_model.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    block = re.search(r"```python\n(.*?)```", own_model_section(), re.S)[1]
    own = block.partition('"exports"\n')[2].partition("compare(")[0]
    lines = [line for line in own.splitlines() if line and not line.startswith("#")]
    assert len(lines) >= 10
    assert not [line for line in lines if line not in code]


def test_what_the_readme_shows_for_ones_own_model_runs(tmp_path, monkeypatch):
    section = own_model_section()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(compile(block, "README", "exec"), names)
    assert list(names["stages"]) == ["start", "train", "prune", "quantize"]
    assert names["found"].row["cosine_min"] > 0.99999
