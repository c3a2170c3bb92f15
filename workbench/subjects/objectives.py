"""What a task asks of a model: how its outputs are read, what is right for each example, the loss.

An objective is the only place that knows what kind of answer counts. `statistics` gives each
example a row of numbers whose sums over examples make the metric: so a metric of a whole set, its
interval and a paired difference all come from rows. Targets at `IGNORED` do not count, neither in
the loss nor in the metric.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.batches import answer, tensors

# as in Hugging Face's label columns: padding, special tokens, all but the first piece of a word
IGNORED = -100


@dataclass(frozen=True)
class Objective:
    """One class for each example; the base of the others. metric: how its column is called. unit:
    what the interval is over. output: the name of the output that is the answer, where a model has
    several.

    Example: `Objective(unit="sentence").metric == "top1"`
    """

    metric: str = "top1"
    unit: str = "image"
    output: str | None = None

    def read(self, outputs, targets: Tensor | None = None) -> Tensor:
        """Logits float (n, classes) of what a model puts out.

        Raises ValueError where they do not fit the targets, TypeError where there is no tensor to
        read.
        """
        logits = answer(outputs, self.output)
        if logits.dim() != 2:
            raise ValueError(f"the model's answer has shape {tuple(logits.shape)}, "
                             f"{self._wanted()}")
        if targets is not None:
            self._check(logits, targets)
        return logits

    def decisions(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What counts, one decision a row: logits (m, classes) and targets int64 (m,)."""
        return logits, targets

    def loss(self, logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Mean cross entropy of the decisions, a scalar."""
        chosen, wanted = self.decisions(logits, targets)
        return F.cross_entropy(chosen.float(), wanted, label_smoothing=smoothing)

    def answers(self, logits: Tensor) -> Tensor:
        """The chosen class of each example, int64 (n,)."""
        return logits.argmax(-1)

    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """How right each example is, float (n,): 0 or 1 for a class, the share of its tokens
        otherwise."""
        return (self.answers(logits) == targets).float()

    def statistics(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Float64 (n, columns), of which `value` makes the metric."""
        return self.right(logits, targets).double()[:, None]

    def value(self, sums: Tensor, n) -> Tensor:
        """The metric of sums of statistics (..., columns) over `n` examples."""
        return sums[..., 0] / n

    def check_targets(self, inputs, targets: Tensor) -> None:
        """Raise ValueError where targets do not belong to inputs; nothing to check for one class an
        example."""

    def _wanted(self) -> str:
        return ("expected (n, classes), one class an example; give the task another objective or "
                "the model another head")

    def _check(self, logits: Tensor, targets: Tensor) -> None:
        if len(logits) != len(targets):
            raise ValueError(f"the model answers {len(logits)} times for {len(targets)} examples")
        if len(targets) and int(targets.max()) >= logits.shape[1]:
            raise ValueError(f"the model knows {logits.shape[1]} classes, a target is class "
                             f"{int(targets.max())}; load the model with a head for this task")


@dataclass(frozen=True)
class Tagging(Objective):
    """A tag for each token, B- and I- marking entities; the metric is the F1 of whole entities, as
    seqeval counts them.

    tags: their names, in the order of the model's classes. A sentence is answered by the likeliest
    tags that are one (`likeliest`), or, where `whole` is False, by the likeliest of each token.
    Source: CoNLL-2000 evaluation, Tjong Kim Sang & Buchholz 2000.

    Example: `Tagging(tags=("O", "B-room", "I-room"))`
    """

    tags: Sequence[str] = ()
    metric: str = "f1"
    unit: str = "sentence"
    whole: bool = True

    def read(self, outputs, targets: Tensor | None = None) -> Tensor:
        """Logits float (n, tokens, tags). Raises as `Objective.read` does, and where there is not a
        target for each token."""
        logits = answer(outputs, self.output)
        if logits.dim() != 3 or logits.shape[2] != len(self.tags):
            raise ValueError(f"the model's answer has shape {tuple(logits.shape)}, expected (n, "
                             f"tokens, {len(self.tags)}), a tag for each token")
        if targets is not None and targets.shape != logits.shape[:2]:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, the tokens "
                             f"{tuple(logits.shape[:2])}; give one tag a token, {IGNORED} for "
                             "those that do not count")
        return logits

    def decisions(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that count."""
        return logits[targets != IGNORED], targets[targets != IGNORED]

    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The share of each sentence's tokens that are right, float (n,)."""
        return _share(self.tagged(logits, targets) == targets, targets != IGNORED)

    def tagged(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The chosen tags of the tokens that count, int64 (n, tokens)."""
        return (likeliest(logits, targets != IGNORED, self.tags) if self.whole
                else self.answers(logits))

    def statistics(self, logits: Tensor, targets: Tensor) -> Tensor:
        """By sentence: entities that are right, entities found, entities there."""
        return _entities(self.tagged(logits, targets), targets, self.tags)

    def value(self, sums: Tensor, n) -> Tensor:
        """F1 = 2 right / (found + there), 1 where there are none and none is found."""
        both = sums[..., 1] + sums[..., 2]
        return torch.where(both > 0, 2 * sums[..., 0] / both.clamp_min(1), 1.0)

    def check_targets(self, inputs, targets: Tensor) -> None:
        """Raise ValueError where a sentence has not one target for each of its tokens."""
        _check_lengths(inputs, targets)


@dataclass(frozen=True)
class NextToken(Objective):
    """Each token from those before it; the metric is perplexity, exp of the mean negative log
    likelihood of a token.

    Targets are the tokens themselves, at their own places: the logits at place k answer for place k
    + 1.

    Example: `NextToken().metric == "perplexity"`
    """

    metric: str = "perplexity"
    unit: str = "sentence"

    def read(self, outputs, targets: Tensor | None = None) -> Tensor:
        """Logits float (n, tokens, vocabulary). Raises as `Objective.read` does."""
        logits = answer(outputs, self.output)
        if logits.dim() != 3:
            raise ValueError(f"the model's answer has shape {tuple(logits.shape)}, expected (n, "
                             "tokens, vocabulary)")
        if targets is not None and targets.shape != logits.shape[:2]:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, the tokens "
                             f"{tuple(logits.shape[:2])}; the targets are the tokens themselves")
        return logits

    def decisions(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that follow another and count."""
        return super().decisions(logits[:, :-1][targets[:, 1:] != IGNORED],
                                 targets[:, 1:][targets[:, 1:] != IGNORED])

    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The share of each sentence's tokens that are guessed from those before them, float
        (n,)."""
        return _share(self.answers(logits)[:, :-1] == targets[:, 1:], targets[:, 1:] != IGNORED)

    def statistics(self, logits: Tensor, targets: Tensor) -> Tensor:
        """By sentence: the negative log likelihood, in nats, and how many tokens it is of."""
        wanted = targets[:, 1:]
        rows = logits[:, :-1].flatten(0, 1).float()  # in double it takes three times as long
        lost = F.cross_entropy(rows, wanted.flatten(), reduction="none",
                               ignore_index=IGNORED).view(wanted.shape)
        return torch.stack([lost.double().sum(1), (wanted != IGNORED).sum(1).double()], 1)

    def value(self, sums: Tensor, n) -> Tensor:
        """exp(nats / tokens)."""
        return (sums[..., 0] / sums[..., 1].clamp_min(1)).exp()

    def check_targets(self, inputs, targets: Tensor) -> None:
        """Raise ValueError where a sentence has not one target for each of its tokens."""
        _check_lengths(inputs, targets)


@dataclass(frozen=True)
class Understanding(Objective):
    """What a sentence wants and what it names: an intent, and a tag for each token.

    A model answers with logits (n, tokens, width), width at least the number of intents and of
    tags: the first token, which is the tokenizer's own ([CLS]), answers the intent, every other one
    its tag. Targets lie in the same places.

    metric: "sentence" (share of sentences whose intent and tags are all right), "intent" (share of
    intents) or "f1" (of whole entities, as seqeval counts them). The loss is the cross entropy of
    the intents and that of the tags, added. Tags are chosen as `Tagging` does, by `whole`. Source:
    JointBERT, Chen et al. 2019 (arXiv 1902.10909).

    Example: `Understanding(intents=("on", "off"), tags=("O", "B-room"))`
    """

    intents: Sequence[str] = ()
    tags: Sequence[str] = ()
    metric: str = "sentence"
    unit: str = "sentence"
    whole: bool = True

    def __post_init__(self):
        if self.metric not in UNDERSTOOD:
            raise ValueError(f"unknown metric {self.metric!r} of an understanding; expected one of "
                             f"{', '.join(UNDERSTOOD)}")

    def read(self, outputs, targets: Tensor | None = None) -> Tensor:
        """Logits float (n, tokens, width), those that answer nothing at -10,000."""
        logits = answer(outputs, self.output)
        sizes = [len(self.intents), len(self.tags)]
        if logits.dim() != 3 or logits.shape[2] < max(sizes):
            raise ValueError(f"the model's answer has shape {tuple(logits.shape)}, expected (n, "
                             f"tokens, {max(sizes)}): an intent in the first place, then a tag for "
                             "each token")
        if targets is not None and targets.shape != logits.shape[:2]:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, the tokens "
                             f"{tuple(logits.shape[:2])}; give the intent and then one tag a "
                             f"token, {IGNORED} for those that do not count")
        # 0: the intent, 1: a tag
        kinds = (torch.arange(logits.shape[1], device=logits.device) > 0).long()
        known = torch.tensor(sizes, device=logits.device)[kinds]
        return logits.masked_fill(torch.arange(logits.shape[2], device=logits.device)
                                  >= known[:, None], -1e4)

    def decisions(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The intents and the tokens that count."""
        return logits[targets != IGNORED], targets[targets != IGNORED]

    def loss(self, logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Mean cross entropy of the intents and of the tags, added, a scalar; smoothing is over
        what may be answered."""
        parts = ((logits[:, :1], targets[:, :1], len(self.intents)),
                 (logits[:, 1:], targets[:, 1:], len(self.tags)))
        total = logits.sum() * 0.0
        for chosen, wanted, size in parts:
            if (wanted != IGNORED).any():
                total = total + F.cross_entropy(chosen[..., :size].flatten(0, 1).float(),
                                                wanted.flatten(), ignore_index=IGNORED,
                                                label_smoothing=smoothing)
        return total

    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whether all of a sentence is right, float (n,)."""
        return ((self.chosen(logits, targets) == targets) | (targets == IGNORED)).all(1).float()

    def chosen(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The chosen intent and, behind it, the chosen tags, int64 (n, tokens)."""
        tagging = Tagging(tags=self.tags, whole=self.whole)
        tags = tagging.tagged(logits[:, 1:, :len(self.tags)], targets[:, 1:])
        return torch.cat([self.answers(logits[:, :1]), tags], 1)

    def statistics(self, logits: Tensor, targets: Tensor) -> Tensor:
        """By sentence: all is right, the intent is right, entities that are right, entities found,
        entities there."""
        chosen = self.chosen(logits, targets)
        right = (chosen == targets) | (targets == IGNORED)
        both = torch.stack([right.all(1), chosen[:, 0] == targets[:, 0]], 1).double()
        return torch.cat([both, _entities(chosen[:, 1:], targets[:, 1:], self.tags)], 1)

    def value(self, sums: Tensor, n) -> Tensor:
        """The metric."""
        if self.metric == "f1":
            return Tagging(tags=self.tags).value(sums[..., 2:], n)
        return sums[..., UNDERSTOOD.index(self.metric)] / n

    def check_targets(self, inputs, targets: Tensor) -> None:
        """Raise ValueError where a sentence has not one target for each of its tokens."""
        _check_lengths(inputs, targets)


UNDERSTOOD = ("sentence", "intent", "f1")
OBJECTIVES = {"class": Objective, "tags": Tagging, "next_token": NextToken}


def objective(name: str, **options) -> Objective:
    """The objective called `name`: "class", "tags" or "next_token". Raises ValueError for another
    name.

    Example: `objective("class", unit="speaker").unit == "speaker"`
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; expected one of {', '.join(OBJECTIVES)}, or "
                         "an Objective of your own")
    return OBJECTIVES[name](**options)


def likeliest(logits: Tensor, counted: Tensor, tags: Sequence[str]) -> Tensor:
    """The tags, int64 (n, tokens), of the greatest product of probabilities among those that are
    entities: I-X stands behind B-X or I-X alone.

    logits: float (n, tokens, tags). counted: bool (n, tokens); what does not count is passed over
    and answered by any tag. Source: Viterbi 1967, doi 10.1109/TIT.1967.1054010.

    Example: `likeliest(torch.tensor([[[2.0, 0.0, 3.0]]]), torch.tensor([[True]]), ("O", "B-room",
    "I-room")).tolist() == [[0]]`
    """
    inside = [k for k, tag in enumerate(tags)
              if tag.startswith("I-") and f"B-{tag[2:]}" in tags]
    begin = [tags.index(f"B-{tags[k][2:]}") for k in inside]
    order = (~counted).byte().argsort(dim=1, stable=True)  # what counts first
    chances = logits.float().log_softmax(-1).take_along_dim(order[:, :, None], 1)
    lengths, same = counted.sum(1, keepdim=True), torch.arange(len(tags), device=logits.device)
    total = chances[:, 0].clone()
    total[:, inside] = -torch.inf
    before = []
    for place in range(1, chances.shape[1]):
        best, came = (found.expand(-1, len(tags)).clone() for found in total.max(1, keepdim=True))
        goes_on = total[:, inside] >= total[:, begin]
        best[:, inside] = total[:, inside].maximum(total[:, begin])
        came[:, inside] = torch.where(goes_on, same[inside], same[begin])
        ended = place >= lengths
        total = torch.where(ended, total, best + chances[:, place])
        before.append(torch.where(ended, same, came))
    path = [total.argmax(1, keepdim=True)]
    for came in reversed(before):
        path.append(came.gather(1, path[-1]))
    return torch.empty_like(order).scatter_(1, order, torch.cat(path[::-1], 1))


def _entities(chosen: Tensor, targets: Tensor, tags: Sequence[str]) -> Tensor:
    """By sentence, float64 (n, 3): entities that are right, found, and there."""
    from seqeval.metrics.sequence_labeling import get_entities

    rows = []
    for line, wanted in zip(chosen.tolist(), targets.tolist(), strict=True):
        kept = [k for k, tag in enumerate(wanted) if tag != IGNORED]
        found, there = (set(get_entities([tags[tagged[k]] for k in kept]))
                        for tagged in (line, wanted))
        rows.append([len(found & there), len(found), len(there)])
    return torch.tensor(rows, dtype=torch.float64).view(-1, 3)


def _share(hits: Tensor, counted: Tensor) -> Tensor:
    return (hits & counted).sum(1) / counted.sum(1).clamp_min(1)


def _check_lengths(inputs, targets: Tensor) -> None:
    tokens = next((value for value in tensors(inputs) if value.dim() == 2
                   and not value.is_floating_point()), None)
    if tokens is not None and targets.shape != tokens.shape:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, the tokens "
                         f"{tuple(tokens.shape)}; give one target a token, {IGNORED} for those "
                         "that do not count")
