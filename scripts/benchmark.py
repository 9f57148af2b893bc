"""How fast SpatialVLA predicts, beside plain `generate`, beside the published implementation, beside the floor.

    OMP_NUM_THREADS=1 python scripts/benchmark.py

The model is the recorded mid-size configuration (319 M parameters, random weights, 276 prompt tokens, float32, one
thread). CPU seconds are the best of several runs. `generate` scores the full vocabulary of 265,347 in the same run;
`published` are the CPU seconds of the published implementation on the machine where it was recorded
(tests/goldens/spatialvla/bench/midsize_latency.json), so that ratio also compares two machines.

Floor: the multiplications of the first pass (counted by torch: vision tower, depth model, the prompt through the
language model) at the speed of a large matrix product measured here, plus, for each further token, reading the
language model's layers once at the speed at which a long vector is summed here.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration

RECORDING = Path(__file__).parents[1] / "tests" / "goldens" / "spatialvla" / "bench"
LIMITS = {3: 0.85, 12: 0.65}  # of the published implementation's CPU time


def cpu_seconds(function, runs):
    """Best CPU time of a few runs, after one to warm up."""
    function()
    times = []
    for _ in range(runs):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def build(config, num_tokens):
    """The model and one prompt as in the recording."""
    torch.manual_seed(0)
    model = SpatialVLAForConditionalGeneration(SpatialVLAConfig(**config)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[config["eos_token_id"]].zero_()  # generate shall not stop early
    text = torch.randint(300, 20000, (num_tokens - 256 - 2,))
    ids = torch.cat([torch.full((256,), config["image_token_index"]), torch.tensor([2]), text, torch.tensor([108])])[
        None
    ]
    focal = torch.tensor([[218.0, 0.0, 112.0], [0.0, 291.0, 112.0], [0.0, 0.0, 1.0]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "intrinsics": focal[None]}
    return model, {**inputs, "pixel_values": torch.rand(1, 3, 224, 224)}


def blocks_only(model, prompt_length):
    """Restrict `generate` to the ids that `predict_action` may choose, to compare tokens."""
    starts = np.cumsum([model.config.action_token_begin_idx, *model.config.action_block_sizes]).tolist()

    def allowed(_, ids):
        block = (len(ids) - prompt_length) % len(model.config.action_block_sizes)
        return list(range(starts[block], starts[block + 1]))

    return allowed


def floor_seconds(model, inputs):
    """CPU seconds that the first token, and each further one, cannot do without."""
    square, vector = torch.rand(2048, 2048), torch.rand(2**27)
    flops_per_second = 2 * 2048**3 / cpu_seconds(lambda: square @ square, 3)
    bytes_per_second = vector.nbytes / cpu_seconds(vector.sum, 3)
    print(
        f"speeds here: {flops_per_second / 1e9:.0f} GFLOP/s in a matrix product, "
        f"{bytes_per_second / 1e9:.0f} GB/s read"
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_decoder()(
            inputs_embeds=model.embed_inputs(
                inputs["input_ids"], model.get_image_features(inputs["pixel_values"], inputs["intrinsics"])
            )
        )
    layer_bytes = sum(parameter.nbytes for parameter in model.get_decoder().layers.parameters())
    return counter.get_total_flops() / flops_per_second, layer_bytes / bytes_per_second


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of which the best counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recorded = json.loads((RECORDING / "midsize_latency.json").read_text())
    model, inputs = build(json.loads((RECORDING / "midsize_config.json").read_text()), recorded["prompt_tokens"])
    prompt_length = inputs["input_ids"].shape[1]

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    print(f"{parameters:,} parameters, {prompt_length} prompt tokens")
    first, further = floor_seconds(model, inputs)
    print("\ntokens predict_action generate published   floor  of generate  of published  of floor  same tokens")
    for tokens, limit in LIMITS.items():
        new = {"max_new_tokens": tokens, "do_sample": False}
        chunk = {"chunk_size": tokens // 3}
        ours = cpu_seconds(lambda chunk=chunk: model.predict_action(**inputs, **chunk), arguments.runs)
        plain = cpu_seconds(lambda new=new: model.generate(**inputs, **new), arguments.runs)
        published = recorded["cpu_seconds"][f"generate_{tokens}_tokens"]["median"]
        floor = first + (tokens - 1) * further
        predicted = model.predict_action(**inputs, **chunk).action_ids + model.config.action_token_begin_idx
        same = model.generate(**inputs, **new, prefix_allowed_tokens_fn=blocks_only(model, prompt_length))
        equal = torch.equal(same[:, prompt_length:], predicted)
        print(
            f"{tokens:6} {ours:12.3f} s {plain:6.3f} s {published:7.3f} s {floor:5.3f} s {ours / plain:12.2f} "
            f"{ours / published:6.2f} (<{limit}) {ours / floor:9.2f}  {equal}"
        )


if __name__ == "__main__":
    main()
