"""Clients that do not know of each other share batches, and nothing else."""

import time
from concurrent.futures import wait

import numpy as np
import pytest

from hf_vla.policy import predict_chunks
from hf_vla.serving.engine import Engine
from hf_vla.serving.protocol import RefusedRequest


@pytest.fixture
def engine():
    engines = []

    def make(**options):
        engines.append(Engine(**options))
        return engines[-1]

    yield make
    for each in engines:
        each.stop()


def together(engine, policies, observations, clients=None):
    """Ask for all of them at once; those whose requests fail give their error."""
    engine.clients = clients or len(policies) + 1  # so that they wait for each other
    futures = [engine.submit(policy, seen) for policy, seen in zip(policies, observations, strict=True)]
    wait(futures, 60)
    return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize("name", ["tinyvla_metaworld", "spatialvla_metaworld", "divla_metaworld"])
def test_an_answer_does_not_depend_on_its_company(name, shipped, vary, engine):
    models, first = shipped(name).models, shipped(name).observation
    seen = [vary(first, index) for index in range(5)]
    wanted = [predict_chunks([models.policy()], [each], None, 4)[0] for each in seen]
    answers = together(engine(batch_size=4, window_s=0.5), [models.policy() for _ in seen], seen, clients=5)
    for answer, chunk in zip(answers, wanted, strict=True):
        assert np.array_equal(answer.actions, chunk)
    speaks = models.policy().takes_reasoning  # and thinks alone
    assert {answer.mates for answer in answers} == ({1} if speaks else {1, 4})
    if speaks:
        assert all(isinstance(answer.reasoning, str) for answer in answers)
    assert len({chunk.tobytes() for chunk in wanted}) > 2  # of whole ids, some are the same


def test_instructions_do_not_mix(shipped, vary, engine, gate):
    models, first = shipped("tinyvla_metaworld").models, shipped("tinyvla_metaworld").observation
    held = gate(models.policy().model)
    held.open()
    tasks = ["Press a button from the top", "Open a drawer", "Press a button from the top", "Open a drawer"]
    seen = [{**vary(first, index), "task": task} for index, task in enumerate(tasks)]
    answers = together(engine(batch_size=2, window_s=5.0), [models.policy() for _ in seen], seen, clients=4)
    assert [answer.mates for answer in answers] == [2, 2, 2, 2] and held.calls == 2
    for answer, each in zip(answers, seen, strict=True):
        assert np.array_equal(answer.actions, predict_chunks([models.policy()], [each], None, 2)[0])


def test_one_error_is_nobody_elses(shipped, vary, engine):
    models, first = shipped("tinyvla_metaworld").models, shipped("tinyvla_metaworld").observation
    seen = [vary(first, index) for index in range(4)]
    bad = {**seen[1], "observation.images.corner4": np.full((8, 8, 3), np.nan, np.float32)}
    answers = together(
        engine(batch_size=4, window_s=5.0), [models.policy() for _ in seen], [seen[0], bad, *seen[2:]], clients=4
    )
    assert isinstance(answers[1], RefusedRequest) and answers[1].kind == "observation"
    for place in (0, 2, 3):
        assert np.array_equal(answers[place].actions, predict_chunks([models.policy()], [seen[place]], None, 4)[0])


def test_a_batch_that_fails_is_predicted_one_by_one_with_the_same_noise(shipped, vary, engine, monkeypatch, caplog):
    models, first = shipped("tinyvla_metaworld").models, shipped("tinyvla_metaworld").observation
    seen = [vary(first, index) for index in range(3)]
    wanted = [predict_chunks([models.policy()], [each], None, 4)[0] for each in seen]
    decode, bad = type(models.policy().processor).decode_actions, []

    def fail_once(self, output, unnorm_key=None):
        if not bad or (bad[0] == "alone" and output.actions.shape[0] == 4 and len(bad) < 3):
            bad.append("batch" if not bad else "again")
            raise RuntimeError("secret details")
        return decode(self, output, unnorm_key)

    monkeypatch.setattr(type(models.policy().processor), "decode_actions", fail_once)
    answers = together(engine(batch_size=4, window_s=5.0), [models.policy() for _ in seen], seen, clients=3)
    assert [answer.mates for answer in answers] == [1, 1, 1]
    for answer, chunk in zip(answers, wanted, strict=True):
        assert np.array_equal(answer.actions, chunk)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_what_the_model_cannot_do_is_not_the_observations_fault(error, shipped, engine, monkeypatch, caplog):
    models, seen = shipped("tinyvla_metaworld").models, shipped("tinyvla_metaworld").observation

    def fail(self, output, unnorm_key=None):
        raise error("secret details")

    monkeypatch.setattr(type(models.policy().processor), "decode_actions", fail)
    failing = engine()
    for _ in range(2):  # it goes on
        (answer,) = together(failing, [models.policy()], [seen])
        assert answer.kind == "internal" and "secret" not in str(answer) and "secret details" in caplog.text


