from dataclasses import asdict, dataclass

import torch


@dataclass
class AdamWConfig:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    grad_clip_norm: float = 10.0

    def build(self, parameters):
        options = asdict(self)
        del options["grad_clip_norm"]
        return torch.optim.AdamW(parameters, **options)
