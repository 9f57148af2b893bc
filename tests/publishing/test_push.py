"""Checkpoints that are pushed to the Hub and pulled from it, over real HTTP and in processes of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import LoraConfig
from safetensors.torch import load
from transformers import AutoModel
from typer.testing import CliRunner

import hf_vla  # noqa: F401
from hf_vla.cli.main import app
from hf_vla.hub.card import write_card
from hf_vla.hub.export import export_remote_code
from hf_vla.hub.push import push_checkpoint
from hf_vla.models.auto import FAMILIES
from hf_vla.policy import Policy

REPO = "somebody/robot"
SHIPPED = Path(__file__).parents[2] / "spaces/action_demo/checkpoints/tinyvla_metaworld"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# In a process that has nothing but the names: pulls, predicts, and says what it got.
PULL = """
import json, sys
import numpy as np
from hf_vla import Policy
from hf_vla.hub.latency import blank_observation

rows = {}
for repo in sys.argv[2:]:
    name, _, revision = repo.partition("@")
    policy = Policy.from_pretrained(name, seed=0, revision=revision or None)
    rows[repo.replace("/", ":")] = policy.predict_chunk(blank_observation(policy, "reach"))
np.savez(sys.argv[1], **rows)
"""

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own uploads


@pytest.fixture
def signed_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture
def impatient(monkeypatch):
    """huggingface_hub tries again at once, not after half a minute."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def robots(sawyer, tmp_path_factory):
    """A saved checkpoint of every family."""
    folders = {}
    for family in FAMILIES:
        model, processor = sawyer(family)
        folders[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(folders[family])
        processor.save_pretrained(folders[family])
    return folders


def predict(source, **options):
    from hf_vla.hub.latency import blank_observation

    policy = Policy.from_pretrained(source, seed=0, **options)
    return policy.predict_chunk(blank_observation(policy, "reach"))


def pull(tmp_path, *repos):
    """Predict with checkpoints on the Hub in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PULL, str(tmp_path / "pulled.npz"), *repos],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "pulled.npz") as rows:
        return [rows[repo.replace("/", ":")] for repo in repos]


def read(hub, name):
    return hub.read(REPO, name, kind="model")


def add_adapters(model):
    torch.manual_seed(1)
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and "q_proj" in name]
    model.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    return model


def test_what_is_pushed_acts_the_same_in_a_fresh_process(signed_in, robots, tmp_path):
    wanted, repos = [], []
    for family, folder in robots.items():
        model, processor = AutoModel.from_pretrained(folder), hf_vla.Policy.from_pretrained(folder).processor
        repo = f"somebody/{family}"
        model.push_to_hub(repo)
        processor.push_to_hub(repo)
        wanted.append(predict(folder))
        repos.append(repo)
    # adapters of a model on the Hub, by themselves
    folder, repo = tmp_path / "adapters", "somebody/adapters"
    model = add_adapters(AutoModel.from_pretrained("somebody/tinyvla"))
    model.save_pretrained(folder)
    hf_vla.Policy.from_pretrained(robots["tinyvla"]).processor.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/tinyvla"
    push_checkpoint(folder, repo)
    assert "model.safetensors" not in signed_in.files(repo, kind="model")
    wanted.append(predict(folder))
    assert not np.array_equal(wanted[-1], wanted[list(robots).index("tinyvla")])

    for action, expected in zip(pull(tmp_path, *repos, repo), wanted, strict=True):
        assert action.dtype == expected.dtype and np.array_equal(action, expected)
    for _, name in signed_in.repos:
        assert not [file for file in signed_in.files(name, kind="model") if file.endswith(PICKLES)]


def test_revisions(signed_in, robots, sawyer, tmp_path):
    first = push_checkpoint(robots["tinyvla"], REPO, code=False)
    HfApi().create_tag(REPO, tag="v1")
    other, _ = sawyer("tinyvla")
    with torch.no_grad():
        for parameter in other.action_head.parameters():
            parameter.add_(0.5)
    other.save_pretrained(tmp_path / "other")
    Policy.from_pretrained(robots["tinyvla"]).processor.save_pretrained(tmp_path / "other")
    push_checkpoint(tmp_path / "other", REPO, revision="further/steps", code=False)
    one, two = predict(robots["tinyvla"]), predict(tmp_path / "other")
    assert not np.array_equal(one, two)
    for revision, expected in {"v1": one, "main": one, first.revision: one, "further/steps": two, None: one}.items():
        assert np.array_equal(predict(REPO, revision=revision), expected)
    options = ["--text", "reach", "--state", "0 0 0 0", "--seed", "0", "--revision", "v2", "--model", REPO]
    result = CliRunner().invoke(app, ["predict", "--image", str(SHIPPED / "frame_corner4.png"), *options])
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and "'somebody/robot' has no branch, tag or commit 'v2'" in said
    with pytest.raises(ValueError, match="a folder, which has no revision"):
        Policy.from_pretrained(robots["tinyvla"], revision="v1")


def test_adapters_of_a_revision_are_of_the_base_s_own(signed_in, robots, tmp_path):
    """The revision is the adapter's; the model on the Hub that it adapts has no such branch."""
    push_checkpoint(robots["tinyvla"], "somebody/base", code=False)
    folder = tmp_path / "adapters"
    add_adapters(AutoModel.from_pretrained("somebody/base")).save_pretrained(folder)
    Policy.from_pretrained(robots["tinyvla"]).processor.save_pretrained(folder)
    push_checkpoint(folder, REPO, revision="second", code=False)
    assert signed_in.files(REPO, kind="model") == []
    assert np.array_equal(predict(REPO, revision="second"), predict(folder))


def test_adapters_bring_their_model_along_or_are_refused(signed_in, robots, tmp_path):
    base, folder = shutil.copytree(robots["tinyvla"], tmp_path / "here"), tmp_path / "adapters"
    add_adapters(AutoModel.from_pretrained(base)).save_pretrained(folder)
    Policy.from_pretrained(base).processor.save_pretrained(folder)
    wanted = predict(folder)
    with pytest.raises(ValueError, match="is no model on the Hub that could be found, .* push that model"):
        push_checkpoint(folder, REPO, code=False)
    assert not signed_in.repos
    shutil.move(base, folder / "base")
    push_checkpoint(folder, REPO, code=False)
    assert str(tmp_path) in (folder / "adapter_config.json").read_text()  # as it was
    assert not [
        name for name in signed_in.files(REPO, kind="model") if str(tmp_path).encode() in read(signed_in, name)
    ]
    shutil.rmtree(folder)
    assert np.array_equal(predict(REPO), wanted) and np.array_equal(predict(REPO, revision="main"), wanted)
    assert ModelCard.load(REPO).data.base_model is None


def test_private_repositories(signed_in, robots, monkeypatch):
    push_checkpoint(robots["tinyvla"], REPO, private=True, code=False)
    assert signed_in.repos["model", REPO].private
    wanted = predict(robots["tinyvla"])
    assert np.array_equal(predict(REPO), wanted)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        OSError, match=r"not on the Hub, or it is private, nor is there a folder .* run `hf auth login`"
    ):
        predict(REPO)
    with pytest.raises(OSError, match="not on the Hub, or it is private"):
        predict("somebody/nothing")
    assert np.array_equal(predict(REPO, token=signed_in.read_token), wanted)


