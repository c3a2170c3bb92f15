"""Whether a model knows what it does not know: sentences out of its scope, told by how sure of an
intent it is."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from workbench.deployment import sessions
from workbench.subjects.objectives import Understanding
from workbench.subjects.tasks import Split, Texts


def sureness(model, split: Split, *, batch_size: int = 32) -> np.ndarray:
    """The probability of the intent that is chosen, float (n,), for anything that sessions.open
    takes.

    Raises ValueError where the split asks for no intents.

    Example: `rejection.sureness(model, task.test)`
    """
    asked = split.objective
    if not isinstance(asked, Understanding):
        raise ValueError(f"{split.name} asks for no intents, so that none can be rejected")
    session = sessions.open(model)
    logits = [asked.read(session(batch.inputs))[:, 0, :len(asked.intents)]
              for batch in split.batches(batch_size)]
    return torch.cat(logits).softmax(1).amax(1).numpy()


def outside(split: Split, lines: Sequence[str], *, words: int = 12) -> Split:
    """Sentences that are in nobody's scope, prepared as those of `split`: the first `words` of each
    line, without a right answer.

    Example: `rejection.outside(task.test, data.load("wordnet").test.inputs.lines)`
    """
    cut = [line.split()[:words] for line in lines]
    return replace(split, inputs=Texts(cut), targets=Texts([[0] * (len(line) + 1) for line in cut]),
                   units=None, name="out of scope")


def roc(inside: np.ndarray, other: np.ndarray, *, samples: int = 1000,
        seed: int = 0) -> pd.DataFrame:
    """threshold, accepted (share of `inside` at least so sure) and let_in (share of `other`), from
    the strictest on.

    attrs: auc, auc_low, auc_high, the area under the curve with its 95 % bootstrap interval over
    sentences.

    Example: `rejection.roc(np.array([0.9, 0.8]), np.array([0.3, 0.85]))`
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    truth, values = np.r_[np.ones(len(inside)), np.zeros(len(other))], np.r_[inside, other]
    let_in, accepted, threshold = roc_curve(truth, values)
    random = np.random.default_rng(seed)
    drawn = [roc_auc_score(truth,
                           np.r_[random.choice(inside, len(inside)),
                                 random.choice(other, len(other))])
             for _ in range(samples)]
    table = pd.DataFrame({"threshold": threshold, "accepted": accepted, "let_in": let_in})
    table.attrs |= {"auc": float(roc_auc_score(truth, values)),
                    "auc_low": float(np.percentile(drawn, 2.5)),
                    "auc_high": float(np.percentile(drawn, 97.5))}
    return table
