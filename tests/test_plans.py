"""Recipes: what is read is what was written, each bad one is one line; and the way from a model to
a file, killed or not."""

import copy
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pandas as pd
import pytest
import torch
from torch import nn

from workbench.__main__ import main
from workbench.errors import UnsupportedModelError
from workbench.measures import accuracy
from workbench.methods.channels import Prune
from workbench.methods.distillation import Distil, falling
from workbench.methods.factorization import Factorize
from workbench.methods.quantization import Quantize
from workbench.methods.rounding import Repair
from workbench.methods.sparsity import Sparsify
from workbench.plans import recipe, tuning
from workbench.plans.allocation import Mix
from workbench.plans.checkup import checkup
from workbench.plans.compress import compress
from workbench.plans.orders import order
from workbench.plans.steps import Export, Load, plan
from workbench.plans.tuning import Tune
from workbench.store import Store
from workbench.subjects import data, models
from workbench.subjects.subject import Subject
from workbench.subjects.training import Recipe, Train

ARTICLES = """compression: [
{type: structured_pruning, params: {sparsity_ratio: 0.4, target_layers: ["encoder.block.*"]}},
{type: quantization, params: {bits: 8, method: adaquant}}]"""
STEPS = [Prune(macs=0.5), Distil(Recipe(epochs=2, learning_rate=0.01), temperature=2.0),
         Prune(ratio=0.1, keep=["conv1"]),
         Sparsify(sparsity=0.5, recipe=Recipe(epochs=1)), Factorize(energy=0.9),
         Train(Recipe(epochs=30)), Quantize(bits=4),
         Repair("adaround", steps=10), Mix(widths=[4, 8]), Tune(bits=4), Load("mine.safetensors"),
         Export()]


def test_the_articles_recipe_is_understood_as_it_stands():
    steps = recipe.parse(ARTICLES).steps
    assert list(steps) == ["structured_pruning", "quantization", "quantization, adaquant"]
    assert steps["structured_pruning"] == Prune(ratio=0.4, layers=["encoder.block.*"])
    assert list(steps.values())[1:] == [Quantize(bits=8), Repair("adaquant")]


def test_every_step_comes_back_from_its_yaml():
    told = recipe.dump(STEPS, name="all")
    again = recipe.parse(told)
    assert list(again.steps.values()) == STEPS
    assert again.name == "all"
    assert list(again.steps)[:3] == ["prune", "distil", "prune 2"]
    assert recipe.dump(again.steps, name="all") == told


@pytest.mark.parametrize(("text", "message"), [
    ("", "r.yaml is empty"),
    ("compression: [", r"not valid YAML \(line 1\)"),
    ("steps: []", "expected `compression:` and a list of steps"),
    ("compression: []", "expected `compression:` and a list of steps"),
    ("compression: [3]", "step 1: found 3, expected {type"),
    ("{compression: [{type: fold}], modell: x}", "unknown key 'modell'; expected compression, "
     "name, model, data"),
    ("compression: [{type: fold}, {type: prun}]",
     r"step 2 \(prun\): unknown type, did you mean 'prune'"),
    ("compression: [{type: prune}]", "give exactly one of macs, params"),
    ("compression: [{type: prune, params: {macs: 0.5, ratio: 0.1}}]",
     "give exactly one of macs, params"),
    ("compression: [{type: prune, params: {mac: 0.5}}]",
     "unknown field 'mac', did you mean 'macs'"),
    ("compression: [{type: prune, params: {macs: half}}]", "macs is 'half', expected number"),
    ("compression: [{type: prune, params: {macs: 2}}]",
     "macs is 2, expected less than or equal to 1"),
    ("compression: [{type: structured_pruning, params: {sparsity_ratio: 1.0}}]",
     "sparsity_ratio is 1.0, expected less than 1"),
    ("compression: [{type: train, params: {bits: 8}}]", "unknown field 'bits'"),
    ("compression: [{type: train, params: {epochs: 0}}]", "epochs is 0, expected more than 0"),
    ("compression: [{type: quantize, params: {bits: 9}}]",
     "bits is 9, expected less than or equal to 8"),
    ("compression: [{type: quantize, params: {granularity: chanel}}]",
     "expected 'tensor', 'channel' or 'group'"),
    ("compression: [{type: quantization, params: {method: adaqant}}]", "did you mean 'adaquant'"),
    ("compression: [{type: tune, params: {repairs: [magic]}}]", "repairs holds 'magic'"),
    ("compression: [{type: fold, bits: 3}]", "unknown key 'bits'; a step has type and params"),
])
def test_a_bad_recipe_is_one_line_that_names_step_and_field(text, message):
    with pytest.raises(ValueError, match=message) as told:
        recipe.parse(text, where="r.yaml")
    assert str(told.value).startswith("r.yaml")
    assert "\n" not in str(told.value)