def test_what_shall_be_private_is_not_pushed_where_all_can_see_it(signed_in, robots):
    HfApi().create_repo(REPO)
    with pytest.raises(ValueError, match="was there before, and is public: make it private"):
        push_checkpoint(robots["tinyvla"], REPO, private=True, code=False)
    assert signed_in.files(REPO, kind="model") == [] and not signed_in.requests("/lfs/*")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, r"Pushing to 'somebody/robot' needs a token with write permission, and none was found: run `hf auth"),
        (
            "hf_wrongwrongwrongwrong",
            r"The Hub does not accept the token .*: it is wrong or has expired\. Run `hf auth",
        ),
        (
            "read",
            r"The Hub does not let the token .* write to 'somebody/robot' \(.*\): it may need .* write permission",
        ),
    ],
)
def test_tokens_that_may_not_push(hub, robots, token, message, monkeypatch):
    token = hub.read_token if token == "read" else token
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    result = CliRunner().invoke(app, ["push", str(robots["tinyvla"]), REPO])
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and re.search(message, said), said
    assert "Traceback" not in said and not (token and token in said)
    assert not hub.repos


def test_a_wrong_token_is_told_from_a_missing_repository(signed_in, robots, monkeypatch):
    push_checkpoint(robots["tinyvla"], REPO, code=False)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrongwrong")
    with pytest.raises(OSError, match="does not accept the token of this computer") as caught:
        predict(REPO)
    assert "wrongwrong" not in str(caught.value)
    signed_in.repos["model", REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", signed_in.read_token)
    with pytest.raises(OSError, match=r"is gated: ask for access on http"):
        predict(REPO)


def test_without_a_connection(signed_in, robots, impatient, monkeypatch):
    push_checkpoint(robots["tinyvla"], REPO, code=False)
    wanted = predict(REPO)
    signed_in.close()
    assert np.array_equal(predict(REPO), wanted)  # of the cache
    waited = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    with pytest.raises(OSError, match="cannot be reached for 'somebody/other'"):
        predict("somebody/other")
    assert waited == []  # for names that are folders' more often than not
    with pytest.raises(OSError, match="cannot be reached for 'somebody/robot'.* not sent again"):
        push_checkpoint(robots["tinyvla"], REPO, code=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match="HF_HUB_OFFLINE is set, and 'somebody/other' is no folder here, nor complete in the cache"
    ):
        predict("somebody/other")


@pytest.mark.parametrize("name", ["no name", "a/b/c", "somebody/../x"])
def test_what_is_no_name(signed_in, robots, name):
    with pytest.raises(ValueError, match="Expected a name on the Hub such as owner/name"):
        push_checkpoint(robots["tinyvla"], name, code=False)


def test_an_interrupted_push_sends_the_rest_only(signed_in, robots, impatient, tmp_path):
    """Three files of weights; the connection is cut in the middle of the second, however often it is tried."""
    hub, folder = signed_in, tmp_path / "sharded"
    AutoModel.from_pretrained(robots["tinyvla"]).save_pretrained(folder, max_shard_size="400KB")
    Policy.from_pretrained(robots["tinyvla"]).processor.save_pretrained(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) >= 3
    oid = hub.keep(shards[1].read_bytes(), shards[1].name).sha256
    (hub.folder / oid).unlink()
    hub.cut_upload(f"/lfs/{oid}", times=99, after=1000)
    with pytest.raises(OSError, match="cannot be reached .* push again: what has arrived is not sent again"):
        push_checkpoint(folder, REPO, code=False)
    assert hub.files(REPO, kind="model") == []  # a commit is whole or not there
    arrived = {request.path for request in hub.requests("/lfs/*", "PUT") if request.status == 200}
    assert arrived and f"/lfs/{oid}" not in arrived
    hub.faults.clear()
    before = len(hub.log)
    push_checkpoint(folder, REPO, code=False)
    sent = [request.path for request in hub.log[before:] if request.method == "PUT"]
    assert f"/lfs/{oid}" in sent and not arrived & set(sent)
    assert np.array_equal(predict(REPO), predict(folder))


def changed(folder, target, **options):
    """Save another checkpoint of the same family: its actions differ."""
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.action_head.parameters():
            parameter.add_(0.5)
    model.save_pretrained(target, **options)
    Policy.from_pretrained(folder).processor.save_pretrained(target)
    return target


def with_base(folder, target):
    add_adapters(AutoModel.from_pretrained(folder)).save_pretrained(target)
    Policy.from_pretrained(folder).processor.save_pretrained(target)
    shutil.copytree(folder, target / "base")
    return target


def test_nothing_of_an_earlier_checkpoint_is_loaded(signed_in, robots, tmp_path):
    """One file, shards, adapters with their model, in one repository; what others put there stays."""
    whole, hub = robots["tinyvla"], signed_in
    first = with_code(whole, tmp_path / "first")
    (first / "eval").mkdir()
    (first / "eval" / "report.md").write_text("# Evaluated")
    push_checkpoint(first, REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=notes(tmp_path / "notes"))
    sharded = changed(whole, tmp_path / "sharded", max_shard_size="400KB")
    pushed = push_checkpoint(sharded, REPO, code=False)
    assert {"model.safetensors", "eval/report.md", "models_base.py"} <= set(pushed.removed)
    assert not {name for name in hub.files(REPO, kind="model") if name.endswith(".py")} - {"mine.py"}
    assert np.array_equal(predict(REPO), predict(sharded)) and not np.array_equal(predict(REPO), predict(whole))
    adapters = with_base(whole, tmp_path / "adapters")
    push_checkpoint(adapters, REPO, code=False)
    assert np.array_equal(predict(REPO), predict(adapters))
    pushed = push_checkpoint(sharded, REPO, code=False)
    assert {"adapter_config.json", "adapter_model.safetensors", "base/model.safetensors"} <= set(pushed.removed)
    assert np.array_equal(predict(REPO), predict(sharded))
    pushed = push_checkpoint(whole, REPO, code=False)
    assert "model.safetensors.index.json" in pushed.removed and np.array_equal(predict(REPO), predict(whole))
    assert {"LICENSE", "assets/data.csv", "photo.png", "mine.py"} <= set(hub.files(REPO, kind="model"))


def notes(folder):
    (folder / "assets").mkdir(parents=True)
    for name in ("LICENSE", "assets/data.csv", "photo.png", "mine.py"):
        (folder / name).write_text("mine")
    return folder


def with_code(folder, target):
    export_remote_code(shutil.copytree(folder, target))
    return target


def test_only_a_checkpoint_s_files_are_pushed(signed_in, robots, tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "run")
    own = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others = ["credentials.json", "token.txt", "logs/train.txt", "wandb/run-1/files/wandb-metadata.json"]
    others += [
        "runsheet.md",
        "runs/now/host.json",
        "eval/notes.txt",
        "mine.py",
        "base/keys.json",
        "weights.safetensors",
    ]
    others += ["assets/robot.csv", "_hf_vla_unfinished/config.json", ".hidden/config.json"]
    others += [f"assets/{name}" for name in ("robot.pt", "robot.PKL", "robot.pth.tar", "robot.joblib")]
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    pushed = push_checkpoint(folder, REPO, code=False)
    assert set(pushed.files) == own == set(signed_in.files(REPO, kind="model"))
    tops = [".hidden", "_hf_vla_unfinished", "assets", "base", "credentials.json", "eval/notes.txt", "logs", "mine.py"]
    assert pushed.left_out == [*tops, "runs", "runsheet.md", "token.txt", "wandb", "weights.safetensors"]
    result = CliRunner().invoke(
        app, ["push", str(folder), REPO, "--no-code", "--include", "*assets*", "--include", "*/config.json"]
    )
    assert result.exit_code == 0, result.output
    assert set(signed_in.files(REPO, kind="model")) == own | {"assets/robot.csv"}


def test_no_code_is_none(signed_in, robots, tmp_path):
    folder = with_code(robots["tinyvla"], tmp_path / "b")
    push_checkpoint(folder, REPO, code=False)
    assert not [name for name in signed_in.files(REPO, kind="model") if name.endswith(".py")]
    for name in ("config.json", "processor_config.json"):
        assert "auto_map" in (folder / name).read_text() and "auto_map" not in json.loads(read(signed_in, name))
    assert np.array_equal(predict(REPO), predict(folder))


def broken_shard(folder):
    AutoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="400KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    next(folder.glob("model-00002*")).unlink()


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_shard, "{folder}/model.safetensors.index.json names model-00002-of-.*, which {folder} does not hold"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "{folder}/model.safetensors.index.json names no files of weights",
        ),
        *(
            (
                lambda folder, shard=shard: (folder / "model.safetensors.index.json").write_text(
                    json.dumps({"weight_map": {"a": shard}})
                ),
                "{folder}/model.safetensors.index.json names no files of weights",
            )
            for shard in (3, "", "../model.safetensors")
        ),
        (cut, "{folder}/model.safetensors is not whole"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
            "Expected weights as model",
        ),
        (lambda folder: (folder / "processor_config.json").unlink(), "{folder} was saved without its processor"),
        (lambda folder: (folder / "README.md").write_text("# Mine\n<!-- begin robot -->\n"), "{folder}/README.md"),
    ],
)
def test_what_fails_leaves_no_trace_and_names_the_folder(signed_in, robots, tmp_path, spoil, message):
    folder = shutil.copytree(robots["tinyvla"], tmp_path / "mine")
    spoil(folder)
    with pytest.raises(ValueError, match=message.format(folder=folder)) as caught:
        push_checkpoint(folder, REPO, revision="branch")
    assert not signed_in.repos and "hf_vla_push" not in str(caught.value)


