"""What reasoning costs a DiVLA, what a refresh interval saves, and how far both are from their floor.

    OMP_NUM_THREADS=1 python scripts/benchmark_reasoning.py
    python scripts/benchmark_reasoning.py --preset 2b --device cuda

Random weights whose end token never wins, so that every reasoning takes `--tokens` tokens, its end included. Two
cameras (9 tokens a picture for the preset tiny, else 99 as published), a state, 16 steps of 14 actions. All ways of
acting run in turn in one process on the same model, through `Policy.predict_chunk`, pictures' preparation included.
A first round is not counted; then the best of `--runs` samples, of about 0.2 s at least. On the CPU one thread,
float32, CPU seconds; elsewhere bfloat16 and seconds of the clock.

Floor of a chunk: the backbone over the prompt once, with the reasoning behind it where that is an earlier or given
one; one step of the backbone (with the scores of the vocabulary) per token that is said; the head's denoising. Each is
measured in the same rounds, bare of everything else. On the CPU the machine's own limit is said, too: multiplications
at the speed of a large matrix product here, or reading a step's weights at the speed at which a long vector is summed
here.

Reasoning alone is compared with transformers' own greedy `generate` on the same backbone, which runs one step less
(the last token's, whose state the action head needs), and with the plain loop that keeps nothing: for every token
pictures, prompt and what was said run through the backbone anew.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from hf_vla.actions.spec import CameraSpec
from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.models.divla.processing_divla import DiVLAProcessor
from hf_vla.policy import IMAGES, STATE, TASK, Policy

ACTIONS, CAMERAS, PICTURE = 14, ("front", "wrist"), (252, 308, 3)
INTERVALS = (1, 2, 4, 8)
SAMPLE_SECONDS = 0.2
TOKENIZER = {"image_token_id": 259, "video_token_id": 260, "vision_start_token_id": 261, "vision_end_token_id": 262}
MIDDLE = {  # between tiny and 2b: two cores run it in seconds
    "model_type": "qwen2_vl",
    "vision_config": {"depth": 4, "embed_dim": 384, "hidden_size": 512, "num_heads": 6, "mlp_ratio": 4},
    "text_config": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


def build(preset, tokens, device):
    """A model that always says `tokens` tokens, its processor, and what the robot sees."""
    options = {"action_dim": ACTIONS, "state_dim": ACTIONS, "max_reasoning_tokens": tokens, "end_token_id": 1}
    backbone = MIDDLE if preset == "middle" else DiVLAConfig.from_preset(preset).backbone_config.to_dict()
    options["backbone_config"] = backbone | TOKENIZER  # the ids of a tokenizer that needs no files
    config = DiVLAConfig(**options) if preset == "middle" else DiVLAConfig.from_preset(preset, **options)
    torch.manual_seed(0)
    with torch.device(device):
        model = DiVLAForActionPrediction(config).eval()
    if device != "cpu":
        model.to(torch.bfloat16)
    with torch.no_grad():
        model.get_output_embeddings().weight[config.end_token_id].zero_()
    limits = {"min": [-1.0] * ACTIONS, "max": [1.0] * ACTIONS, "mean": [0.0] * ACTIONS, "std": [1.0] * ACTIONS}
    action_config = {
        "chunk_size": config.chunk_size,
        "normalization": {"mode": "min_max", "convention": "tinyvla"},
        "state_normalization": {"mode": "mean_std", "convention": "tinyvla"},
    }
    cameras = [CameraSpec(name, PICTURE[1], PICTURE[0]).to_dict() for name in CAMERAS]
    processor = DiVLAProcessor.from_scratch(
        config, {"robot": {"action": limits, "state": limits}}, action_config, {"robot": cameras}
    )
    if preset != "tiny":  # pictures as they are
        processor.image_processor.size = {"shortest_edge": 56**2, "longest_edge": 1280 * 28**2}
    pictures = np.random.default_rng(0).integers(0, 255, (len(CAMERAS), *PICTURE), np.uint8)
    observation = {IMAGES + name: picture for name, picture in zip(CAMERAS, pictures, strict=True)}
    return model, processor, observation | {STATE: np.zeros(ACTIONS), TASK: "put everything on the table into the bin"}


def sample(function, times, device):
    """Seconds that a function takes, the mean of several calls, and what it returns."""

    def clock():
        if device == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()

    start = clock()
    for _ in range(times):
        result = function()
    return (clock() - start) / times, result


def best_seconds(functions, runs, device):
    """Least seconds of each function, which are called in turn, and what each returns."""
    first = [sample(function, 1, device) for function in functions]
    times = []
    for function, (seconds, _) in zip(functions, first, strict=True):
        if seconds < SAMPLE_SECONDS:  # warm it is faster
            seconds, _ = sample(function, 1, device)
        times.append(max(1, round(SAMPLE_SECONDS / seconds)))
    best = [float("inf")] * len(functions)
    for _ in range(runs):
        for index, (function, count) in enumerate(zip(functions, times, strict=True)):
            best[index] = min(best[index], sample(function, count, device)[0])
    return best, [result for _, result in first]


class Way(NamedTuple):
    """A way to act: a function, chunks that it predicts, how many are reasoned for, how many said something before."""

    act: Callable
    chunks: int
    reasoned: int
    recalled: int


def words_of(processor, tokens):
    """A reasoning of so many tokens, its end included."""
    answer = processor.tokenizer(processor.prompt_config["answer"].format(reasoning=""), add_special_tokens=False)
    return "x" * (tokens - len(answer["input_ids"]))  # a byte is a token


def ways_to_act(model, processor, observation):
    """Every [`Way`] by its name."""

    def act(policy, count, **given):
        policy.reset()
        for _ in range(count):
            policy.predict_chunk(observation, **given)

    ways = {}
    for interval in INTERVALS:
        policy = Policy(model, processor, reasoning_interval=interval, seed=0)
        name = "before every chunk" if interval == 1 else f"before every {interval}th"
        ways[name.replace("2th", "2nd")] = Way(partial(act, policy, interval), interval, 1, interval - 1)
    words = words_of(processor, model.config.max_reasoning_tokens)
    ways["never: it is given"] = Way(partial(act, Policy(model, processor, seed=0), 1, reasoning=words), 1, 0, 1)
    silent = Policy(model, processor, seed=0, max_reasoning_tokens=0)
    ways["never: there is none"] = Way(partial(act, silent, 1), 1, 0, 0)
    return ways


def parts(model, inputs, answered, state):
    """The floor's parts, as functions: prompt, prompt and reasoning, all steps of a reasoning, the head."""
    encoding = model.encode(**inputs)
    features, mask = model.condition(encoding)
    prompt = inputs["input_ids"]
    filled = model.backbone.base_model(
        **inputs, mm_token_type_ids=(prompt == model.config.image_token_id).int(), use_cache=True
    )
    cache, tokens = filled.past_key_values, model.config.max_reasoning_tokens
    token, place = prompt[:, :1], prompt.new_full((3, 1, 1), prompt.shape[1])

    def steps():
        for _ in range(tokens):
            step = model.backbone.base_model(
                input_ids=token, position_ids=place, past_key_values=cache, use_cache=True
            )
            model.get_output_embeddings()(step.last_hidden_state).argmax(-1)
        cache.crop(-tokens)

    head = partial(model.action_head.sample, features, mask, state)
    return partial(model.encode, **inputs), partial(model.encode, **answered), steps, head


