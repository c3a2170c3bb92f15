"""Prune, distil, quantise: a plan for every order of them."""

from workbench.methods.channels import Prune
from workbench.methods.distillation import Distil
from workbench.methods.quantization import Quantize
from workbench.subjects.subject import Step
from workbench.subjects.training import Recipe

NAMES = {"P": "prune", "D": "distil", "Q": "quantize"}


def order(letters: str, *, macs: float = 0.5, bits: int = 4, steps: int = 60,
          learning_rate: float = 0.01, learning_rate_rounded: float = 0.0005,
          seed: int = 0, state: str | None = None, known: str | None = None) -> dict[str, Step]:
    """The steps of an order, such as "PDQ": P prunes to `macs`, D distils for `steps` of 64
    examples, Q rounds weights to `bits`.

    learning_rate_rounded: of D behind Q, where weights jump from level to level. state and known:
    of D, as `training.fit` has them. Raises ValueError for other letters, a letter twice, or P
    behind Q: the scales of a quantised model belong to the channels that it has.

    Example: `steps.plan(Subject(model, task), orders.order("PDQ"))`
    """
    if (not letters or set(letters) - set(NAMES) or len(set(letters)) < len(letters)
        or "P" in letters.partition("Q")[2]):
        raise ValueError(f"order is {letters!r}, expected some of P, D and Q, each once, P before "
                         "Q")
    rounded = "D" in letters.partition("Q")[2]
    training = Recipe(epochs=1, batch_size=64,
                      learning_rate=learning_rate_rounded if rounded else learning_rate)
    single: dict[str, Step] = {
        "P": Prune(macs=macs), "Q": Quantize(bits=bits),
        "D": Distil(training, examples=64 * steps, validation=1, seed=seed, state=state,
                    known=known)}
    return {NAMES[letter]: single[letter] for letter in letters}
