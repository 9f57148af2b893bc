"""Open X-Embodiment: its datasets and named mixtures, as `oxe.toml` beside this file gives them.

The RLDS originals are brought into one form by [`~hf_vla.data.oxe_steps.standardize`]; the same facts describe the
LeRobot conversions of IPEC-COMMUNITY, which can be trained from directly.

Where the datasets need care:

- Bridge's actions are the differences of the states reached; its first action is empty and its last has no successor.
- `iamlab_cmu_pickup_insert` and `ucsd_kitchen` record absolute poses (UCSD's in millimetres and degrees), and so does
  RH20T, going by its key's name: `standardize` turns them into motion, the LeRobot conversions keep them.
- BC-Z's rotations are rotation vectors; the LeRobot conversion passes them on as they are.
- DROID, FMB, TACO and the datasets of robosuite's controller (VIOLA, BUDS, Sailor, Sirius, MUTEX) give motion in the
  controller's own scale, not in metres. DROID's LeRobot conversion exchanges the two outer cameras at random.
- Kuka holds failed episodes, which are left out.

Source: names, keys, gripper conventions, camera roles and weights as in
https://github.com/octo-models/octo (`octo/data/oxe`), https://github.com/openvla/openvla
(`prismatic/vla/datasets/rlds/oxe`) and https://github.com/SpatialVLA/SpatialVLA (`data/oxe`); robots, rates and
colour orders from https://github.com/Tavish9/any4lerobot (`openx2lerobot`); features from
https://www.tensorflow.org/datasets/catalog; intrinsics from https://github.com/simpler-env/SimplerEnv.
"""

import tomllib
from difflib import get_close_matches
from pathlib import Path

from hf_vla.actions.spec import CameraSpec
from hf_vla.data.oxe_steps import OxeDataset

OWNER = "IPEC-COMMUNITY/"
SUFFIX = "_converted_externally_to_rlds"


def _read(path: Path) -> tuple[dict[str, OxeDataset], dict[str, dict[str, float]]]:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    datasets = {}
    for name, entry in table["datasets"].items():
        entry = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        entry = {"lerobot": f"{OWNER}{name}_lerobot"} | entry
        for optional in ("lerobot", "published_rotation"):  # TOML has no null
            if optional in entry:
                entry[optional] = entry[optional] or None
        cameras = entry.pop("intrinsics", {})
        intrinsics = {role: CameraSpec(role, **camera) for role, camera in cameras.items()}
        datasets[name] = OxeDataset(name, **entry, intrinsics=intrinsics)
    return datasets, table["mixtures"]


DATASETS, MIXTURES = _read(Path(__file__).with_suffix(".toml"))


def oxe_dataset(name: str) -> OxeDataset:
    """Look up a dataset.

    Args:
        name (`str`): of the dataset, as the folder of its RLDS original is called, with or without its version
            (`bridge_orig/1.0.0`) and `_converted_externally_to_rlds`; or of its LeRobot conversion on the Hub.

    Raises:
        ValueError: the table has no such dataset; the text suggests the nearest ones.
    """
    short = name.removeprefix(OWNER).split("/")[0].removesuffix("_lerobot").removesuffix(SUFFIX)
    return DATASETS[_known(short, name, "Open X-Embodiment dataset", DATASETS)]


def oxe_mixture(name: str) -> dict[str, float]:
    """Look up a mixture: dataset -> weight. A dataset's share of the samples is its weight times its number of steps.

    Raises:
        ValueError: there is no such mixture; the text suggests the nearest ones.
    """
    return dict(MIXTURES[_known(name, name, "mixture", MIXTURES)])


def _known(key: str, name: str, what: str, table: dict) -> str:
    if key in table:
        return key
    near = get_close_matches(key, table, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"No {what} {name!r}.{hint} Known are {sorted(table)}.")