def test_an_episode_goes_on_as_it_would_alone(shipped, vary, engine):
    """Each client's noise goes on from its own place, whoever else is asked."""
    models, first = shipped("tinyvla_metaworld").models, shipped("tinyvla_metaworld").observation
    alone = models.policy()
    wanted = [predict_chunks([alone], [vary(first, step)], None, 4)[0] for step in range(3)]
    shared, ours = engine(batch_size=4, window_s=0.05), models.policy()
    for step in range(3):
        others = [models.policy() for _ in range(step)]
        seen = [vary(first, step)] + [vary(first, 10 + index) for index in range(step)]
        answers = together(shared, [ours, *others], seen)
        assert np.array_equal(answers[0].actions, wanted[step])


def test_an_instruction_that_is_too_long_is_the_observations_fault(shipped, engine, caplog):
    models, seen = shipped("tinyvla_metaworld").models, shipped("tinyvla_metaworld").observation
    (answer,) = together(engine(), [models.policy()], [seen | {"task": "a " * 2048}])
    assert answer.kind == "observation" and "shorten the instruction" in str(answer) and not caplog.records


@pytest.mark.parametrize("window_s", [float("inf"), float("nan"), -1.0, 1e9])
def test_a_window_is_a_time(window_s):
    with pytest.raises(ValueError, match="Expected a window of 0 to 60 seconds"):
        Engine(2, window_s)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_failed(shipped, engine):
    models, seen = shipped("tinyvla_metaworld").models, shipped("tinyvla_metaworld").observation

    def fail(requests, seconds):
        raise RuntimeError("nobody foresaw this")

    failing = engine(observe=fail)
    answers = together(failing, [models.policy(), models.policy()], [seen, seen], clients=2)
    assert [answer.kind for answer in answers] == ["internal", "internal"]
    failing.stop()
    assert not failing.alive
    with pytest.raises(RefusedRequest):
        failing.submit(models.policy(), seen)


def test_too_many_are_refused_at_once(shipped, engine, gate):
    models, seen = shipped("tinyvla_metaworld").models, shipped("tinyvla_metaworld").observation
    held = gate(models.policy().model)
    full = engine(max_queue=2)
    futures = [full.submit(models.policy(), seen)]
    assert held.reached.wait(30)
    futures += [full.submit(models.policy(), seen) for _ in range(2)]
    assert full.queue_length == 2
    with pytest.raises(RefusedRequest, match="2 requests are waiting already") as error:
        full.submit(models.policy(), seen)
    assert error.value.kind == "overloaded"
    assert futures[1].cancel()
    futures.append(full.submit(models.policy(), seen))  # a place is free
    held.open()
    assert all(np.isfinite(futures[place].result(60).actions).all() for place in (0, 2, 3))
    assert [future.cancelled() for future in futures] == [False, True, False, False] and held.calls == 3


def test_who_is_alone_waits_for_nobody(shipped, engine):
    models, seen = shipped("tinyvla_metaworld").models, shipped("tinyvla_metaworld").observation
    alone = engine(batch_size=4, window_s=20.0)
    alone.clients = 1
    begun = time.monotonic()
    assert alone.submit(models.policy(), seen).result(30).queue_s < 5
    assert time.monotonic() - begun < 10


def test_stopped_it_answers_what_waits_and_takes_no_more(shipped, engine, gate):
    models, seen = shipped("tinyvla_metaworld").models, shipped("tinyvla_metaworld").observation
    held, stopping = gate(models.policy().model), engine(batch_size=2, window_s=20.0)
    stopping.clients = 9
    futures = [stopping.submit(models.policy(), seen) for _ in range(3)]
    held.open()
    stopping.stop()
    assert all(np.isfinite(future.result(0).actions).all() for future in futures) and not stopping.alive
    with pytest.raises(RefusedRequest, match="stopping"):
        stopping.submit(models.policy(), seen)
