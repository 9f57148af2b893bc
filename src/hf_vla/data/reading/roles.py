"""Columns under the names that the library has for them, whatever a dataset calls them."""

from collections.abc import Mapping

from hf_vla.data.schema import DatasetInfo, camera_key

# What the rows are put in order by; always under these names.
_FIXED = ("index", "episode_index", "frame_index", "timestamp", "task_index")


def own_keys(
    dataset: str, info: DatasetInfo, camera_map: Mapping[str, str], column_map: Mapping[str, str]
) -> dict[str, str]:
    """Return the dataset's own key of every column, by the key it is read under.

    Args:
        dataset (`str`): names it in errors.
        info ([`~hf_vla.data.schema.DatasetInfo`]): of the dataset.
        camera_map (`Mapping[str, str]`): role -> camera, each with or without `observation.images.`.
        column_map (`Mapping[str, str]`): key -> the dataset's column, which is no camera.

    Raises:
        ValueError: there is no such camera or column, or two would have one name.
    """
    cameras = info.camera_keys
    wanted = {camera_key(role): key if key in cameras else camera_key(key) for role, key in camera_map.items()}
    _check(dataset, "camera", cameras, camera_map, wanted)
    columns = [key for key in info.features if key not in cameras and key not in _FIXED]
    _check(dataset, "column", columns, column_map, column_map)
    roles = {own: role for role, own in {**wanted, **column_map}.items()}
    own = {roles.get(key, key): key for key in info.features}
    if len(own) < len(info.features):
        raise ValueError(
            f"{dataset}: expected names that no other column of {[*info.features]} keeps, came "
            f"{dict(camera_map)} and {dict(column_map)}."
        )
    return own


def _check(dataset, what, known, given, wanted):
    if unknown := sorted({*wanted.values()} - {*known}):
        raise ValueError(f"{dataset}: no {what} {unknown} for the roles of {what}_map; it has {known}.")
    kept = {*known} - {*wanted.values()}
    if len({*wanted.values()}) < len(given) or len({*wanted} - kept) < len(given):
        raise ValueError(
            f"{dataset}: expected another role of {what}_map for each of its {what}s {known}, came {dict(given)}; "
            f"a role may not be the name of a {what} that keeps its own."
        )
