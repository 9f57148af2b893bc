"""Draw what the action heads answer where two actions are right: `python scripts/draw_mode_averaging.py`.

The example of the action-representation chapter: a cup may be put down 0.1 m to the left or 0.1 m to the right, each
demonstrated half of the time with a spread of 0.01 m. Every head is trained on it for seconds, with tiny networks; one
number, chunks of one action, an observation that says nothing. 0.2 m are one normalised unit, so that the modes lie at
-0.5 and 0.5, inside the heads' range [-1, 1].

Left, what they answer; ten sampling steps narrow the modes. Right, how large the gradient of the loss with respect to
the network's prediction is while the model is bad and when it is good; normalised units. Regression's is twice the
error of its answer, so 150 times smaller at 1 mm from the demonstrated action than at 150 mm. A denoising head
predicts noise or velocity, of order 1 at every time; the chapter's two predictions differ by a factor of 1.3. Below,
what the real heads do untrained and trained on the two modes, as a mean over demonstrations, noises and times. What
keeps their gradient large is the part of the noise that cannot be known while several actions are right; its mean is
zero, it is no signal. Where exactly one action is right there is no such part: a denoiser that is off by an error has
a gradient in proportion to it, as regression has.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from hf_vla.actions.heads.registry import build_action_head

MODES, SPREAD, UNIT = (-0.1, 0.1), 0.01, 0.2  # metres
FEATURES = 8
UNET = {  # of a chunk of one action a wider convolution would see nothing more
    "type": "conditional_unet1d",
    "down_dims": [32],
    "kernel_size": 1,
    "n_groups": 2,
    "diffusion_step_embed_dim": 32,
}
HEADS = {
    "regression": {"hidden_dim": 32},
    "classification": {"hidden_dim": 32, "decoding": "sample"},
    "diffusion": {"denoiser": UNET},
    "flow_matching": {"denoiser": {"type": "dit", "hidden_size": 64, "depth": 1, "num_heads": 2}},
}
# of the chapter: an answer far from the action demonstrated and one close to it, metres; noises predicted and added
DEMONSTRATED, ANSWERS = 0.050, (0.200, 0.051)
NOISES = ((0.87, 1.23), (-0.45, -0.72))
COLORS = {"classification": "#E69F00", "diffusion": "#0072B2", "flow_matching": "#009E73", "regression": "#D55E00"}


def demonstrations(count, generator):
    """Draw `(count,)` actions, metres."""
    side = torch.randint(2, (count,), generator=generator)
    return torch.tensor(MODES)[side] + SPREAD * torch.randn(count, generator=generator)


def observation(count):
    return {"features": torch.ones(count, 1, FEATURES), "feature_mask": torch.ones(count, 1, dtype=torch.bool)}


def batch(actions):
    """Turn `(count,)` normalised actions into what a head's loss takes."""
    mask = torch.ones(len(actions), 1, dtype=torch.bool)
    return observation(len(actions)) | {"actions": actions.view(-1, 1, 1), "action_mask": mask}


def build(name):
    torch.manual_seed(0)
    return build_action_head({"type": name, **HEADS[name]}, FEATURES, action_dim=1, chunk_size=1)


