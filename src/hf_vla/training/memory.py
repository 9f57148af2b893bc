"""How much memory a training will take, before it starts.

Weights, gradients, optimizer and average follow from the parameters. Activations are counted on one forward pass over
a real batch, in which the weights are tensors without memory: nothing is computed, so this takes about a second and
works for models on the meta device, too. Counted is each tensor that autograd keeps for the backward pass; what is
needed for a moment only, and what reading the data takes, is not.
"""

import inspect
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import MethodType

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_vla.training.optimization import NOT_QUANTIZED

logger = logging.getLogger(__name__)

# numbers that an optimizer keeps of each one that it trains, by the beginning of `training.optim`, and the bytes of
# one where they are not of the weights' own precision: 4 or 8 bits, and a scale of float32 for each 128 or 256
_STATES = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "adamw": 2, "ademamix": 3}
_STATE_BYTES = {"4bit": 0.5 + 4 / 128, "8bit": 1 + 4 / 256}
# bytes of a weight: 4 bits, and for each 64 of them a scale of 8 bits that shares its own with 255 others
_QUANTIZED = {"4bit": 0.5 + 1 / 64 + 4 / 64 / 256, "8bit": 1.0}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process of a training takes, all of them on its device.

    Args:
        weights (`int`): parameters and buffers.
        gradients (`int`): of what is trained; twice with several processes, which exchange a copy.
        optimizer (`int`, *optional*): its states, as far as they stay on the device; None where unknown.
        average (`int`): of the weights, see [`~hf_vla.training.ema.WeightAverage`].
        activations (`int`, *optional*): kept for the backward pass, but for the logits; None where unknown.
        logits (`int`, *optional*): scores of the vocabulary, and their gradient.
    """

    weights: int
    gradients: int
    optimizer: int | None
    average: int
    activations: int | None = None
    logits: int | None = None

    @property
    def lasting(self) -> int:
        """What there is whatever the batch."""
        return self.weights + self.gradients + (self.optimizer or 0) + self.average

    @property
    def total(self) -> int:
        """All of it at once: an upper bound, since gradients come while activations go."""
        return self.lasting + (self.activations or 0) + (self.logits or 0)

    def __str__(self):
        rows = {**asdict(self), "total": self.total}
        return "\n".join(f"{name:<12}{_gigabytes(size):>12}" for name, size in rows.items())


def estimate_memory(
    model: nn.Module, arguments, batch: Mapping | None = None, quantization: str | None = None
) -> MemoryEstimate:
    """Estimate what a training takes, for a process that keeps all weights (no FSDP, no ZeRO).

    Args:
        model (`nn.Module`): ready to be trained (adapters added, frozen what is frozen), on any device, or on meta.
        arguments (`VLATrainingArguments`): batch, optimizer, precision, activation checkpointing, average.
        batch (`Mapping`, *optional*): of the collator, on the model's device (for a model on meta, on the CPU);
            without one, activations and logits are not estimated.
        quantization (`str`, *optional*): "4bit" or "8bit", to count the frozen linear layers of a model that is not
            quantised as if they were.

    Returns:
        [`MemoryEstimate`]. With activation checkpointing, activations are the inputs of the layers that are computed
        twice, and the inside of the largest of them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    in_full = sum(parameter.nbytes for parameter in trained)
    copies = 2 if arguments.world_size > 1 else 1
    activations, logits = (None, None) if batch is None else _activations(model, arguments, batch)
    return MemoryEstimate(
        weights=_weights(model, quantization),
        gradients=copies * in_full,
        optimizer=_optimizer_states(arguments, trained),
        average=in_full if arguments.ema_decay is not None else 0,
        activations=activations,
        logits=logits,
    )


def with_batch_size(one: MemoryEstimate, two: MemoryEstimate, batch_size: int) -> MemoryEstimate:
    """Estimate for batches of any size from those for one sample and for two, which take little time."""
    activations = one.activations + (batch_size - 1) * (two.activations - one.activations)
    return replace(one, activations=activations, logits=one.logits + (batch_size - 1) * (two.logits - one.logits))


def check_memory(estimate: MemoryEstimate, device: torch.device, there: int | None = None) -> None:
    """Compare with what the device has.

    Args:
        estimate ([`MemoryEstimate`]): of the training.
        device (`torch.device`): where it will run.
        there (`int`, *optional*): bytes of the device; all that it has by default.

    Raises:
        ValueError: the accelerator cannot hold weights, gradients and optimizer, whatever the batch.
    """
    if there is None:
        is_cpu = device.type == "cpu"
        there = psutil.virtual_memory().total if is_cpu else torch.accelerator.get_memory_info(device)[1]
    hint = (
        "Smaller batches with more gradient_accumulation_steps, activation_checkpointing: true, model.lora, "
        "model.tune: head or model.quantization take less."
    )
    if estimate.lasting > there and device.type != "cpu":
        raise ValueError(
            f"This training takes {_gigabytes(estimate.lasting)} before its first batch, {device} has "
            f"{_gigabytes(there)}. {hint}\n{estimate}"
        )
    if estimate.total > there:
        logger.warning(
            "This training is expected to take %s, %s has %s. %s", _gigabytes(estimate.total), device,
            _gigabytes(there), hint,
        )  # fmt: skip


def _weights(model: nn.Module, quantization: str | None) -> int:
    packed = set()
    if quantization is not None:
        packed = {
            module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not set(name.split(".")) & {*NOT_QUANTIZED, "lora_A", "lora_B"}
        }
    total = sum(buffer.nbytes for buffer in model.buffers())
    for parameter in model.parameters():
        total += int(parameter.numel() * _QUANTIZED[quantization]) if parameter in packed else parameter.nbytes
        state = getattr(parameter, "quant_state", None)  # of a weight that is quantised already
        total += 0 if state is None else state.absmax.nbytes
    return total


