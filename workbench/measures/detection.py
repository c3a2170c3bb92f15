"""How well something is detected in a stream: events against what was said, and how sure a detector of speech is.

Source: the streaming wakeword benchmark of MLPerf Tiny (https://github.com/mlcommons/tiny, benchmark/runner): an event is right
from the beginning of a word to one second behind its end; false alarms within one second of each other are one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

GRACE_S = 1.0  # behind a word's end
DEBOUNCE_S = 1.0  # within which false alarms are one


@dataclass(frozen=True)
class Detected:
    """hits, misses: words that were named and were not; false_alarms; per_hour: false alarms an hour, with the exact 95 %
    interval of a Poisson count; delay_s: from a word's end to its event, of each hit."""

    hits: int
    misses: int
    false_alarms: int
    per_hour: float
    per_hour_low: float
    per_hour_high: float
    delay_s: tuple[float, ...]


def scored(heard: pd.DataFrame, said: pd.DataFrame, *, hours: float) -> Detected:
    """Events (word, at_s) against what was said (what, word, start_s, end_s; only commands count) in so many hours.

    An event that names another word than is being said is a false alarm.

    Example: `detection.scored(heard, scene.said, hours=20 / 60)`
    """
    commands = said[said.what == "command"] if "what" in said else said
    named, alarms = {}, []
    for event in heard.sort_values("at_s").itertuples():
        near = (commands.start_s <= event.at_s) & (event.at_s <= commands.end_s + GRACE_S)
        right = commands[near & (commands.word == event.word)]
        if len(right):
            named.setdefault(right.index[0], event.at_s - right.end_s.iloc[0])
        elif not alarms or event.at_s - alarms[-1] > DEBOUNCE_S:
            alarms.append(event.at_s)
    rate, low, high = poisson(len(alarms), hours)
    return Detected(len(named), len(commands) - len(named), len(alarms), rate, low, high, tuple(named.values()))


def poisson(count: int, hours: float) -> tuple[float, float, float]:
    """Events an hour with the exact 95 % interval of a Poisson count (Garwood 1936).

    Example: `detection.poisson(0, 1.0)[2]` is 3.69
    """
    from scipy.stats import chi2

    low = chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    return count / hours, float(low) / hours, float(chi2.ppf(0.975, 2 * count + 2)) / 2 / hours


def area(scores: Sequence[np.ndarray], truth: Sequence[np.ndarray], *, against: Sequence[np.ndarray] | None = None,
         samples: int = 300, seed: int = 0) -> dict[str, float]:
    """Area under the ROC curve of scores by frame, with its 95 % bootstrap interval over recordings: auc, auc_low, auc_high;
    and, `against` other scores of the same frames, change, change_low and change_high, drawn on the same recordings.

    truth: 1 where there is speech, 0 where there is none, -1 where it is not known.
    """
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(seed)
    drawn = [np.arange(len(scores)), *(draw.integers(len(scores), size=len(scores)) for _ in range(samples))]

    def areas(values: Sequence[np.ndarray]) -> np.ndarray:
        found = []
        for places in drawn:
            right, given = (np.concatenate([part[k] for k in places]) for part in (truth, values))
            found.append(roc_auc_score(right[right >= 0], given[right >= 0]))
        return np.array(found)

    own = areas(scores)
    made = {"auc": own[0], "auc_low": np.percentile(own[1:], 2.5), "auc_high": np.percentile(own[1:], 97.5)}
    if against is not None:
        apart = own - areas(against)
        made |= {"change": apart[0], "change_low": np.percentile(apart[1:], 2.5), "change_high": np.percentile(apart[1:], 97.5)}
    return {name: float(value) for name, value in made.items()}
