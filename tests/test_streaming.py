"""Streams: hop by hop as the whole network, in float and in 8 bits, as modules and as files; what
cannot stream is told."""

import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.deployment import onnx, sessions, streaming
from workbench.deployment.listening import Doubled, Drift, Gate, Listener, Ring, listen, paced
from workbench.errors import UnsupportedModelError
from workbench.measures import detection, hearing
from workbench.methods import quantization
from workbench.subjects import embedded, models, speech, words


class Residual(nn.Module):
    def __init__(self, width, taps, dilation):
        super().__init__()
        self.own = nn.Conv1d(width, width, taps, padding=(taps - 1) * dilation // 2,
                             dilation=dilation, groups=width)
        self.all, self.norm = nn.Conv1d(width, width, 1), nn.BatchNorm1d(width)
        self.norm.running_mean.normal_()
        self.norm.bias.data.normal_()

    def forward(self, values):
        return F.relu(values + self.norm(self.all(self.own(values))))


class Recurrent(nn.Module):
    def __init__(self, width, kind):
        super().__init__()
        self.cell, self.out = kind(width, 6, 2, batch_first=True), nn.Linear(6, width)

    def forward(self, values):
        return self.out(self.cell(values.transpose(1, 2))[0]).transpose(1, 2)


class Said(nn.Module):
    """Calls what it is given."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleDict(parts)

    def forward(self, values):
        return self.function(values, **self.parts)


class Bands(nn.Module):
    """Bands times time as a picture, as BC-ResNet has it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, (3, 5), padding=(1, 4), dilation=(1, 2), groups=4)
        self.last = nn.Conv1d(4 * 6, 3, 3, padding=1)

    def forward(self, values):
        return self.last(F.relu(self.second(F.relu(self.first(values[:, None])))).flatten(1, 2))


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 6)

    def forward(self, values):
        return self.mix(values[:, 0].unfold(-1, 16, 8)).abs().log1p().transpose(1, 2)


def both(network, recording, hop):
    """What the whole network and its stream make of a recording."""
    network.eval()
    # an example of another length
    stream = streaming.stream(network, F.pad(recording[:1], (0, 13)), hop=hop)
    with torch.inference_mode():
        return network(recording), streaming.Stream(stream).whole(recording)["logits"], stream


ARCHITECTURES = {
    "residual": lambda: nn.Sequential(nn.Conv1d(6, 8, 5, padding=2), nn.ReLU(), Residual(8, 5, 3),
                                      Residual(8, 3, 1)),
    "lstm": lambda: nn.Sequential(nn.Conv1d(6, 8, 5, padding=2), Recurrent(8, nn.LSTM)),
    "gru": lambda: nn.Sequential(nn.Conv1d(6, 8, 5, padding=2, stride=2), Recurrent(8, nn.GRU),
                                 Residual(8, 3, 1)),
    "bands": Bands,
    "pools": lambda: nn.Sequential(nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(3, 1, 1), nn.Conv1d(6, 4, 3),
                                   nn.MaxPool1d(2)),
    "windows": lambda: nn.Sequential(Windows(), nn.Conv1d(6, 4, 3, padding=1)),
    "branches": lambda: Said(lambda x, a, b: torch.cat([a(x), b(F.pad(x, (1, 3)))[..., :], x.abs()],
                                                       1),
                             a=nn.Conv1d(6, 4, 7, padding=3), b=nn.Conv1d(6, 2, 5)),
    "cropped": lambda: Said(lambda x, a: a(x) + x[..., 2:-2], a=nn.Conv1d(6, 6, 5)),
    "mean": lambda: Said(lambda x, a, b: b(a(x).mean(-1)),
                         a=nn.Conv1d(6, 4, 5, padding=2, stride=2), b=nn.Linear(4, 3)),
    "largest": lambda: nn.Sequential(nn.Conv1d(6, 4, 5, padding=2), Said(lambda x: x.amax(-1))),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(("samples", "hops"), [(97, 1), (160, 3)])
def test_a_stream_answers_as_the_whole_network(kind, samples, hops, tmp_path):
    torch.manual_seed(0)
    recording = torch.randn(2, 6, samples)
    whole, streamed, stream = both(ARCHITECTURES[kind](), recording, 8 * hops)
    assert streamed.shape == whole.shape
    assert (streamed - whole).abs().max() <= 1e-5
    if hops == 3 and kind in ("residual", "lstm", "mean"):
        file = streaming.Stream(streaming.export(stream, tmp_path / "x.onnx"))
        assert (file.whole(recording)["logits"] - whole).abs().max() <= 1e-5
        assert file.hop == 24
        assert (file.late, file.every) == (streaming.Stream(stream).late,
                                           streaming.Stream(stream).every)


def test_time_may_be_another_axis_than_the_last():
    torch.manual_seed(0)
    network = Said(lambda x, a: a(x)[0], a=nn.LSTM(6, 4, batch_first=True)).eval()
    recording = torch.randn(2, 29, 6)  # three hops and five steps
    stream = streaming.Stream(streaming.stream(network, recording[:1], hop=8, axis=-2))
    with torch.inference_mode():
        torch.testing.assert_close(stream.whole(recording)["logits"], network(recording))


layers = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 6),
                   st.booleans())


