"""How fast the diffusion head samples, beside a plain restatement of the published loop, beside the floor.

    OMP_NUM_THREADS=1 python scripts/benchmark_heads.py

The UNet is full size (channels 256/512/1024, condition 2048, 98.8 M parameters, random weights): 10 DDIM steps to a
chunk of 16 actions, batch 1, float32, one thread. `plain` is the published algorithm written with torch's own modules:
convolutions by nn.Conv1d, time and condition joined and projected in every block of every step. Both run in turn in
one process with the same weights and the same noise; CPU seconds of the process, minimum and median.

Floor: reading once the weights of the FiLM projections and of the condition, and once per step those of everything
else, at the speed at which a long vector is summed here; or the multiplications at the speed of a large matrix
product here, if that is more. What is left between floor and time: torch's F.linear reads its weights at a third of
that speed when there are so few rows. The machine could do more: oneDNN's product with weights rearranged beforehand
(torch.ops.mkldnn._linear_pointwise) would bring 10 steps to 0.14 s; it is private to torch and needs a second copy of
the weights.

At last the layers alone, matrix product over torch's convolution, by rows (batch size times length): MAX_ROWS of the
network is where the product stops being the faster one.
"""

import argparse
import platform
import statistics
import time
from unittest import mock

import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_vla.actions.heads.diffusion import SCHEDULER, DiffusionHead
from hf_vla.actions.heads.networks import conditional_unet1d

FEATURES, ACTIONS, CHUNK, STATE, STEPS = 2048, 10, 16, 7, 10
LIMIT = 0.65  # of the plain loop's CPU time


class PlainBlock(nn.Module):
    def __init__(self, source, target, condition):
        super().__init__()
        self.blocks = nn.ModuleList(self.convolution(channels, target) for channels in (source, target))
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * target))
        self.residual_conv = nn.Identity() if source == target else nn.Conv1d(source, target, 1)

    @staticmethod
    def convolution(source, target):
        layers = nn.Conv1d(source, target, 5, padding=2), nn.GroupNorm(8, target), nn.Mish()
        return nn.ModuleDict({"block": nn.Sequential(*layers)})

    def forward(self, x, condition):
        scale, shift = self.cond_encoder(condition)[..., None].chunk(2, 1)
        h = scale * self.blocks[0]["block"](x) + shift
        return self.blocks[1]["block"](h) + self.residual_conv(x)


class PlainUnet(nn.Module):
    """The published network; its weights bear the names of ours."""

    def __init__(self, dims=(256, 512, 1024), step=256):
        super().__init__()
        cond, pairs = step + FEATURES, list(zip((ACTIONS, *dims), dims, strict=False))
        self.diffusion_step_encoder = nn.Sequential(
            nn.Identity(), nn.Linear(step, 4 * step), nn.Mish(), nn.Linear(4 * step, step)
        )
        self.down_modules = nn.ModuleList()
        for low, high in pairs:
            halve = nn.Identity() if high == dims[-1] else nn.ModuleDict({"conv": nn.Conv1d(high, high, 3, 2, 1)})
            self.down_modules.append(nn.ModuleList([PlainBlock(low, high, cond), PlainBlock(high, high, cond), halve]))
        self.mid_modules = nn.ModuleList(PlainBlock(dims[-1], dims[-1], cond) for _ in range(2))
        self.up_modules = nn.ModuleList()
        for low, high in pairs[:0:-1]:
            double = nn.ModuleDict({"conv": nn.ConvTranspose1d(low, low, 4, 2, 1)})
            self.up_modules.append(
                nn.ModuleList([PlainBlock(2 * high, low, cond), PlainBlock(low, low, cond), double])
            )
        self.final_conv = nn.Sequential(PlainBlock.convolution(dims[0], dims[0]), nn.Conv1d(dims[0], ACTIONS, 1))

    def forward(self, sample, timestep, condition):
        frequencies = torch.exp(torch.arange(128) * (-torch.log(torch.tensor(10000.0)) / 127))
        angles = timestep * frequencies
        step = self.diffusion_step_encoder(torch.cat([angles.sin(), angles.cos()])[None])
        condition = torch.cat([step, condition], -1)
        x, skipped = sample.transpose(1, 2), []
        for first, second, halve in self.down_modules:
            x = second(first(x, condition), condition)
            skipped.append(x)
            x = x if isinstance(halve, nn.Identity) else halve["conv"](x)
        for block in self.mid_modules:
            x = block(x, condition)
        for first, second, double in self.up_modules:
            x = torch.cat([x, skipped.pop()], 1)
            x = double["conv"](second(first(x, condition), condition))
        x = self.final_conv[0]["block"](x)
        return self.final_conv[1](x).transpose(1, 2)


