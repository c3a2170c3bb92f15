"""The search: what it chooses from, who proposes, that nothing is made twice and it goes on; bad
limits are one line."""

import shutil
import sys
from concurrent.futures import CancelledError
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.__main__ import main
from workbench.deployment import onnx
from workbench.graph.layers import macs_of
from workbench.measures import latency
from workbench.methods import channels, depth
from workbench.numbers.fronts import dominated_area, enlarged, undominated
from workbench.plans import evaluation, recipe
from workbench.plans import search as searching
from workbench.plans.evaluation import Makers
from workbench.plans.samplers import NAMES, replayed, sampler
from workbench.plans.search import Limits, judged_by, search, spared
from workbench.plans.space import (
    BITS,
    DEPTH,
    FLOAT,
    ROUNDING,
    Forecast,
    Space,
    forecast,
    label,
    plan_of,
)
from workbench.plans.steps import plan as run_steps
from workbench.store import Store
from workbench.subjects.subject import Subject

GENES = {f"layer{k}": (1.0, 0.5) for k in range(6)} | {BITS: (FLOAT, 8)}


@pytest.fixture(scope="module")
def space():
    return Space(GENES)


@pytest.fixture(scope="module")
def expected(space):
    """A forecast whose harms and times differ from gene to gene."""
    rows = [{"gene": name, "option": 1, "distance": 0.1 * 2**k} for k, name in enumerate(GENES)]
    rows[-1]["distance"] = 0.05
    times = [{"share": share, "bits": bits, "layer": f"layer{k}",
              "latency_ms": share * (k + 1) / (1 if bits == FLOAT else 2)}
             for share in (1.0, 0.5) for bits in (FLOAT, 8) for k in range(6)]
    genes = {f"layer{k}": (f"layer{k}",) for k in range(6)}
    return Forecast(space, pd.DataFrame(rows), pd.DataFrame(times), genes)


def truth(space, expected):
    """What plans come to: the forecast, bent."""
    return {plan: (0.02 * expected.lost(plan) ** 1.3, 0.9 * expected.latency(plan) + 0.05)
            for plan in space.every()}


def test_a_forecast_adds_the_harms_and_times_of_the_options(space, expected):
    whole, least = (0,) * 7, (1,) * 7
    assert expected.latency(whole) == pytest.approx(1.0)
    assert expected.latency(least) == pytest.approx(0.25)
    assert expected.lost(whole) == 0
    assert expected.lost(least) == pytest.approx(0.1 * 63 + 0.05)


def test_a_space_knows_the_models_groups_and_writes_plans_as_recipes(model, tiny):
    space = Space.of(model, tiny.example, shares=(1.0, 0.75, 0.5), bits=(32, 8, 4), recovery=2,
                     batch_size=20)
    assert space.genes["layer3.1.conv1"] == (1.0, 0.75, 0.5)
    assert space.genes["layer1.0.conv1"] == (1.0, 0.75, 0.5)
    assert space.genes[BITS] == (32, 8, 4)
    assert space.genes[ROUNDING] == ("nearest", "descend")
    whole = (0,) * len(space.genes)
    assert space.steps(whole) == {}
    plan = (*[2] * 9, 1, 1)
    steps = space.steps(plan)
    assert list(steps) == ["prune", "distil", "quantize", "repair"]
    assert list(recipe.parse(recipe.dump(steps)).steps.values()) == list(steps.values())
    made = run_steps(Subject(model, tiny), steps)
    assert macs_of(made["prune"].model, tiny.example) < 0.6 * macs_of(model, tiny.example)
    assert space.reduced((*[0] * 9, 0, 1)) == whole, "what is not rounded has no way of rounding"


def test_a_space_leaves_out_blocks_in_their_order_and_what_is_left_out_is_not_cut(model, tiny):
    space = Space.of(model, tiny.example, shares=(1.0, 0.5), bits=(32, 8), rounding=(),
                     blocks=["layer3.2", "layer1.1"],
                     recovery=2, batch_size=20)
    assert space.genes[DEPTH] == (0, 1, 2)
    assert space.blocks == {"layer3.2": ("layer3.2.conv1",), "layer1.1": ("layer1.1.conv1",)}
    everything = space.reduced([1] * (len(space.genes) - 2) + [2, 1])
    assert [name for name, option in space.chosen(everything).items()
            if option == 1.0] == ["layer1.1.conv1", "layer3.2.conv1"]
    steps = space.steps(everything)
    assert list(steps) == ["prune", "drop", "distil", "quantize"]
    assert list(recipe.parse(recipe.dump(steps)).steps.values()) == list(steps.values())
    left = run_steps(Subject(model, tiny), steps)["distil"].model
    assert "layer3.2.conv1" not in dict(left.named_modules())
    assert left.layer3[1].conv1.out_channels == 32
    assert space.left_out([0] * len(space.genes)) == []


