"""The recorded head, and diffusions whose every step is known: time 0 = hardly any noise, the last = noise."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from hf_vla.actions.heads import diffusion
from hf_vla.actions.heads.diffusion import PREDICTION_TYPES, SCHEDULER, DiffusionHead, check_scheduler
from hf_vla.actions.heads.networks.base import Denoiser

FEATURES, ACTIONS, CHUNK, STATE = 8, 2, 4, 3
UNET = {"type": "conditional_unet1d", "down_dims": [16, 32], "n_groups": 4, "diffusion_step_embed_dim": 8}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}
DDPM = {"_class_name": "DDPMScheduler", **COSINE}
DPM = {"_class_name": "DPMSolverMultistepScheduler", **COSINE}
OTHERS = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler")
TRAILING = SCHEDULER | {"timestep_spacing": "trailing"}
ALPHAS = diffusers.DDIMScheduler(**COSINE).alphas_cumprod


class Known(Denoiser):
    """A known prediction of the chunk and of the time; keeps the times and the samples it was called with."""

    def __init__(self, function):
        super().__init__()
        self.function, self.times, self.samples = function, [], []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def prepare(self, condition, times):
        self.times += list(times)
        return [time[:, None, None] for time in times]

    def forward(self, sample, time):
        self.samples.append(sample)
        return self.function(sample, time) + self.weight


def build(function=None, seed=0, **options):
    """A small head, with a known prediction in place of its network if one is given."""
    torch.manual_seed(seed)
    head = DiffusionHead(FEATURES, ACTIONS, CHUNK, STATE, **{"denoiser": UNET} | options)
    if function is not None:
        head.denoiser = Known(function)
    return head


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def observe(batch_size=3):
    return {
        "features": torch.randn(batch_size, 5, FEATURES, generator=seeded(1)),
        "feature_mask": torch.ones(batch_size, 5, dtype=torch.bool),
        "state": torch.randn(batch_size, STATE, generator=seeded(2)),
    }


def chunks(batch_size=3):
    """Actions in [-0.8, 0.8], all of them real."""
    actions = torch.rand(batch_size, CHUNK, ACTIONS, generator=seeded(3)) * 1.6 - 0.8
    return {"actions": actions, "action_mask": torch.ones(batch_size, CHUNK, dtype=torch.bool)}


def predictor(prediction_type, actions):
    """The ideal predictions where these actions are the only data, from `x = signal * actions + spread * noise`."""

    def function(x, time):
        signal, spread = ALPHAS[time.long()].sqrt(), (1 - ALPHAS[time.long()]).sqrt()
        noise = (x - signal * actions) / spread
        return {"epsilon": noise, "sample": actions, "v_prediction": signal * noise - spread * actions}[
            prediction_type
        ]

    return function


def test_published_loss_and_gradients(published):
    head, outputs, inputs = published.head, published.outputs, published.inputs
    head.zero_grad()
    drawn = {"noise": inputs["noise"][0], "timesteps": inputs["train_timesteps"]}
    loss = head.loss(**published.batch, **published.chunk, **drawn)
    assert loss.mean().item() == pytest.approx(outputs["loss"].item(), abs=4e-5)
    loss.mean().backward()
    for name, norm in published.gradients.items():
        assert head.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name


def test_published_padded_actions_enter_the_noised_chunk_and_ours_do_not(goldens, monkeypatch):
    folder = goldens / "unet1d" / "tinyvla_a"
    inputs = load_file(folder / "inputs.safetensors")
    noised = load_file(folder / "outputs.safetensors")["noisy_actions"]
    actions, mask, features = inputs["actions"][:, :16], ~inputs["is_pad"][:, :16], inputs["hidden_states"]
    head = DiffusionHead(48, 10, 16, 7, denoiser=UNET, reduction="published")
    seen = []
    monkeypatch.setattr(head, "denoise", lambda sample, context: seen.append(sample) or sample)
    for reduction in ("published", "masked"):
        head.reduction = reduction
        head.loss(
            features,
            torch.ones(features.shape[:2], dtype=torch.bool),
            actions,
            mask,
            inputs["states"],
            noise=inputs["noise"][0],
            timesteps=inputs["train_timesteps"],
        )
    torch.testing.assert_close(seen[0], noised, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[1][mask], noised[mask], rtol=0, atol=1e-6)
    assert (~mask).any() and (seen[1] - noised)[~mask].abs().max() > 0.1


def test_published_ddim_step_by_step(published, monkeypatch):
    head, outputs = published.head, published.outputs
    samples, predictions, predict = [], [], head.guided

    def spy(sample, context):
        samples.append(sample)
        predictions.append(predict(sample, context))
        return predictions[-1]

    monkeypatch.setattr(head, "guided", spy)
    final = head.sample(**published.batch, noise=published.inputs["init_noise"])
    after = torch.stack([*samples[1:], final])
    torch.testing.assert_close(torch.stack(predictions), outputs["ddim_eps"], rtol=0, atol=7e-4)
    torch.testing.assert_close(after, outputs["ddim_samples"], rtol=0, atol=7e-4)
    alphas = ALPHAS[torch.arange(90, -1, -10)][:, None, None, None]
    clean = (torch.stack(samples) - (1 - alphas).sqrt() * torch.stack(predictions)) / alphas.sqrt()
    torch.testing.assert_close(clean.clamp(-1, 1), outputs["ddim_pred_x0"], rtol=0, atol=7e-4)


def test_the_default_schedule_is_the_published_one(goldens):
    tables = load_file(goldens / "unet1d" / "scheduler_and_timestep_tables.safetensors")
    head = build()
    scheduler = head.build_scheduler()
    assert torch.equal(scheduler.timesteps, tables["timesteps_10"])
    torch.testing.assert_close(head.alphas_cumprod, tables["alphas_cumprod"], rtol=0, atol=1e-7)
    torch.testing.assert_close(scheduler.betas, tables["betas"], rtol=0, atol=1e-7)
    assert scheduler.final_alpha_cumprod == tables["final_alpha_cumprod"] == 1.0


@pytest.mark.parametrize("steps", [5, 16])
def test_published_steps_from_given_predictions(steps, goldens):
    """16 do not divide 100: the recorded times tell how they are spaced."""
    recorded = load_file(goldens / "unet1d" / "ddim_steps_fixed_eps.safetensors")
    predictions, init, expected, times = (
        recorded[f"n{steps}_{key}"] for key in ("eps", "init", "samples", "timesteps")
    )
    batch_size, length, dim = init.shape
    given = iter(predictions)
    head = DiffusionHead(FEATURES, dim, length, STATE, denoiser=UNET)
    head.denoiser = Known(lambda x, time: next(given))
    final = head.sample(**observe(batch_size), noise=init, num_inference_steps=steps)
    assert torch.equal(torch.cat(head.denoiser.times), times)
    samples = torch.stack([*head.denoiser.samples[1:], final])
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        *((SCHEDULER, steps) for steps in (3, 10, 100)),
        *((TRAILING, steps) for steps in (1, 2, 10)),
        (DDPM, 100),
        (DPM, 10),
        (DPM, 25),
        *((COSINE | {"_class_name": name}, 10) for name in OTHERS),
    ],
)
def test_a_single_known_chunk_is_reached_exactly(scheduler, steps, prediction_type):
    actions = chunks()["actions"]
    options = {"scheduler": scheduler | {"prediction_type": prediction_type}, "num_inference_steps": steps}
    head = build(predictor(prediction_type, actions), **options)
    tolerance = 1e-3 if steps == 1 else 2e-5  # alone, one step divides float32 by the signal of time 99, 5e-5
    for seed in (0, 1):
        sample = head.sample(**observe(), generator=seeded(seed))
        torch.testing.assert_close(sample, actions, rtol=0, atol=tolerance)
    heun = "Heun" in scheduler["_class_name"]  # two predictions a step, but one for the last
    assert len(head.denoiser.samples) == 2 * (2 * steps - 1 if heun else steps)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_ideal_prediction_costs_nothing_and_no_other_does(prediction_type):
    scheduler = SCHEDULER | {"prediction_type": prediction_type}
    ideal = predictor(prediction_type, chunks()["actions"])
    for time in (0, 1, 50, 99):
        drawn = {"timesteps": torch.full((3,), time), "generator": seeded(time)}
        cost = build(ideal, scheduler=scheduler).loss(**observe(), **chunks(), **drawn)
        assert cost.max() < 1e-8
        off = build(lambda x, t: ideal(x, t) + 0.5, scheduler=scheduler).loss(**observe(), **chunks(), **drawn)
        torch.testing.assert_close(off, torch.full((3,), 0.25), rtol=0, atol=1e-3)


def gaussian(mean, std):
    """Expectation of the noise, given the noised chunk, where the data are N(mean, std^2)."""

    def function(x, time):
        alpha = ALPHAS[time.long()]
        return (1 - alpha).sqrt() * (x - alpha.sqrt() * mean) / (alpha * std**2 + 1 - alpha)

    return function


def test_ddpm_draws_from_a_gaussian():
    """65,536 numbers: sampling error 0.0012 of the mean, 0.0008 of the deviation; the rest is that of 100 steps."""
    scheduler = DDPM | {"clip_sample": False, "variance_type": "fixed_large"}
    head = build(gaussian(0.2, 0.3), scheduler=scheduler, num_inference_steps=100)
    sample = head.sample(**observe(8192), generator=seeded())
    assert sample.mean().item() == pytest.approx(0.2, abs=0.01)
    assert sample.std().item() == pytest.approx(0.3, abs=0.01)
    columns = sample.flatten(1)
    correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlation.abs().max() < 0.06  # entries are drawn independently: 1 / sqrt(8192) is 0.011


@pytest.mark.parametrize(("scheduler", "steps", "tolerance"), [(SCHEDULER, 100, 0.02), (DPM, 25, 0.02)])
def test_deterministic_samplers_carry_noise_to_the_gaussian(scheduler, steps, tolerance):
    """The flow of the probabilities moves each quantile: from z of N(0, 1) to mean + std * z."""
    options = {"scheduler": scheduler | {"clip_sample": False}} if scheduler is SCHEDULER else {"scheduler": scheduler}
    head = build(gaussian(0.2, 0.3), num_inference_steps=steps, **options)
    noise = torch.linspace(-2, 2, 3 * CHUNK * ACTIONS).reshape(3, CHUNK, ACTIONS)
    sample = head.sample(**observe(), noise=noise)
    torch.testing.assert_close(sample, 0.2 + 0.3 * noise, rtol=0, atol=tolerance)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 34, 50, 51, 60, 99, 100])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_any_number_of_steps_ends_around_the_mean_or_that_is_said(spacing, steps, caplog):
    """Beginning where a chunk is not noise would leave noise and its mean in the sample. DDIM's trailing times are not
    those that it steps to where the number of steps is no divisor of the training times.
    """
    mean, std = 0.5, 0.3
    scheduler = SCHEDULER | {"timestep_spacing": spacing, "clip_sample": False}
    head = build(gaussian(mean, std), scheduler=scheduler)
    refused, message, inexact = {
        "leading": ((1,), "with 1 steps begins at 0 of 99, .*set timestep_spacing: trailing", (2, 51, 60)),
        "trailing": ((34, 51, 60), f"in {steps} denoising steps .* another number of steps", ()),
    }[spacing]
    if steps in refused:
        with pytest.raises(ValueError, match=message):
            head.sample(**observe(), num_inference_steps=steps)
        return
    check_scheduler.cache_clear()
    if steps in inexact:
        for _ in range(2):
            head.sample(**observe(), num_inference_steps=steps)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1 and f"in {steps} denoising steps" in said[0] and "inexact" in said[0]
        return
    noise = torch.linspace(-2, 2, 3 * CHUNK * ACTIONS).reshape(3, CHUNK, ACTIONS)
    sample = head.sample(**observe(), noise=noise, num_inference_steps=steps)
    assert sample.mean().item() == pytest.approx(mean, abs=0.09)
    assert sample.std() < 1.1 * std * noise.std()  # few steps narrow it
    assert not caplog.records


def test_training_times_are_uniform():
    head = build(lambda x, time: x)
    head.loss(**observe(5000), **chunks(5000), generator=seeded())
    counts = torch.bincount(head.denoiser.times[0], minlength=100)
    assert len(counts) == 100 and counts.min() > 20 and counts.max() < 90  # 50 expected, deviation 7


def test_all_randomness_comes_from_the_generator():
    head = build(scheduler=DDPM, condition_dropout=0.5).train()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for draw in (lambda seed: head.sample(**observe(), generator=seeded(seed)), lambda seed: loss(head, seed)):
        assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    noise = torch.randn(3, CHUNK, ACTIONS, generator=seeded())
    one, two = (head.sample(**observe(), noise=noise, generator=seeded(seed)) for seed in (0, 1))
    assert not torch.equal(one, two)  # DDPM adds noise on its way, too
    assert torch.equal(torch.get_rng_state(), before)


def loss(head, seed=0):
    return head.loss(**observe(), **chunks(), generator=seeded(seed))


def test_bfloat16_weights_leave_the_schedule_alone_and_samples_near():
    """The published `add_noise` casts its table to the network's precision in place; samples are NaN from then on."""
    head, inputs = build(), observe()
    expected = head.sample(**inputs, generator=seeded())
    head.to(torch.bfloat16)
    inputs["features"] = inputs["features"].to(torch.bfloat16)
    for _ in range(2):
        sample = head.sample(**inputs, generator=seeded())
        assert sample.dtype == torch.float32 and (sample - expected).abs().max() < 0.1
        value = head.loss(**inputs, **chunks(), generator=seeded())
        value.sum().backward()
        assert value.dtype == torch.float32 and torch.isfinite(value).all()
    assert head.alphas_cumprod.dtype == torch.float32 and torch.equal(head.alphas_cumprod, ALPHAS)


