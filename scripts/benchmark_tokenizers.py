"""Throughput of the action tokenizers on this machine: `OMP_NUM_THREADS=1 python scripts/benchmark_tokenizers.py`.

CPU seconds of one process (`time.process_time`), median of the repetitions; chunks smooth and within [-1, 1].
"published" is what the published implementations did on the machine that recorded the goldens (one thread of a shared
AMD EPYC; SpatialVLA's grid includes its detour over token strings): another machine, so read the ratio as a rough one.

The floor, for one 7-D float32 action of the default grid. Encoding reads 28 bytes and writes 24 (three int64 ids);
between them lie 98 comparisons (15 + 31 + 7 + 3 * 15 inner edges), two arctan2, two square roots, all in float64.
Decoding reads 24 bytes of ids and 48 of table and writes 56. At 10 GB/s that is 5 ns and 13 ns for an action; the
arithmetic, at 4 to 8 comparisons a cycle, some 10 ns more.
"""

import argparse
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread, so that CPU time is wall time

import platform
import statistics
import time

import numpy as np
import scipy
import tokenizers
from rich.console import Console
from rich.table import Table

from hf_vla.actions.tokenizers.fast import FastTokenizer
from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer, transfer_embeddings
from hf_vla.actions.tokenizers.uniform import UniformTokenizer

GAUSSIANS = {  # of SpatialVLA's BridgeData grid
    "theta": (2.18094, 0.78493),
    "phi": (0.14072, 1.79030),
    "r": (0.55386, 0.30016),
    "roll": (-0.00826, 0.31316),
    "pitch": (0.08298, 0.33079),
    "yaw": (0.00934, 0.29815),
}


def cpu_seconds(call, inputs):
    times = []
    for value in inputs:
        start = time.process_time()
        call(value)
        times.append(time.process_time() - start)
    return statistics.median(times)


def smooth_chunks(count, seed, horizon=16, dims=7):
    """Mean of three slow sines, as robot motions are: float32 in [-1, 1]."""
    phase, rate = np.random.default_rng(seed).uniform(0, 2 * np.pi, (2, count, 1, dims, 3))
    steps = np.linspace(0, 1, horizon)[:, None, None]
    return np.sin(rate * steps + phase).mean(axis=-1).astype(np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actions", type=int, default=100_000, help="actions in a batch")
    parser.add_argument("--chunks", type=int, default=5_000, help="FAST chunks of 16x7 in a batch")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    def uniform_actions(seed):
        return np.random.default_rng(seed).uniform(-1, 1, (args.actions, 1, 7)).astype(np.float32)

    def fast_chunks(seed):
        return smooth_chunks(args.chunks, seed)

    grid = GaussianGridTokenizer.from_gaussians(GAUSSIANS)
    fast = FastTokenizer.fit(smooth_chunks(2_000, seed=10**6), vocab_size=512)
    cases = [
        ("gaussian_grid, 8194", grid, uniform_actions, 442e3, 8.7e6),
        ("uniform 256, centers", UniformTokenizer(), uniform_actions, None, None),
        ("uniform 256, openvla", UniformTokenizer(convention="openvla"), uniform_actions, None, None),
        ("fast 16x7, 512", fast, fast_chunks, 14.0e3, 20.8e3),
    ]
    table = Table("tokenizer", "", "in a batch", "per second", "published", "ratio")
    for name, tokenizer, make, *published in cases:
        batches = [make(seed) for seed in range(args.repeats)]  # new ones each time: BPE remembers words
        encoded = [tokenizer.encode(batch) for batch in [make(args.repeats + seed) for seed in range(args.repeats)]]
        for work, inputs, reference in zip(("encode", "decode"), (batches, encoded), published, strict=True):
            rate = len(inputs[0]) / cpu_seconds(getattr(tokenizer, work), inputs)
            compared = (f"{reference:,.0f}", f"{rate / reference:.1f}") if reference else ("-", "-")
            table.add_row(name, work, f"{len(inputs[0]):,}", f"{rate:,.0f}", *compared)
    target = GaussianGridTokenizer(distribution="uniform")
    embeddings = np.random.default_rng(0).standard_normal((grid.vocab_size, 2304), dtype=np.float32)
    adaptation = cpu_seconds(lambda rows: transfer_embeddings(rows, grid, target), [embeddings] * 3)
    console = Console()
    console.print(table)
    console.print(f"spatial embedding adaptation, 8194 x 2304 float32: {adaptation:.3f} s")
    console.print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}, tokenizers {tokenizers.__version__}, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    )


if __name__ == "__main__":
    main()