@settings(max_examples=25, deadline=None)
@given(st.lists(layers, min_size=1, max_size=4), st.integers(1, 3), st.integers(40, 90),
       st.integers(0, 10**6))
def test_any_kernels_strides_and_dilations_stream(kinds, hops, samples, seed):
    torch.manual_seed(seed)
    every, parts, left = 1, [], samples
    for taps, stride, dilation, padding, depthwise in kinds:
        if (left := (left + 2 * padding - (taps - 1) * dilation - 1) // stride + 1) < 1:
            return
        every *= stride
        parts += [nn.Conv1d(3, 3, taps, stride, padding, dilation, groups=3 if depthwise else 1),
                  nn.LeakyReLU()]
    whole, streamed, _ = both(nn.Sequential(*parts), torch.randn(1, 3, samples), hops * every)
    assert streamed.shape == whole.shape
    assert (streamed - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["residual", "causal"])
def test_in_8_bits_a_stream_answers_to_the_last_bit_as_the_whole_file(kind, tmp_path):
    torch.manual_seed(0)
    net = {"residual": ARCHITECTURES["residual"], "causal": lambda: nn.Sequential(
        nn.Conv1d(6, 8, 3), nn.ReLU(), speech.Causal(8, 5, 2), nn.AvgPool1d(4, 1),
        nn.Conv1d(8, 3, 1))}[kind]().eval()
    rounded = quantization.quantize(net, [(torch.randn(8, 6, 96), None)])
    recording = torch.randn(2, 6, 96)
    whole = sessions.open(onnx.export(rounded, recording, tmp_path / "whole.onnx"))(recording)
    stream = streaming.stream(rounded, recording, hop=12)
    assert (streaming.Stream(stream).whole(recording)["logits"] - whole).abs().max() < 1e-5
    file = streaming.Stream(streaming.export(stream, tmp_path / "stream.onnx"))
    assert torch.equal(file.whole(recording)["logits"], whole)
    assert torch.uint8 in {value.dtype for value in file.timing.start.values()}


@pytest.mark.parametrize(("function", "parts", "said"), [
    (lambda x, a: a(x.transpose(1, 2))[0],
     {"a": nn.LSTM(6, 4, batch_first=True, bidirectional=True)},
     "looks ahead without bound"),
    (lambda x: x.softmax(-1), {}, "looks at all steps of a recording at once"),
    (lambda x, a: a(x), {"a": nn.GroupNorm(2, 6)}, "normalises over time"),
    (lambda x, a: a(x), {"a": nn.Linear(64, 3)}, "layer parts.a mixes all steps of time"),
    (lambda x: x * x.mean(-1, keepdim=True), {}, "average over all of the recording"),
    (lambda x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3), {},
     "may look at all of a recording"),
    (lambda x: x.flip(-1), {}, "may look at all of a recording"),
    (lambda x, a: a(F.pad(x, (1, 1), mode="reflect")), {"a": nn.Conv1d(6, 3, 3)},
     "pads time by something else than zeros"),
    (lambda x: x + torch.arange(64.0), {}, "a number of its own"),
    (lambda x: x.sum(-1), {}, "sums up all of a recording"),
])
def test_what_cannot_stream_is_told_with_its_reason(function, parts, said):
    with pytest.raises(UnsupportedModelError, match=said):
        streaming.stream(Said(function, **parts).eval(), torch.randn(1, 6, 64), hop=8)


