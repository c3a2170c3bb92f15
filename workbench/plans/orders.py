"""Prune, distil, quantise: a recipe for every order of them."""

from workbench.plans import recipe
from workbench.subjects.subject import Step

LETTERS = "PDQ"


def order(letters: str, *, macs: float = 0.5, bits: int = 4, steps: int = 60, learning_rate: float = 0.01,
          learning_rate_rounded: float = 0.0005, seed: int = 0) -> dict[str, Step]:
    """The steps of an order, such as "PDQ": P prunes to `macs`, D distils for `steps` of 64 examples, Q rounds weights to `bits`.

    learning_rate_rounded: of D behind Q, where weights jump from level to level. Raises ValueError for other letters, a letter
    twice, or P behind Q: the scales of a quantised model belong to the channels that it has.

    Example: `steps.plan(Subject(model, task), orders.order("PDQ"))`
    """
    if not letters or set(letters) - set(LETTERS) or len(set(letters)) < len(letters) or "P" in letters.partition("Q")[2]:
        raise ValueError(f"order is {letters!r}, expected some of P, D and Q, each once, P before Q")
    lines = []
    for place, letter in enumerate(letters):
        rate = learning_rate_rounded if "Q" in letters[:place] else learning_rate
        lines.append({"P": f"{{type: prune, params: {{macs: {macs}}}}}", "Q": f"{{type: quantize, params: {{bits: {bits}}}}}",
                      "D": f"{{type: distil, params: {{epochs: 1, batch_size: 64, examples: {64 * steps}, validation: 1, "
                           f"learning_rate: {rate}, seed: {seed}}}}}"}[letter])
    return recipe.parse("\n".join(["compression:", *(f"- {line}" for line in lines)])).steps
