"""The stand-in answers huggingface_hub as the Hub does: what other tests take for granted."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "repo/data").mkdir(parents=True)
    (tmp_path / "repo/README.md").write_text("---\nlicense: mit\n---\nwörter")
    (tmp_path / "repo/data/é 1.bin").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "repo/empty.txt").touch()
    return tmp_path / "repo"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["dataset", "model", "space"])
def test_a_folder_comes_back_as_it_was_pushed(hub, folder, kind):
    api = HfApi(token=hub.token)
    sdk = {"space_sdk": "gradio"} if kind == "space" else {}
    name = api.create_repo("somebody/thing", repo_type=kind, private=True, **sdk).repo_id
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(name, repo_type=kind, **sdk)
    api.create_repo(name, repo_type=kind, exist_ok=True, **sdk)
    first = api.upload_folder(repo_id=name, folder_path=folder, repo_type=kind, commit_message="all").oid
    api.create_tag(name, tag="v1", repo_type=kind)
    with pytest.raises(HfHubHTTPError, match="exists already"):
        api.create_tag(name, tag="v1", repo_type=kind)
    operations = [CommitOperationAdd("README.md", b"new"), CommitOperationDelete("data/", is_folder=True)]
    second = api.create_commit(name, operations, commit_message="less", repo_type=kind).oid
    assert first != second and hub.files(name, kind=kind) == ["README.md", "empty.txt"]
    assert contents(Path(snapshot_download(name, repo_type=kind, revision="v1", token=hub.token))) == contents(folder)
    assert api.repo_info(name, repo_type=kind, revision="v1").sha == first
    assert {tag.name for tag in api.list_repo_refs(name, repo_type=kind).tags} == {"v1"}
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(name, repo_type=kind, revision="v2", token=hub.token)
    with pytest.raises(RepositoryNotFoundError):  # private, and nobody is signed in
        snapshot_download(name, repo_type=kind)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_another").create_repo("somebody/other")


def test_ranges_are_served_and_counted(hub, folder):
    commit = hub.upload("somebody/blocks", folder)
    with HfFileSystem().open(f"datasets/somebody/blocks@{commit}/data/é 1.bin", "rb", cache_type="none") as file:
        file.seek(1000)
        assert file.read(10) == (bytes(range(256)) * 4)[1000:1010]
    assert hub.sent("*é 1.bin") == 10 and hub.fetched() == ["data/é 1.bin"]
    assert HfFileSystem().glob(f"datasets/somebody/blocks@{commit}/data/*.bin")


def test_faults_happen_as_often_as_told(hub, folder):
    hub.upload("somebody/blocks", folder)
    hub.cut("*é 1.bin", after=100)
    hub.fail("*README.md", status=500, method="GET")
    with pytest.raises(HfHubHTTPError, match="told to fail"):
        snapshot_download("somebody/blocks", repo_type="dataset")
    assert contents(Path(snapshot_download("somebody/blocks", repo_type="dataset"))) == contents(folder)
    assert 100 in [request.sent for request in hub.requests("*é 1.bin")]
    assert [request.status for request in hub.requests("*README.md", "GET")] == [500, 200]


def test_child_processes_ask_the_stand_in(hub, folder):
    hub.upload("somebody/blocks", folder)
    code = "import huggingface_hub as h; print(h.snapshot_download('somebody/blocks', repo_type='dataset'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert contents(Path(done.stdout.strip())) == contents(folder)


def test_tokens_may_read_or_write_or_nothing(hub, folder):
    hub.upload("somebody/secret", folder, private=True)
    reader = HfApi(token=hub.read_token)
    assert reader.repo_info("somebody/secret", repo_type="dataset").private
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="somebody/secret", repo_type="dataset")
    with pytest.raises(HfHubHTTPError, match="401.*\n*.*Invalid credentials"):
        HfApi(token="hf_another").repo_info("somebody/secret", repo_type="dataset")
    assert hub.files("somebody/secret") == ["README.md", "data/é 1.bin", "empty.txt"]


def test_uploads_are_cut_and_what_arrived_is_not_asked_for_again(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    (folder / "first.bin").write_bytes(b"1" * 1000)
    api = HfApi(token=hub.token)
    api.create_repo("somebody/thing")
    hub.cut_upload("/lfs/*", times=1, after=10)
    api.upload_file(path_or_fileobj=b"2" * 1000, path_in_repo="second.bin", repo_id="somebody/thing")
    assert [request.status for request in hub.requests("/lfs/*", "PUT")] == [0, 200]  # tried again
    api.upload_file(path_or_fileobj=b"2" * 1000, path_in_repo="third.bin", repo_id="somebody/thing")
    assert len(hub.requests("/lfs/*", "PUT")) == 2


@pytest.mark.parametrize(
    "metadata", ["base_model: /tmp/here", "datasets: [here]", "pipeline_tag: dance", "license: [", "a: b\n c: d"]
)
def test_metadata_are_looked_at(hub, metadata):
    api = HfApi(token=hub.token)
    api.create_repo("somebody/thing")
    with pytest.raises(ValueError, match="Invalid metadata|Invalid YAML"):
        card = f"---\n{metadata}\n---\n".encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="somebody/thing")