def test_a_hop_or_a_state_that_does_not_fit_is_told(tmp_path):
    net = nn.Sequential(nn.Conv1d(1, 2, 3, stride=4)).eval()
    with pytest.raises(ValueError, match="gives 10 steps at layer 0, which takes one of 4; use "
                       "a multiple of 4"):
        streaming.stream(net, torch.zeros(1, 1, 64), hop=10)
    with pytest.raises(ValueError, match="at least 1 sample"):
        streaming.stream(net, torch.zeros(1, 1, 64), hop=0)
    with pytest.raises(ValueError, match="does not stream; convert it"):
        streaming.Stream(net)
    with pytest.raises(ValueError, match="does not stream; convert it"):
        streaming.export(net, tmp_path / "x.onnx")
    stream = streaming.Stream(streaming.stream(nn.Conv1d(1, 2, 9), torch.zeros(1, 1, 64), hop=8))
    with pytest.raises(ValueError, match="takes hops of 8 samples, found 7"):
        stream(torch.zeros(1, 1, 7))
    stream(torch.zeros(1, 1, 8))
    other = streaming.Stream(streaming.stream(nn.Conv1d(1, 2, 5), torch.zeros(1, 1, 64), hop=8))
    with pytest.raises(ValueError, match=r"state of another network: \w+ is \(1, 1, 8\) of "
                       r"torch.float32, expected \('n', 1, 4\) of torch.float32"):
        other.resume(stream.now)


def test_a_file_keeps_its_state_in_two_places_by_turns_and_gives_copies(tmp_path):
    net = nn.Sequential(nn.Conv1d(1, 4, 5), nn.ReLU(), nn.Conv1d(4, 2, 3, dilation=2)).eval()
    file = streaming.export(streaming.stream(net, torch.zeros(1, 1, 64), hop=8),
                            tmp_path / "net.onnx")
    hops = torch.randn(2, 1, 48).split(8, 2)
    bound, plain = (streaming.Stream(file, threads=1) for _ in range(2))
    answers, states = [], []
    for hop in hops:
        answers.append(bound(hop))
        states.append(bound.now)
        plain.now = plain.now  # which is looked up anew each time
        assert torch.equal(answers[-1], plain(hop))
    assert not torch.equal(answers[-1], answers[-2]), "not written over by the next hop"
    other = streaming.Stream(file, threads=1)
    other.resume(states[2])
    assert [torch.equal(other(hop), wanted)
            for hop, wanted in zip(hops[3:], answers[3:], strict=True)] == 3 * [True]
    bound.resume(states[2])
    assert torch.equal(bound(hops[3]), answers[3])
    with pytest.raises(ValueError, match="refuses the inputs"):
        bound(torch.zeros(1, 1, 8))
    bound.reset()
    assert bound.now == {}
    assert len(bound(torch.zeros(1, 1, 8))) == 1


def test_the_context_of_silero_counts():
    pytest.importorskip("silero_vad")
    import onnxruntime

    net = speech.silero()
    said = np.concatenate([clip.samples for clip in words.embedded() if clip.what == "speech"][:12])
    samples = torch.from_numpy(speech.resampled(said, 8000, 16_000))[None]
    samples = samples[:, :samples.shape[1] // 512 * 512]
    file = speech.package_file("silero_vad", "data", "silero_vad.onnx")
    theirs = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def asked(context):
        state, kept, found = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32), []
        for chunk in samples.numpy().reshape(-1, 1, 512):
            read = np.concatenate([kept, chunk], 1) if context else chunk
            score, state = theirs.run(None, {"input": read, "state": state, "sr": np.array(16_000)})
            kept = chunk[:, -64:]
            found.append(score[0, 0])
        return np.array(found)

    streamed = streaming.Stream(streaming.stream(net, torch.zeros(1, 8192),
                                                 hop=512)).whole(samples)["logits"][0, 0].numpy()
    right, without = asked(True), asked(False)
    assert np.abs(streamed - right).max() < 1e-4
    assert (right > 0.5).mean() > 0.5
    assert (without > 0.5).mean() < 0.1 * (right > 0.5).mean()  # nothing errs, and speech is missed