@pytest.mark.parametrize("scheduler", [SCHEDULER, DDPM, DPM])
def test_a_head_built_as_bfloat16_on_the_meta_device_has_its_whole_schedule(scheduler):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            head = build(scheduler=scheduler)
            assert torch.equal(head.alphas_cumprod, ALPHAS)
    finally:
        torch.set_default_dtype(torch.float32)
    head = head.to_empty(device="cpu").float()
    head.load_state_dict(build().state_dict())
    assert torch.isfinite(head.sample(**observe())).all()


def test_autocast_needs_no_other_code():
    head, inputs = build(), observe()
    expected = head.sample(**inputs, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, sample = loss(head), head.sample(**inputs, generator=seeded())
    value.sum().backward()
    assert value.dtype == sample.dtype == torch.float32 and (sample - expected).abs().max() < 0.1


def test_samplings_share_no_state():
    """DPM-Solver++ keeps its last predictions: two samplings at a time would mix them."""
    head, inputs = build(scheduler=DPM), observe()
    noises = torch.randn(8, 3, CHUNK, ACTIONS, generator=seeded())
    expected = [head.sample(**inputs, noise=noise) for noise in noises]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda noise: head.sample(**inputs, noise=noise), noises))
    assert all(torch.equal(one, other) for one, other in zip(expected, together, strict=True))


