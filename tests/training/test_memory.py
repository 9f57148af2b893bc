"""The estimate of a training's memory against what autograd, optimizers and devices really keep."""

import gc
import logging
from types import SimpleNamespace

import pytest
import torch

import hf_vla  # noqa: F401
from hf_vla.training.lora import add_lora
from hf_vla.training.memory import MemoryEstimate, check_memory, estimate_memory, with_batch_size
from hf_vla.training.optimization import NOT_QUANTIZED

# peft asks every model for an attribute that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FAMILIES = ("divla", "pi0_vla", "spatialvla", "tinyvla")


def arguments(optim="adamw_torch_fused", **options):
    defaults = {"world_size": 1, "ema_decay": None, "bf16": False, "fp16": False, "activation_checkpointing": False}
    return SimpleNamespace(optim=SimpleNamespace(value=optim), **{"optim_args": None} | defaults | options)


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[0]] * 4)


def kept(model, batch, bf16=False):
    """Bytes of what autograd really keeps, weights and inputs aside."""
    own = [*model.parameters(), *model.buffers(), *(each for each in batch.values() if torch.is_tensor(each))]
    own, storages = {each.untyped_storage()._cdata for each in own}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    more = {"logits_to_keep": 1} if model.config.model_type == "spatialvla" else {}
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch, **more).loss
    del loss
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_that_autograd_keeps(family, bf16, make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, f"{family}_tiny")
    batch, state = batch_of(trainer), torch.get_rng_state()
    estimate = estimate_memory(trainer.model, arguments(bf16=bf16), batch)
    fewer = [trainer.data_collator([trainer.train_dataset[0]] * count) for count in (1, 2)]
    fewer = with_batch_size(*(estimate_memory(trainer.model, arguments(bf16=bf16), each) for each in fewer), 4)
    assert fewer.total == pytest.approx(estimate.total, rel=0.01)
    assert torch.equal(torch.get_rng_state(), state)  # the training draws what it would have drawn
    assert estimate.activations + estimate.logits == pytest.approx(kept(trainer.model, batch, bf16), rel=0.03)
    sizes = [value.nbytes for value in [*trainer.model.parameters(), *trainer.model.buffers()]]
    trained = sum(value.nbytes for value in trainer.model.parameters() if value.requires_grad)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (sum(sizes), trained, 2 * trained)


def test_checkpointed_layers_keep_their_inputs_and_one_inside(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, "tinyvla_tiny")
    model, batch = trainer.model, batch_of(trainer)
    whole, less = (
        estimate_memory(model, arguments(activation_checkpointing=each), batch).activations for each in (False, True)
    )
    model.activation_checkpointing_enable()
    assert estimate_memory(model, arguments(activation_checkpointing=True), batch).activations == less
    real = kept(model, batch)  # without the inside of the layer that is computed anew
    assert real < less < whole / 2
    towers = [model.backbone.vision_tower.encoder.layers, model.backbone.language_model.layers]
    assert less - real < max((whole - real) / len(layers) for layers in towers) * 1.5
    assert model.is_activation_checkpointing  # as it was


@pytest.mark.parametrize(
    ("optim", "options"),
    [
        ("adamw_torch", None),
        ("sgd", None),
        ("sgd", "momentum=0.9"),
        ("adafactor", None),
        ("adagrad", None),
        ("rmsprop", None),
        ("rmsprop", "momentum=0.9, centered=True"),
    ],
)
def test_states_are_those_of_the_optimizer(optim, options, make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, "tinyvla_tiny", training__optim=optim, training__optim_args=options)
    optimizer = trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    real = sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )
    estimate = estimate_memory(trainer.model, arguments(optim, optim_args=options)).optimizer
    assert estimate == pytest.approx(real, rel=0.01, abs=2000)


@pytest.mark.parametrize(
    ("optim", "size"),  # of a number, in bytes
    [
        ("adamw_torch_fused", 8),
        ("adamw_8bit", 2 * (1 + 4 / 256)),
        ("adamw_torch_4bit", 2 * (0.5 + 4 / 128)),
        ("ademamix", 12),
        ("ademamix_8bit", 3 * (1 + 4 / 256)),
        ("lion_32bit", 4),
        ("paged_adamw_32bit", 0),
        ("galore_adamw", None),
        ("lomo", None),
        ("schedule_free_adamw", None),
    ],
)
def test_states_of_optimizers_that_are_not_installed(optim, size):
    model = torch.nn.Linear(100, 50)
    small = 4 * 50 * (0 if not size else {8: 2, 12: 3, 4: 1}.get(size, 3 if "ademamix" in optim else 2))
    estimate = estimate_memory(model, arguments(optim))
    assert estimate.optimizer == (None if size is None else int(5000 * size + small))
    assert ("unknown" in str(estimate).splitlines()[2]) == (size is None)
    assert estimate.lasting == 2 * 4 * 5050 + (estimate.optimizer or 0)