def test_a_detector_with_fewer_units_comes_back_from_its_checkpoint(tmp_path):
    pytest.importorskip("silero_vad")
    half = models.load(f"silero@{embedded.verified('checkpoints', 'silero-half.safetensors')}")
    assert (half.lstm.hidden_size, half.lstm.input_size, half.out.in_features) == (64, 128, 64)
    models.save(half, tmp_path / "again.safetensors")
    again, samples = models.load(f"silero@{tmp_path / 'again.safetensors'}"), torch.randn(1, 2048)
    with torch.inference_mode():
        assert torch.equal(again(samples), half(samples))
    stream = streaming.Stream(streaming.stream(half, samples, hop=512))
    assert torch.allclose(stream.whole(samples)["logits"], half(samples), atol=1e-6)


def test_frames_of_the_spectrum_are_those_of_a_plain_transform():
    samples = torch.randn(1, 800)
    found = speech.LogMel(40)(samples)[0]
    padded = F.pad(samples[0], (speech.WINDOW - speech.HOP, 0))
    for frame in (0, 3, 9):
        window = padded[frame * 80:frame * 80 + 256] * torch.hann_window(256)
        power = torch.fft.rfft(window).abs() ** 2
        bands = power.double() @ speech.LogMel(40).triangles
        assert torch.allclose(found[:, frame].double(), bands.log1p(), atol=1e-3)


def test_the_ring_counts_what_it_loses():
    ring = Ring(0.01, rate=1000)
    assert ring.write(np.arange(8.0)) == 0
    assert ring.write(np.arange(8.0)) == 6
    assert ring.dropped == 6
    assert ring.read(4).tolist() == [0, 1, 2, 3]
    assert ring.write(np.arange(10.0, 14.0)) == 0
    assert ring.read(8).tolist() == [4, 5, 6, 7, 0, 1, 10, 11]
    ring.close()
    assert ring.read(4) is None
    with pytest.raises(ValueError, match="more than 0"):
        Ring(0)


def test_samples_are_doubled_as_a_whole_filter_would():
    samples, doubled = np.sin(2 * np.pi * 440 * np.arange(1600) / 8000).astype(
        np.float32), Doubled()
    found = np.concatenate([doubled(hop) for hop in samples.reshape(-1, 80)])
    wanted = np.sin(2 * np.pi * 440 * (np.arange(3200) - 31.5) / 16000)
    assert np.abs(found - wanted)[200:].max() < 0.01


class Told(nn.Module):
    """Names the word in whose band the power is: a spotter whose answers are known."""

    def forward(self, samples):
        loud = (samples[:, None] ** 2).unfold(-1, 80, 80).mean(-1)
        return torch.cat([loud * 1e3 - 5, -loud * 1e3 + 5], 1)


def spotter():
    return streaming.Stream(streaming.stream(Told(), torch.zeros(1, 800), hop=80))


def test_a_listener_stopped_and_taken_up_again_hears_the_same(tmp_path):
    samples = np.zeros(8000 * 4, np.float32)
    for start in (6000, 15000, 22000):
        samples[start:start + 2400] = 0.5
    whole = Listener(spotter(), ["word", "none"])
    events = [event for hop in samples.reshape(-1, 80) for event in whole.hear(hop)]
    assert [event.word for event in events if event.word != "drift"] == ["word"] * 3
    first, found = Listener(spotter(), ["word", "none"]), []
    for hop in samples[:16000].reshape(-1, 80):
        found += first.hear(hop)
    first.save(tmp_path / "state")
    again = Listener(spotter(), ["word", "none"])
    assert again.resume(tmp_path / "state") == 2.0
    for hop in samples[16000:].reshape(-1, 80):
        found += again.hear(hop)
    assert found == events
    with pytest.raises(ValueError, match="state of another listener"):
        Listener(spotter(), ["a", "b", "none"]).resume(tmp_path / "state")
    with pytest.raises(ValueError, match="gives 2 probabilities, for 3 classes: a, b, none"):
        Listener(spotter(), ["a", "b", "none"]).hear(samples[:80])
    (tmp_path / "state").write_bytes(b"no")
    with pytest.raises(ValueError, match="no state of a listener"):
        again.resume(tmp_path / "state")