def test_a_recipe_for_another_model_is_refused_before_anything_runs(model):
    steps = recipe.parse(ARTICLES).steps
    with pytest.raises(ValueError, match=r"pruning: layers: no layer matches .encoder.block.\*.; "
                       r"the layers are conv1"):
        recipe.expect_layers(steps, model)


def test_the_recipes_that_come_along_are_whole():
    for name in ("int8", "int4"):
        assert recipe.load(name).steps
    with pytest.raises(FileNotFoundError, match="recipe int9 does not exist; give a YAML file, or "
                       "one of int4, int8"):
        recipe.load("int9")


def test_what_a_set_has_is_what_tuning_draws_from(few):
    none = few.task.train.take(torch.arange(0))
    for task, where in ((replace(few.task, train=none), few.task.validation),
                        (few.task, few.task.train)):
        parts = tuning._drawn(task, 100, 60, seed=0)
        assert sum(map(len, parts)) == len(where)
        assert all(len(part) for part in parts)


def test_how_near_answers_come_does_not_depend_on_how_large_they_are():
    found, expected = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    for size in (1e-6, 1.0, 1e6):
        assert tuning._distance(size * found, size * expected) == pytest.approx((4 / 3 + 1 / 2) / 2)


def test_a_share_of_the_channels_of_some_layers_goes(model, tiny):
    made = Prune(ratio=0.5, layers=["layer1.*.conv1"],
                 scope="layer").apply(Subject(model, tiny)).model
    widths = {name: module.out_channels for name, module in made.named_modules()
              if isinstance(module, torch.nn.Conv2d)}
    assert widths["layer1.0.conv1"] == 8
    assert widths["layer2.0.conv1"] == 32


RUN = """
import sys
from tests.test_plans import run
run(*sys.argv[1:])
"""
WHOLE = """compression:
  - {type: prune, params: {macs: 0.6}}
  - {type: distil, params: {epochs: 3, batch_size: 60, learning_rate: 1e-2}}
  - {type: quantize}
"""


def run(source: str, out: str) -> None:
    """A small task through the recipe."""
    task = data.load("fashion_mnist")
    task = replace(task, train=task.train.subset(600), validation=task.validation.subset(100),
                   test=task.test.subset(200))
    compress(Subject(models.load("resnet20", task), task), recipe.load(source).steps, out, blocks=5)


def test_killed_while_it_trains_it_goes_on_and_leaves_the_same(tmp_path):
    (tmp_path / "r.yaml").write_text(WHOLE)
    run(tmp_path / "r.yaml", tmp_path / "whole")
    process = subprocess.Popen([sys.executable, "-c", RUN, tmp_path / "r.yaml",
                                tmp_path / "killed"],
                               cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    stages, end = tmp_path / "killed" / "stages", time.monotonic() + 120
    while process.poll() is None and not list(
        stages.glob("2 distil*.state")) and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in stages.glob("[0-9]*/key.json")}
    assert [path.parent.name[:7] for path in sorted(before)] == ["0 start", "1 prune"]
    assert list(stages.glob("2 distil*.state")), "the training goes on from here"
    run(tmp_path / "r.yaml", tmp_path / "killed")
    assert all(path.stat().st_mtime_ns == made
               for path, made in before.items()), "what stood was not made again"
    one, other = (pd.read_csv(tmp_path / out / "stages.csv") for out in ("whole", "killed"))
    same = ["stage", "top1", "top1_change", "params", "macs", "size_bytes"]
    pd.testing.assert_frame_equal(one[same], other[same])
    whole, killed = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


@pytest.mark.parametrize("step", [
    "quantize: {bits: 8}", "tune: {bits: 8}", "train: {epochs: 1}", "drop: {share: 0.5}",
    "factorize: {rank: 4, outputs: true}", "sparsify: {sparsity: 0.5, epochs: 1}",
    "prune: {macs: 0.5, criterion: taylor}"])
