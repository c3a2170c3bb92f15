import threading
import time

import pytest
import torch
from torch import nn

from workbench import machine
from workbench.deployment import onnx, runtimes, sessions
from workbench.deployment.batching import Batcher
from workbench.measures import latency


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def path(net, images, tmp_path_factory):
    return onnx.export(net, images, tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.fixture
def gate():
    return threading.Event()


@pytest.fixture
def gated(gate):
    """A model that answers once the gate is open."""
    return lambda batch: gate.wait(10) and batch.flatten(1)


@pytest.mark.parametrize(("size", "deadline"), [(1, 0.0), (4, 50.0), (100, 5.0)])
def test_every_caller_gets_the_answer_to_its_own_image(path, images, size, deadline):
    expected = sessions.open(path)(images)
    with Batcher(path, size=size, deadline_ms=deadline, threads=1) as served:
        answers = [served.submit(image) for image in images]
        found = torch.stack([answer.result(timeout=10) for answer in answers])
    assert torch.allclose(found, expected, atol=1e-5)
    assert sum(served.batches) == len(images)
    assert max(served.batches) <= size


def test_a_full_batch_does_not_wait_and_a_lone_request_waits_the_deadline(images):
    seen = []

    def model(batch):
        seen.append(len(batch))
        return batch.flatten(1)

    with Batcher(model, size=4, deadline_ms=300) as served:
        started = time.perf_counter()
        for answer in [served.submit(image) for image in images[:4]]:
            answer.result(timeout=10)
        assert time.perf_counter() - started < 0.25
        started = time.perf_counter()
        served.submit(images[0]).result(timeout=10)
        assert time.perf_counter() - started >= 0.29
    assert seen == [4, 1]


def test_a_batch_that_fails_tells_its_callers_and_the_next_is_served(images):
    def model(batch):
        if batch.isnan().any():
            raise ValueError("NaN here")
        return batch.flatten(1)

    with Batcher(model, size=1, deadline_ms=0) as served:
        with pytest.raises(ValueError, match="NaN here"):
            served.submit(images[0] * float("nan")).result(timeout=10)
        assert torch.equal(served.submit(images[1]).result(timeout=10), images[1].flatten())
    with pytest.raises(ValueError, match="closed"):
        served.submit(images[0])


def test_a_request_that_is_cancelled_does_not_stop_the_others(gate, gated, images):
    with Batcher(gated, size=1, deadline_ms=0) as served:
        first, second, third = (served.submit(image) for image in images[:3])
        second.cancel()
        gate.set()
        assert torch.equal(third.result(timeout=10), images[2].flatten())
    assert first.done()
    assert second.cancelled()
    with pytest.raises(ValueError, match="inside its with block"):
        Batcher(gated).submit(images[0])


def test_the_load_of_a_known_model_is_measured_as_it_is(images):
    calls = []

    def model(batch):
        calls.append(time.perf_counter())
        time.sleep(0.005)
        return batch.flatten(1)

    for clients in (1, 16):
        calls.clear()
        row = latency.under_load(model, images, clients=[clients], seconds=1.2).iloc[0]
        # two are before the clock, a quarter of it is not counted
        counted = sum(call > calls[2] + 0.3 for call in calls)
        # however slow the machine is meanwhile
        assert row.requests == pytest.approx(counted, abs=clients + 3)
        assert row.requests_per_s == pytest.approx(counted / 0.9, rel=0.25)
        assert row.requests_per_s <= 202


def test_what_waits_at_the_end_is_still_served(gate, gated, images):
    with Batcher(gated, size=2, deadline_ms=0) as served:
        answers = [served.submit(image) for image in images[:7]]
        gate.set()
    assert [torch.equal(a.result(timeout=1), i.flatten())
            for a, i in zip(answers, images, strict=False)] == [True] * 7


def test_a_load_lasts_until_a_slow_model_has_answered(images):
    def slow(batch):
        time.sleep(0.1)
        return torch.zeros(len(batch), 2)

    assert latency.under_load(slow, images, clients=(3,), seconds=0.05).requests[0] > 0


def test_a_load_is_asked_once_more_where_the_machine_stood_still(images):
    calls = []

    def stopped(batch):
        calls.append(len(batch))
        time.sleep(0.6 if len(calls) == 3 else 0.001)  # two are before the clock
        return torch.zeros(len(batch), 2)

    assert latency.under_load(stopped, images, clients=(1,), seconds=0.2).requests[0] > 0


def test_load_counts_what_was_answered(images):
    # so that next to all of a client's time is spent waiting for it, on a busy machine too
    def slow(batch):
        time.sleep(0.05)
        return torch.zeros(len(batch), 2)

    table = latency.under_load(slow, images, clients=(1, 4), size=4, deadline_ms=1, seconds=1.5)
    assert list(table.clients) == [1, 4]
    assert (table.requests > 0).all()
    assert (table.p50_ms <= table.p99_ms).all()
    assert table.mean_batch[0] == 1  # one client never has two requests under way
    assert table.mean_batch[1] <= 4
    # closed loop, Little's law: clients = throughput x time in the system
    assert (table.requests_per_s * table.mean_ms / 1e3).to_numpy() == pytest.approx(
        [1, 4], rel=0.25)


def test_sentences_share_a_batch_with_those_of_their_bucket(gate):
    seen = []

    def model(batch):
        gate.wait(5)
        seen.append(tuple(batch.shape))
        return batch.sum(1, keepdim=True).float()

    sentences = [torch.ones(length, dtype=torch.int64) for length in (3, 30, 4, 28, 2, 60)]
    with Batcher(model, size=8, deadline_ms=20, buckets=[4, 32]) as served:
        answers = [served.submit(sentence) for sentence in sentences]
        gate.set()
    assert [int(answer.result(timeout=1)) for answer in answers] == [3, 30, 4, 28, 2,
                                                                     60], "each its own answer"
    assert sorted(seen) == [(1, 60), (2, 30),
                            (3, 4)], "short with short, long with long, the oldest bucket first"
    assert served.padding == pytest.approx(1 - (3 + 30 + 4 + 28 + 2 + 60) / (60 + 60 + 12))


def test_load_takes_sentences_of_different_lengths_in_turn():
    seen = set()

    def model(batch):
        seen.add(batch.shape[1])
        return torch.zeros(len(batch), 1)

    sentences = [torch.ones(1, length, dtype=torch.int64) for length in (2, 5, 9)]
    table = latency.under_load(model, sentences, clients=(1,), seconds=0.2)
    assert seen == {2, 5, 9}
    assert table.padding[0] == 0


def test_an_open_loop_counts_the_wait_from_when_a_request_was_due(images):
    def slow(batch):
        time.sleep(0.02)
        return torch.zeros(len(batch), 1)

    table = latency.at_rate(slow, images, rates=[10, 200], seconds=1.0)
    assert list(table.rate) == [10, 200]
    assert table.p50_ms[0] < 60, "below its capacity of 50 a second it keeps up"
    assert table.p50_ms[1] > 300, "above it it falls behind, and that is seen"
    assert table.requests_per_s[1] < 60


def test_the_grid_has_every_thread_and_batch(path, net, images):
    threads = sorted({1, machine.cores()})
    table = latency.grid({"onnx": path, "torch": net}, images[:1], threads=threads, batches=[1, 4],
                         blocks=5)
    assert len(table) == 2 * len(threads) * 2
    assert (table.examples_per_s == 1e3 * table.batch / table.latency_ms).all()


def test_words_are_said_where_int8_does_not_pay(path, net, images, monkeypatch):
    table = latency.paired({"a": path, "b": path}, images[:1], threads=1, blocks=5)
    slow = table.assign(ratio=[1.0, 1.5], ratio_low=[1.0, 1.4], ratio_high=[1.0, 1.6])
    monkeypatch.setattr(machine, "hardware", lambda: {"formats": ["avx2"]})
    words = latency.warn(slow, quantised=["b"])
    assert "neither VNNI nor AMX" in words[0]
    assert "b is slower than the reference at 1 threads and batch 1: 1.50x" in words[1]
    monkeypatch.setattr(machine, "hardware", lambda: {"formats": ["avx512_vnni"]})
    assert latency.warn(slow.assign(ratio_low=[1.0, 0.9]), quantised=["b"]) == []


def test_peak_memory_sees_a_larger_batch(path, images):
    many = images[:1].expand(4000, 1, 8, 8).contiguous()
    table = latency.peak_memory({"small": path}, images[:1])
    large = latency.peak_memory({"large": path}, many)
    assert table.own_mb[0] > 0
    assert large.peak_mb[0] > table.peak_mb[0]


def test_runtimes_that_are_there_agree_and_those_that_are_not_say_what_to_install(
        path, net, images):
    listed = runtimes.available().set_index("runtime")
    expected = sessions.open(path)(images)
    for runtime, version in listed.version.items():
        source = net if runtime.startswith("torch") else path
        if version is None:
            with pytest.raises(ValueError, match="not installed; pip install"):
                runtimes.open(source, runtime)
        elif not listed.note[runtime] and runtime != "torch compiled":  # compiling takes long
            tolerance = 0.05 if "bfloat16" in runtime else 1e-4
            assert torch.allclose(runtimes.open(source, runtime, threads=1)(images), expected,
                                  atol=tolerance), runtime


def test_a_runtime_that_cannot_be_opened_says_why(path, net, monkeypatch):
    with pytest.raises(ValueError, match="unknown runtime 'tensorrt'"):
        runtimes.open(path, "tensorrt")
    with pytest.raises(ValueError, match="takes a module"):
        runtimes.open(path, "torch bfloat16")
    with pytest.raises(ValueError, match="threads is 99, expected 1 to"):
        runtimes.open(net, "torch bfloat16", threads=99)
    monkeypatch.setitem(runtimes.PACKAGES, "openvino", "no_such_package")
    with pytest.raises(ValueError, match="runtime openvino is not installed"):
        runtimes.open(path, "openvino")
    with pytest.raises(ValueError, match="takes an ONNX file"):
        runtimes.open(net, "onnxruntime")


@pytest.mark.parametrize(("call", "message"), [
    (lambda p, x: Batcher(p, size=0), "size is 0"), (lambda p, x: Batcher(p, deadline_ms=-1),
                                                     "deadline_ms -1"),
    (lambda p, x: latency.under_load(p, x, clients=[0]), "clients are"),
    (lambda p, x: Batcher(p, buckets=[8, 4]), r"buckets are \[8, 4\]"),
    (lambda p, x: latency.at_rate(p, x, rates=[0]), "rates are"),
    (lambda p, x: latency.at_rate(p, x, rates=[]), "rates are"),
    (lambda p, x: latency.under_load(p, x, clients=[]), "clients are")])
def test_impossible_loads_are_refused(path, images, call, message):
    with pytest.raises(ValueError, match=message):
        call(path, images)


@pytest.mark.skipif(not runtimes._compiler(), reason="torch compiled needs a compiler")
def test_the_compiled_runtime_is_compiled(monkeypatch):
    called = []

    def compiled(model, **_options):
        called.append(model)
        return lambda *inputs: called.append("ran") or model(*inputs)

    monkeypatch.setattr(torch, "compile", compiled)
    model = torch.nn.Linear(3, 2).eval()
    runtimes.open(model, "torch compiled", threads=1)(torch.ones(1, 3))
    assert called[1:] == ["ran"]
