"""Who proposes the next plans: random, greedy, Optuna's samplers, a policy trained by reinforcement
learning, and `forecast`.

A sampler is asked for plans and told what they came to, (lost, latency) each, both to be low; a
limit is a box (the most lost, the most latency) outside which nothing counts. `forecast` begins
from the measured sensitivities, corrects them by what it is told, and asks for the plans that are
expected to enlarge the dominated area most (Emmerich et al. 2006).

Sources: NSGA-II Deb et al. 2002, TPE Bergstra et al. 2011, GP with expected hypervolume
improvement, all as Optuna has them.
"""

import time
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.special import ndtri

from workbench.numbers.fronts import Box, enlarged, undominated
from workbench.plans.asking import Repeating, Sampler
from workbench.plans.space import BITS, FLOAT, ROUNDING, Forecast, Plan, Space, label

ENUMERATED = 5000  # plans up to which the whole space is looked at


def sampler(name: str, space: Space, *, forecast: Forecast | None = None, box: Box = (1.0, 1.0),
            seed: int = 0) -> Sampler:
    """The sampler of that name: forecast, greedy (both need `forecast`), random, nsga2, tpe, gp,
    policy.

    Raises ValueError for an unknown name or where a forecast is missing, ImportError where its
    library is.

    Example: `sampler("random", space).ask(8)`
    """
    if name not in NAMES:
        raise ValueError(f"unknown sampler {name!r}; expected one of {', '.join(NAMES)}")
    if name in ("forecast", "greedy"):
        if forecast is None:
            raise ValueError(f"sampler {name} needs the forecast of its space (space.forecast)")
        return (Forecasting if name == "forecast" else Greedy)(forecast, box,
                                                               _pool(forecast,
                                                                     np.random.default_rng(seed)))
    if name == "random":
        return Random(space, seed)
    try:
        if name == "policy":
            from workbench.plans.policy import Policy  # its library takes seconds to import

            return Policy(space, forecast, box, seed)
        return Optuna(name, space, box, seed)
    except ImportError as error:
        raise ImportError(f"sampler {name} needs a library that is missing ({error}); pip install "
                          "'workbench[search]'") from error


def replayed(name: str, space: Space, known: Mapping[Plan, tuple[float, float]], *,
             forecast: Forecast | None = None, evaluations: int = 64, batch: int = 4,
             seed: int = 0) -> pd.DataFrame:
    """The plans that a sampler asks for where what every plan comes to is known: plan, lost,
    latency, asking_s (so far).

    known: plan -> (lost, latency), of all plans. It ends early where the sampler knows no more.

    Example: `samplers.replayed("random", space, known, evaluations=8)`
    """
    chooser, rows, took = sampler(name, space, forecast=forecast, seed=seed), [], 0.0
    while len(rows) < evaluations:
        began = time.perf_counter()
        plans = chooser.ask(min(batch, evaluations - len(rows)))
        if not plans:
            break
        for plan in plans:
            chooser.tell(plan, *known[plan])
        took += time.perf_counter() - began
        rows += [{"plan": label(plan), "lost": known[plan][0], "latency": known[plan][1],
                  "asking_s": took}
                 for plan in plans]
    return pd.DataFrame(rows)


NAMES = ("forecast", "greedy", "random", "nsga2", "tpe", "gp", "policy")


class Random(Repeating):
    """Plans drawn uniformly.

    Example: `len(Random(Space.of(model, x), seed=0).ask(2)) == 2`
    """

    def __init__(self, space: Space, seed: int):
        super().__init__(space)
        self.numbers = np.random.default_rng(seed)

    def draw(self) -> tuple[list[int], None]:
        return [int(self.numbers.integers(size)) for size in self.space.sizes], None