def test_what_needs_other_examples_is_refused_before_anything_runs(model, tiny, tmp_path, step):
    none = tiny.train.take(torch.arange(0))
    kind, _, params = step.partition(": ")
    steps = recipe.parse(f"compression: [{{type: fold}}, {{type: {kind}, params: {params}}}]").steps
    only = Subject(model, replace(tiny, train=none, validation=none))
    with pytest.raises(ValueError, match=f"^{kind} needs examples other than the test's, and "
                       "fashion_mnist has none; .* give folder:PATH files or folders named train"):
        compress(only, steps, tmp_path / "out", blocks=5)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="^fashion_mnist has 0 validation or training examples"):
        Tune().apply(only)


@pytest.fixture
def few(task):
    """A network and task whose stages take no time."""
    torch.manual_seed(0)
    own = data.of((torch.randn(90, 6), torch.arange(90) % 3))
    return Subject(models.wrap(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), own),
                   own)


def test_stages_of_other_examples_models_and_teachers_are_not_taken(few, tmp_path):
    how = {"out": tmp_path / "out", "stages": tmp_path / "stages", "blocks": 5}
    halves = [few.task.test.take(torch.arange(k, k + 9)) for k in (0, 9)]
    tops = [compress(few, [], test=half, **how).stages.top1[0] for half in halves]
    assert tops == [accuracy.evaluate(few.model, half).value for half in halves]
    other = copy.deepcopy(few.model)
    other[1] = nn.Tanh()
    other.origin = few.model.origin
    compress(few.with_model(other), [], **how)
    nodes = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert "Tanh" in nodes
    taught = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        teacher = nn.Sequential(nn.Linear(6, 3)).eval()
        step = Distil(Recipe(epochs=3, learning_rate=0.05), teacher=teacher, alpha=1.0)
        taught.append(compress(few, {"distil": step}, **how).subject.model[0].weight)
    assert not torch.equal(*taught)


def test_a_schedule_a_step_of_ones_own_and_a_list_of_steps_are_taken(few, tmp_path):
    @dataclass(frozen=True)
    class Halved:
        share: float = 0.5

        def apply(self, subject):
            model = copy.deepcopy(subject.model)
            model[0].weight.data *= self.share
            return subject.with_model(model)

    steps = [Halved(), Distil(Recipe(epochs=1), temperature=falling(4.0, 1.0))]
    made = compress(few, steps, tmp_path / "one", stages=tmp_path / "stages", blocks=5)
    assert made.stages.stage.tolist() == ["start", "halved", "distil"]
    again = compress(few, steps, tmp_path / "two", stages=tmp_path / "stages", blocks=5)
    assert again.stages.took_s.tolist() == made.stages.took_s.tolist(), "taken, not made again"


def test_an_export_is_written_where_its_stage_was_known_too(few, tmp_path):
    for out in ("one", "two"):
        made = compress(few, {"export": Export("mid.onnx")}, tmp_path / out,
                        stages=tmp_path / "stages", blocks=5)
        assert made.subject.made["file"] == tmp_path / out / "mid.onnx"
        assert made.subject.made["file"].exists()


def test_test_examples_do_not_calibrate(few, tmp_path):
    none = few.task.train.take(torch.arange(0))
    only = Subject(few.model, replace(few.task, train=none, validation=none))
    with pytest.raises(ValueError, match="no validation or training examples to calibrate on"):
        checkup(only, folder=tmp_path)


def test_what_a_run_leaves(model, tiny, tmp_path):
    made = compress(Subject(model, tiny),
                    recipe.parse(WHOLE.replace("epochs: 3", "epochs: 1")).steps, tmp_path, blocks=5)
    assert list(made.stages.stage) == ["start", "prune", "distil", "quantize"]
    assert made.stages.took_s.between(0, 100).all()
    assert made.verdict.passed
    assert made.stages.size_bytes.is_monotonic_decreasing or made.stages.size_bytes.iloc[
        -1] < made.stages.size_bytes.iloc[0] / 3
    assert {"model.onnx", "model.safetensors", "stages.csv", "run.json",
            "stages"} == {p.name for p in tmp_path.iterdir()}
    told = json.loads((tmp_path / "run.json").read_text())
    assert [step["type"] for step in told["steps"]] == ["prune", "distil", "quantize"]
    assert all(check["passed"] for check in told["checks"])


