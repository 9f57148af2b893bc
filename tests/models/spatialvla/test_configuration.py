import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError

from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig

RANGES = {"action_block_sizes": None}


def test_defaults_are_the_published_sizes():
    config = SpatialVLAConfig()
    assert config.action_block_sizes == [4096, 4096, 2] and config.spatial_token_num == 8194
    assert config.action_token_begin_idx + config.spatial_token_num == config.text_config.vocab_size == 265347
    assert config.num_image_tokens == 256 and config.use_ego3d


@pytest.mark.parametrize("preset", ["4b", "tiny"])
def test_round_trip(preset, tmp_path):
    config = SpatialVLAConfig.from_preset(preset)
    config.save_pretrained(tmp_path)
    assert SpatialVLAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"No SpatialVLA preset 'huge'; there are \['4b', 'tiny'\]"):
        SpatialVLAConfig.from_preset("huge")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_freqs": -1}, "Expected n_freqs of 1 or more, got -1"),
        ({"action_block_sizes": [0, 1536, 2]}, r"Expected action_block_sizes of 1 or more, got \[0, 1536, 2\]"),
        ({"action_token_ranges": [[0, 2]]}, "Expected action_block_sizes or action_token_ranges, got both"),
        ({**RANGES, "action_token_ranges": [[0, 1539]]}, r"within the spatial_token_num 1538.*, got \[0, 1539\]"),
        ({**RANGES, "action_token_ranges": [[2, 2]]}, r"got \[2, 2\]"),
        ({**RANGES, "action_token_ranges": [[0, 2], [3]]}, r"got \[3\]"),
        ({"action_block_sizes": [1, 2]}, r"hold 3 tokens, but spatial_token_num is 1538"),
        ({"action_token_begin_idx": 300}, r"do not fit a vocabulary of 1798: set text_config.vocab_size to 1838"),
        ({"vision_config": {"model_type": "siglip_vision_model", "image_size": 85, "patch_size": 14}}, "no multiple"),
    ],
)
def test_inconsistent_sizes(overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        SpatialVLAConfig.from_preset("tiny", **overrides)


def test_misspelt_names():
    with pytest.raises(ValueError, match="no 'use_vision_zeo'; did you mean 'use_vision_zoe'"):
        SpatialVLAConfig(use_vision_zeo=False)


def test_tokens_that_may_stand_at_each_place():
    def ranges(sizes, places):
        fields = {"action_block_sizes": sizes, "action_token_ranges": places}
        return SpatialVLAConfig.from_preset("tiny", **fields).action_ranges(2)

    assert ranges([1024, 512, 2], None) == [(0, 1024), (1024, 1536), (1536, 1538)] * 2
    assert ranges(None, [[0, 2], [0, 256]]) == [(0, 2), (0, 256)] * 2
    assert ranges(None, []) == [] and ranges(None, None) is None


def test_other_tokens_of_the_published_grids_number_are_no_grid():
    config = SpatialVLAConfig(action_token_ranges=[])
    assert config.action_block_sizes is None and config.action_ranges(4) == []