class Optuna(Repeating):
    """One of Optuna's samplers, by name; beyond the box it is told that a limit is not kept.

    Example: `len(Optuna("tpe", Space.of(model, x), (1.0, 1.0), seed=0).ask(2)) == 2`
    """

    def __init__(self, name: str, space: Space, box: Box, seed: int):
        import optuna

        super().__init__(space)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = {"nsga2": optuna.samplers.NSGAIISampler, "tpe": optuna.samplers.TPESampler,
                 "gp": optuna.samplers.GPSampler}
        # of few evaluations a generation of 50 would be most
        more = {"population_size": 16} if name == "nsga2" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = optuna.create_study(directions=["minimize", "minimize"],
                                             sampler=kinds[name](seed=seed, **more))
        self.box = box

    def draw(self) -> tuple[list[int], object]:
        trial = self.study.ask()
        return [trial.suggest_categorical(name, list(range(size)))
                for name, size in zip(self.space.names, self.space.sizes, strict=True)], trial

    def learn(self, led, lost: float, latency: float) -> None:
        for what, value, most in zip(("lost", "latency"), (lost, latency), self.box, strict=True):
            if most < 1:
                led.set_constraint(what, value - most)
        self.study.tell(led, (lost, latency))


class Greedy:
    """The plans that the measured sensitivities alone say are best: those that no other is expected
    to beat, front by front.

    Example: `Greedy(forecast, (1.0, 0.7), pool).ask(8)`
    """

    def __init__(self, forecast: Forecast, box: Box, pool: list[Plan]):
        self.box, self.pool = box, pool
        self.expected = np.array([[forecast.lost(plan), forecast.latency(plan)] for plan in pool])
        self.left = np.ones(len(self.pool), dtype=bool)

    def ask(self, count: int) -> list[Plan]:
        asked: list[Plan] = []
        while len(asked) < count and self.left.any():
            places = np.flatnonzero(self.left)
            inside = places[self.expected[places, 1] <= self.box[1]]
            places = inside if len(inside) else places
            front = places[undominated(self.expected[places])]
            front = front[np.argsort(self.expected[front, 1])]
            spread = front[np.unique(np.linspace(0, len(front) - 1,
                                                 min(count - len(asked),
                                                     len(front))).round().astype(int))]
            self.left[spread] = False
            asked += [self.pool[place] for place in spread]
        return asked

    def tell(self, plan: Plan, lost: float, latency: float) -> None:
        pass


