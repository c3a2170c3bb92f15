"""Networks that listen: the log-mel spectrum as a layer, a network that spots words, a detector of
speech.

Sources: separable dilated convolutions over time as in TC-ResNet, Choi et al. 2019 (arXiv
1904.03814), made causal; silero-vad 6.2 (https://github.com/snakers4/silero-vad, MIT), whose
weights are in its package.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE = 8_000  # samples a second that the word spotter hears
HOP, WINDOW = 80, 256  # samples of a frame and of what it is made of: 10 and 32 ms
SECOND = 100  # frames


class LogMel(nn.Module):
    """log(1 + sum_k m_bk |STFT_k|^2 / e) of samples (n, T): (n, bands, T / hop), each frame of
    samples up to its own end.

    m: triangles of equal width in mels, mel(f) = 2595 log10(1 + f / 700), between `low` and `high`
    Hz; e: `least`, so that silence is 0. Computed in double precision, so that a hop gives the same
    float32 as a whole recording, whose products a library adds up in another order; its numbers are
    buffers, which nothing prunes or rounds.

    Example: `LogMel(40)(torch.zeros(1, 8000)).shape == (1, 40, 100)`
    """

    def __init__(self, bands: int, *, rate: int = RATE, window: int = WINDOW, hop: int = HOP,
                 low: float = 60.0, high: float = 3_800.0, least: float = 1e-4):
        super().__init__()
        self.window, self.hop = window, hop
        bins = window // 2 + 1
        angles = 2 * math.pi * torch.arange(bins)[:, None] * torch.arange(window) / window
        waves = torch.cat([angles.cos(), angles.sin()]) * torch.hann_window(window)
        edges = torch.linspace(*(2595 * math.log10(1 + value / 700) for value in (low, high)),
                               bands + 2)
        edges = 700 * (10 ** (edges / 2595) - 1)
        places = torch.arange(bins) * rate / window
        rising = (places - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
        falling = (edges[2:, None] - places) / (edges[2:] - edges[1:-1])[:, None]
        self.register_buffer("waves", waves.T.double().contiguous(), persistent=False)
        triangles = torch.minimum(rising, falling).clamp_min(0).T.double() / least
        self.register_buffer("triangles", triangles.contiguous(), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        windows = F.pad(samples, (self.window - self.hop, 0)).unfold(1, self.window, self.hop)
        cosines, sines = (windows.to(self.waves.dtype) @ self.waves).chunk(2, 2)
        return ((cosines * cosines + sines * sines) @ self.triangles).log1p().float().transpose(1,
                                                                                                2)


class Causal(nn.Module):
    """A convolution over time, of each channel alone and then of all, that reads nothing to come;
    its input is added.

    Example: `Causal(8, 3, 2)(torch.ones(1, 8, 20)).shape == (1, 8, 20)`
    """

    def __init__(self, width: int, taps: int, dilation: int):
        super().__init__()
        self.before = (taps - 1) * dilation
        self.own = nn.Conv1d(width, width, taps, dilation=dilation, groups=width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.all = nn.Conv1d(width, width, 1, bias=False)
        self.norm_all = nn.BatchNorm1d(width)

    def forward(self, values: Tensor) -> Tensor:
        found = F.relu(self.norm(self.own(F.pad(values, (self.before, 0)))))
        return F.relu(values + self.norm_all(self.all(found)))


class WordSpotter(nn.Module):
    """Samples (n, T) at 8 kHz -> logits (n, classes, T / 80): for each 10 ms which word has just
    ended, the last class for none.

    From each band of the spectrum its mean over the last second is taken: what a microphone or a
    room does to all that is said.

    Example: `WordSpotter(11)(torch.zeros(1, 8000)).shape == (1, 11, 100)`
    """

    def __init__(self, classes: int, *, width: int = 88, bands: int = 40, taps: int = 5,
                 dilations: tuple[int, ...] = (1, 2, 4, 1, 2, 4, 8)):
        super().__init__()
        self.front = LogMel(bands)
        self.norm = nn.BatchNorm1d(bands)
        self.stem = nn.Conv1d(bands, width, 3)
        self.blocks = nn.Sequential(*(Causal(width, taps, dilation) for dilation in dilations))
        self.head = nn.Conv1d(width, classes, 1)

    def forward(self, samples: Tensor) -> Tensor:
        spectra = self.front(samples)
        spectra = spectra - F.avg_pool1d(F.pad(spectra, (SECOND - 1, 0)), SECOND, 1)
        return self.head(self.blocks(F.relu(self.stem(F.pad(self.norm(spectra), (2, 0))))))


class Silero(nn.Module):
    """silero-vad's network for 16 kHz: samples (n, T) -> the probability of speech (n, 1, T / 512)
    in each 32 ms.

    Each chunk of 512 samples is read behind the 64 before it; in the chunk a spectrum by
    convolution and four convolutions, over the chunks an LSTM.

    Example: `Silero()(torch.zeros(1, 1024)).shape == (1, 1, 2)`
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("waves", torch.zeros(258, 1, 1, 256))
        sizes = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.convolutions = nn.ModuleList(nn.Conv2d(*channels, (1, 3), stride=(1, stride),
                                                    padding=(0, 1))
                                          for *channels, stride in sizes)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.out = nn.Linear(128, 1)

    def forward(self, samples: Tensor) -> Tensor:
        chunks = F.pad(samples, (64, 0)).unfold(1, 576, 512)
        parts = F.conv2d(F.pad(chunks, (0, 64), mode="reflect")[:, None], self.waves,
                         stride=(1, 128))
        cosines, sines = parts.chunk(2, 1)
        values = (cosines * cosines + sines * sines).sqrt()
        for convolution in self.convolutions:
            values = F.relu(convolution(values))
        states, _ = self.lstm(values.squeeze(3).transpose(1, 2))
        return self.out(F.relu(states)).sigmoid().transpose(1, 2)


