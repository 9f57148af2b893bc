import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_vla.actions.heads.networks.film import FiLM, ReasoningFiLM, masked_mean

DIM = 16
PREFIXES = {
    "input_action_proj.mlps.": "prompt_proj.",
    "reasoning_action_proj.mlps.": "reasoning_proj.",
    "reasoning_film.scale_fc.": "film.scale.",
    "reasoning_film.shift_fc.": "film.shift.",
}


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def mask_of(rows):
    return torch.tensor([[char == "1" for char in row] for row in rows])


@pytest.fixture(scope="module", params=["unet_b1", "unet_b2_leftpad"])
def published(request, goldens):
    """The recorded modulation in ours, with the hidden states that it was given, and its outputs."""
    folder = goldens / "divla" / request.param
    weights = {}
    for name, tensor in load_file(folder / "checkpoint" / "model.safetensors").items():
        for published, own in PREFIXES.items():
            if name.startswith(published):
                weights[own + name.removeprefix(published)] = tensor
    film = ReasoningFiLM(json.loads((folder / "checkpoint" / "config.json").read_text())["hidden_size"])
    film.load_state_dict(weights)
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs_bf16emb.safetensors")
    answer = (inputs["labels"] != -100).cumsum(1) > 0
    return SimpleNamespace(
        film=film, outputs=outputs, inputs=inputs, prompt=inputs["attention_mask"] & ~answer, reasoning=answer
    )


@torch.no_grad()
def test_parts_are_as_published(published):
    film, outputs = published.film, published.outputs
    tokens = outputs["last_hidden_state"]
    reasoning = film.reasoning_proj(tokens, published.reasoning)
    close(film.prompt_proj(tokens, published.prompt), outputs["input_action_proj"])
    close(reasoning, outputs["reasoning_action_proj"])
    close(film.film.scale(reasoning), outputs["film_scale"])
    close(film.film.shift(reasoning), outputs["film_shift"])
    close(film(tokens, published.prompt, published.reasoning), outputs["film_forward"][:, 0])


@torch.no_grad()
def test_a_generated_reasoning_modulates_as_published(published):
    """All samples of different length at once, padded on the right with what must not matter."""
    outputs, inputs = published.outputs, published.inputs
    count = len(inputs["input_ids"])
    states = [outputs[f"eval{row}_hidden"][0] for row in range(count)]
    lengths = torch.tensor([[len(each)] for each in states])
    begins = torch.tensor([[inputs[f"prompt_ids_{row}"].shape[1]] for row in range(count)])
    tokens = torch.nn.utils.rnn.pad_sequence(states, batch_first=True, padding_value=float("nan"))
    places = torch.arange(tokens.shape[1])
    modulated = published.film(tokens, places < begins, (places >= begins) & (places < lengths))
    close(modulated, torch.stack([outputs[f"eval{row}_film"][0, 0] for row in range(count)]))


@pytest.fixture
def film():
    """With a modulation that is not the identity, and biases that would show wherever it must not reach."""
    torch.manual_seed(0)
    film = ReasoningFiLM(DIM)
    with torch.no_grad():
        for parameter in film.film.parameters():
            parameter.normal_(0.0, 0.3)
    return film


@pytest.fixture
def tokens():
    """Four samples of seven places."""
    return torch.randn(4, 7, DIM, generator=torch.Generator().manual_seed(1))


# padding on the left, on the right, in the middle of both, everywhere
PROMPT = mask_of(["0011000", "1100000", "1010000", "0000000"])
REASONING = mask_of(["0000111", "0011100", "0001101", "0000000"])


def test_an_untrained_modulation_is_the_identity(tokens):
    x = tokens[:, 0]
    assert torch.equal(FiLM(DIM)(x, tokens[:, 1], torch.ones(4, dtype=torch.bool)), x)
    torch.manual_seed(0)
    untrained = ReasoningFiLM(DIM)
    expected = untrained.prompt_proj(tokens, PROMPT) + masked_mean(tokens, PROMPT)
    assert torch.equal(untrained(tokens, PROMPT, REASONING), expected)


