"""Putting a LeRobot dataset on the Hub so that LeRobot finds it."""

import json
from pathlib import Path

from hf_vla.data import schema
from hf_vla.data.recording.commits import WORK, is_unfinished


def push_dataset(
    root: Path,
    repo_id: str,
    private: bool | None = None,
    tags: list[str] | None = None,
    license: str | None = None,
    branch: str | None = None,
) -> str:
    """Upload a dataset with a card, and tag it with the version of its format, which LeRobot's reader asks for.

    Args:
        root (`Path`): the dataset's folder. Its README.md, where it has one, is the card.
        repo_id (`str`): `owner/name`; it is created if need be.
        private (`bool`, *optional*): whether a new repository is private; as the owner's settings say by default.
        tags (`list[str]`, *optional*): of the card that is made, besides "LeRobot".
        license (`str`, *optional*): of the card that is made.
        branch (`str`, *optional*): to upload to, in place of the main one.

    Returns:
        `str`: the address of the dataset.

    Raises:
        ValueError: a recorder was interrupted among the files of an episode.
    """
    from huggingface_hub import HfApi

    if is_unfinished(root):
        raise ValueError(f"{root}: an episode is saved by halves; open the folder with LeRobotRecorder to finish it.")
    version = schema.read_info(root).codebase_version
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    repo = {"repo_id": url.repo_id, "repo_type": "dataset"}
    if branch is not None:
        api.create_branch(**repo, branch=branch, exist_ok=True)
    api.upload_folder(**repo, folder_path=root, revision=branch, ignore_patterns=[WORK, f"{WORK}/**"])
    if not (root / "README.md").exists():
        card = dataset_card(root, url.repo_id, tags, license)
        api.upload_file(**repo, path_or_fileobj=card.encode(), path_in_repo="README.md", revision=branch)
    if version in {tag.name for tag in api.list_repo_refs(**repo).tags}:
        api.delete_tag(**repo, tag=version)
    api.create_tag(**repo, tag=version, revision=branch)
    return str(url)


def dataset_card(root: Path, repo_id: str, tags: list[str] | None = None, license: str | None = None) -> str:
    """Return a card with the entries by which the Hub and LeRobot's visualizer know a dataset."""
    from huggingface_hub import DatasetCardData

    info = json.loads((root / "meta/info.json").read_text(encoding="utf-8"))
    data = DatasetCardData(
        license=license,
        tags=["LeRobot", *(tag for tag in tags or [] if tag != "LeRobot")],
        task_categories=["robotics"],
        configs=[{"config_name": "default", "data_files": "data/*/*.parquet"}],
    )
    tasks = [text for text in schema.read_tasks(root, schema.read_info(root)).values() if text]
    cameras = [key for key, feature in info["features"].items() if feature["dtype"] in ("video", "image")]
    rows = {
        "Robot": info.get("robot_type") or "not named",
        "Episodes": info["total_episodes"],
        "Frames": f"{info['total_frames']} at {info['fps']} per second",
        "Cameras": ", ".join(f"`{camera}`" for camera in cameras) or "none",
    }
    lines = [
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n",
        "Robot demonstrations in the format of [LeRobot](https://github.com/huggingface/lerobot), recorded with "
        "hf_vla.\n",
        "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items()),
        f"[Look at the episodes](https://huggingface.co/spaces/lerobot/visualize_dataset?path={repo_id}).\n",
        "## Tasks\n\n" + "".join(f"- {json.dumps(task, ensure_ascii=False)}\n" for task in tasks),
        f"## Structure\n\n[meta/info.json](meta/info.json):\n\n```json\n{json.dumps(info, indent=4)}\n```\n",
    ]
    return "\n".join(lines)
