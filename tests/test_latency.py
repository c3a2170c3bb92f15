"""The timing itself: candidates do not disturb each other, and what is stated of a run is true."""

import time

import numpy as np
import pytest
import torch

from workbench import machine
from workbench.deployment import onnx, sessions
from workbench.graph import layers
from workbench.measures import latency
from workbench.methods import quantization, reparameterization


def sleeper(milliseconds: float):
    def run(images):
        time.sleep(milliseconds / 1e3)
        return images

    return run


def until_quiet(measure, accept, attempts: int = 4):
    """The first measurement that `accept` takes; a shared machine may be disturbed, but not four
    times in a row."""
    for _ in range(attempts):
        found = measure()
        if accept(found):
            return found
    return found


@pytest.fixture(scope="module")
def exported(model, task, tmp_path_factory):
    return onnx.export(model, task.example, tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_a_model_paired_with_itself_gives_a_ratio_of_one(exported, task):
    """Two ONNX Runtime sessions with their own thread pools, side by side."""
    def measure():
        return latency.paired({"one": exported, "same": exported}, task.example, blocks=15,
                              block_ms=30).ratio[1]

    assert until_quiet(measure, lambda ratio: abs(ratio - 1) < 0.05) == pytest.approx(1, abs=0.05)


def test_each_median_agrees_with_that_model_timed_alone(exported, model, task):
    """The fault this guards against, spinning thread pools that starve each other, costs 250 %, not
    15."""
    def measure():
        alone = {name: latency.paired({name: candidate}, task.example, blocks=10).latency_ms[0]
                 for name, candidate in {"onnx": exported, "torch": model}.items()}
        beside = latency.paired({"onnx": exported, "torch": model}, task.example,
                                blocks=10).set_index("candidate")
        return max(abs(beside.latency_ms[name] / alone[name] - 1) for name in alone)

    assert until_quiet(measure, lambda worst: worst < 0.15) < 0.15


def test_a_known_difference_is_found_within_its_interval():
    images = torch.zeros(1, 1)
    row = latency.paired({"5 ms": sleeper(5), "10 ms": sleeper(10)}, images, blocks=8,
                         block_ms=50).iloc[1]
    assert 1.8 < row.ratio_low <= row.ratio <= row.ratio_high < 2.1
    assert 10 <= row.latency_ms < 11


def test_the_table_states_threads_batch_and_machine(exported):
    frame = latency.paired({"m": exported}, torch.zeros(3, 1, 28, 28), threads=1, blocks=5,
                           block_ms=1)
    assert frame.loc[0, ["threads", "batch", "runtime"]].tolist() == [1, 3, "onnxruntime"]
    assert "torch" in frame.attrs["machine"]


def test_a_busy_machine_is_told(monkeypatch, capsys):
    images = torch.zeros(1, 1)
    for share, said in ((0.05, False), (0.48, True)):
        monkeypatch.setattr(machine, "others", lambda share=share: lambda: share)
        frame = latency.paired({"a": sleeper(1)}, images, threads=1, blocks=5)
        assert frame.attrs["machine"].endswith("other processes took 48% of it meanwhile") == said
        assert ("measure again when it is quiet" in capsys.readouterr().out) == said


def test_others_count_what_this_process_does_not(monkeypatch):
    from collections import namedtuple

    every = namedtuple("every", "user system idle iowait guest")
    own = namedtuple("own", "user system")
    moments = iter([0.0, 10.0, 20.2, 20.4])
    counts = iter([every(5, 1, 10, 1, 0), every(15, 4, 17, 1, 2), every(0, 0, 0, 0, 0),
                   every(9, 9, 9, 9, 9)])
    used = iter([own(1, 0), own(5, 1), own(0, 0), own(0, 0)])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(moments))
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda: next(counts))
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.psutil, "Process",
                        lambda: type("Process", (), {"cpu_times": lambda _self: next(used)})())
    # of 20 processor seconds 13 were busy, a guest's among the users', and 5 were this one's
    assert machine.others()() == pytest.approx((13 - 5) / 20)
    assert machine.others()() == 0.0


def test_the_runtimes_profile_is_told_by_layer_in_float_and_in_integers(exported, model, task,
                                                                        tmp_path):
    made = quantization.quantize(reparameterization.fold_batchnorm(model, task.example),
                                 list(task.validation.subset(50).batches(50)))
    paths = {"float32": exported, "int8": onnx.export(made, task.example, tmp_path / "int8.onnx")}
    frame = latency.by_layer(paths, task.example, runs=10)
    for name, path in paths.items():
        found = frame[frame.candidate == name].set_index("layer").latency_ms
        assert set(found.index) == {*layers.named(model), "(rest)"}
        assert (found.drop("(rest)") > 0).all()
        whole = latency.paired({name: path}, task.example, threads=1, blocks=5).latency_ms[0]
        assert found.sum() < 5 * whole, "watching costs, but not that much"
    with pytest.raises(TypeError, match="mine is ResNet, expected an ONNX file"):
        latency.by_layer({"mine": model}, task.example)


def test_the_settling_runs_are_discarded(monkeypatch):
    calls, clock = [], [0]
    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: clock[0])

    def slow_at_first():
        clock[0] += 4_000_000 if len(calls) < 3 else 1_000_000
        calls.append(1)

    turn = latency._turn(slow_at_first, 20)
    assert (turn == 1.0).all()
    assert len(turn) >= 20
    assert len(calls) == len(turn) + 3


def test_of_runs_that_take_long_none_is_discarded_and_one_is_enough():
    calls = []

    def slow(images):
        time.sleep(0.11)
        calls.append(1)

    assert len(latency._turn(lambda: slow(None), 5)) == 1
    assert len(calls) == 1


def test_timing_leaves_the_number_of_threads_as_it_was(model, task):
    before = torch.get_num_threads()
    latency.paired({"m": model}, task.example, threads=1, blocks=5, block_ms=1)
    assert torch.get_num_threads() == before


def test_the_interval_holds_the_median_and_follows_from_its_seed():
    values = np.random.default_rng(0).normal(1, 0.1, 20)
    low, middle, high = latency._median_interval(values, 0)
    assert low < middle < high
    assert latency._median_interval(values, 0) == (low, middle, high)


def test_bad_requests_are_refused(model, task):
    with pytest.raises(ValueError, match="no candidate"):
        latency.paired({}, task.example)
    with pytest.raises(ValueError, match="at least 5"):
        latency.paired({"m": model}, task.example, blocks=2)
    with pytest.raises(ValueError, match="the cores of this machine"):
        latency.paired({"m": model}, task.example, threads=machine.cores() + 1)
    with pytest.raises(ValueError, match="mine refuses a batch"):
        latency.paired({"mine": sessions.open(model, name="mine")}, torch.zeros(1, 2, 28, 28))