def test_scenes_to_train_on_have_pieces_of_words_that_are_none():
    draw, noise = np.random.default_rng(0), np.random.default_rng(1)
    word = words.Clip(noise.standard_normal(4000).astype(np.float32), "command", "one")
    effect = words.Clip(noise.standard_normal(16_000).astype(np.float32), "effect")
    said = pd.concat([words._drawn([word], [effect], 8.0, draw).said for _ in range(200)])
    lengths, shares = said.end_s - said.start_s, said.what.value_counts(normalize=True)
    assert abs(shares["command"] - words.WHOLE) < 0.05
    assert abs(shares["speech"] - words.PIECES) < 0.05
    # played between 0.8 and 1.25 times as fast, the whole word lasts at least 0.4 s
    assert lengths[said.what == "command"].between(0.39, 0.63).all()
    assert lengths[said.what == "speech"].between(0.07, 0.26).all()
    assert lengths[said.what == "effect"].between(0.23, 1.88).all()


def test_a_word_spotter_learns_and_the_same_seed_gives_the_same():
    noise = np.random.default_rng(0)
    tone = np.sin(2 * np.pi * 600 * np.arange(3200) / 8000).astype(np.float32)
    commands = [words.Clip(tone, "command", "one")]
    others = [words.Clip(noise.standard_normal(8000).astype(np.float32), "effect")]
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        network = speech.WordSpotter(11, width=16, dilations=(1, 2))
        losses = words.train(network, commands, others, steps=30, batch=4, seconds=1.5, seed=3)
        made.append((losses, network.head.weight.detach().clone()))
    assert np.mean(made[0][0][-5:]) < 0.8 * np.mean(made[0][0][:5])
    assert made[0][0] == made[1][0]
    assert torch.equal(made[0][1], made[1][1])


def test_a_higher_threshold_misses_more_and_alarms_less():
    said = pd.DataFrame([("command", "one", "a", 1.0, 1.5), ("command", "two", "a", 3.0, 3.5)],
                        columns=["what", "word", "voice", "start_s", "end_s"])
    heard = np.zeros((len(words.WORDS) + 1, 600))
    heard[-1] = 1.0
    # probabilities: "one" at its end, "two" less surely, "six" where nothing was said
    for word, at, share in ((1, 150, 0.95), (2, 350, 0.75), (6, 500, 0.65)):
        heard[word, at:at + 20], heard[-1, at:at + 20] = share, 1 - share
    scene = words.Scene(np.zeros(48_000, np.float32), np.zeros(48_000, np.float32), said)
    found = hearing.thresholds(np.log(heard + 1e-9),
                               partial(Listener, spotter(), [*words.WORDS, "none"]), scene,
                               [0.6, 0.7, 0.8])
    assert found.hits.tolist() == [2, 2, 1]
    assert found.misses.tolist() == [0, 0, 1]
    assert found.false_alarms.tolist() == [1, 0, 0]


def test_listening_at_pace_loses_nothing_and_a_slow_one_says_so():
    samples = np.random.default_rng(0).standard_normal(8000).astype(np.float32) * 0.01
    made = listen(Listener(spotter(), ["word", "none"]), paced(samples, hop=80, pace=20))
    assert made["dropped"] == 0
    assert len(made["milliseconds"]) == 100
    slow = Listener(spotter(), ["word", "none"])
    slow.hear = lambda _hop: time.sleep(0.02) or []
    assert listen(slow, paced(samples, hop=80, pace=50), ring=Ring(0.05))["dropped"] > 0

    def broken(_ring):
        raise OSError("the microphone is gone")

    with pytest.raises(OSError, match="microphone is gone"):
        listen(slow, broken)