def ways_to_reason(model, inputs):
    """name -> a function that gives the reasoning's ids."""
    prompt, tokens = inputs["input_ids"], model.config.max_reasoning_tokens

    def generate():
        types = (prompt == model.config.image_token_id).int()
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        special = {"eos_token_id": model.config.end_token_id, "pad_token_id": 0}
        ids = model.backbone.generate(**inputs, mm_token_type_ids=types, do_sample=False, **length, **special)
        return ids[:, prompt.shape[1] :]

    def plain():
        given, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(tokens):
            states = model.encode(**{**inputs, "input_ids": given, "attention_mask": mask}).hidden_states
            token = model.get_output_embeddings()(states[:, -1]).argmax(-1, keepdim=True)
            given, mask = torch.cat([given, token], 1), torch.cat([mask, mask[:, :1]], 1)
        return given[:, prompt.shape[1] :]

    return {"ours": lambda: model.reason(**inputs)[1], "generate": generate, "without a cache": plain}


def machine_limit(model, inputs, runs):
    """CPU seconds that prompt and step cannot do without: multiplications, and reading the weights."""
    square, vector = torch.rand(2048, 2048), torch.rand(2**27)
    (product, total), _ = best_seconds([lambda: square @ square, vector.sum], runs, "cpu")
    with FlopCounterMode(display=False) as counter:
        model.encode(**inputs)
    weights = [*model.backbone.base_model.language_model.layers.parameters(), model.get_output_embeddings().weight]
    read = sum(weight.nbytes for weight in weights)
    return counter.get_total_flops() * product / (2 * 2048**3), read * total / vector.nbytes


