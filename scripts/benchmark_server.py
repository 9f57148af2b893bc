"""Many clients at a policy server: how long answers take, whether all come, and whether each is the right one.

Starts `hf-vla serve` once for every batch size, asks it from several processes over real sockets, and compares every
answer, to the last bit, with what a policy predicts for that client alone.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

DEFAULT = "spaces/action_demo/checkpoints/tinyvla_metaworld"
TASKS = ["Press a button from the top", "Slide a plate into a cabinet sideways"]
COUNTS = ("inference_seconds_sum", "inference_seconds_count", "batch_requests_sum")


def vary(observation, client, step):
    """Another picture and state for every client and step, of one of two instructions."""
    rng = np.random.default_rng((client, step))
    varied = {**observation, "task": TASKS[client % len(TASKS)]}
    for key, value in observation.items():
        if key.startswith("observation.images."):
            varied[key] = np.roll(value, rng.integers(0, min(value.shape[:2]), 2), axis=(0, 1))
        elif key == "observation.state":
            varied[key] = (value + rng.normal(0, 0.02, value.shape)).astype(np.float32)
    return varied


def read_observation(folder):
    from PIL import Image

    from hf_vla.evaluation.example import read_example

    frame = read_example(folder)
    pictures = {f"observation.images.{name}": Image.open(path) for name, path in frame["images"].items()}
    observation = {name: np.asarray(picture) for name, picture in pictures.items()}
    if frame["state"] is not None:
        observation["observation.state"] = np.array(frame["state"], np.float32)
    return observation


def expected_chunks(folder, observation, clients, requests, batch_size):
    """What each client is to get, of a policy of its own: `(clients, requests, chunk, dimensions)`."""
    import torch

    from hf_vla.policy import Policy, predict_chunks

    torch.set_num_threads(1)
    first = Policy.from_pretrained(folder, device="cpu", seed=0)
    chunks = []
    for client in range(clients):
        policy = Policy(first.model, first.processor, seed=0)
        seen = [vary(observation, client, step) for step in range(requests)]
        chunks.append([predict_chunks([policy], [each], None, batch_size)[0] for each in seen])
    return np.array(chunks)


def run_clients(url, observation, clients, requests, wanted, barrier):
    """Clients of one process, a thread each: `[(seconds of each answer, wrong answers), ...]`."""
    from hf_vla.serving.client import PolicyClient

    def run(client):
        seen = [vary(observation, client, step) for step in range(requests)]
        seconds, wrong = [], 0
        with PolicyClient(url, timeout=120.0) as server:
            barrier.wait()
            for step in range(requests):
                begun = time.perf_counter()
                chunk = server.predict_chunk(seen[step])
                seconds.append(time.perf_counter() - begun)
                wrong += not np.array_equal(chunk, wanted[client][step])
        return seconds, wrong

    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(run, clients))


def work(pipe, *arguments):
    pipe.send(run_clients(*arguments))


def measure(folder, observation, batch_size, args, wanted):
    """A server's figures with this batch size."""
    with serving(folder, batch_size, args.window_ms) as url:
        overhead = protocol_overhead(url, vary(observation, 0, 0))
        warm_up(url, observation)
        before, context = counts(url), multiprocessing.get_context("spawn")
        groups = [list(range(start, args.clients, args.processes)) for start in range(args.processes)]
        barrier = context.Barrier(args.clients + 1)
        pipes, processes = [], []
        for group in groups:
            ours, theirs = context.Pipe()
            arguments = (theirs, url, observation, group, args.requests, wanted, barrier)
            processes.append(context.Process(target=work, args=arguments))
            processes[-1].start()
            pipes.append(ours)
        barrier.wait()
        begun = time.perf_counter()
        answers = list(itertools.chain.from_iterable(pipe.recv() for pipe in pipes))
        seconds = time.perf_counter() - begun
        for process in processes:
            process.join()
        after = counts(url)
    spent, calls, answered = (after[name] - before[name] for name in COUNTS)
    latencies = np.concatenate([each for each, _ in answers]) * 1e3
    return {
        "batch_size": batch_size,
        "answers": len(latencies),
        "lost": args.clients * args.requests - len(latencies),
        "wrong": sum(wrong for _, wrong in answers),
        "p50_ms": np.percentile(latencies, 50),
        "p95_ms": np.percentile(latencies, 95),
        "answers_per_s": len(latencies) / seconds,
        "requests_per_call": answered / calls,
        "call_ms": spent / calls * 1e3,
        "model_share": spent / seconds,
        "overhead_ms": overhead,
    }


class serving:
    """`hf-vla serve` in a process of its own, for a `with` block."""

    def __init__(self, folder, batch_size, window_ms):
        command = [sys.executable, "-c", "from hf_vla.cli.main import app; app()", "serve", str(folder), "--port", "0"]
        command += ["--device", "cpu", "--seed", "0", "--batch-size", str(batch_size), "--log-level", "warning"]
        command += ["--batch-window-ms", str(window_ms)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def __enter__(self):
        for line in self.process.stdout:
            if line.startswith("Serving "):
                return line.split()[-1]
        raise SystemExit("The server did not start.")

    def __exit__(self, *exception):
        self.process.terminate()
        code = self.process.wait(60)
        self.process.stdout.close()
        if code and not exception[0]:
            raise SystemExit(f"The server ended with exit code {code}.")


def protocol_overhead(url, observation, repeat=200):
    """Milliseconds of a message with a picture that is read and checked, but not predicted."""
    from hf_vla.serving.client import PolicyClient

    seconds = []
    with PolicyClient(url) as client:
        for _ in range(repeat):
            begun = time.perf_counter()
            client.infer({**observation, "predict": False})
            seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds) * 1e3)


def warm_up(url, observation):
    from hf_vla.serving.client import PolicyClient

    with PolicyClient(url) as client:
        for client_number in range(2):
            client.predict_chunk(vary(observation, client_number, 0))


def counts(url):
    with urllib.request.urlopen(url.replace("ws://", "http://") + "/metrics") as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(dict(lines)[f"hf_vla_{name}"]) for name in COUNTS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(DEFAULT), help="a checkpoint with a frame.json")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10, help="of every client")
    parser.add_argument("--processes", type=int, default=4, help="that the clients run in, a thread each")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--window-ms", type=float, default=5.0)
    args = parser.parse_args()

    observation = read_observation(args.model)
    rows = []
    for batch_size in args.batch_sizes:
        wanted = expected_chunks(args.model, observation, args.clients, args.requests, batch_size)
        rows.append(measure(args.model, observation, batch_size, args, wanted))
    versions = {name: __import__(name).__version__ for name in ("torch", "transformers")}
    print(f"{args.model.name}, {args.clients} clients, {args.requests} requests each, {platform.processor() or 'CPU'}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for row in rows:
        print(json.dumps({name: round(value, 3) for name, value in row.items()}))
    if len(rows) > 1:
        ratio = rows[-1]["answers_per_s"] / rows[0]["answers_per_s"]
        print(f"throughput with batches of {args.batch_sizes[-1]} over {args.batch_sizes[0]}: {ratio:.2f}")
    raise SystemExit(any(row["lost"] or row["wrong"] for row in rows))


if __name__ == "__main__":
    main()