def test_a_forecast_takes_off_the_times_of_the_layers_that_are_left_out():
    genes = {"a.0.x": (1.0, 0.5), "a.1.x": (1.0, 0.5), DEPTH: (0, 1), BITS: (FLOAT, 8)}
    times = [{"share": share, "bits": bits, "layer": layer, "latency_ms": share * time
              * (1 if bits == FLOAT else 0.5)}
             for share in (1.0, 0.5) for bits in (FLOAT, 8)
             for layer, time in (("a.0.x", 1.0), ("a.1.x", 2.0), ("b", 1.0))]
    space = Space(genes, {"a.1": ("a.1.x",)})
    harm = pd.DataFrame([{"gene": DEPTH, "option": 1, "distance": 0.3},
                         {"gene": "a.0.x", "option": 1, "distance": 0.1}])
    expected = Forecast(space, harm, pd.DataFrame(times),
                        {"a.0.x": ("a.0.x",), "a.1.x": ("a.1.x",)})
    assert expected.latency((0, 0, 1, 0)) == pytest.approx(0.5)
    assert expected.latency((1, 0, 1, 1)) == pytest.approx(0.1875)
    assert expected.lost((1, 0, 1, 0)) == pytest.approx(0.4)
    fixed, parts = expected.parts(FLOAT)
    assert fixed + sum(parts[name][place]
                       for name, place in zip(parts, (1, 0, 1),
                                              strict=True)) == pytest.approx(0.375)


def test_a_search_that_is_given_nothing_else_may_leave_out_half_of_the_blocks(model, tiny):
    start = Subject(model, tiny)
    found = spared(start, judged_by(start, 100, 0))
    assert len(found) == 3
    assert set(found) <= set(depth.blocks(model, tiny.example))


@pytest.mark.parametrize(("box", "limits"), [((1.0, 1.0), []), ((0.02, 1.0), ["lost"]),
                                             ((0.02, 0.7), ["lost", "latency"])])
def test_the_samplers_of_optuna_are_told_the_limits_and_no_others(space, box, limits):
    told, asked = [], sampler("tpe", space, box=box)

    class Trial:
        set_constraint = staticmethod(lambda name, value: told.append((name, round(value, 6))))

    asked.study = SimpleNamespace(tell=lambda trial, values: None)
    asked.learn(Trial, 0.03, 0.8)
    wanted = {"lost": 0.03 - box[0], "latency": 0.8 - box[1]}
    assert told == [(name, round(wanted[name], 6)) for name in limits]


def test_a_plan_comes_back_from_its_label():
    assert plan_of(label((0, 11, 2))) == (0, 11, 2)


@pytest.mark.parametrize("seed", [0, 3])
def test_spaces_too_large_to_write_down_are_searched_too(seed):
    genes = {f"layer{k}": (1.0, 0.75, 0.5, 0.25) for k in range(9)} | {BITS: (FLOAT, 8, 4),
                                                                       ROUNDING: ("nearest",
                                                                                  "descend")}
    rows = [{"gene": name, "option": place, "distance": 0.1 * place * (k + 1)}
            for k, (name, options) in enumerate(genes.items()) for place in range(1, len(options))
            if name != ROUNDING]
    times = [{"share": share, "bits": bits, "layer": f"layer{k}",
              "latency_ms": share * (1.0 if bits == FLOAT else 0.5)}
             for share in (1.0, 0.75, 0.5, 0.25) for bits in (FLOAT, 8) for k in range(9)]
    expected = Forecast(Space(genes), pd.DataFrame(rows), pd.DataFrame(times),
                        {f"layer{k}": (f"layer{k}",) for k in range(9)})
    chooser, plans = sampler("forecast", expected.space, forecast=expected, seed=seed), []
    for _ in range(3):
        for plan in chooser.ask(4):
            chooser.tell(plan, 0.02 * expected.lost(plan), expected.latency(plan))
            plans.append(plan)
    assert len(set(plans)) == 12


