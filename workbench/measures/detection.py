"""How well something is detected in a stream: events against what was said, and how sure a detector
of speech is.

Source: the streaming wakeword benchmark of MLPerf Tiny (https://github.com/mlcommons/tiny,
benchmark/runner): an event is right from the beginning of a word to one second behind its end;
false alarms within one second of each other are one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench.measures.accuracy import wilson

GRACE_S = 1.0  # behind a word's end
DEBOUNCE_S = 1.0  # within which false alarms are one


@dataclass(frozen=True)
class Detected:
    """hits, misses: words that were named and were not; false_alarms; per_hour: false alarms an
    hour, with the exact 95 % interval of a Poisson count; delay_s: from a word's end to its event,
    of each hit.

    Example: `Detected(9, 1, 0, 0.0, 0.0, 3.7, (0.1,)).misses == 1`
    """

    hits: int
    misses: int
    false_alarms: int
    per_hour: float
    per_hour_low: float
    per_hour_high: float
    delay_s: tuple[float, ...]


def scored(heard: pd.DataFrame, said: pd.DataFrame, *, hours: float) -> Detected:
    """Events (word, at_s) against what was said (what, word, start_s, end_s; only commands count)
    in so many hours.

    An event that names another word than is being said is a false alarm.

    Example: `detection.scored(heard, scene.said, hours=20 / 60)`
    """
    commands = said[said.what == "command"] if "what" in said else said
    named, wrong = {}, []
    for event in heard.sort_values("at_s").itertuples():
        near = (commands.start_s <= event.at_s) & (event.at_s <= commands.end_s + GRACE_S)
        right = commands[near & (commands.word == event.word)]
        new = right[~right.index.isin(named)]  # the same word may be said again at once
        if len(new):
            named[new.index[0]] = event.at_s - new.end_s.iloc[0]
        elif not len(right):
            wrong.append(event.at_s)
    count = len(alarms(wrong))
    return Detected(len(named), len(commands) - len(named), count, *poisson(count, hours),
                    tuple(named.values()))


def alarms(times: Iterable[float]) -> list[float]:
    """Moments of false alarms, of those within a second of one that counts only that one.

    Example: `detection.alarms([2.0, 2.5, 3.5]) == [2.0, 3.5]`
    """
    found: list[float] = []
    for moment in sorted(times):
        if not found or moment - found[-1] > DEBOUNCE_S:
            found.append(moment)
    return found


def poisson(count: int, hours: float) -> tuple[float, float, float]:
    """Events an hour with the exact 95 % interval of a Poisson count (Garwood 1936).

    Example: `detection.poisson(0, 1.0)[2]` is 3.69
    """
    from scipy.stats import chi2

    low = chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    return count / hours, float(low) / hours, float(chi2.ppf(0.975, 2 * count + 2)) / 2 / hours


def area(scores: Sequence[np.ndarray], truth: Sequence[np.ndarray], *,
         against: Sequence[np.ndarray] | None = None, samples: int = 100,
         seed: int = 0) -> dict[str, float]:
    """Area under the ROC curve of scores by frame, with its 95 % bootstrap interval over
    recordings: auc, auc_low, auc_high; and, `against` other scores of the same frames, change,
    change_low and change_high, drawn on the same recordings.

    truth: 1 where there is speech, 0 where there is none, -1 where it is not known.

    Example: `detection.area([np.array([0.1, 0.9])] * 3, [np.array([False, True])] * 3)["auc"] ==
    1.0`
    """
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(seed)
    drawn = [np.arange(len(scores)),
             *(draw.integers(len(scores), size=len(scores)) for _ in range(samples))]

    def areas(values: Sequence[np.ndarray]) -> np.ndarray:
        found = []
        for places in drawn:
            right, given = (np.concatenate([part[k] for k in places]) for part in (truth, values))
            found.append(roc_auc_score(right[right >= 0], given[right >= 0]))
        return np.array(found)

    own = areas(scores)
    made = {"auc": own[0], "auc_low": np.percentile(own[1:], 2.5),
            "auc_high": np.percentile(own[1:], 97.5)}
    if against is not None:
        apart = own - areas(against)
        made |= {"change": apart[0], "change_low": np.percentile(apart[1:], 2.5),
                 "change_high": np.percentile(apart[1:], 97.5)}
    return {name: float(value) for name, value in made.items()}


def curve(scores: Sequence[np.ndarray],
          truth: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve of `area`: the share of other frames that are taken for speech, and the share
    of speech that is heard.

    Example: `detection.curve([np.array([0.1, 0.9])], [np.array([False, True])])`
    """
    from sklearn.metrics import roc_curve

    right, given = np.concatenate(truth), np.concatenate(scores)
    return roc_curve(right[right >= 0], given[right >= 0])[:2]


def by_voice(named: pd.DataFrame) -> pd.DataFrame:
    """One row per voice and candidate of words (word, voice, named, candidate): right, with its 95
    % Wilson interval, none, the share of words that were not named at all, and n.

    Example: `by_voice(pd.DataFrame({"word": ["one", "two"], "voice": ["a", "a"], "named": ["one",
    "one"], "candidate": ["ours", "ours"]})).right[0] == 0.5`
    """
    rows = []
    for (voice, candidate), part in named.groupby(["voice", "candidate"], sort=False):
        right = part.word == part.named
        low, high = wilson(int(right.sum()), len(part))
        rows.append({"voice": voice, "candidate": candidate, "right": right.mean(), "low": low,
                     "high": high,
                     "none": (part.named == "none").mean(), "n": len(part)})
    return pd.DataFrame(rows)


def over_voices(right: Sequence[float]) -> dict[str, float]:
    """The mean of what each voice had right, with the 95 % interval of Student's t over voices.

    Example: `detection.over_voices([0.9, 0.8, 0.85])["low"]`
    """
    from scipy.stats import t

    values = np.asarray(right, float)
    half = (t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
            if len(values) > 1 else float("nan"))
    return {"right": values.mean(), "low": values.mean() - half, "high": values.mean() + half}