def test_a_sample_without_reasoning_is_not_modulated(film, tokens):
    some = REASONING & torch.tensor([True, False, True, True])[:, None]
    modulated, mixed = film(tokens, PROMPT, REASONING), film(tokens, PROMPT, some)
    plain = film.prompt_proj(tokens, PROMPT) + masked_mean(tokens, PROMPT)
    assert torch.equal(mixed[1], plain[1]) and (modulated[1] - plain[1]).abs().max() > 0.1
    assert torch.equal(mixed[[0, 2, 3]], modulated[[0, 2, 3]])


def test_padding_gives_what_the_real_tokens_give(film, tokens):
    together = film(tokens, PROMPT, REASONING)
    assert torch.isfinite(together).all()  # the last sample has no token at all
    for row in range(3):
        real = PROMPT[row] | REASONING[row]
        masks = (mask[row, real][None] for mask in (PROMPT, REASONING))
        close(film(tokens[row, real][None], *masks), together[[row]], atol=1e-6)


@pytest.mark.parametrize("value", [1e30, float("nan"), float("-inf")])
def test_the_content_of_padding_changes_no_bit_of_results_and_gradients(film, tokens, value):
    def run(tokens):
        tokens = tokens.clone().requires_grad_()
        film.zero_grad()
        output = film(tokens, PROMPT, REASONING)
        output.square().sum().backward()
        return [output, tokens.grad, *(parameter.grad.clone() for parameter in film.parameters())]

    real = PROMPT | REASONING
    before, after = run(tokens), run(tokens.masked_fill(~real[..., None], value))
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert not after[1][~real].any() and all(gradient.any() for gradient in after[1:])


def test_prompt_and_reasoning_enter_apart(film, tokens):
    """What the reasoning says reaches the condition by scale and shift alone, the prompt by all else."""
    changed = tokens.masked_fill(REASONING[..., None], 0.5)
    scale, shift = (layer(film.reasoning_proj(changed, REASONING)) for layer in (film.film.scale, film.film.shift))
    expected = film.prompt_proj(tokens, PROMPT) * (1 + scale) + shift + masked_mean(tokens, PROMPT)
    close(film(changed, PROMPT, REASONING)[:3], expected[:3], atol=1e-6)


def test_the_first_steps_of_training_reach_both_projectors(tokens):
    """Scale and shift start at 0, so the reasoning's projector learns from the second step on."""
    torch.manual_seed(0)
    untrained = ReasoningFiLM(DIM)
    optimizer = torch.optim.SGD(untrained.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        untrained(tokens, PROMPT, REASONING).square().sum().backward()
        reached = {name for name, parameter in untrained.named_parameters() if parameter.grad.any()}
        names = {name for name, _ in untrained.named_parameters() if step or not name.startswith("reasoning_proj")}
        assert reached == names
        optimizer.step()


def test_without_any_reasoning_gradients_are_zeros_not_none(film, tokens):
    """Distributed training waits for all of them."""
    film(tokens, PROMPT, torch.zeros_like(PROMPT)).square().sum().backward()
    modulation = [*film.film.parameters(), *film.reasoning_proj.parameters()]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in modulation)


def test_weights_in_half_precision_take_states_of_any(film, tokens):
    expected = film(tokens, PROMPT, REASONING)
    half = film.to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        output = half(tokens.to(dtype), PROMPT, REASONING)
        assert output.dtype == torch.bfloat16
        close(output.float(), expected, atol=0.1)


def test_a_mean_in_half_precision_is_rounded_once():
    tokens = torch.randn(8, 301, DIM, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16) + 1
    mask = torch.ones(8, 301, dtype=torch.bool)
    assert torch.equal(masked_mean(tokens, mask), tokens.float().mean(1).to(torch.bfloat16))
