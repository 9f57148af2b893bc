"""Published action experts as the start of a head."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vla.actions.heads.registry import build_action_head
from hf_vla.models.divla.scale_dp import SCALE_DP_HEADS, load_scale_dp


@pytest.fixture
def expert(goldens):
    """The recorded ScaleDP: two blocks of width 64, conditioned by 48 features."""
    return load_file(goldens / "scaledp" / "scaledp_a" / "weights.safetensors")


@pytest.fixture
def make_head():
    """A head for the recorded ScaleDP."""

    def make(feature_dim=48, action_dim=14, chunk_size=16, state_dim=14, hidden_dim=64, dropout=0.0, **denoiser):
        torch.manual_seed(0)
        sizes = {"type": "dit", "hidden_size": 64, "depth": 2, "num_heads": 4, **denoiser}
        condition = {"norm": False, "combine": "mlp", "hidden_dim": hidden_dim}
        config = {"type": "diffusion", "condition": condition, "denoiser": sizes, "condition_dropout": dropout}
        return build_action_head(config, feature_dim, action_dim, chunk_size, state_dim)

    return make


def save_expert(weights, path, prefix="", **others):
    """Under a prefix, beside other networks."""
    save_file({f"{prefix}{name}": tensor for name, tensor in weights.items()} | others, path)
    return path


def ours(name):
    return f"condition_encoder.{name}" if name.startswith("combine.") else f"denoiser.{name}"


@pytest.mark.parametrize("prefix", ["", "policy.", "policy_head.", "policy.policy_head.", "module.policy_head."])
def test_scale_dp_weights_are_loaded_whatever_stands_before_their_names(make_head, expert, tmp_path, prefix):
    others = {"visual.blocks.0.attn.qkv.weight": torch.ones(192, 64)} if "policy_head" in prefix else {}
    loaded = load_scale_dp(head := make_head(), save_expert(expert, tmp_path / "expert.safetensors", prefix, **others))
    assert loaded == (sorted(others), [])
    assert all(torch.equal(tensor, expert[name]) for name in expert for tensor in [head.state_dict()[ours(name)]])


@pytest.mark.parametrize("prefix", ["noise_pred_net.", "policy.noise_pred_net."])
def test_an_expert_that_was_trained_alone_keeps_its_view_of_the_condition(make_head, expert, tmp_path, prefix):
    """As in the published fine-tuning; its vision backbones are left out."""
    others = {"policy.backbones.0.conv1.weight": torch.ones(2), "blocks.0.attn.qkv.weight": torch.zeros(192, 64)}
    fresh = {name: tensor.clone() for name, tensor in make_head().state_dict().items() if "cond_obs_emb" in name}
    save_expert(expert, tmp_path / "model.safetensors", prefix, **others)
    loaded = load_scale_dp(head := make_head(), tmp_path)
    names = [f"cond_obs_emb.{kind}" for kind in ("bias", "weight")]
    assert loaded.left_out == sorted([*others, *(prefix + name for name in names)])
    assert loaded.fresh == [f"denoiser.{name}" for name in names]
    state = head.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in fresh.items())
    assert all(torch.equal(state[ours(name)], expert[name]) for name in expert if name not in names)


def test_what_another_robot_and_condition_need_stays_as_it_was(make_head, expert, tmp_path):
    path = save_expert(expert, tmp_path / "expert.safetensors")
    head = make_head(feature_dim=32, action_dim=7, chunk_size=10, state_dim=None, hidden_dim=128)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    loaded = load_scale_dp(head, path)
    adapters = {f"combine.{i}.{kind}" for i in (0, 2, 4) for kind in ("bias", "weight")}
    adapters |= {"cond_obs_emb.weight", "x_embedder.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    assert loaded == (sorted(adapters), sorted(map(ours, adapters)))
    state = head.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in loaded.fresh)
    assert torch.equal(state["denoiser.pos_embed"], expert["pos_embed"][:, :10])  # the first positions
    loaded = load_scale_dp(head := make_head(chunk_size=20), path)
    assert loaded == (["pos_embed"], ["denoiser.pos_embed"]) and not head.denoiser.pos_embed.any()


def test_a_null_condition_stays_as_it_was(make_head, expert, tmp_path):
    loaded = load_scale_dp(make_head(dropout=0.1), save_expert(expert, tmp_path / "expert.safetensors"))
    assert loaded == ([], ["null_condition"])


def test_cross_attention_beside_the_trunk_stays_as_it_was(make_head, expert, tmp_path):
    loaded = load_scale_dp(
        make_head(conditioning="cross_attention"), save_expert(expert, tmp_path / "expert.safetensors")
    )
    assert loaded.left_out == [] and len(loaded.fresh) == 12
    assert all(".cross_attn." in name for name in loaded.fresh)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 3}, "Expected a depth of 3, a hidden_size of 64 and MLPs of 256, as .* got a depth of 2, a hidden"),
        (
            {"hidden_size": 32},
            "a hidden_size of 32 .* got a depth of 2, a hidden_size of 64 and MLPs of 256",
        ),
        ({"mlp_ratio": 2.0}, "MLPs of 128, .* MLPs of 256"),
        ({"conditioning": "in_context"}, "modulated by adaln_zero, as SCALE_DP_HEADS has it, got DiffusionHead with"),
        ({"type": "conditional_unet1d"}, None),
    ],
)
def test_an_expert_of_another_size_is_refused(make_head, expert, tmp_path, sizes, message):
    path = save_expert(expert, tmp_path / "expert.safetensors")
    if message is None:
        config = {"type": "diffusion", "denoiser": sizes | {"down_dims": [16]}}
        head, message = build_action_head(config, 48, 14, 16, 14), "got DiffusionHead with ConditionalUnet1D"
    else:
        head = make_head(**sizes)
    with pytest.raises(ValueError, match=message):
        load_scale_dp(head, path)


def test_incomplete_experts_and_pickles_are_refused(make_head, expert, tmp_path):
    path = tmp_path / "expert.safetensors"
    lost = {name: tensor for name, tensor in expert.items() if name != "blocks.1.attn.qkv.bias"}
    head = make_head()
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing are \['denoiser.blocks.1.attn.qkv.bias'\]"):
        load_scale_dp(head, save_expert(lost, path))
    with pytest.raises(ValueError, match="Expected the weights of a ScaleDP .* none is"):
        load_scale_dp(head, save_expert({"other": torch.ones(2)}, path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    torch.save({"nets": {"nets": expert}}, tmp_path / "open_scale_dp_h_backbone.ckpt")
    with pytest.raises(ValueError, match=r'Expected safetensors, came open_scale.*\["nets"\]\["nets"\].*save_file'):
        load_scale_dp(head, tmp_path / "open_scale_dp_h_backbone.ckpt")


@pytest.mark.parametrize(("name", "depth", "size"), [("scale_dp_l", 24, 0.46e9), ("scale_dp_h", 32, 0.96e9)])
def test_the_published_experts_have_their_size(name, depth, size):
    with torch.device("meta"):
        head = build_action_head(SCALE_DP_HEADS[name], 1536, 14, 50, 14)
    assert len(head.denoiser.blocks) == depth
    assert sum(parameter.numel() for parameter in head.parameters()) == pytest.approx(size, rel=0.02)