def silero() -> Silero:
    """silero-vad with the weights of its own ONNX file, which is in its package; the safetensors
    file beside it, of version 6.2.3, holds those of another training, and answers otherwise. Raises
    ModuleNotFoundError where it is not installed.

    Example: `silero()`
    """
    import onnx

    network, parts = (Silero(),
                      list(onnx.load(package_file("silero_vad", "data",
                                                  "silero_vad_16k_op15.onnx")).graph.initializer))
    known = {
        part.name.removeprefix("model."): torch.from_numpy(onnx.numpy_helper.to_array(part).copy())
        for part in parts}
    names = {"waves": "stft.forward_basis_buffer", "out.weight": "decoder.decoder.2.weight",
             "out.bias": "decoder.decoder.2.bias"}
    names |= {f"convolutions.{place}.{kind}": f"encoder.{place}.reparam_conv.{kind}"
              for place in range(4) for kind in ("weight", "bias")}
    names |= {f"lstm.{kind}_l0": f"decoder.rnn.{kind}"
              for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    own = network.state_dict()
    network.load_state_dict({name: known[names[name]].reshape(value.shape)
                             for name, value in own.items()})
    network.origin = {"architecture": "silero"}
    return network.eval()


def word_spotter(header: Mapping[str, str] | None = None) -> WordSpotter:
    """A word spotter at random, as wide as the header of a checkpoint says.

    Example: `word_spotter()`
    """
    known = ({"classes": "11", "width": "88"}
             | {key: header[key] for key in ("classes", "width") if header and key in header})
    model = WordSpotter(int(known["classes"]), width=int(known["width"]))
    model.origin = {"architecture": "word_spotter", **known}
    return model


def package_file(package: str, *inside: str) -> Path:
    """A file of an installed package, which is not imported: silero_vad would set torch's threads,
    pulsevad asks for torchaudio.

    Raises ModuleNotFoundError where it is not installed.

    Example: `package_file("silero_vad", "data").exists()`
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"speech needs the package {package}; pip install "
                                  "'workbench[speech]'")
    return Path(found.origin).parent.joinpath(*inside)


def resampled(samples: np.ndarray, rate: int, wanted: int = RATE) -> np.ndarray:
    """Samples at another rate, float32, by a polyphase filter.

    Example: `len(resampled(samples, 16_000, 8_000)) == 800`
    """
    from scipy.signal import resample_poly

    whole = math.gcd(rate, wanted)
    return (samples if rate == wanted
            else resample_poly(samples, wanted // whole, rate // whole).astype(np.float32))