def train(name, steps=400, batch_size=256, learning_rate=1e-2):
    head, generator = build(name), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(head.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(**batch(demonstrations(batch_size, generator) / UNIT), generator=generator).mean().backward()
        optimizer.step()
        schedule.step()
    return head


def answers(head, count=2000):
    """Draw `(count,)` answers of a head, metres."""
    return head.sample(**observation(count), generator=torch.Generator().manual_seed(1)).flatten() * UNIT


def gradients(head, actions, predicted=None, **known):
    """Sizes of the derivatives of each sample's loss with respect to what the network predicts for it.

    Args:
        actions (`torch.Tensor` of shape `(count,)`): normalised targets.
        predicted (`torch.Tensor` of shape `(count,)`, *optional*): takes the place of the network's own prediction.
        known: noise and times, for heads that have them.
    """
    seen = []

    def look(module, inputs, output):
        seen.append(output if predicted is None else predicted.view_as(output).requires_grad_())
        return seen[-1]

    network = head.denoiser if hasattr(head, "denoiser") else head.network
    with network.register_forward_hook(look):
        loss = head.loss(**batch(actions), generator=torch.Generator().manual_seed(2), **known)
    return torch.autograd.grad(loss.sum(), seen)[0].flatten().abs()


def chapter_gradients():
    """Gradients of bad and good predictions with the chapter's numbers: regression's and diffusion's."""
    regression = gradients(build("regression"), torch.full((2,), DEMONSTRATED) / UNIT, torch.tensor(ANSWERS) / UNIT)
    predicted, noise = torch.tensor(NOISES).T
    times = {"noise": noise.view(-1, 1, 1), "timesteps": torch.tensor([50, 50])}
    return regression, gradients(build("diffusion"), torch.full((2,), DEMONSTRATED) / UNIT, predicted, **times)


def measured_gradients(name, trained):
    """Mean gradients of an untrained and of the trained head over demonstrations, noises and times."""
    actions = demonstrations(4096, torch.Generator().manual_seed(3)) / UNIT
    return torch.stack([gradients(head, actions).mean() for head in (build(name), trained)])


def draw(heads):
    """Draw both panels for the trained `heads` (by name)."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    draw_answers(left, heads)
    draw_gradients(right.subplots(), heads)
    return figure


def draw_answers(figure, heads):
    point = answers(heads["regression"], 1).item()
    grid = torch.linspace(-0.15, 0.15, 601)
    density = sum(torch.distributions.Normal(mode, SPREAD).log_prob(grid).exp() / 2 for mode in MODES)
    names = [name for name in heads if name != "regression"]
    axes = figure.subplots(len(names), 1, sharex=True, sharey=True)
    for name, ax in zip(names, axes, strict=True):
        ax.fill_between(grid, density, color="0.8", label="demonstrations")
        bins = torch.linspace(-0.15, 0.15, 76).tolist()
        drawn = answers(heads[name]).tolist()
        ax.hist(drawn, bins, density=True, histtype="step", color=COLORS[name], lw=1.5, label=name.replace("_", " "))
        ax.axvline(point, color=COLORS["regression"], ls="--", lw=2, label=f"regression: {point:+.3f} m")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0), fontsize=8, frameon=True, framealpha=0.9)
    axes[len(names) // 2].set_ylabel("density (1/m)")
    axes[-1].set(xlabel="action (m)", xlim=(-0.15, 0.15))
    figure.suptitle("Two right actions: what the heads answer", fontsize=11)


def draw_gradients(ax, heads):
    regression, diffusion = chapter_gradients()
    rows = {
        "regression,\nanswer 150 mm\nand 1 mm off": ("regression", regression),
        "diffusion,\nthe chapter's\ntwo noises": ("diffusion", diffusion),
        "diffusion,\nuntrained\nand trained": ("diffusion", measured_gradients("diffusion", heads["diffusion"])),
        "flow matching,\nuntrained\nand trained": (
            "flow_matching",
            measured_gradients("flow_matching", heads["flow_matching"]),
        ),
    }
    for row, (name, pair) in enumerate(rows.values()):
        bad, good = pair.tolist()
        ax.plot([bad, good], [row, row], color=COLORS[name], lw=2)
        ax.plot(bad, row, "o", ms=9, color=COLORS[name], label="bad model" if not row else None)
        ax.plot(good, row, "o", ms=9, color=COLORS[name], mfc="white", mew=2, label="good model" if not row else None)
        ax.annotate(f"{bad / good:.3g}x", ((bad * good) ** 0.5, row), (0, 7), textcoords="offset points", ha="center")
    ax.set(
        xscale="log",
        xlim=(1e-3, 5),
        ylim=(len(rows) - 0.5, -0.6),
        xlabel="|d loss / d prediction|, normalised units",
    )
    ax.set_yticks(range(len(rows)), rows, fontsize=9)
    ax.grid(axis="x", color="0.9")
    ax.legend(loc="lower left", fontsize=8)
    ax.set_title("Gradient of the loss", fontsize=11)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parents[1] / "docs" / "mode_averaging.png"
    parser.add_argument("--output", type=Path, default=default)
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    draw({name: train(name) for name in HEADS}).savefig(output, dpi=110)


if __name__ == "__main__":
    main()
