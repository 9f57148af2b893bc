"""Actions predicted directly, as one point: fast, but the mean of two good answers is often a bad one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_vla.actions.heads.base import ActionHead, check_one_pass
from hf_vla.actions.heads.networks.condition import ConditionEncoder
from hf_vla.actions.heads.networks.mlp import MLPResNet, mlp
from hf_vla.actions.heads.networks.samples import check_finite

LOSSES: dict[str, Callable[..., torch.Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
NETWORKS = ("mlp", "parallel")


class RegressionHead(ActionHead):
    """One pass of a perceptron, deterministic.

    Args:
        loss (`str`): `"mse"`, `"l1"` (OpenVLA-OFT) or `"huber"`.
        huber_delta (`float`): error, normalised units, above which the Huber loss is linear.
        network (`str`): `"mlp"`: the condition vector gives the whole chunk. `"parallel"` (OpenVLA-OFT): the real
            features are readout tokens, `tokens_per_action` for each action, which is computed from their
            concatenation. Where there is a state, the condition vector (tokens, pooled, with the state) is added to
            every token; without one, nothing is pooled and `condition` has no options.
        hidden_dim (`int`): width.
        num_layers (`int`): Linear layers of `"mlp"`.
        num_blocks (`int`): residual blocks of `"parallel"`.
        tokens_per_action (`int`): of `"parallel"`; OpenVLA-OFT has `action_dim`.
        others: see [`~hf_vla.actions.heads.base.ActionHead`].

    Raises:
        ValueError: an option is not valid.

    Source: OpenVLA-OFT, https://huggingface.co/papers/2502.19645
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        chunk_size: int,
        state_dim: int | None = None,
        *,
        loss: str = "mse",
        huber_delta: float = 1.0,
        network: str = "mlp",
        hidden_dim: int = 1024,
        num_layers: int = 3,
        num_blocks: int = 2,
        tokens_per_action: int = 1,
        **kwargs,
    ):
        super().__init__(feature_dim, action_dim, chunk_size, state_dim, **kwargs)
        if loss not in LOSSES or network not in NETWORKS:
            raise ValueError(
                f"Expected loss in {tuple(LOSSES)} and network in {NETWORKS}, came {loss!r} and {network!r}."
            )
        if huber_delta <= 0 or tokens_per_action < 1 or num_blocks < 0:
            raise ValueError(
                "Expected huber_delta above 0, tokens_per_action of 1 or more and num_blocks of 0 or more, came "
                f"{huber_delta}, {tokens_per_action} and {num_blocks}."
            )
        self.loss_type, self.huber_delta = loss, huber_delta
        self.parallel, self.tokens_per_action = network == "parallel", tokens_per_action
        if self.parallel and state_dim is None:
            if kwargs.get("condition"):
                raise ValueError(
                    f"Expected no condition for a parallel network without a state, which pools nothing, came "
                    f"{kwargs['condition']}: leave it out."
                )
            self.condition_encoder = ConditionEncoder(feature_dim, norm=False)  # no weights that nothing would train
        self.network = (
            MLPResNet(feature_dim * tokens_per_action, hidden_dim, action_dim, num_blocks)
            if self.parallel
            else mlp(feature_dim, hidden_dim, chunk_size * action_dim, num_layers)
        )

    def loss(self, features, feature_mask, actions, action_mask, state=None, generator=None):
        """Error of each sample `(batch_size,)`; the generator is not used."""
        targets = self.mask_padding(features, actions, action_mask)
        options = {"delta": self.huber_delta} if self.loss_type == "huber" else {}
        predicted = self._predict(features, feature_mask, state)
        return self.reduce(LOSSES[self.loss_type](predicted, targets, reduction="none", **options), action_mask)

    @torch.no_grad()
    def sample(
        self,
        features,
        feature_mask,
        state=None,
        generator=None,
        noise=None,
        num_inference_steps=None,
        action_mask=None,
        callback=None,
    ):
        """Predict `(batch_size, chunk_size, action_dim)`; the generator is not used, noise and steps are refused."""
        check_one_pass(noise=noise, num_inference_steps=num_inference_steps, callback=callback)
        return self.keep_own(check_finite(self._predict(features, feature_mask, state)), action_mask)

    def _predict(self, features, feature_mask, state):
        condition = self.encode(features, feature_mask, state)
        hidden = condition.vector
        if self.parallel:
            needed, real = self.chunk_size * self.tokens_per_action, feature_mask.sum(1)
            if (real != needed).any():
                raise ValueError(
                    f"Expected {needed} readout tokens ({self.chunk_size} actions of {self.tokens_per_action}) in "
                    f"every sample, came {real.tolist()} real ones of {features.shape[1]}: set the model's "
                    f"num_readout_tokens to {needed}, or tokens_per_action to fit."
                )
            hidden = condition.tokens[feature_mask].view(len(features), needed, -1)
            if state is not None:
                hidden = hidden + condition.vector[:, None]
            hidden = hidden.reshape(len(features), self.chunk_size, -1)
        return self.network(hidden).float().reshape(-1, self.chunk_size, self.action_dim)