@torch.no_grad()
def measure(preset, tokens, runs, device):
    """Print what a model takes: a table of the ways to act, and one of the ways to reason."""
    console, (model, processor, observation) = Console(width=100), build(preset, tokens, device)
    images = {name: observation[IMAGES + name] for name in CAMERAS}
    seen = {"images": images, "text": observation[TASK], "state": observation[STATE]}
    inputs, answered = (
        processor(**seen, reasoning=words).to(device, model.dtype) for words in (None, words_of(processor, tokens))
    )
    state, _ = inputs.pop("state"), answered.pop("state")

    ways = ways_to_act(model, processor, observation)
    functions = *parts(model, inputs, answered, state), *(way.act for way in ways.values())
    (prompt, recalled, steps, head, *times), _ = best_seconds(functions, runs, device)
    size, length = sum(weight.numel() for weight in model.parameters()), inputs["input_ids"].shape[1]
    console.print(
        f"{preset}: {size / 1e6:,.1f} M parameters, {length} prompt tokens, {tokens} reasoning tokens\n"
        f"floor: prompt {1e3 * prompt:.1f} ms, with a reasoning {1e3 * recalled:.1f} ms, "
        f"a step {1e3 * steps / tokens:.2f} ms, head {1e3 * head:.1f} ms",
        highlight=False,
    )
    if device == "cpu":
        limit, step = machine_limit(model, inputs, runs)
        console.print(f"machine's limit: prompt {1e3 * limit:.1f} ms, a step {1e3 * step:.2f} ms", highlight=False)
    table = Table("it reasons", "ms per chunk", "of every chunk's", "floor, ms", "of the floor")
    for (name, (_, count, reasoned, again)), seconds in zip(ways.items(), times, strict=True):
        each = seconds / count
        floor = (prompt * (count - again) + recalled * again + steps * reasoned) / count + head
        row = f"{1e3 * each:.1f}", f"{each / times[0]:.2f}", f"{1e3 * floor:.1f}", f"{each / floor:.2f}"
        table.add_row(name, *row)
    console.print(table)

    ways = ways_to_reason(model, inputs)
    *cached, plain = ways.values()
    (times, ids), (slow, plain_ids) = best_seconds(cached, runs, device), sample(plain, 1, device)
    table = Table("reasoning alone", "ms", "ours of it", "same tokens")
    for name, seconds, said in zip(ways, [*times, slow], [*ids, plain_ids], strict=True):
        same = str(torch.equal(said[:, : tokens - 1], ids[0][:, : tokens - 1]))  # but for the end, which is forced
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{times[0] / seconds:.2f}", same)
    console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", help="DiVLA's, or middle (default: tiny, then middle)")
    parser.add_argument("--tokens", type=int, default=32, help="of a reasoning (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="samples of which the best counts")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the smallest model, few tokens, one run: to try it")
    arguments = parser.parse_args()
    presets = arguments.preset or ["tiny", "middle"]
    tokens, runs = arguments.tokens, arguments.runs
    if arguments.quick:
        presets, tokens, runs = ["tiny"], 16, 1
    torch.set_num_threads(1)
    where = f"{platform.machine()}, {os.cpu_count()} CPUs, 1 thread"
    if arguments.device != "cpu":
        where = torch.cuda.get_device_name(arguments.device)
    print(
        f"{where}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    for preset in presets:
        measure(preset, tokens, runs, arguments.device)


if __name__ == "__main__":
    main()
