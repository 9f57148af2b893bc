"""Goes round the obstacle on the side that the seed chooses, and looks at nothing that a policy sees to choose it."""

import math

import numpy as np

from hf_vla.evaluation.envs.base import Expert
from hf_vla.evaluation.envs.two_ways import DISTANCE, STEP

SIDES = ("left", "right")
SPEED = 0.9  # of the greatest
DETOURS = (0.32, 0.42)  # metres from the obstacle's middle


class TwoWaysExpert(Expert):
    """Follows a cosine from the start to the goal, beside the obstacle's middle at its crest.

    Attributes:
        side (`str`): "left" or "right", drawn in `reset` from the episode's seed, half and half; may be set after it.
    """

    def reset(self):
        """Choose the side, and how wide to go round."""
        rng = np.random.default_rng([self.env.seed, 1])  # other numbers than those of the layout
        self.side, self.detour = SIDES[rng.integers(2)], rng.uniform(*DETOURS)

    def act(self):
        """Next action, `(4,)`."""
        env = self.env
        ahead, left = env._across(env.hand)
        crest = self.detour * (1 if self.side == "left" else -1)
        phase = math.pi / 2 * np.clip(ahead / DISTANCE, -1.0, 1.0)
        slope = -crest * math.sin(phase) * math.pi / 2 / DISTANCE
        motion = np.array([1.0, slope + (crest * math.cos(phase) - left) / (3 * STEP)])  # back on the curve in 3 steps
        forward, sideways = SPEED * motion / np.linalg.norm(motion)
        x, y = forward * env.ahead + sideways * np.array([-env.ahead[1], env.ahead[0]])
        remaining = max(1.0, np.linalg.norm(env.goal - env.hand[:2]) / (SPEED * STEP))  # steps
        down = -env.hand[2] / (STEP * remaining)
        return np.array([x, y, max(-1.0, down), 1.0 if ahead > 0 else -1.0])
