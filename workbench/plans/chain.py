"""From a network that spots words to a chain that listens: quantised, streaming, as a file, behind
a gate of speech."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from workbench.batches import Batch
from workbench.deployment import listening, sessions, streaming
from workbench.deployment.listening import Event, Gate, Listener, Ring
from workbench.measures import rejection
from workbench.methods import quantization
from workbench.subjects import data, models, speech, words
from workbench.subjects.objectives import Understanding

FULL_SCALE = 0.999  # samples from here on were cut by whoever recorded them
CLASSES = "classes"  # under which a file tells what its answers mean
SCENES, SCENE_S = 24, 4.0  # that 8 bits are calibrated on
ROUNDED = ("stem", "blocks.*", "head")  # what is rounded: all but the spectrum


@contextlib.contextmanager
def chain(name: str = "word_spotter", *, bits: int = 8, gate: bool = True, threshold: float = 0.8,
          meaning: Callable[[str], str] | None = None) -> Iterator[Listener]:
    """A listener for a model by name, checkpoint or .onnx file, ready to hear; its files are gone
    when the block ends.

    Raises ValueError for a model that does not stream, or not samples at 8 kHz.

    Example: `with chain.chain("word_spotter") as listener: listener.hear(samples)`
    """
    with tempfile.TemporaryDirectory() as folder:
        path = (Path(name) if name.endswith(".onnx")
                else write(models.load(name), Path(folder) / "words.onnx", bits=bits))
        stream = streaming.Stream(path, threads=1)
        session = cast(sessions.OnnxSession, stream.session)
        if stream.timing.axis != -1 or len(session.inputs[stream.timing.source].shape) != 2:
            raise ValueError(f"{name} does not take samples (n, {stream.hop}); listening needs a "
                             "network over samples at 8 kHz")
        speaking = gate_file(Path(folder) / "speech.onnx") if gate else None
        yield listener(path, gate=speaking, threshold=threshold, meaning=meaning)


def listener(path: Path, *, gate: Path | None = None, threshold: float = 0.8,
             meaning: Callable[[str], str] | None = None) -> Listener:
    """A listener of streaming files, of words and, to rest where there is no speech, of speech; one
    thread.

    Example: `listener(write(models.load("word_spotter"), "words.onnx"), threshold=0.9)`
    """
    stream = streaming.Stream(path, threads=1)
    told = cast(sessions.OnnxSession,
                stream.session).session.get_modelmeta().custom_metadata_map.get(CLASSES)
    classes = told.split(",") if told else [*words.WORDS, "none"]
    speaking = Gate(streaming.Stream(gate, threads=1)) if gate else None
    return Listener(stream, classes, gate=speaking, threshold=threshold, meaning=meaning)


def write(network: nn.Module, path: Path, *, bits: int = 8, hop: int = speech.HOP) -> Path:
    """A word spotter as a streaming file, of 8 or 32 bits; returns its path. Raises ValueError for
    other bits, and as streaming.stream and its export do.

    Example: `write(models.load("word_spotter"), "words.onnx", bits=32)`
    """
    if bits not in (8, 32):
        raise ValueError(f"bits is {bits}, expected 8 or 32")
    rounded = eight_bits(network) if bits == 8 else network
    stream = streaming.stream(rounded, torch.zeros(1, 8 * hop), hop=hop)
    return streaming.export(stream, path, told={CLASSES: ",".join([*words.WORDS, "none"])})


def eight_bits(network: nn.Module) -> nn.Module:
    """A word spotter in 8 bits but for its spectrum, calibrated on scenes of the embedded clips.

    Example: `eight_bits(models.load("word_spotter"))`
    """
    return quantization.quantize(network, scenes(), layers=[*ROUNDED])


def scenes(*, seed: int = 0) -> list[Batch]:
    """Scenes of the embedded speech and effects, which hold no command of anybody who is tested.

    Example: `len(scenes()) > 0`
    """
    draw, clips = np.random.default_rng(seed), [clip for clip in words.embedded()
                                                if clip.what != "command"]
    made = [words.scene([clips[k] for k in draw.permutation(len(clips))], seconds=SCENE_S,
                        draw=draw) for _ in range(SCENES)]
    return [Batch(torch.from_numpy(np.stack([one.samples for one in made])))]


def gate_file(path: Path, network: nn.Module | None = None) -> Path:
    """silero-vad, or a network made of it, as a streaming file; returns its path.

    Example: `gate_file(Path("gate.onnx"))`
    """
    return streaming.export(streaming.stream(network or speech.silero(), torch.zeros(1, 4096),
                                             hop=512), path)


def understood(sentences: Mapping[str, str], *, name: str = "hashed_cnn",
               data_name: str = "intents:en") -> Callable[[str], str]:
    """What a word stands for: the intent of its sentence, as a model of intents understands it,
    with the sentence; for `Listener(meaning=)`. Words without a sentence mean nothing.

    Raises as data.load and models.load do.

    Example: `understood({"one": "turn on the light in the kitchen"})("one")`
    """
    task = data.load(data_name, preprocessing=models.preprocessing(name))
    split = rejection.outside(task.test, list(sentences.values()))
    found = task.objective.read(
        sessions.open(models.load(name, task))(split.batch().inputs))[:, 0].argmax(1)
    asked = cast(Understanding, task.objective)
    meanings = {word: f"{asked.intents[int(place)]}: {sentence}"
                for (word, sentence), place in zip(sentences.items(), found, strict=True)}
    return lambda word: meanings.get(word, "")


def recording(source: str | Path, *, told: Callable[[str], None] = print) -> np.ndarray:
    """The samples of a file at 8 kHz; what is odd about them is told. Raises as words.read_audio
    does.

    Example: `recording("said.wav")`
    """
    samples, rate = words.read_audio(source)
    if rate != speech.RATE:
        told(f"{source} has {rate:,} samples a second; it was resampled to {speech.RATE:,}")
    clipped = float((np.abs(samples) >= FULL_SCALE).mean())
    if not np.abs(samples).max() > 0:
        told(f"{source} is silent: all of its samples are 0")
    elif clipped > 0.001:
        told(f"{source}: {clipped:.1%} of its samples are at full scale; it was recorded too loud")
    return samples


def listen(listener: Listener, samples: np.ndarray | None, *, pace: float | None = None,
           state: Path | None = None, told: Callable[[str], None] = print) -> None:
    """Tell the events of samples, or of the microphone where there are none, and in the end what it
    took.

    pace: times real time, None for as fast as it can. state: a file in which each second is
    remembered; where it exists, what it remembers is not heard again.

    Example: `listen(listener("words.onnx"), samples)`
    """
    start = round(listener.resume(state) * listener.rate) if state and state.exists() else 0
    if start:
        told(f"goes on at {start / listener.rate:.2f} s, as {state} remembers")
    if state and start and samples is not None and len(samples) - start < listener.hop:
        state.unlink()
        told("which is its end: it was heard to the last hop, and the state is removed")
        return
    source = (microphone(listener) if samples is None
              else listening.paced(samples[start:], hop=listener.hop, pace=pace))
    made = listening.listen(listener, source, told=lambda event: told(line(event)), state=state)
    took, heard = made["milliseconds"], len(made["milliseconds"]) * listener.hop / listener.rate
    if not len(took):
        told("nothing to listen to: there is less than one hop")
        return
    told(f"{heard:.1f} s in hops of {1e3 * listener.hop / listener.rate:.0f} ms: median "
         f"{np.median(took):.2f} ms, 99 of 100 within {np.percentile(took, 99):.2f}, longest "
         f"{took.max():.2f}; {made['dropped']} samples dropped; the spotter worked on "
         f"{listener.worked / listener.hops:.0%} of the hops")
    if state:
        state.unlink(missing_ok=True)


def line(event: Event) -> str:
    """An event as it is printed.

    Example: `"one" in line(listening.Event(1.2, "one", 0.9))`
    """
    return f"{event.at_s:9.2f} s  {event.word:8} {event.score:.2f}  {event.meaning}".rstrip()


def microphone(listener: Listener) -> Callable[[Ring], None]:
    """A source that writes what the default microphone hears. Raises ModuleNotFoundError without
    the package sounddevice.

    Example: `listening.listen(listener, microphone(listener))`
    """
    try:
        import sounddevice
    except (ModuleNotFoundError, OSError) as error:  # the second: without the library PortAudio
        raise ModuleNotFoundError("the microphone needs sounddevice and PortAudio; pip install "
                                  "sounddevice") from error

    def source(ring: Ring) -> None:
        with sounddevice.InputStream(samplerate=listener.rate, channels=1, blocksize=listener.hop,
                                     callback=lambda block, *_: ring.write(block[:, 0])):
            while not ring.closed:
                sounddevice.sleep(100)

    return source