def _optimizer_states(arguments, trained: list[nn.Parameter]) -> int | None:
    kind = str(arguments.optim.value)
    if kind == "adafactor":  # a sum for each row and column, instead of numbers
        return sum(4 * sum(p.shape[-2:]) * p.shape[:-2].numel() if p.ndim > 1 else p.nbytes for p in trained)
    if kind.startswith("paged"):  # moves to the host's memory where it is in the way
        return 0
    name = kind.partition("_")[0]
    if name not in _STATES:
        return None
    options = dict(option.split("=") for option in (arguments.optim_args or "").replace(" ", "").split(",") if option)
    count = _STATES[name] + (float(options.get("momentum", 0)) > 0)
    count += options.get("centered", "").lower() in ("true", "1", "yes")
    size = next((size for end, size in _STATE_BYTES.items() if kind.endswith(end)), None)
    # small tensors keep their precision
    return int(count * sum(p.nbytes if size is None or p.numel() < 4096 else size * p.numel() for p in trained))


def _activations(model: nn.Module, arguments, batch: Mapping) -> tuple[int, int]:
    """Bytes that autograd keeps: all but the logits, and the logits with their gradient."""
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = {name: _fake(tensor, fakes, device) for name, tensor in tensors.items() if _is_weight(tensor)}
    kept = _Kept([*weights.values(), *(value for value in batch.values() if isinstance(value, torch.Tensor))])
    inputs = dict(batch)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = 1
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16
    with (
        _training_mode(model),
        _watched(model, kept),
        torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type),
        torch.autocast(device.type, dtype, enabled=arguments.bf16 or arguments.fp16),
        _NoValues(),
        torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor),
    ):
        loss = functional_call(model, weights, (), inputs).loss
    del loss
    vocabulary = inner.get_input_embeddings().num_embeddings
    return kept.sizes(vocabulary, arguments.activation_checkpointing)


class _Kept:
    """The tensors that autograd keeps, by the checkpointed layer that computed them (None: by none)."""

    def __init__(self, others):
        self.others = {_place(tensor) for tensor in others}
        self.layer, self.tensors, self.inputs = None, {None: {}}, {}

    def add(self, tensor):
        if _place(tensor) not in self.others:
            self.tensors.setdefault(self.layer, {})[_place(tensor)] = tensor
        return tensor

    def sizes(self, vocabulary: int, checkpointing: bool) -> tuple[int, int]:
        inside = {layer: tensors for layer, tensors in self.tensors.items() if layer is not None}
        if checkpointing:
            largest = max((_size(tensors) for tensors in inside.values()), default=0)
            inputs = {place: each for layer, (place, each) in self.inputs.items() if layer in inside}
            alive = {**self.tensors[None], **inputs}
        else:
            largest, alive = 0, {place: each for tensors in self.tensors.values() for place, each in tensors.items()}
        # not a weight in another precision, which is kept with its axes exchanged
        scores = [each for each in alive.values() if each.shape[-1:] == (vocabulary,) and each.is_contiguous()]
        logits = [each.untyped_storage().nbytes() for each in scores]
        return _size(alive) - sum(logits) + largest, sum(logits) + max(logits, default=0)


class _NoValues(TorchFunctionMode):
    """Lets a model run on tensors without values.

    A mask that indexes one has values, and is turned into places; where one is to be a number, as in ZoeDepth, which
    chooses among its heads of one size so, it is 0.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.item and isinstance(args[0], FakeTensor):
            return torch.zeros((), dtype=args[0].dtype).item()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], FakeTensor):
            places = []
            for place in args[1] if isinstance(args[1], tuple) else (args[1],):
                is_mask = isinstance(place, torch.Tensor) and place.dtype == torch.bool
                known = is_mask and not isinstance(place, FakeTensor)
                places += place.nonzero(as_tuple=True) if known else [place]
            args = (args[0], tuple(places), *args[2:])
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(model: nn.Module, kept: _Kept):
    """Tell `kept` which layer is at work; layers that would be computed twice are computed once."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    twice = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
    quantized = [module for module in model.modules() if hasattr(getattr(module, "weight", None), "quant_state")]

    def enter(layer, args, kwargs):
        kept.layer = layer
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor):
            kept.inputs[layer] = _place(hidden), hidden

    def leave(layer, args, output):
        kept.layer = None

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        for layer in twice:
            layer.gradient_checkpointing = False
        for module in quantized:  # keeps as much as one that is not
            module.forward = MethodType(nn.Linear.forward, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in twice:
            layer.gradient_checkpointing = True
        for module in quantized:
            del module.forward


@contextmanager
def _training_mode(model: nn.Module):
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)


def _is_weight(tensor: torch.Tensor) -> bool:
    """Buffers of whole numbers, such as positions, keep their values: models look at them."""
    return isinstance(tensor, nn.Parameter) or tensor.is_floating_point() or tensor.is_meta


def _fake(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    """A tensor like another one, without memory; of a 4-bit weight, what it stands for."""
    packed = getattr(tensor, "quant_state", None)
    shape, dtype = (tensor.shape, tensor.dtype) if packed is None else (packed.shape, packed.dtype)
    with mode:
        fake = torch.empty(shape, dtype=dtype, device=device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensors: Mapping[int, torch.Tensor]) -> int:
    return sum(each.untyped_storage().nbytes() for each in tensors.values())


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.3g} GB"