def test_shares_keep_the_channels_with_the_highest_scores(model, tiny):
    scores = channels.score(model, "l1", example=tiny.example)
    removed = channels.fewest(scores, {"layer3.0.conv1": 0.5, "layer2.0.conv1": 1.0})
    kept = scores[(scores.layer == "layer3.0.conv1")
                  & ~scores.channel.isin(removed["layer3.0.conv1"])].score
    assert len(removed["layer3.0.conv1"]) == 32
    assert kept.min() >= scores[scores.layer == "layer3.0.conv1"].score.nlargest(32).min()
    assert "layer2.0.conv1" not in removed
    with pytest.raises(ValueError, match="'fc' is no group of channels that can be cut; there are "
                       "layer1.0.conv1"):
        channels.fewest(scores, {"fc": 0.5})
    with pytest.raises(ValueError, match="expected a fraction that stays"):
        channels.fewest(scores, {"layer3.0.conv1": 0.0})


def test_areas_are_those_of_a_grid_that_is_counted():
    draw = np.random.default_rng(0)
    points, new = draw.random((9, 2)), draw.random((20, 2))
    ticks = (np.arange(1000) + 0.5) / 1000
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)

    def counted(points):
        return (grid[:, None] >= points[None]).all(2).any(1).mean()

    assert dominated_area(points, (1.0, 1.0)) == pytest.approx(counted(points), abs=3e-3)
    gains = enlarged(points, new, (1.0, 1.0))
    for one, gain in zip(new, gains, strict=True):
        assert gain == pytest.approx(dominated_area(np.vstack([points, one]), (1, 1))
                                     - dominated_area(points, (1, 1)), abs=1e-9)
    kept = points[undominated(points)]
    assert not any(((other <= one).all() and (other < one).any()) for one in kept
                   for other in points)


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_proposes_new_plans_and_the_same_again(name, space, expected):
    known, asked = truth(space, expected), []
    for _ in range(2):
        chooser, plans = sampler(name, space, forecast=expected, seed=3), []
        while len(plans) < 16:
            new = chooser.ask(4)
            for plan in new:
                chooser.tell(plan, *known[plan])
            plans += new
        assert len(set(plans)) == 16
        asked.append(plans)
    assert asked[0] == asked[1]


def test_sensitivities_lead_faster_than_chance(space, expected):
    known = truth(space, expected)
    points = np.array(list(known.values()))
    corner, shares = tuple(points.max(0) + 1e-9), {}
    for name in ("forecast", "random"):
        runs = [replayed(name, space, known, forecast=expected, evaluations=16, seed=seed)
                for seed in range(5)]
        shares[name] = np.mean([dominated_area(run[["lost", "latency"]].to_numpy(), corner)
                                for run in runs])
        shares[name] /= dominated_area(points, corner)
    assert shares["forecast"] > shares["random"]
    assert shares["forecast"] > 0.95


def test_the_policy_learns_from_plans_one_by_one():
    chooser = sampler("policy", Space({"a": (1.0, 0.5), "b": (1.0, 0.5), BITS: (FLOAT, 8)}),
                      forecast=None, box=(1.0, 1.0), seed=0)
    for _ in range(chooser.EPISODES):
        chooser.learn(chooser.draw()[1], lost=0.01, latency=0.5)
    buffer = chooser.learner.rollout_buffer
    assert buffer.episode_starts.reshape(-1, 3).tolist() == [[1, 0, 0]] * chooser.EPISODES
    assert (buffer.rewards.reshape(-1, 3)[:, :2] == 0).all(), "a plan is judged when it is whole"


def test_what_leaving_blocks_out_does_is_measured_one_by_one(model, tiny, tmp_path):
    few = tiny.validation.subset(40)
    space = Space({DEPTH: (0, 1, 2)}, blocks=("layer3.2", "layer1.1"))
    harm = forecast(Subject(model, tiny), space, few, folder=tmp_path, runs=1).harm
    images = few.batch().inputs
    with torch.no_grad():
        whole = model(images)
        lost = []
        for gone in (("layer3.2",), ("layer3.2", "layer1.1")):
            apart = depth.without_blocks(model, gone)(images) - whole
            lost.append((apart.square().sum(1) / whole.square().sum(1)).mean().item())
    found = harm[harm.gene == DEPTH].set_index("option").distance
    assert found.to_dict() == pytest.approx({1: lost[0], 2: lost[1]}, rel=1e-3)


