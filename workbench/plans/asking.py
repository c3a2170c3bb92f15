"""What samplers have in common: they are asked for plans, and told what these came to."""

from typing import Any, Protocol

from workbench.plans.space import Plan, Space

TRIES = 200  # of a sampler for plans that it has not proposed before


class Sampler(Protocol):
    """Proposes plans of a space.

    Example: `plans = sampler("random", space).ask(8)`
    """

    def ask(self, count: int) -> list[Plan]:
        """At most `count` plans that it has not proposed before; none where it knows no more."""

    def tell(self, plan: Plan, lost: float, latency: float) -> None:
        """What a plan came to; all that were asked for are told in their order, before the next are
        asked for."""


class Repeating:
    """A sampler that may come to a plan again: the plan is then told from memory, and costs
    nothing.

    `draw` gives a plan, written in any way, and what led to it; `learn` takes the latter with what
    the plan came to.

    Example: `Repeating(Space({"layer1": (1.0, 0.5)})).known == {}`
    """

    def __init__(self, space: Space):
        self.space = space
        self.known: dict[Plan, tuple[float, float]] = {}
        self.open: dict[Plan, list] = {}  # plans that are not told yet, with all that led to them

    def draw(self) -> tuple[list[int], Any]:
        """The next plan."""
        raise NotImplementedError

    def learn(self, led: Any, lost: float, latency: float) -> None:
        """Take what a plan came to."""

    def ask(self, count: int) -> list[Plan]:
        asked: list[Plan] = []
        for _ in range(TRIES):
            drawn, led = self.draw()
            plan = self.space.reduced(drawn)
            if plan in self.known:
                self.learn(led, *self.known[plan])
            elif plan in self.open:
                self.open[plan].append(led)
            else:
                self.open[plan] = [led]
                asked.append(plan)
            if len(asked) == count:
                break
        return asked

    def tell(self, plan: Plan, lost: float, latency: float) -> None:
        self.known[plan] = lost, latency
        for led in self.open.pop(plan, []):
            self.learn(led, lost, latency)