def test_the_network_is_called_once_a_step_and_the_condition_is_read_once():
    def flops(feature_dim, steps):
        torch.manual_seed(0)
        head = DiffusionHead(feature_dim, ACTIONS, CHUNK, STATE, denoiser=UNET)
        features, mask = torch.randn(1, 5, feature_dim), torch.ones(1, 5, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter:
            head.sample(features, mask, torch.zeros(1, STATE), num_inference_steps=steps)
        return counter.get_total_flops()

    assert flops(16, 20) > 3 * flops(16, 4)
    assert flops(512, 20) - flops(16, 20) == flops(512, 4) - flops(16, 4) > 0


def test_guidance_moves_away_from_the_null_prediction():
    """One step of DDIM that predicts the sample: what comes out is the guided prediction itself."""
    scheduler = TRAILING | {"prediction_type": "sample", "clip_sample": False}
    options = {"scheduler": scheduler, "condition_dropout": 0.1, "num_inference_steps": 1}
    noise = torch.randn(3, CHUNK, ACTIONS, generator=seeded())
    # in double precision: the sizes of the two batches round differently in single, and guidance triples that
    plain, guided = build(**options).double(), build(guidance_scale=3.0, **options).double()
    null = build(**options).double()
    for head in (plain, guided, null):
        torch.nn.init.normal_(head.null_condition, generator=seeded(5))
    null.condition_encoder.forward = lambda *inputs: null.drop_condition(
        plain.condition_encoder(*inputs), torch.ones(3, dtype=torch.bool)
    )
    with_condition, with_null = (head.sample(**observe(), noise=noise) for head in (plain, null))
    assert (with_condition - with_null).abs().max() > 1e-4
    expected = with_null + 3 * (with_condition - with_null)
    torch.testing.assert_close(guided.sample(**observe(), noise=noise), expected, rtol=0, atol=1e-6)


def test_a_scheduler_may_be_given_as_diffusers_saves_it():
    saved = json.loads(diffusers.DDIMScheduler(**COSINE, prediction_type="sample").to_json_string())
    head = build(scheduler=saved)
    assert saved["_class_name"] == "DDIMScheduler" and head.prediction_type == "sample"
    assert build(scheduler=DPM).build_scheduler().config.num_train_timesteps == 100


SAMPLE, V_PREDICTION = (COSINE | {"prediction_type": kind} for kind in ("sample", "v_prediction"))
MISS, FAILS = "Expected a scheduler that leads from noise to the actions", "fails in 10 denoising steps with"


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"_class_name": "DDMIScheduler"}, "_class_name of a diffusers scheduler.*came 'DDMIScheduler'"),
        ({"_class_name": "AutoModel"}, "_class_name of a diffusers scheduler.*came 'AutoModel'"),
        ({"num_train_timesteps": 100}, "_class_name of a diffusers scheduler.*came None"),
        (SCHEDULER | {"clip_smaple": True}, "options of DDIMScheduler, .*'clip_smaple'"),
        (SCHEDULER | {"beta_schedule": "cosine"}, "options of DDIMScheduler, .*cosine is not implemented"),
        (SCHEDULER | {"prediction_type": "noise"}, r"prediction_type in \('epsilon', .*DDIMScheduler with 'noise'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a diffusion scheduler .*FlowMatch.* with None"),
        (SCHEDULER | {"timestep_spacing": "wide"}, "wide is not supported"),
        (COSINE | {"_class_name": "DDIMInverseScheduler"}, "DDIMInverseScheduler with 10 steps begins at "),
        (
            COSINE | {"_class_name": "DPMSolverMultistepInverseScheduler"},
            "MultistepInverseScheduler with 10 steps begins",
        ),
        (
            V_PREDICTION | {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "EulerDiscreteScheduler with 10 steps begins",
        ),
        (SCHEDULER | {"num_train_timesteps": 20, "beta_schedule": "linear"}, "with 10 steps begins at 18 of 19"),
        *((DPM | {"use_flow_sigmas": True, "prediction_type": kind}, "use_flow_sigmas") for kind in PREDICTION_TYPES),
        (COSINE | {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        (SCHEDULER | {"clip_sample_range": 0.1}, MISS),
        (DDPM | {"variance_type": "fixed_large_log"}, MISS),  # diffusers takes the logarithm for the variance
        (COSINE | {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True}, FAILS),
        (SAMPLE | {"_class_name": "KDPM2DiscreteScheduler"}, FAILS),
        (SAMPLE | {"_class_name": "EulerAncestralDiscreteScheduler"}, FAILS),
        (SAMPLE | {"_class_name": "PNDMScheduler"}, FAILS),
        (COSINE | {"_class_name": "CogVideoXDPMScheduler"}, FAILS),
        (DDPM | {"variance_type": "learned_range"}, FAILS),
        (DPM | {"variance_type": "learned"}, FAILS),
        (SCHEDULER | {"num_train_timesteps": 9}, "at most num_train_timesteps = 9 denoising steps, came 10"),
    ],
)
def test_schedulers_without_a_meaning_raise_when_the_head_is_built(scheduler, message):
    with pytest.raises(ValueError, match=message):
        build(scheduler=scheduler)


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_other_numbers_of_steps_raise(steps):
    with pytest.raises(ValueError, match=f"Expected .*came {steps}"):
        build().sample(**observe(), num_inference_steps=steps)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "PNDM"])
