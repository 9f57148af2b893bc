import pytest

from hf_vla.models.names import refuse_near_misses, refuse_unknown


def test_near_misses_are_refused_and_strange_names_are_not():
    refuse_near_misses("Config", ["transformers_version"], ["chunk_size"])
    with pytest.raises(ValueError, match="Config has no 'chunk_sise'; did you mean 'chunk_size'"):
        refuse_near_misses("Config", ["chunk_sise"], ["chunk_size"])


def test_unknown_names_are_all_listed():
    refuse_unknown("Model", ["state"], ["state", "actions"])
    with pytest.raises(ValueError, match=r"Model takes no 'action', 'xyz'; did you mean 'actions'\?"):
        refuse_unknown("Model", ["xyz", "state", "action"], ["state", "actions"])
    with pytest.raises(ValueError, match=r"Model takes no 'xyz'; it takes \['actions', 'state'\]\."):
        refuse_unknown("Model", ["xyz"], ["state", "actions"])