def test_stages_of_another_model_are_named_and_not_used(model, tiny, tmp_path, capsys):
    compress(Subject(model, tiny), {"quantize": Quantize(examples=40)}, tmp_path, blocks=5)
    assert "stale" not in capsys.readouterr().out
    other = copy.deepcopy(model)
    list(other.parameters())[-1].data += 1.0
    made = compress(Subject(other, tiny), {"quantize": Quantize(examples=40)}, tmp_path, blocks=5)
    said = capsys.readouterr().out
    assert "stale, of another model, recipe, data or state of the code: 0 start-" in said
    assert "1 quantize-" in said
    assert made.verdict.passed


def test_tuning_keeps_what_brings_the_answers_nearer(model, tiny):
    made = Tune(bits=3, calibrators=["minmax", "mse"], repairs=["descend"], examples=60,
                judged=40).apply(Subject(model, tiny))
    tried = made.made["tried"].set_index("what")
    assert {"minmax", "mse", "descend"} <= set(tried.index)
    assert tried.kept["descend"]
    assert tried.distance["descend"] < tried.distance[["minmax", "mse"]].min()


def test_mixed_widths_keep_to_their_share_of_the_bytes(model, tiny):
    made = Mix(bytes=0.5, widths=[2, 4, 8], examples=40).apply(Subject(model, tiny))
    bits, weights = made.made["bits"], {name: layer.weight.numel()
                                        for name, layer in model.named_modules()
                                        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)}
    assert sum(bits[name] * weights[name] for name in bits) <= 0.5 * 8 * sum(weights.values())
    assert len(set(bits.values())) > 1


def test_a_quantised_model_is_not_cut(model, tiny):
    quantised = Quantize(examples=40).apply(Subject(model, tiny))
    with pytest.raises(UnsupportedModelError, match="put prune before quantize"):
        Prune(macs=0.5).apply(quantised)


def test_a_plan_may_export_on_its_way(model, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = plan(Subject(model, tiny), [Prune(macs=0.8), Export("early.onnx"), Quantize()])
    assert Path("early.onnx").exists()
    assert stages["quantize"].made["file"] == Path("early.onnx")


def test_a_store_makes_once_and_names_what_is_stale(tmp_path):
    store, calls = Store(tmp_path), []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "value.txt").write_text("1")

    first = store.kept("scan", {"model": "a"}, make)
    assert store.kept("scan", {"model": "a"}, make) == first
    assert len(calls) == 1
    assert json.loads((first / "key.json").read_text()) == {"model": "a"}
    assert store.stale("scan", {"model": "b"}) == [first]
    assert store.stale("scan", {"model": "a"}) == []
    with pytest.raises(ZeroDivisionError):
        store.kept("scan", {"model": "c"}, lambda folder: 1 / 0)
    assert not store.place("scan", {"model": "c"}).exists()
    assert len(list(tmp_path.glob("scan-*"))) == 1


def test_two_results_of_one_hash_and_a_store_that_cannot_be_written_are_refused(tmp_path):
    store = Store(tmp_path / "store")
    made = store.kept("scan", {"model": "a", "data": "d"}, lambda folder: None)
    for damaged in (json.dumps({"model": "b", "data": "d"}),
                    json.dumps({"model": "b", "data": "d"})[:9]):
        (made / "key.json").write_text(damaged)
        with pytest.raises(ValueError, match=rf"{made.name} is the result of something else "
                           r".*model.* remove that folder"):
            store.kept("scan", {"model": "a", "data": "d"}, lambda folder: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"results cannot be kept in .*file \(.*\); give a folder "
                       r"that can be written"):
        Store(tmp_path / "file").kept("scan", {"model": "a"}, lambda folder: None)


@pytest.mark.parametrize(("arguments", "message"), [
    (["none.yaml", "--model", "resnet20", "--data", "fashion_mnist"],
     "recipe none.yaml does not exist"),
    (["int8", "--model", "resnet20"], "compress needs --data; recipe int8 names none"),
    (["r.yaml", "--model", "resnet20", "--data", "fashion_mnist"],
     "r.yaml is for model resnet56, not resnet20"),
])
def test_the_command_refuses_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text("{model: resnet56, compression: [{type: fold}]}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["workbench", "compress", *arguments, "--out", "out"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_orders_are_recipes_and_nothing_is_cut_behind_rounding():
    assert list(order("PDQ", steps=2)) == ["prune", "distil", "quantize"]
    behind, before = (order(letters)["distil"].recipe.learning_rate for letters in ("PQD", "PDQ"))
    assert behind < before
    for letters in ("QP", "PP", "X", ""):
        with pytest.raises(ValueError, match="expected some of P, D and Q, each once, P before Q"):
            order(letters)