@pytest.mark.parametrize("name", ["outputs/base", "nobody/nothing", None, ""])
def test_adapters_of_what_is_not_on_the_hub_are_refused(signed_in, robots, tmp_path, name):
    """A path, too, that is none from where the push is called."""
    folder = with_base(robots["tinyvla"], tmp_path / "adapters")
    shutil.rmtree(folder / "base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    with pytest.raises(ValueError, match=f"are of {name!r}, which is no model on the Hub"):
        push_checkpoint(folder, REPO, code=False)
    assert not signed_in.repos


def test_what_is_written_on_the_hub_during_a_push_stays(signed_in, robots, monkeypatch):
    push_checkpoint(robots["tinyvla"], REPO, code=False)

    def write_meanwhile(*args):
        HfApi().upload_file(repo_id=REPO, path_or_fileobj=b"# Edited", path_in_repo="README.md")
        return write_card(*args)

    monkeypatch.setattr("hf_vla.hub.push.write_card", write_meanwhile)
    with pytest.raises(OSError, match="Somebody else pushed to 'somebody/robot' meanwhile: push again"):
        push_checkpoint(robots["tinyvla"], REPO, code=False)
    assert read(signed_in, "README.md") == b"# Edited"


def test_a_name_without_owner_is_one_s_own(signed_in, robots):
    push_checkpoint(robots["tinyvla"], "robot", code=False)
    assert signed_in.files(REPO, kind="model") and f'"{REPO}"'.encode() in read(signed_in, "README.md")


@pytest.mark.slow
def test_a_killed_push_goes_on(signed_in, robots, tmp_path):
    hub, folder = signed_in, robots["spatialvla"]
    hub.latency = 0.05
    command = [sys.executable, "-c", "from hf_vla.cli.main import app; app()", "push", str(folder), REPO, "--no-code"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not hub.requests("*/info/lfs/objects/batch") and process.poll() is None:
        pass
    process.kill()
    process.communicate()
    assert hub.files(REPO, kind="model") == []
    hub.latency = 0.0
    push_checkpoint(folder, REPO, code=False)
    assert np.array_equal(predict(REPO), predict(folder))


def test_a_push_leaves_the_folder_as_it_is_and_says_what_it_did(signed_in, robots, tmp_path):
    hub, folder = signed_in, tmp_path / "run"
    model = AutoModel.from_pretrained(robots["tinyvla"])
    model.save_pretrained(folder)
    Policy.from_pretrained(robots["tinyvla"]).processor.save_pretrained(folder)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "checkpoint-2/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"secret of this machine")
    (folder / ".env").write_text("HF_TOKEN=hf_mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in before}
    result = CliRunner().invoke(app, ["push", str(folder), REPO, "--message", "first", "--license", "mit"])
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert {path: path.stat().st_mtime_ns for path in before} == times
    files = hub.files(REPO, kind="model")
    wanted = {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
    assert wanted <= set(files) and any(name.endswith(".py") for name in files)
    assert not [name for name in files if name.endswith(PICKLES) or name.startswith((".", "checkpoint"))]
    assert not [name for name in files if b"secret of this machine" in hub.read(REPO, name, kind="model")]
    assert hub.repos["model", REPO].messages == ["initial commit", "first"]
    generated = (
        r"Written for the Hub, not into the folder: README.md, config.json, processor_config.json, \d+ files of"
    )
    assert re.search(generated, result.output)
    assert f'`AutoModel.from_pretrained("{REPO}", trust_remote_code=True)`' in read(hub, "README.md").decode()
    left_out = ".env, checkpoint-2, optimizer.pt, trainer_state.json, training_args.bin"
    assert f"Left out, no part of the checkpoint: {left_out}" in result.output
    pushed = load(hub.read(REPO, "model.safetensors", kind="model"))
    assert all(torch.equal(value, pushed[name]) for name, value in model.state_dict().items() if name in pushed)
    again = push_checkpoint(folder, REPO, message="second", license="mit")
    assert [request.path for request in hub.requests("/lfs/*", "PUT")] == [
        f"/lfs/{_sha(hub)}"
    ] and again.files == files


def _sha(hub):
    repo = hub.repos["model", REPO]
    return repo.commits[repo.resolve("main")]["model.safetensors"].sha256


def test_the_repository_s_own_card_is_kept(signed_in, robots):
    hub = signed_in
    push_checkpoint(robots["divla"], REPO, code=False)
    card = hub.read(REPO, "README.md", kind="model").decode()
    assert f'Policy.from_pretrained("{REPO}"' in card
    card = card.replace("<!-- begin usage -->", "Written on the Hub's page.\n\n<!-- begin usage -->")
    HfApi().upload_file(repo_id=REPO, path_or_fileobj=card.encode(), path_in_repo="README.md")
    push_checkpoint(robots["divla"], REPO, code=False)
    assert hub.read(REPO, "README.md", kind="model").decode() == card
    AutoModel.from_pretrained(robots["tinyvla"]).push_to_hub("somebody/drafted")  # with a card to be filled in
    assert "[More Information Needed]" in hub.read("somebody/drafted", "README.md", kind="model").decode()
    push_checkpoint(robots["tinyvla"], "somebody/drafted", code=False)
    assert "[More Information Needed]" not in hub.read("somebody/drafted", "README.md", kind="model").decode()


@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize("adapters", [False, True])
def test_pickles_are_refused(signed_in, robots, tmp_path, where, adapters):
    folder = tmp_path / "old"
    model = AutoModel.from_pretrained(robots["tinyvla"])
    Policy.from_pretrained(robots["tinyvla"]).processor.save_pretrained(folder)
    (model if not adapters else add_adapters(model)).save_pretrained(folder)
    name = "adapter_model" if adapters else "model"
    weights = load((folder / f"{name}.safetensors").read_bytes())
    (folder / f"{name}.safetensors").unlink()
    pickled = "adapter_model.bin" if adapters else "pytorch_model.bin"
    torch.save(weights, folder / pickled)
    with pytest.raises(ValueError, match=f"Expected weights as model.safetensors .* came only {pickled}, which is a"):
        push_checkpoint(folder, REPO)
    assert not signed_in.repos
    source = folder
    if where == "hub":
        source = HfApi().create_repo(REPO).repo_id
        HfApi().upload_folder(repo_id=REPO, folder_path=folder)
    for load_it in (AutoModel.from_pretrained, type(model).from_pretrained, Policy.from_pretrained):
        with pytest.raises(ValueError, match=f"came {pickled} alone: a pickle, which could run any code"):
            load_it(str(source))
    if where == "hub":
        assert pickled not in signed_in.fetched()  # not even downloaded
    with pytest.raises(ValueError, match="leave use_safetensors out"):
        type(model).from_pretrained(folder, use_safetensors=False)


def test_a_whole_repository_comes_back_as_it_was_pushed(signed_in, robots, tmp_path):
    pushed = push_checkpoint(robots["spatialvla"], REPO, code=False)
    folder = Path(snapshot_download(REPO, local_dir=tmp_path / "back"))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith(".cache")} == set(pushed.files)
    for name in set(pushed.files) - set(pushed.generated):
        assert (folder / name).read_bytes() == (robots["spatialvla"] / name).read_bytes()
    assert pushed.generated == ["README.md"] and os.path.basename(pushed.url) == pushed.revision
