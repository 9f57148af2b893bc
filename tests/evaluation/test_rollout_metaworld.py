"""The same as on the point, where it counts: in Meta-World."""

import pytest

pytestmark = pytest.mark.sim


@pytest.fixture
def run(tmp_path):
    from hf_vla.evaluation.protocol import EvaluationPlan
    from hf_vla.evaluation.rollout import evaluate

    def run(system, name, processes, envs, **options):
        plan = EvaluationPlan("metaworld", "door-close-v3,button-press-v3", 3, horizon=12, batch_size=4, **options)
        return evaluate(*system, plan, tmp_path / name, "tiny", processes, envs)

    return run


def test_one_process_or_four_one_environment_or_six(sawyer, family, run, results):
    system = sawyer(family)
    records = run(system, "one", 1, 1)
    assert results(records) == results(run(system, "four", 4, 6))
    assert [each.seed for each in records] == [0, 1, 2, 0, 1, 2] and all(each.steps <= 12 for each in records)
    assert results(records) == results(run(system, "four", 4, 6))  # all there


def test_a_camera_with_other_intrinsics_is_refused(sawyer, run):
    with pytest.raises(ValueError, match="Camera 'corner4': its intrinsics and those of 'gripperPOV' differ"):
        run(sawyer("tinyvla"), "other", 1, 1, cameras={"corner4": "gripperPOV"})