def test_a_gate_rests_in_silence_and_catches_what_came_before_it_opened():
    class Power(nn.Module):
        def forward(self, samples):
            return (samples.unfold(-1, 512, 512) ** 2).mean(-1)[:, None] * 1e3

    gate = Gate(streaming.Stream(streaming.stream(Power(), torch.zeros(1, 2048), hop=512)))
    listener = Listener(spotter(), ["word", "none"], gate=gate)
    samples = np.zeros(8000 * 4, np.float32)
    samples[16000:18400] = 0.5
    events = [event for hop in samples.reshape(-1, 80) for event in listener.hear(hop)]
    assert [event.word for event in events if event.word != "drift"] == ["word"]
    assert listener.worked < 0.5 * listener.hops


def test_noise_that_changes_is_told_once_and_so_is_silence():
    draw, drift = np.random.default_rng(0), Drift(80)
    told = []
    for level in (0.01, 0.1, 0.01):
        for _ in range(1500):
            told.append(drift.hear((level * draw.standard_normal(80)).astype(np.float32)))
    told = [line for line in told if line]
    assert len(told) == 2
    assert told[0].startswith("noise at")
    assert told[1] == "noise as at first again"
    silent = [line for _ in range(1000) if (line := Drift.hear(drift, np.zeros(80, np.float32)))]
    assert "no signal" in silent


@pytest.mark.parametrize(("louder", "told"), [(11.5, 0), (12.5, 1)])
def test_noise_is_told_from_twelve_decibels_on(louder, told):
    drift = Drift(80)
    hops = [np.full(80, level, np.float32)
            for level in (0.01, 0.01 * 10 ** (louder / 20)) for _ in range(4000)]
    assert len([line for hop in hops if (line := drift.hear(hop))]) == told


def test_events_are_scored_as_mlperf_tiny_scores_them():
    import pandas as pd

    said = pd.DataFrame({"what": ["command"] * 2, "word": ["one", "two"], "start_s": [1.0, 7.0],
                         "end_s": [1.65, 7.36]})
    heard = pd.DataFrame({"word": ["one", "one", "one", "one", "two"],
                          "at_s": [2.60, 2.80, 3.0, 4.5, 8.0]})
    found = detection.scored(heard, said, hours=0.5)
    # 3.0 is within a second of 2.8
    assert (found.hits, found.misses, found.false_alarms) == (2, 0, 2)
    assert found.per_hour == 4
    assert found.per_hour_low < 4 < found.per_hour_high
    assert detection.poisson(0, 2.0)[1:] == pytest.approx((0, 3.689 / 2), rel=1e-3)
    wrong = detection.scored(heard.assign(word="nine"), said, hours=1.0)
    assert (wrong.hits, wrong.misses) == (0, 2)
    again = said.assign(word="one", start_s=[0.0, 1.0], end_s=[0.5, 1.4])
    heard = pd.DataFrame({"word": ["one", "one"], "at_s": [0.55, 1.45]})
    found = detection.scored(heard, again, hours=1.0)
    assert (found.hits, found.misses, found.false_alarms) == (2, 0, 0)
    assert found.delay_s == pytest.approx((0.05, 0.05))


