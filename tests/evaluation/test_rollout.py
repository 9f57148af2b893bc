"""Rollouts on a point that actions push about: real models, real processes, no simulator to install."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import ByT5Tokenizer

pytest.importorskip("gymnasium")

from hf_vla.evaluation.protocol import EvaluationPlan, config_sha256  # noqa: E402
from hf_vla.evaluation.records import EPISODES, read_records  # noqa: E402
from hf_vla.evaluation.rollout import evaluate  # noqa: E402
from hf_vla.policy import Policy  # noqa: E402

VARIANTS = {
    "ensembling": ("tinyvla", {}, {"ensemble_coefficient": 0.01}),
    "history": ("tinyvla", {"n_obs_steps": 2}, {"n_action_steps": 3}),
    "interval": ("divla", {}, {"reasoning_interval": 2, "n_action_steps": 2}),
}


@pytest.fixture
def run(point, tmp_path):
    """Evaluate a model and processor."""

    def run(system, name="out", probe="none", processes=1, envs=None, deadline_s=120.0, report=None, **options):
        plan = EvaluationPlan(
            "point", **{"selection": "both", "episodes": 3, "horizon": 7, "batch_size": 2, **options}
        )
        others = {"processes": processes, "envs": envs, "probe": probe, "deadline_s": deadline_s}
        others |= {name: plan_option for name, plan_option in (report or {}).items()}
        return evaluate(*system, plan, tmp_path / name, "tiny", **others)

    return run


@pytest.fixture(scope="module")
def tiny(sawyer):
    return sawyer("tinyvla")


def by_hand(system, point, **options):
    """What a policy alone does, step by step, in one process."""
    outcomes = []
    for task in point.PointTask.tasks():
        for seed in range(3):
            env, policy = point.PointTask(task), Policy(*system, seed=seed, **options)
            env.horizon = 7
            observation, over = env.reset(seed=seed)[0], False
            while not over:
                observation, _, success, truncated, _ = env.step(policy.select_action(observation))
                over = success or truncated
            outcomes.append((task, seed, env.success, env.episode_length))
    return outcomes


def outcomes(records):
    return [(each.task, each.seed, each.success, each.steps) for each in records]


def test_neither_processes_nor_batch_mates_change_a_record(sawyer, family, run, results):
    system = sawyer(family)
    alone = run(system, "alone", processes=1, envs=1)
    crowd = run(system, "crowd", processes=2, envs=5)
    assert results(alone) == results(crowd)
    assert [(each.task, each.seed) for each in alone] == [
        (task, seed) for task in ("left", "right") for seed in range(3)
    ]
    assert all(len(each.latency_ms) == each.predictions >= 1 and each.restarts == 0 for each in crowd)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_an_episode_is_what_the_policy_does_alone(sawyer, point, run, results, variant):
    family, config, options = VARIANTS[variant]
    system = sawyer(family, **config)
    records = run(system, batch_size=1, policy_options=options)
    assert outcomes(records) == by_hand(system, point, **options)
    assert len({each.steps for each in records}) > 1 or any(each.success for each in records)
    crowd = run(system, "crowd", processes=2, envs=4, policy_options=options)
    assert results(crowd) == results(run(system, "one", envs=1, policy_options=options))


def test_what_is_recorded_is_not_run_again(tiny, run, tmp_path, results):
    expected = run(tiny, "whole", processes=2)
    run(tiny, episodes=3)
    file = tmp_path / "out" / EPISODES
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:20])
    reported = []
    records = run(tiny, episodes=3, report={"on_episode": reported.append})
    assert results(records) == results(expected) == results(reported)
    assert file.read_text().splitlines(keepends=True)[:2] == lines[:2] and len(reported) == 6
    before = file.read_bytes()
    assert results(run(tiny, episodes=3)) == results(expected) and file.read_bytes() == before
    with pytest.raises(ValueError, match="another protocol; it differs in episodes: then 3, now 4\\. Give"):
        run(tiny, episodes=4)


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_a_crash_or_a_hanging_is_noted_and_changes_nothing_else(
    tiny, run, point, tmp_path, monkeypatch, results, kind
):
    expected = run(tiny, "whole")
    task, seed = next((each.task, each.seed) for each in expected if each.steps > 4)
    monkeypatch.setenv(point.FAULT, f"{kind} {task} {seed} 4 {tmp_path / 'happened'}")
    records = run(tiny, processes=1, envs=2, deadline_s=20 if kind == "hang" else 120)
    assert (tmp_path / "happened").exists() and results(records) == results(expected)
    restarts = {(each.task, each.seed): each.restarts for each in records}
    assert restarts[task, seed] == 1 and sum(restarts.values()) <= 2


def test_an_environment_that_raises_is_made_anew(tiny, run, point, tmp_path, monkeypatch, results):
    expected = run(tiny, "whole")
    task, seed = next((each.task, each.seed) for each in expected if each.steps > 4)
    monkeypatch.setenv(point.FAULT, f"raise {task} {seed} 4 {tmp_path / 'happened'}")
    records = run(tiny, envs=2)
    assert results(records) == results(expected)
    assert {(each.task, each.seed): each.restarts for each in records if each.restarts} == {(task, seed): 1}
    monkeypatch.setenv(point.FAULT, f"raises right 1 0 {tmp_path / 'never'}")
    with pytest.raises(
        ChildProcessError, match=r"(?s)right, seed 1, cannot .*3 times.*RuntimeError: the point is los"
    ):
        run(tiny, "always")


def test_three_crashes_over_one_episode_are_enough(tiny, run, point, monkeypatch, tmp_path):
    monkeypatch.setenv(point.FAULT, f"always right 1 0 {tmp_path / 'never'}")
    with pytest.raises(ChildProcessError, match=r"point's right, seed 1, cannot be simulated: 3 times in a row .* -9"):
        run(tiny, envs=1)
    assert ("right", 0) in {(each.task, each.seed) for each in read_records(tmp_path / "out")[0]}


def test_probes_stand_beside_the_score(tiny, run, tmp_path, results):
    score, swapped = run(tiny), run(tiny, probe="swap", processes=2)
    assert {(each.task, each.instruction) for each in swapped} == {
        ("left", "Go to the right"),
        ("right", "Go to the left"),
    }
    records, protocol = read_records(tmp_path / "out")
    assert results(records) == results([*score, *swapped]) and "probe" not in protocol
    with pytest.raises(ValueError, match="No probe is called 'swop'"):
        run(tiny, probe="swop")


def test_the_first_episodes_are_filmed(tiny, run, tmp_path, results):
    import av
    from PIL import Image

    records = run(tiny, report={"videos": 2})
    files = sorted((tmp_path / "out" / "videos").iterdir())
    ends = ["failure", "success"]
    wanted = [each for each in records if each.seed < 2]
    assert [file.name for file in files] == [
        f"{each.task}_seed{each.seed}_{ends[each.success]}.mp4" for each in wanted
    ]
    for file, record in zip(files, wanted, strict=True):
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            assert stream.average_rate == 20 and sum(1 for _ in container.decode(stream)) == record.steps + 1
    assert results(records) == results(run(tiny, "plain"))
    run(tiny, "gifs", selection="left", report={"videos": 1, "video_suffix": ".gif"})
    (file,) = (tmp_path / "gifs" / "videos").iterdir()
    with Image.open(file) as image:
        assert image.format == "GIF" and image.n_frames == wanted[0].steps + 1 and image.info["duration"] == 50


def test_films_can_be_made_later(tiny, run, tmp_path, results):
    records = run(tiny)
    before = (tmp_path / "out" / EPISODES).read_bytes()
    reported = []
    assert results(run(tiny, report={"videos": 1, "on_episode": reported.append})) == results(records)
    files = sorted((tmp_path / "out" / "videos").iterdir())
    assert [file.name.split("_")[0] for file in files] == ["left", "right"] and len(reported) == len(records)
    assert (tmp_path / "out" / EPISODES).read_bytes() == before
    times = [file.stat().st_mtime_ns for file in files]
    run(tiny, report={"videos": 1})
    assert [file.stat().st_mtime_ns for file in files] == times


@pytest.mark.parametrize("fault", ["kill", "always"])
def test_a_film_begins_anew_with_its_episode(tiny, run, point, tmp_path, monkeypatch, fault):
    import av

    monkeypatch.setenv(point.FAULT, f"{fault} left 0 3 {tmp_path / 'happened'}")
    if fault == "always":
        with pytest.raises(ChildProcessError, match="3 times"):
            run(tiny, selection="one", report={"videos": 1}, policy_options={"n_action_steps": 2})
        assert not [*(tmp_path / "out" / "videos").iterdir()]
        return
    record = run(tiny, selection="one", report={"videos": 1}, policy_options={"n_action_steps": 2})[0]
    (file,) = (tmp_path / "out" / "videos").iterdir()
    with av.open(str(file)) as container:
        assert record.restarts == 1 and sum(1 for _ in container.decode(video=0)) == record.steps + 1


def test_a_gripper_of_other_numbers_is_converted(tiny, run, point, monkeypatch, tmp_path, results):
    own = run(tiny)
    monkeypatch.setenv(point.MIRRORED, "1")
    assert results(run(tiny, "mirrored")) == results(own)
    _, protocol = read_records(tmp_path / "mirrored")
    sides = {"checkpoint": {"open": -1.0, "closed": 1.0}, "simulator": {"open": 1.0, "closed": 0.0}}
    assert protocol["gripper_converted"] == sides
    assert "gripper_converted" not in read_records(tmp_path / "out")[1]


def test_a_model_gone_astray_is_named_with_its_episode(sawyer, run):
    import torch

    system = sawyer("tinyvla")
    with torch.no_grad():
        for parameter in system[0].parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"No prediction for left \(seed 0, step 0\).*(NaN|finite)"):
        run(system)


def test_a_checkpoint_of_another_robot_does_not_move(tiny, run, tmp_path):
    with pytest.raises(
        ValueError, match=r"(?s)not for point:\n- Camera 'corner4': No camera of this scene.*'topview'"
    ):
        run(tiny, cameras={"corner4": "topview"})
    assert not (tmp_path / "out").exists()
    assert run(tiny, selection="one", episodes=1, cameras={"corner4": "top"})[0].steps > 0


def test_the_protocol_says_what_decides_the_results(tiny, run, tmp_path):
    run(tiny, selection="one", episodes=1, seed=4, policy_options={"n_action_steps": 2})
    _, protocol = read_records(tmp_path / "out")
    expected = {"env": "point", "tasks": ["left"], "episodes": 1, "seed": 4, "horizon": 7, "n_action_steps": 2}
    assert expected.items() <= protocol.items() and {"torch", "gymnasium"} <= protocol["versions"].keys()
    assert protocol["cameras"] == {"corner4": ["corner4", 48, 48]} and len(protocol["weights_sha256"]) == 64
    assert "--n-action-steps 2" in protocol["command"] and "--seed 4" in protocol["command"]
    system = (tiny[0], tiny[1])
    with __import__("torch").no_grad():
        parameter = next(system[0].parameters())
        before = parameter.flatten()[0].item()
        parameter.flatten()[0] += 1e-3
        try:
            with pytest.raises(ValueError, match="differs in weights_sha256"):
                run(system, selection="one", episodes=1, seed=4, policy_options={"n_action_steps": 2})
        finally:
            parameter.flatten()[0] = before


def test_a_checkpoint_is_what_it_holds_not_what_it_is_called(tiny, run, tmp_path):
    from copy import deepcopy

    run(tiny, selection="one", episodes=1)
    before = (tmp_path / "out" / EPISODES).read_bytes()
    plan = EvaluationPlan("point", "left", 1, horizon=7, batch_size=2)
    evaluate(*tiny, plan, tmp_path / "out", "elsewhere/tiny")
    assert (tmp_path / "out" / EPISODES).read_bytes() == before
    model, processor = tiny[0], deepcopy(tiny[1])
    (key,) = processor.statistics
    values = next(values for values in processor.statistics[key]["action"].values() if isinstance(values, list))
    values[0] += 0.01
    with pytest.raises(ValueError, match="differs in config_sha256"):
        evaluate(model, processor, plan, tmp_path / "out", "tiny")
    for change in (lambda tokenizer: tokenizer.add_tokens(["Go"]), lambda one: setattr(one, "chat_template", "x")):
        processor = deepcopy(tiny[1])
        same = config_sha256(model, processor)
        processor.tokenizer("a", padding="max_length", max_length=7)
        assert config_sha256(model, processor) == same
        change(processor.tokenizer)
        assert config_sha256(model, processor) != same
    slow = [ByT5Tokenizer(extra_ids=count) for count in (0, 9)]  # written in Python
    hashes = [config_sha256(model, SimpleNamespace(tokenizer=each, chat_template=None, to_dict=dict)) for each in slow]
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    "options",
    [{"episodes": 0}, {"horizon": 0}, {"seed": -1}, {"rendering": "nice"}, {"seed": 999_990, "episodes": 11}],
)
def test_a_plan_that_is_none(point, options):
    with pytest.raises(ValueError, match="Expected"):
        EvaluationPlan("point", "both", **options)


def test_initial_states_are_not_repeated():
    EvaluationPlan("libero", "libero_spatial", 50)
    EvaluationPlan("simpler", "widowx_put_eggplant_in_basket", 64)
    for env, selection, starts in (("libero", "libero_spatial", 50), ("simpler", "widowx_stack_cube", 24)):
        with pytest.raises(ValueError, match=f"has {starts} initial states"):
            EvaluationPlan(env, selection, starts + 1)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from transformers import AutoModel, AutoProcessor
import hf_vla
from hf_vla.evaluation.envs.registry import ENVS
from hf_vla.evaluation.protocol import EvaluationPlan
from hf_vla.evaluation.rollout import evaluate

ENVS["point"] = "point.PointTask"
model, processor = AutoModel.from_pretrained(sys.argv[2]).eval(), AutoProcessor.from_pretrained(sys.argv[2])
evaluate(model, processor, EvaluationPlan("point", "both", 8, horizon=7, batch_size=2), sys.argv[3], "tiny", 2, 4)
"""