def test_numbers_of_steps_that_a_scheduler_cannot_take_raise_before_the_network_is_called(name):
    """The first three end in NaN with as many steps as there are training times, PNDM beside the actions."""
    head = build(lambda x, time: x, scheduler=COSINE | {"_class_name": f"{name}Scheduler"})
    with pytest.raises(ValueError, match=f"{MISS}.*another number of steps"):
        head.sample(**observe(), num_inference_steps=100)
    assert not head.denoiser.samples


def test_linspaced_ddim_of_two_steps_raises_for_the_network_would_see_other_noise_than_in_training():
    """It jumps to the noise of time 49 and calls it time 0."""
    with pytest.raises(ValueError, match=r"an ideal network sees 0\.\d+ more or less noise than in training"):
        build(scheduler=SCHEDULER | {"timestep_spacing": "linspace"}, num_inference_steps=2)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("steps", [10, 25, 100])
def test_schedulers_that_draw_noise_pass_the_trial_and_leave_the_global_generator_alone(variance_type, steps):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    check_scheduler.cache_clear()
    check_scheduler(json.dumps(DDPM | {"variance_type": variance_type}), steps)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_scheduler_is_tried_once_for_each_configuration_and_number_of_steps(monkeypatch):
    tried, dry_run = [], diffusion.dry_run
    monkeypatch.setattr(diffusion, "dry_run", lambda scheduler: tried.append(scheduler) or dry_run(scheduler))
    check_scheduler.cache_clear()
    for head in (build(), build(), build(scheduler=DPM)):
        for steps in (None, 10, 5, 5):
            head.sample(**observe(), num_inference_steps=steps)
    assert sorted((len(each.timesteps), type(each).__name__) for each in tried) == [
        (5, "DDIMScheduler"),
        (5, "DPMSolverMultistepScheduler"),
        (10, "DDIMScheduler"),
        (10, "DPMSolverMultistepScheduler"),
    ]


