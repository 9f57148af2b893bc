"""RT-1's actions: each number is one of a few hundred bins, chosen by a softmax of its own."""

import torch
import torch.nn.functional as F

from hf_vla.actions.heads.base import ActionHead, check_one_pass
from hf_vla.actions.heads.networks.mlp import mlp
from hf_vla.actions.heads.networks.samples import check_finite, draw

DECODINGS = ("argmax", "expectation", "sample")


class ClassificationHead(ActionHead):
    """A softmax over uniform bins of [-1, 1] for every number of the chunk, independent of the others.

    Args:
        num_bins (`int`): bins of a number. Actions outside [-1, 1] count as the bin at that end.
        decoding (`str`): `"argmax"`: the centre of the likeliest bin; `"expectation"`: the mean of all centres, which
            averages modes as regression does; `"sample"`: the centre of a bin drawn with the generator.
        hidden_dim (`int`), num_layers (`int`): width and Linear layers of the perceptron.
        others: see [`~hf_vla.actions.heads.base.ActionHead`].

    Raises:
        ValueError: an option is not valid.

    Source: RT-1, https://huggingface.co/papers/2212.06817
    """

    bound, differentiable = 1.0, False

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        chunk_size: int,
        state_dim: int | None = None,
        *,
        num_bins: int = 256,
        decoding: str = "argmax",
        hidden_dim: int = 512,
        num_layers: int = 3,
        **kwargs,
    ):
        super().__init__(feature_dim, action_dim, chunk_size, state_dim, **kwargs)
        if num_bins < 2 or decoding not in DECODINGS:
            raise ValueError(
                f"Expected num_bins of 2 or more and decoding in {DECODINGS}, came {num_bins} and {decoding!r}."
            )
        self.num_bins, self.decoding = num_bins, decoding
        self.network = mlp(feature_dim, hidden_dim, chunk_size * action_dim * num_bins, num_layers)

    def loss(self, features, feature_mask, actions, action_mask, state=None, generator=None):
        """Cross entropy of each sample `(batch_size,)`, nats for a number; the generator is not used."""
        targets = self.mask_padding(features, actions, action_mask)
        bins = ((targets.clamp(-1, 1) + 1) / 2 * self.num_bins).long().clamp(0, self.num_bins - 1)
        logits = self._logits(features, feature_mask, state)
        return self.reduce(F.cross_entropy(logits.movedim(-1, 1), bins, reduction="none"), action_mask)

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
        """Decode `(batch_size, chunk_size, action_dim)`; noise and steps are refused, `"sample"` draws."""
        check_one_pass(noise=noise, num_inference_steps=num_inference_steps, callback=callback)
        logits = check_finite(self._logits(features, feature_mask, state))
        bins = torch.arange(self.num_bins, device=logits.device, dtype=torch.float32)
        centres = (2 * bins + 1) / self.num_bins - 1
        if self.decoding == "argmax":
            return self.keep_own(centres[logits.argmax(-1)], action_mask)
        probabilities = logits.softmax(-1)
        if self.decoding == "expectation":
            return self.keep_own(probabilities @ centres, action_mask)
        # where each bin waits for a time that is exponential with its probability as rate, the first is a draw
        uniform = draw(torch.rand, logits.shape, generator=generator, device=logits.device, dtype=torch.float32)
        return self.keep_own(centres[(probabilities / -uniform.log()).argmax(-1)], action_mask)

    def _logits(self, features, feature_mask, state):
        """Scores of the bins, `(batch_size, chunk_size, action_dim, num_bins)`, float32."""
        vector = self.encode(features, feature_mask, state).vector
        return self.network(vector).float().reshape(-1, self.chunk_size, self.action_dim, self.num_bins)