class Forecasting:
    """The sensitivities as a prior belief, corrected by what it is told; next come the plans that
    are expected to enlarge the dominated area most.

    A plan loses the sum of what its options lose, each normal about a common share of the distance
    that it alone causes, and a deviation of its own, which plans that differ in few options share
    in part (a Gaussian process). The deviation's size is half of what losses have differed from
    their sums so far, and at least DEVIATION, about the standard error of a loss on 2,500 pictures:
    so that neighbours of the best plans are tried too.

    Example: `Forecasting(forecast, (1.0, 0.7), pool).ask(8)`
    """

    DEVIATION = 0.003
    NOISE = 0.001  # standard error that is left when a plan was told
    # of a loss, over which the enlargement is averaged
    QUANTILES = ndtri((np.arange(16) + 0.5) / 16)

    def __init__(self, forecast: Forecast, box: Box, pool: list[Plan]):
        self.forecast, self.box, self.pool = forecast, box, pool
        self.places = {plan: place for place, plan in enumerate(pool)}
        options = [np.concatenate([np.arange(1, size) == place
                                   for size, place in zip(forecast.space.sizes, plan, strict=True)])
                   for plan in pool]
        # of each option but the first of its gene whether the plan takes it
        self.rows = np.array(options, dtype=float)
        self.prior = np.concatenate([harm[1:] for harm in forecast.harms])
        self.times = np.array([forecast.latency(plan) for plan in pool])
        self.told: dict[int, tuple[float, float]] = {}
        self.asked: set[int] = set()

    def ask(self, count: int) -> list[Plan]:
        # the ends and the middle of what is expected: they tell how the sensitivities are to be
        # read
        if not self.told:
            first = Greedy(self.forecast, self.box, self.pool).ask(count)
            self.asked |= {self.places[plan] for plan in first}
            return first
        mean, error = self._losses()
        times, chosen = self._latencies(), []
        front: dict[int, tuple] = dict(self.told)
        while len(chosen) < count and len(self.asked) < len(self.pool):
            left = np.array([place for place in range(len(self.pool)) if place not in self.asked])
            points = np.array(list(front.values()))
            gain = sum(enlarged(points, np.stack([mean + q * error, times], 1)[left],
                                self._corner()) for q in self.QUANTILES)
            outside = (np.maximum(np.stack([mean, times], 1)[left] - np.array(self.box), 0).sum(1)
                       + 1e-3 * mean[left])
            best = int(left[gain.argmax() if gain.max() > 0 else outside.argmin()])
            self.asked.add(best)
            chosen.append(best)
            front[best] = mean[best], times[best]
        return [self.pool[place] for place in chosen]

    def tell(self, plan: Plan, lost: float, latency: float) -> None:
        self.told[self.places[plan]] = lost, latency

    def _corner(self) -> Box:
        """Where the area begins that plans are to dominate: the box, or as far as what was told
        goes."""
        worst = np.array(list(self.told.values())).max(0)
        return min(self.box[0], worst[0] + 1e-3), min(self.box[1], worst[1] + 1e-3)

    def _losses(self) -> tuple[np.ndarray, np.ndarray]:
        """What each plan of the pool is expected to lose, and the standard error of that."""
        places = np.array(list(self.told))
        rows, lost = self.rows[places], np.array([self.told[place][0] for place in places])
        totals = rows @ self.prior
        share = max(float(totals @ lost) / max(float(totals @ totals), 1e-12), 1e-4)
        mean = share * self.prior
        options = np.diag(mean**2 + 1e-6) + np.outer(mean, mean) / 4
        own = max(float(np.sqrt(np.mean((lost - rows @ mean) ** 2))) / 2, self.DEVIATION)

        def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            apart = one.sum(1)[:, None] + other.sum(1)[None] - 2 * one @ other.T
            return one @ options @ other.T + own**2 * np.exp(-apart / 2)

        among, between = (alike(rows, rows) + self.NOISE**2 * np.eye(len(rows)),
                          alike(self.rows, rows))
        solved = np.linalg.solve(among, between.T)
        known = np.einsum("ij,ji->i", between, solved)
        before = np.einsum("ij,jk,ik->i", self.rows, options, self.rows) + own**2
        return (self.rows @ mean + solved.T @ (lost - rows @ mean),
                np.sqrt(np.maximum(before - known, 0) + self.NOISE**2))

    def _latencies(self) -> np.ndarray:
        """What each plan of the pool is expected to take: the table's figure, corrected by how far
        it was off so far."""
        places = np.array(list(self.told))
        apart = np.log(np.array([self.told[place][1] for place in places]) / self.times[places])
        every = np.hstack([self.rows, np.ones((len(self.rows), 1))])
        rows = every[places]
        weights = np.linalg.solve(rows.T @ rows / 0.02**2 + np.eye(rows.shape[1]) / 0.05**2,
                                  rows.T @ apart / 0.02**2)
        return self.times * np.exp(every @ weights)


def _pool(forecast: Forecast, draw: np.random.Generator) -> list[Plan]:
    """The plans that are thought about: all, or those that are expected to be good for some price
    of time, and their like."""
    space = forecast.space
    if len(space) <= ENUMERATED:
        return list(dict.fromkeys(space.every()))
    names, found = space.names, {}
    bits = space.genes.get(BITS, (FLOAT,))
    for place, width in enumerate(bits):
        _, parts = forecast.parts(width)
        for price in np.logspace(-3, 2, 100):
            plan = [int(np.argmin(harm + price * parts[name])) if name in parts else place
                    if name == BITS else 0
                    for name, harm in zip(names, forecast.harms, strict=True)]
            for way in range(len(space.genes.get(ROUNDING, (0,)))):
                found[space.reduced([way if name == ROUNDING else gene
                                     for name, gene in zip(names, plan, strict=True)])] = None
    for plan in list(found):
        for _ in range(max(1, 2 * ENUMERATED // (3 * len(found)))):
            new = list(plan)
            for gene in draw.choice(len(names), size=min(2, len(names)), replace=False):
                new[gene] = int(draw.integers(space.sizes[gene]))
            found[space.reduced(new)] = None
            if len(found) >= ENUMERATED:
                return list(found)
    return list(found)