def test_killed_and_started_again_it_ends_as_if_never_killed(tiny, point, tmp_path, results, monkeypatch):
    """And no process stays behind."""
    for part in tiny:
        part.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "pids").mkdir()
    monkeypatch.setenv(point.PIDS, str(tmp_path / "pids"))

    def start(folder):
        command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "checkpoint"), str(folder)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    victim = start(tmp_path / "killed")
    file = tmp_path / "killed" / EPISODES
    until = time.monotonic() + 240
    while (not file.exists() or file.read_bytes().count(b"\n") < 3) and victim.poll() is None:
        assert time.monotonic() < until, "no records within four minutes"
        time.sleep(0.01)
    victim.kill()
    victim.communicate()
    count = file.read_bytes().count(b"\n")
    assert 3 <= count < 16
    until = time.monotonic() + 30
    while alive := [pid.name for pid in (tmp_path / "pids").iterdir() if Path("/proc", pid.name).exists()]:
        assert time.monotonic() < until, f"still alive: {alive}"
        time.sleep(0.05)
    for folder in ("killed", "whole"):
        process = start(tmp_path / folder)
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    assert results(read_records(tmp_path / "killed")[0]) == results(read_records(tmp_path / "whole")[0])
    assert len(read_records(tmp_path / "killed")[0]) == 16