def test_adapters_take_less(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    batch = batch_of(trainer)
    full = estimate_memory(trainer.model, arguments(ema_decay=0.9, world_size=2), batch)
    model = add_lora(trainer.model, r=4)
    adapters = estimate_memory(model, arguments(ema_decay=0.9, world_size=2), batch)
    trained = sum(value.nbytes for value in model.parameters() if value.requires_grad)
    assert (adapters.average, adapters.gradients, adapters.optimizer) == (trained, 2 * trained, 2 * trained)
    assert adapters.weights == full.weights + trained and adapters.optimizer < full.optimizer / 10


def test_quantised_weights_are_counted(make_trainer, tmp_path):
    model = add_lora(make_trainer(tmp_path).model.bfloat16(), r=4)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    skipped = {*NOT_QUANTIZED, "lora_A", "lora_B"}
    packed = sum(each.weight.numel() for name, each in layers.items() if not set(name.split(".")) & skipped)
    sizes = {kind: estimate_memory(model, arguments(), quantization=kind).weights for kind in (None, "8bit", "4bit")}
    assert packed > 3e5
    assert sizes[None] - sizes["8bit"] == pytest.approx(packed, rel=1e-3)
    assert sizes[None] - sizes["4bit"] == pytest.approx(packed * (2 - 0.5161), rel=1e-3)


def test_a_model_without_memory_is_estimated_alike(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, "divla_tiny")
    batch = batch_of(trainer)
    with torch.device("meta"):
        model = type(trainer.model)(trainer.model.config)
    assert estimate_memory(model, arguments(), batch) == estimate_memory(trainer.model, arguments(), batch)


def test_the_estimate_is_logged_before_training(make_trainer, tmp_path, caplog):
    trainer = make_trainer(tmp_path, training__estimate_memory=True, training__max_steps=1)
    with caplog.at_level(logging.INFO, "hf_vla.training.trainer"):
        trainer.train()
    (table,) = [record.getMessage() for record in caplog.records if "Memory of each process" in record.getMessage()]
    rows = dict(line.split(maxsplit=1) for line in table.splitlines()[1:])
    assert list(rows) == ["weights", "gradients", "optimizer", "average", "activations", "logits", "total"]
    assert rows["weights"] == "0.0069 GB" and rows["average"] == "0 GB"


class Rows(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_of_a_stream_activations_are_not_known(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, "tinyvla_tiny", training__estimate_memory=True, training__max_steps=1)
    trainer.train_dataset = Rows([trainer.train_dataset[row] for row in range(2)])
    estimate = trainer.report_memory()
    assert estimate.activations is None and estimate.lasting > 0
    trainer.train()


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_what_is_cut_into_shards_is_not_estimated(kind, make_trainer, tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    setattr(trainer, f"is_{kind}_enabled", True)
    with caplog.at_level(logging.INFO, "hf_vla.training.trainer"):
        assert trainer.report_memory() is None
    assert "Memory is not estimated: FSDP and DeepSpeed cut into shards" in caplog.text


def test_what_a_device_cannot_hold(caplog):
    estimate = MemoryEstimate(weights=4 * 10**9, gradients=10**9, optimizer=2 * 10**9, average=0, activations=10**9)
    assert (estimate.lasting, estimate.total) == (7 * 10**9, 8 * 10**9)
    cuda = torch.device("cuda", 0)
    check_memory(estimate, cuda, there=9 * 10**9)
    assert not caplog.records
    check_memory(estimate, cuda, there=75 * 10**8)
    assert "expected to take 8 GB, cuda:0 has 7.5 GB. Smaller batches" in caplog.text
    with pytest.raises(
        ValueError, match=r"takes 7 GB before its first batch, cuda:0 has 6 GB.*model.lora[\s\S]*total"
    ):
        check_memory(estimate, cuda, there=6 * 10**9)
    check_memory(estimate, torch.device("cpu"), there=6 * 10**9)  # swap may do


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["divla", "spatialvla", "tinyvla"])
def test_an_accelerator_takes_what_was_estimated(family, checkpointing, make_trainer, tmp_path):
    options = {"training__max_steps": 2, "training__per_device_train_batch_size": 64, "data__eval_episodes": []}
    trainer = make_trainer(tmp_path, f"{family}_tiny", **options, training__activation_checkpointing=checkpointing)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - sum(value.nbytes for value in trainer.model.parameters())
    estimate = trainer.report_memory()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() - before
    assert 0.75 * peak < estimate.total < 1.35 * peak