def plain_sample(head, plain, features, mask, state, noise):
    """The published loop: every step projects the condition anew."""
    scheduler = DDIMScheduler(**{key: value for key, value in SCHEDULER.items() if key != "_class_name"})
    scheduler.set_timesteps(STEPS)
    condition, sample = head.condition_encoder(features, mask, state).vector, noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(plain(sample, timestep, condition), timestep, sample).prev_sample
    return sample


def cpu_seconds(functions, runs):
    """CPU times of each function, called in turn, after one call to warm up."""
    times = [[] for _ in functions]
    for run in range(runs + 1):
        for function, record in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            if run:
                record.append(time.process_time() - start)
    return times


def floor_seconds(head, inputs):
    """CPU seconds that a sampling cannot do without: (bytes, multiplications)."""
    square, vector = torch.rand(2048, 2048), torch.rand(2**27)
    products, sums = cpu_seconds([lambda: square @ square, vector.sum], 3)
    flops_per_second, bytes_per_second = 2 * 2048**3 / min(products), vector.nbytes / min(sums)
    print(f"speeds here: {flops_per_second / 1e9:.0f} GFLOP/s product, {bytes_per_second / 1e9:.0f} GB/s read")
    with FlopCounterMode(display=False) as counter:
        head.sample(*inputs)
    once = sum(p.nbytes for n, p in head.named_parameters() if "encoder" in n)
    every = sum(p.nbytes for n, p in head.named_parameters() if "encoder" not in n)
    print(f"weights read once: {once / 1e6:.0f} MB, in every step: {every / 1e6:.0f} MB")
    return (once + STEPS * every) / bytes_per_second, counter.get_total_flops() / flops_per_second


def print_products_over_convolutions():
    """CPU time of a layer as a matrix product over that as a convolution; many layers, so that no cache holds them."""
    print("\nproduct / convolution   rows: ratio")
    for channels, length in ((256, 16), (512, 8), (1024, 4)):
        layers = [conditional_unet1d.Conv1d(channels, channels, 5) for _ in range(20 * 1024**2 // channels**2)]
        ratios = []
        for batch_size in (1, 2, 4, 8, 16):
            x = torch.randn(batch_size, length, channels)

            def run(rows, x=x, layers=layers):
                with mock.patch.object(conditional_unet1d, "MAX_ROWS", rows):
                    for layer in layers:
                        layer(x)

            products, convolutions = cpu_seconds([lambda run=run: run(10**9), lambda run=run: run(0)], 3)
            ratios.append(f"{batch_size * length:4}: {min(products) / min(convolutions):.2f}")
        print(f"{channels:4} channels, T {length:2}  {'  '.join(ratios)}")


@torch.no_grad()
def compare(runs):
    """Time both loops: (head, its inputs, CPU seconds of ours, of the plain one, largest difference of samples)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = DiffusionHead(FEATURES, ACTIONS, CHUNK, STATE).eval()
    plain = PlainUnet().eval()
    plain.load_state_dict(head.denoiser.state_dict())
    features, state, noise = torch.randn(1, 32, FEATURES), torch.randn(1, STATE), torch.randn(1, CHUNK, ACTIONS)
    inputs = features, torch.ones(1, 32, dtype=torch.bool), state

    def ours():
        return head.sample(*inputs, noise=noise)

    def published():
        return plain_sample(head, plain, *inputs, noise)

    error = (ours() - published()).abs().max().item()
    return head, inputs, *cpu_seconds([ours, published], runs), error


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each")
    arguments = parser.parse_args()
    head, inputs, times, plain_times, error = compare(arguments.runs)
    print(f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"UNet: {sum(p.numel() for p in head.denoiser.parameters()):,} parameters")
    floor = floor_seconds(head, inputs)
    for name, of in (("minimum", min), ("median", statistics.median)):
        mine, theirs = of(times), of(plain_times)
        print(f"{name}: ours {mine:.3f} s, plain {theirs:.3f} s, ratio {mine / theirs:.2f} (< {LIMIT})")
    print(f"floor: {floor[0]:.3f} s to read, {floor[1]:.3f} s to multiply; ours / floor {min(times) / max(floor):.1f}")
    print(f"largest difference of the samples: {error:.1e}")
    print_products_over_convolutions()


if __name__ == "__main__":
    main()
