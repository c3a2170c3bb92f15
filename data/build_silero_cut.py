"""Train data/checkpoints/silero-half.safetensors: silero-vad with half of its convolutions'
channels and half of its LSTM's units, taught by the whole one.

    apt-get install flite espeak-ng asterisk-core-sounds-{fr,it,ru}-gsm tuxpaint-stamps-default \
        ktuberling-data sound-theme-freedesktop oxygen-sounds psi-plus-sounds lomiri-sounds \
        colobot-common-sounds
    pip install 'workbench[speech]'
    python data/build_silero_cut.py [--source DIR] [--steps N] [--out FILE]

It hears scenes of what data/build_word_spotter.py makes (digits, sentences, phrases, effects; none
of those that are kept to be tested with) and of signals made here. The whole network's probability
is the target of each 32 ms (binary cross-entropy), what its convolutions hand to the LSTM is that
of the cut ones (mean squared error): else a loud sound makes them answer a thousandfold, which 8
bits have no room for.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from build_word_spotter import other_speech, recorded, spoken_digits
from torch import nn

from workbench import files
from workbench.methods import channels
from workbench.subjects import models, speech, words
from workbench.subjects.words import RATE, Clip

HERE = Path(__file__).parent
# the fourth makes what the LSTM takes
SHARES, UNITS = {f"convolutions.{place}": 0.5 for place in range(3)}, 64
SECONDS, BATCH, LEARNING_RATE, HINT = 4.096, 16, 2e-3, 0.2
EXAMPLE = torch.zeros(1, 4096)


def main() -> None:
    """Cut, train and write the checkpoint, with its recipe in its header."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path,
                        default=HERE / "checkpoints" / "silero-half.safetensors")
    asked = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    spoken, sounds = recorded(asked.source / "usr/share")
    clips = [*spoken_digits()[::3], *other_speech(), *signals(), *spoken, *sounds]
    whole = speech.silero()
    ranks = channels.score(whole, "l1", example=EXAMPLE)
    small = channels.remove(whole, channels.fewest(ranks, SHARES), example=EXAMPLE)
    keep_units(small, UNITS)
    losses = taught(small, whole, clips, steps=asked.steps)
    recipe = {"steps": asked.steps, "clips": len(clips),
              "last_loss": round(float(np.mean(losses[-50:])), 4)}
    models.save(small.half(), asked.out, notes={name: str(value) for name, value in recipe.items()})
    print(recipe)


def keep_units(network: nn.Module, count: int) -> None:
    """Leave the LSTM of `network`, itself, the units that weigh most in what reads them."""
    lstm, out = network.lstm, network.out
    heard = lstm.weight_hh_l0.abs().sum(0) + out.weight.abs().sum(0)
    kept = heard.topk(count).indices.sort().values
    gates = torch.cat([kept + gate * lstm.hidden_size for gate in range(4)])
    network.lstm = nn.LSTM(lstm.input_size, count, batch_first=True)
    network.lstm.load_state_dict({name: value[gates][:, kept] if name == "weight_hh_l0"
                                  else value[gates] for name, value in lstm.state_dict().items()})
    network.out = nn.Linear(count, 1)
    network.out.load_state_dict({"weight": out.weight[:, kept], "bias": out.bias})


def signals() -> list[Clip]:
    """Beeps, sweeps, sirens and bursts of noise, of half a second to two, as machines make them."""
    draw, made = np.random.default_rng(0), []
    for place in range(400):
        times = np.arange(round(draw.uniform(0.5, 2.0) * RATE)) / RATE
        low, high = np.exp(draw.uniform(np.log(80), np.log(3_500), 2))
        # times a second, and which part of them
        often, part = draw.uniform(1, 12), draw.uniform(0.1, 0.9)
        # a tone, a sweep up or down
        phase = {0: low * times, 1: low * times + (high - low) * times**2 / (2 * times[-1]),
                 # a siren
                 2: low * times + high / 40 * np.sin(2 * np.pi * often * times) / often,
                 3: 0 * times}[place % 4]
        tone = sum(np.sin(2 * np.pi * k * phase) / k ** draw.uniform(0, 2)
                   for k in range(1, draw.integers(2, 6)))
        values = tone if place % 4 < 3 else draw.standard_normal(len(times))  # a burst of noise
        if draw.random() < 0.7:
            values = values * ((times * often) % 1
                               < part) if draw.random() < 0.5 else values * np.exp(
                                   -8 * ((times * often) % 1))
        made.append(Clip(values.astype(np.float32), "effect"))
    return made


def taught(small: nn.Module, whole: nn.Module, clips: list[Clip], *, steps: int) -> list[float]:
    """Train `small`, itself, to answer as `whole`; returns the loss of each step."""
    draw, losses = np.random.default_rng(0), []
    optimizer = torch.optim.AdamW(small.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    small.train()
    handed = {network: [] for network in (small, whole)}  # to the LSTM
    for network, kept in handed.items():
        network.convolutions[-1].register_forward_hook(lambda _layer, _given, made,
                                                       kept=kept: kept.append(made))
    for _ in files.progress(range(steps), title="training", unit="step"):
        heard = torch.from_numpy(np.stack([scene(clips, draw) for _ in range(BATCH)]))
        with torch.no_grad():
            target = whole(heard)
        loss = F.binary_cross_entropy(small(heard), target)
        ours, theirs = (F.relu(handed[network].pop()) for network in (small, whole))
        loss = loss + HINT * F.mse_loss(ours, theirs)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(small.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    small.eval()
    return losses


def scene(clips: list[Clip], draw: np.random.Generator) -> np.ndarray:
    """Samples at 16 kHz of clips drawn at random, with noise and pauses."""
    some = [clips[place] for place in draw.integers(len(clips), size=8)]
    some = [Clip(clip.samples[:round(draw.uniform(0.4, 3.0) * RATE)], clip.what) for clip in some]
    made = words.scene(some, seconds=SECONDS, draw=draw, pause=(0.1, 1.0), noise=(3.0, 35.0),
                       level=(-38.0, -10.0),
                       speed=(0.8, 1.25))
    return speech.resampled(made.samples, RATE, 2 * RATE)


if __name__ == "__main__":
    main()
