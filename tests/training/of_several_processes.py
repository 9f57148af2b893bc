"""What test_distributed.py starts, in one process or in several.

`train`, a training; `shard`, FSDP2 by hand; `apart`, processes of which one alone sees the checkpoints.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from hf_vla.data.collator import VLACollator
from hf_vla.training import run
from hf_vla.training.builders.registry import build
from hf_vla.training.checkpoints import checkpoint_to_resume
from hf_vla.training.datasets import join, open_datasets
from hf_vla.training.recipe import parse_recipe
from hf_vla.training.trainer import VLATrainer


def train(recipe):
    """Train with noise that depends on step and row alone, so that it is the same however rows are dealt out."""
    log = Path(f"{recipe.training.output_dir}.{recipe.training.process_index}").open("w")
    step, rows_of_step = VLATrainer.training_step, []

    def logged(trainer, model, inputs, *args):
        rows_of_step[:] = [(trainer.state.global_step, row) for _, row in inputs["rows"]]
        num_real = inputs["action_mask"].sum().item() if "action_mask" in inputs else None
        json.dump({"step": trainer.state.global_step, "rows": inputs["rows"], "num_real": num_real}, log)
        log.write("\n")
        head = getattr(trainer._bare(model), "action_head", None)
        if head is not None and "loss" not in vars(head):
            draw_by_row(head, rows_of_step)
        return step(trainer, model, inputs, *args)

    VLATrainer.training_step = logged
    run.train(recipe)


def draw_by_row(head, rows):
    loss = head.loss

    def with_noise(features, *args):
        generators = [torch.Generator().manual_seed(1000 * step + row) for step, row in rows]
        shape, last = (head.chunk_size, head.action_dim), head.num_train_timesteps
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        timesteps = torch.cat([torch.randint(last, (1,), generator=generator) for generator in generators])
        return loss(features, *args, noise=noise, timesteps=timesteps)

    head.loss = with_noise


def shard(recipe):
    """Take a step with a model in shards and with a whole one, on halves of a batch; raise where they differ."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    datasets = open_datasets(recipe.data)
    torch.manual_seed(0)
    model, processor = build(recipe, datasets)
    torch.manual_seed(0)
    whole, _ = build(recipe, datasets)
    rows, _ = join(recipe.data, datasets)
    collator = VLACollator(processor, None, recipe.data.roles, recipe.data.datasets[0].state is not None)
    # the second half ends an episode: it has fewer actions that are real
    halves = [collator([rows[index] for index in half]) for half in ([0, 20], [len(rows) - 2, len(rows) - 1])]
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    names = set(model._no_split_modules)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = sum(parameter.to_local().numel() for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in whole.parameters())

    def loss_of(model, number):
        torch.manual_seed(number)  # of the head's noise
        return model(**halves[number]).loss

    # AdamW would take a whole step in the direction of a gradient's rounding error
    optimizers = [torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.1) for each in (model, whole)]

    def step(model, loss, optimizer):
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    own = loss_of(model, rank)
    norm = step(model, own, optimizers[0])
    losses = [loss_of(whole, number) for number in range(2)]
    wanted_norm = step(whole, torch.stack(losses).mean(), optimizers[1])
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        wanted = whole.state_dict()
        missing = sorted(set(wanted) ^ set(gathered))
        away = {name: (gathered[name].float() - wanted[name].float()).abs().max().item() for name in gathered}
        start = torch.manual_seed(0) and build(recipe, datasets)[0].state_dict()
        moved = max((wanted[name].float() - start[name].float()).abs().max().item() for name in wanted)
        result = {"num_blocks": len(blocks), "share": sharded / total, "missing": missing}
        result |= {"loss": [own.item(), losses[0].item()], "norm": [norm, wanted_norm]}
        sys.stdout.write(json.dumps(result | {"away": max(away.values()), "moved": moved}) + "\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def apart(recipe):
    """Say why a run does not go on from a folder that the main process alone sees."""
    arguments, folder = recipe.training, Path(recipe.training.output_dir)
    if arguments.process_index == 0:
        (folder / "checkpoint-2").mkdir(parents=True)
    else:
        own = Path.is_dir
        Path.is_dir = lambda path: own(path) and folder not in path.parents  # as on a node without this disk
    try:
        checkpoint_to_resume(arguments)
    except ValueError as error:
        sys.stdout.write(f"process {arguments.process_index}: {error}\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    {"train": train, "shard": shard, "apart": apart}[sys.argv[1]](parse_recipe(sys.argv[2:]))