@pytest.fixture(scope="module")
def small(model, tiny):
    """A space of few plans that are quickly made."""
    whole = Space.of(model, tiny.example, shares=(1.0, 0.5), bits=(32, 8), rounding=(), recovery=2,
                     batch_size=20)
    genes = {name: whole.genes[name] for name in ("layer3.1.conv1", "layer3.2.conv1", BITS)}
    return Subject(model, tiny), Space(genes, recovery=2, batch_size=20)


def settings(space) -> dict:
    return {"space": space, "evaluations": 4, "batch": 2, "images": 100, "blocks": 5}


def by_bytes(candidates, *_arguments, **_options) -> pd.DataFrame:
    """Times as latency.paired tells them, of a processor on which a file takes as long as it is
    large."""
    sizes = pd.Series([path.stat().st_size for path in candidates.values()])
    ratios = {name: sizes / sizes[0] for name in ("ratio", "ratio_low", "ratio_high")}
    return pd.DataFrame({"candidate": list(candidates), "latency_ms": sizes / 1e6, **ratios})


def test_a_search_keeps_its_limit_makes_nothing_twice_and_goes_on(small, tmp_path, monkeypatch):
    start, space = small
    monkeypatch.setattr(latency, "paired", by_bytes)
    monkeypatch.setattr(searching, "_timed_alone", by_bytes)
    found = search(start, Limits(latency=0.8), tmp_path / "a", **settings(space))
    assert found.reason == "within the limits"
    assert found.confirmed.set_index("plan").loc[label(found.plan), "latency"] < 0.8
    assert label(found.plan) == found.plans.sort_values(["excess", "lost", "latency"],
                                                        kind="stable").plan.iloc[0]
    assert {"model.onnx", "model.safetensors", "recipe.yaml", "plans.csv", "confirmed.csv",
            "run.json", "journal.jsonl",
            "evaluations"} == {path.name for path in (tmp_path / "a").iterdir()}
    assert recipe.load(tmp_path / "a" / "recipe.yaml").steps == space.steps(found.plan)
    # the same again, from what is kept; then as if it had been killed behind the first batch
    before = (tmp_path / "a" / "plans.csv").read_bytes()
    journal = (tmp_path / "a" / "journal.jsonl").read_text()
    (tmp_path / "a" / "journal.jsonl").write_text("".join(journal.splitlines(keepends=True)[:3])
                                                  + '{"pl')

    def fails(*_arguments):
        raise AssertionError("a plan was made again")

    monkeypatch.setattr(evaluation.onnx, "export", fails)
    search(start, Limits(latency=0.8), tmp_path / "a", **settings(space))
    assert (tmp_path / "a" / "plans.csv").read_bytes() == before
    assert (tmp_path / "a" / "journal.jsonl").read_text() == journal
    with pytest.raises(ValueError, match=r"is of another search \(its limits is .*\); give "
                       r"another folder"):
        search(start, Limits(latency=0.7), tmp_path / "a", **settings(space))
    monkeypatch.undo()  # and where no plan keeps the limit, what was made being taken over
    monkeypatch.setattr(latency, "paired", by_bytes)
    monkeypatch.setattr(searching, "_timed_alone", by_bytes)
    shutil.copytree(tmp_path / "a" / "evaluations", tmp_path / "b" / "evaluations")
    found = search(start, Limits(latency=0.01), tmp_path / "b", **settings(space))
    assert found.reason.startswith("no plan of 4 keeps the limits; the nearest has latency 0.")
    assert found.file.exists()


def test_a_search_without_time_still_tries_one_batch(small, tmp_path, monkeypatch):
    start, space = small
    monkeypatch.setattr(latency, "paired", by_bytes)
    monkeypatch.setattr(searching, "_timed_alone", by_bytes)
    found = search(start, Limits(latency=0.8), tmp_path, minutes=1e-6, **settings(space))
    assert len(found.plans) == 2