@pytest.mark.parametrize(
    "timesteps",
    [
        torch.tensor([0, 1]),
        torch.tensor([[0, 1, 2]]),
        torch.tensor([0, 1, 100]),
        torch.tensor([0, -1, 2]),
        torch.ones(3),
    ],
)
def test_given_timesteps_of_another_shape_dtype_or_range_raise(timesteps):
    with pytest.raises(ValueError, match=r"Expected timesteps of shape \(3,\), int64, in 0 to 99, came tensor"):
        build().loss(**observe(), **chunks(), timesteps=timesteps)


def test_importing_the_head_does_not_import_diffusers():
    code = "import sys, hf_vla.actions.heads.diffusion; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("scheduler", [SCHEDULER, DDPM])
def test_the_network_never_sees_a_dimension_that_a_robot_has_not(scheduler):
    """Not even where a scheduler adds noise on its way."""
    head = build(lambda sample, time: 0 * sample + 1.0, scheduler=scheduler)
    own = torch.tensor([[True, True], [True, False], [True, False]])[:, None].repeat(1, CHUNK, 1)
    head.sample(**observe(), generator=seeded(), action_mask=own)
    head.loss(**observe(), actions=torch.ones(3, CHUNK, ACTIONS), action_mask=own, generator=seeded())
    for sample in head.denoiser.samples:
        assert not sample[1:, :, 1].any() and sample[:, :, 0].all() and sample[0].all()