def test_bad_sound_is_told(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        words.read_audio(tmp_path / "x.wav")
    (tmp_path / "x.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match="no sound file that can be read"):
        words.read_audio(tmp_path / "x.wav")
    for samples, said in ((np.zeros((100, 2)), "has 2 channels"), (np.zeros(0), "holds no samples"),
                          (np.array([0, np.nan]), "sample 1 is no number")):
        soundfile.write(tmp_path / "x.wav", samples, 8000, subtype="FLOAT")
        with pytest.raises(ValueError, match=said):
            words.read_audio(tmp_path / "x.wav")
    soundfile.write(tmp_path / "x.wav", np.zeros(16_000), 16_000)
    samples, own = words.read_audio(tmp_path / "x.wav")
    assert (len(samples), own) == (8000, 16_000)
    with pytest.raises(ValueError, match="are no numbers"):
        Listener(spotter(), ["word", "none"]).hear(np.full(80, np.nan, np.float32))


def test_a_scene_says_what_is_named_when():
    clip = words.Clip(np.ones(4000, np.float32), "command", "three", "me")
    made = words.scene([clip], seconds=2.0, draw=np.random.default_rng(0), pause=(0.5, 0.5))
    labels = made.labels()
    assert len(labels) == 200
    assert set(labels[:50]) == {10}
    assert set(labels[50:98]) == {-1}
    assert set(labels[98:125]) == {3}
    assert set(labels[125:]) == {10}


def test_a_file_is_listened_to_and_taken_up_where_it_was_left(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    from workbench.plans import chain

    clips = [clip for clip in words.embedded() if clip.what == "command"]
    made = words.scene(clips, seconds=16.0, draw=np.random.default_rng(0), pause=(0.6, 0.6),
                       noise=(30, 30))
    soundfile.write(tmp_path / "x.wav", speech.resampled(made.samples, 8_000, 16_000), 16_000)
    said: list[str] = []
    samples = chain.recording(tmp_path / "x.wav", told=said.append)
    assert "16,000 samples a second; it was resampled to 8,000" in said[0]
    with chain.chain(bits=32, gate=False, threshold=0.5, meaning=str.upper) as listener:
        chain.listen(listener, samples, told=said.append)
    events = said[1:-1]
    assert len(events) >= 4
    assert all(line.split()[2] in words.WORDS and line.endswith(line.split()[2].upper())
               for line in events)
    assert said[-1].startswith("16.0 s in hops of 10 ms")
    with chain.chain(bits=32, gate=False, threshold=0.5) as listener:
        for hop in samples[:64_000].reshape(-1, 80):
            listener.hear(hop)
        listener.save(tmp_path / "state")
    again: list[str] = []
    with chain.chain(bits=32, gate=False, threshold=0.5) as listener:
        chain.listen(listener, samples, state=tmp_path / "state", told=again.append)
    assert again[0] == f"goes on at 8.00 s, as {tmp_path / 'state'} remembers"
    later = [line for line in events if float(line.split()[0]) > 8]
    assert [line.split()[:3] for line in again[1:-1]] == [line.split()[:3] for line in later]
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("given", "said"), [
    ([], "takes a FILE or --microphone, one of them"), (["x.wav", "--microphone"], "one of them"),
    (["nowhere.wav"], "sound file nowhere.wav does not exist"),
    (["pyproject.toml"], "no sound file that can be read"),
    (["data/speech/clips.wav", "--model", "nowhere.onnx", "--no-gate"],
     "nowhere.onnx does not exist"),
    (["data/speech/clips.wav", "--model", "silero", "--no-gate", "--bits", "32"],
     "use a multiple of 512"),
    (["data/speech/clips.wav", "--pace", "0"], "0.0"),
    (["data/speech/clips.wav", "--threshold", "2"], "2.0 is not in the")])
def test_what_listen_refuses(given, said, monkeypatch, capsys):
    import sys
    from pathlib import Path

    from workbench.__main__ import main

    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(sys, "argv", ["workbench", "listen", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_silent_and_clipped_sound_is_told(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    from workbench.plans import chain

    for samples, wanted in ((np.zeros(8000), "is silent"), (np.ones(8000), "recorded too loud")):
        said: list[str] = []
        soundfile.write(tmp_path / "x.wav", samples, 8_000)
        chain.recording(tmp_path / "x.wav", told=said.append)
        assert wanted in said[0]


class Deaf:
    """A listener that hears a word at one second, whatever is said."""

    hop, rate, hops, worked = 80, 8000, 0, 0

    def hear(self, hop):
        self.hops += 1
        self.worked += self.hops % 2
        return ([SimpleNamespace(at_s=1.0, word="seven", score=0.9, meaning="")]
                if self.hops == 100 else [])


def test_a_run_times_each_hop_and_counts_what_was_missed():
    clips = [clip for clip in words.embedded() if clip.word == "one"][:1]
    scene = words.scene(clips, seconds=3.0, draw=np.random.default_rng(0), pause=(1.5, 1.5))
    table, times, row = hearing.run(Deaf(), scene)
    assert table.word.tolist() == ["seven"]
    assert len(times) == len(scene.samples) // 80
    assert 0 < times.min() <= times.max() < 1000
    assert (row["hits"], row["misses"], row["false_alarms"], row["worked"]) == (0, 1, 1, 0.5)