def test_the_last_timing_knows_nothing_of_the_script_that_asks_for_it(small, tmp_path):
    start, _ = small
    path = onnx.export(start.model, start.example, tmp_path / "m.onnx")
    table = searching._timed_alone({"one": path, "other": path}, start.example, 5, 0)
    assert table.candidate.tolist() == ["one", "other"]
    with pytest.raises(RuntimeError, match="timed in a process of their own: .*nosuch"):
        searching._timed_alone({"one": tmp_path / "nosuch.onnx"}, start.example, 5, 0)


def test_plans_are_sent_anew_where_the_scheduler_was_lost(small, tmp_path, monkeypatch):
    import distributed

    class Client:
        """Loses the first plans that it is given."""

        asked = 0

        def __init__(self, *_arguments, **_settings):
            pass

        def scatter(self, packed, broadcast):
            return packed

        def map(self, work, plans, *, packed, **_settings):
            return [work(plan, packed) for plan in plans]

        def gather(self, futures):
            Client.asked += 1
            if Client.asked == 1 or lost:
                raise CancelledError("lost")
            return futures

        def close(self, timeout=None):
            pass

    start, space = small
    monkeypatch.setattr(distributed, "Client", Client)
    monkeypatch.setattr(evaluation, "made", lambda _start, _space, plan, *_more: label(plan))
    lost = False
    with Makers(start, space, Store(tmp_path), {}, 1, "tcp://127.0.0.1:9") as make:
        assert make(space.every()[1:3]) == [label(plan) for plan in space.every()[1:3]]
        assert Client.asked == 2
        lost = True
        with pytest.raises(OSError, match="lost the same plans 20 times"):
            make(space.every()[1:2])


def test_two_workers_and_a_cluster_make_what_one_makes(small, tmp_path):
    from distributed import LocalCluster

    start, space = small
    plans, made = space.every()[1:3], []
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        for workers, scheduler in ((1, None), (2, None), (1, cluster.scheduler_address)):
            with Makers(start, space, Store(tmp_path / str(len(made))), {"model": "m"}, workers,
                        scheduler) as make:
                made.append([(place / "model.safetensors").read_bytes() for place in make(plans)])
    assert made[0] == made[1] == made[2]


def test_a_plan_that_another_surely_beats_is_not_looked_at_further():
    right = torch.ones(2000, 1, dtype=torch.float64)
    wrong = right.clone()
    wrong[::10] = 0
    labels, good = torch.zeros(2000, dtype=torch.int64), {}
    for name, statistics in (("rival", right), ("plan", wrong), ("close", right.clone())):
        if name == "close":
            statistics[5] = 0
        good[name] = evaluation.accuracy.scored(statistics, evaluation.accuracy.Objective(),
                                                labels=labels,
                                                predictions=(statistics[:, 0] < 0.5).long())
    assert evaluation._behind(good["plan"], good["rival"])
    assert not evaluation._behind(good["close"], good["rival"])
    assert not evaluation._behind(good["rival"], good["plan"])


@pytest.mark.parametrize(("limits", "message"), [
    ({}, "search needs a limit: latency, size or lost"),
    ({"latency": "fast"}, "limit latency is 'fast', expected a number"),
    ({"latency": float("nan")}, "limit latency is nan, expected a number"),
    ({"latency": 1.2}, "limit latency is 1.2, expected a share of the model's own, more "
     "than 0 and below 1"),
    ({"size": 0}, "limit size is 0, expected a share"),
    ({"lost": 2.0}, "limit lost is 2, expected a fraction"),
])
def test_bad_limits_are_one_line(limits, message):
    with pytest.raises(ValueError, match=message):
        Limits(**limits)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--latency", "1.5"], "limit latency is 1.5"),
    ([], "search needs a limit"),
    (["--latency", "0.5", "--sampler", "luck"], "'luck' is not one of 'forecast', 'greedy'"),
    (["--latency", "half"], "'half' is not a valid float"),
    (["--latency", "0.5", "--scheduler", "tcp://127.0.0.1:9", "--evaluations", "1"],
     "no scheduler at tcp://127.0.0.1:9"),
])
def test_the_command_refuses_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["workbench", "search", "--model", "resnet20", "--data",
                                      "fashion_mnist", "--out", "out",
                                      *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
