"""A policy that chooses a plan gene by gene, trained by reinforcement learning.

Sources: AMC He et al. 2018 (arXiv 1802.03494), HAQ Wang et al. 2019 (arXiv 1811.08886), Galen
Krieger et al. 2022; trained by PPO, Schulman et al. 2017 (arXiv 1707.06347), as stable-baselines3
has it.
"""

from collections.abc import Sequence

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.logger import configure

from workbench.numbers.fronts import Box
from workbench.plans.asking import Repeating
from workbench.plans.space import BITS, FLOAT, Forecast, Space


class Policy(Repeating):
    """A policy that chooses gene by gene, trained by PPO; its reward is less what the plan loses,
    where that keeps the limit.

    It sees which gene is next, how much latency the choices so far leave at least (from the
    forecast, where there is one), and what it chose last. A limit is drawn for each plan from the
    box, so that one policy learns the whole front.

    Example: `Policy(Space.of(model, x), None, (1.0, 1.0), seed=0).ask(2)`
    """

    EPISODES = 8  # plans behind each update

    def __init__(self, space: Space, forecast: Forecast | None, box: Box, seed: int):
        super().__init__(space)
        self.forecast, self.box, self.numbers = forecast, box, np.random.default_rng(seed)
        genes, width = len(space.genes), 3 + len(space.genes)

        # PPO asks an environment for its shapes; the steps are taken here
        class Shapes(gymnasium.Env):
            observation_space = gymnasium.spaces.Box(-10, 10, (width,), np.float32)
            action_space = gymnasium.spaces.Discrete(max(space.sizes))

        self.learner = stable_baselines3.PPO("MlpPolicy", Shapes(), n_steps=genes * self.EPISODES,
                                             batch_size=genes * 2, n_epochs=10, learning_rate=1e-3,
                                             gamma=1.0, seed=seed, device="cpu")
        self.learner.set_logger(configure(None, []))
        self.ended: list[tuple] = []

    def draw(self) -> tuple[list[int], tuple]:
        """A plan as the policy chooses it now; with the limit that it was to keep and the steps
        that led to it."""
        limit, plan, steps = float(self.numbers.uniform(0.3, 1.0)) * self.box[1], [], []
        for place, size in enumerate(self.space.sizes):
            seen = np.zeros(3 + len(self.space.sizes), np.float32)
            seen[:3] = limit, self._least(plan) - limit, plan[-1] if plan else 0
            seen[3 + place] = 1
            with torch.no_grad():
                action, value, chance = self.learner.policy(torch.from_numpy(seen)[None])
            steps.append((seen, action.numpy(), value, chance))
            # there are as many actions as the widest gene has options
            plan.append(int(action) % size)
        return plan, (limit, steps)

    def learn(self, led: tuple, lost: float, latency: float) -> None:
        limit, steps = led
        self.ended.append((steps,
                           -100 * lost if latency <= limit else -10 - 10 * (latency - limit)))
        if len(self.ended) == self.EPISODES:
            self._update()

    def _least(self, plan: Sequence[int]) -> float:
        """The latency that the choices so far leave at least."""
        if self.forecast is None:
            return 0.0
        names, least = self.space.names, []
        place = names.index(BITS) if BITS in names else None
        for bits in self.space.genes.get(BITS, (FLOAT,)):
            if place is None or place >= len(plan) or self.space.genes[BITS][plan[place]] == bits:
                fixed, parts = self.forecast.parts(bits)
                least.append(fixed
                             + sum(parts[name][plan[k]] if k < len(plan) else parts[name].min()
                                   for k, name in enumerate(names) if name in parts))
        return min(least)

    def _update(self) -> None:
        buffer = self.learner.rollout_buffer
        buffer.reset()
        for steps, reward in self.ended:
            for place, (seen, action, value, chance) in enumerate(steps):
                buffer.add(seen[None], action.reshape(1, 1),
                           np.array([reward if place == len(steps) - 1 else 0.0]),
                           np.array([place == 0]), value, chance)
        buffer.compute_returns_and_advantage(torch.zeros(1, 1), np.array([True]))
        self.learner.train()
        self.ended = []
