"""Meta-World's own scripted policies."""

import warnings

import numpy as np
from metaworld.policies import ENV_POLICY_MAP

from hf_vla.evaluation.envs.base import Expert


class MetaWorldExpert(Expert):
    """The policy that comes with Meta-World: 98 % over MT50."""

    def reset(self):
        """Begin anew."""
        self._policy = ENV_POLICY_MAP[self.env.task]()

    def act(self):
        """Next action, `(4,)`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Constant", UserWarning)  # it asks for more than the robot takes
            action = self._policy.get_action(self.env.numbers)
        return np.clip(action, -1.0, 1.0)
