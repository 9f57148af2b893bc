"""The section data of a training recipe."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from hf_vla.actions.spec import GripperSpec, whole_number
from hf_vla.data import schema
from hf_vla.data.mixture import BALANCES
from hf_vla.data.oxe import oxe_dataset, oxe_mixture
from hf_vla.data.oxe_steps import OxeDataset

CHUNK_TAILS = ("mask", "hold")
SHUFFLES = ("rows", "windows")


@dataclass
class CameraArguments:
    """A camera to look through and its calibration.

    Args:
        name (`str`): the camera's role for the model; with or without `observation.images.`.
        fovy (`float`, *optional*): vertical field of view in degrees, of square pixels around the image's centre.
        intrinsics (`list`, *optional*): 3 x 3 pinhole matrix in pixels of the recorded image, instead of `fovy`.
        size (`list[int]`, *optional*): width and height of the image whose pixels `intrinsics` are in, where that is
            not the recorded one.
        source (`str`, *optional*): the dataset's own name of the camera, where that is another.
    """

    name: str
    fovy: float | None = None
    intrinsics: list[list[float | int]] | None = None
    size: list[int] | None = None
    source: str | None = None

    def __post_init__(self):
        if self.fovy is not None and self.intrinsics is not None:
            raise ValueError("Expected fovy or intrinsics of a camera, came both.")
        if self.fovy is not None and not 0 < self.fovy < 180:
            raise ValueError(f"Expected a camera's fovy between 0 and 180 degrees, came {self.fovy}.")


@dataclass
class ActionArguments:
    """What the actions mean, see [`~hf_vla.actions.spec.ActionSpec`]; names and rate come from the dataset."""

    kind: str
    rotation: str | None = None
    frame: str | None = None
    gripper: GripperSpec | None = None


@dataclass
class StateArguments:
    """What the robot's state means, see [`~hf_vla.actions.spec.StateSpec`]; names come from the dataset."""

    rotation: str | None = None
    frame: str | None = None


@dataclass
class DatasetArguments:
    """A dataset, and how it is read.

    Args:
        source (`str`): folder or Hub name of a LeRobot dataset.
        cameras (`list[CameraArguments]`): the cameras to look through, in the order in which the model sees them.
        action (`ActionArguments`): what the actions mean.
        state (`StateArguments`, *optional*): what the robot's state means; without it the model sees no state.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        unnorm_key (`str`, *optional*): the dataset's name in the checkpoint; the last part of `source` by default.
        episodes (`list[int]`, *optional*): the episodes to read, held-out ones included; all of them by default.
        eval_episodes (`list[int]`): episodes kept from training, for evaluation.
        columns (`dict[str, str]`, *optional*): the dataset's own names of `action` and `observation.state`, where they
            are others: `{action: actions, observation.state: state}`.
        weight (`float`): above 0; of several datasets, what this one's share is multiplied by, see `data.balance`.
    """

    source: str
    cameras: list[CameraArguments]
    action: ActionArguments
    state: StateArguments | None = None
    revision: str | None = None
    unnorm_key: str | None = None
    episodes: list[int] | None = None
    eval_episodes: list[int] = field(default_factory=list)
    columns: dict[str, str] | None = None
    weight: float = 1.0

    def __post_init__(self):
        names = [schema.camera_key(camera.name) for camera in self.cameras]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Expected data.cameras to name one camera or more, each once, came {names}.")
        if self.weight <= 0:
            raise ValueError(
                f"Expected a weight above 0 for {self.source}, came {self.weight}: leave the dataset out."
            )
        self.unnorm_key = self.unnorm_key or Path(self.source).name


@dataclass
class FilterArguments:
    """What to leave out of the training, of which held-out episodes are no part.

    See [`~hf_vla.data.filters.find_dropped`]. Idle rows are missing from the observations before a row (`n_obs_steps`)
    too: behind a rest the training sees the rows before it, the policy the last steps of the rest.

    Args:
        idle (`float`, *optional*): share of its range by which a dimension may move while all is idle, 0.01 for
            example.
        idle_seconds (`float`): the shortest time of that which is left out.
        outliers (`float`, *optional*): ranges by which an action may lie outside of the usual, 1.0 for example.
        jerk (`float`, *optional*): ranges of the velocity by which the acceleration may change within a step, 1.0 for
            example.
        duplicates (`bool`): leave out episodes that are there twice, and those that are among the held-out ones.
    """

    idle: float | None = None
    idle_seconds: float = 0.5
    outliers: float | None = None
    jerk: float | None = None
    duplicates: bool = False


@dataclass
class DataArguments:
    """What to learn from: one dataset, several, or a named mixture of Open X-Embodiment.

    Args:
        source, cameras, action, state, revision, unnorm_key, episodes, eval_episodes, columns (one dataset): see
            [`DatasetArguments`].
        datasets (`list[DatasetArguments]`): several datasets instead.
        mixture (`str`, *optional*): a mixture of Open X-Embodiment instead, see [`~hf_vla.data.oxe.MIXTURES`].
            `cameras` are then named by their roles, primary, secondary and wrist, and calibrated as given where a
            dataset's calibration is not known; `state: {}` lets the model see states; `eval_episodes` are those of
            each dataset.
        mixture_without (`list[str]`): datasets of the mixture to leave out.
        mixture_root (`str`): Hub organisation or folder that has the mixture's datasets in LeRobot's form: a folder
            called like the dataset is taken for what `hf-vla convert rlds` wrote, else `<dataset>_lerobot` for
            IPEC-COMMUNITY's conversion.
        balance (`str`): share of each of several datasets in a training, before their weights: "size", in proportion
            to their rows, or "equal".
        chunk_size (`int`): actions that one prediction holds.
        chunk_tail (`str`): what stands in a chunk behind its episode's end: "mask", nothing that is learnt, or "hold",
            the robot holds its position there, see [`~hf_vla.data.tail.hold_tail`].
        n_obs_steps (`int`): observations that the model sees, the current one included, in families that take several.
        reasoning (`str`, *optional*): column of texts that the model is to say before it acts, "subtask" for example;
            a row without one trains the action head alone. By default nothing is said; a model that would still say
            something from its own training is made to act without a word, unless `model.new_embodiment` freezes it.
        camera_dropout (`float`): probability, below 1, with which each of several cameras is withheld from a training
            sample, though never all of them: so a model learns to act when one is missing.
        state_dropout (`float`): probability, below 1, with which the state is withheld from a training sample, zeros
            (normalised) in its place: a model that is told its state every time may never learn to look, see
            `hf-vla eval --probe blank`.
        filters (`FilterArguments`, *optional*): rows and episodes to leave out of the training; what was left out, and
            why, is written to `data_report.json` in `training.output_dir`.
        shuffle (`str`, *optional*): order of the training rows: "rows", any row after any other, or "windows", which
            reads videos forwards, see [`~hf_vla.data.sampling.WindowSampler`], and is many times faster where pictures
            are large or far away; the default for `streaming`.
        streaming (`bool`): read pictures of datasets on the Hub by and by instead of downloading them first.
        frame_cache (`str`, *optional*): folder that keeps decoded pictures, see [`~hf_vla.data.cache.FrameCache`].
        frame_cache_gb (`float`): its largest size, in 10^9 bytes.
    """

    source: str | None = None
    cameras: list[CameraArguments] = field(default_factory=list)
    action: ActionArguments | None = None
    state: StateArguments | None = None
    revision: str | None = None
    unnorm_key: str | None = None
    episodes: list[int] | None = None
    eval_episodes: list[int] = field(default_factory=list)
    columns: dict[str, str] | None = None
    datasets: list[DatasetArguments] = field(default_factory=list)
    mixture: str | None = None
    mixture_without: list[str] = field(default_factory=list)
    mixture_root: str = "IPEC-COMMUNITY"
    balance: str = "size"
    chunk_size: int = 4
    chunk_tail: str = "mask"
    n_obs_steps: int = 1
    reasoning: str | None = None
    camera_dropout: float = 0.0
    state_dropout: float = 0.0
    filters: FilterArguments | None = None
    shuffle: str | None = None
    streaming: bool = False
    frame_cache: str | None = None
    frame_cache_gb: float = 20.0

    def __post_init__(self):
        ways = {name: getattr(self, name) for name in ("source", "datasets", "mixture")}
        if sum(bool(way) for way in ways.values()) != 1:
            given = [f"data.{name}" for name, way in ways.items() if way]
            raise ValueError(f"Expected one of data.source, data.datasets and data.mixture, came {given or 'none'}.")
        own = {field.name: getattr(self, field.name) for field in fields(DatasetArguments) if field.name != "weight"}
        of_mixture = {"cameras", "state", "eval_episodes"} if self.mixture is not None else set()
        unread = [name for name, value in own.items() if value and self.source is None and name not in of_mixture]
        if unread:
            raise ValueError(
                f"data.{unread[0]} is of data.source alone: leave it out, or give it to each of datasets."
            )
        if self.mixture is None and self.mixture_without:
            raise ValueError("data.mixture_without is of a data.mixture: leave it out.")
        if self.mixture is not None:
            self.datasets = self._of_mixture()
        elif self.source is not None:
            if self.action is None:
                raise ValueError("The recipe lacks data.action: what the actions of data.source mean.")
            self.datasets = [DatasetArguments(**own)]
        self.shuffle = self.shuffle or ("windows" if self.streaming else "rows")
        for name, choices in (("balance", BALANCES), ("chunk_tail", CHUNK_TAILS), ("shuffle", SHUFFLES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"Expected data.{name} among {choices}, came {getattr(self, name)!r}.")
        for name in ("chunk_size", "n_obs_steps"):
            whole_number(getattr(self, name), f"data.{name}")
        keys = [dataset.unnorm_key for dataset in self.datasets]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"Several of data.datasets are called {repeated}: give them different unnorm_keys.")
        if len({dataset.state is None for dataset in self.datasets}) > 1:
            raise ValueError("Some of data.datasets have a state and some none: name it in all of them, or in none.")
        if not 0 <= self.camera_dropout < 1 or (self.camera_dropout and len(self.roles) == 1):
            raise ValueError(
                f"Expected data.camera_dropout from 0 to below 1, and 0 for one camera alone, came "
                f"{self.camera_dropout} for {self.roles}."
            )
        if not 0 <= self.state_dropout < 1 or (self.state_dropout and self.datasets[0].state is None):
            raise ValueError(
                f"Expected data.state_dropout from 0 to below 1, and 0 where data.state is not given, came "
                f"{self.state_dropout}."
            )

    def _of_mixture(self) -> list[DatasetArguments]:
        members = oxe_mixture(self.mixture)
        if unknown := sorted(set(self.mixture_without) - set(members)):
            raise ValueError(f"data.mixture_without names {unknown}, which {self.mixture!r} has not: {[*members]}.")
        datasets, unfit = [], {}
        for name in (name for name in members if name not in self.mixture_without):
            facts = oxe_dataset(name)
            own = Path(self.mixture_root, name).is_dir()  # written by `hf-vla convert rlds`, in the common form
            action, state = (facts.rlds_action, facts.rlds_state) if own else (facts.action, facts.state)
            common = facts.rlds_action
            cameras = [_calibrated(camera, facts) for camera in self.cameras if camera.name in facts.cameras]
            if not own and facts.lerobot is None:
                unfit[name] = "no LeRobot conversion is known"
            elif (action.kind, action.rotation) != (common.kind, common.rotation):
                unfit[name] = f"the conversion's actions are {action.kind} with rotation {action.rotation}"
            elif self.state is not None and state is None:
                unfit[name] = "it has no state"
            elif not cameras:
                unfit[name] = f"its cameras are {list(facts.cameras)}"
            else:
                folder = name if own else facts.lerobot.rpartition("/")[2]
                datasets.append(
                    DatasetArguments(
                        source=f"{self.mixture_root}/{folder}",
                        cameras=cameras,
                        action=ActionArguments(action.kind, action.rotation, action.frame, action.gripper),
                        state=self.state and StateArguments(state.rotation, state.frame),
                        unnorm_key=name,
                        eval_episodes=self.eval_episodes,
                        weight=members[name],
                    )
                )
        if unfit:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in unfit.items())
            raise ValueError(
                f"Not all of data.mixture {self.mixture!r} can be learnt from so: {reasons}. Leave them out, "
                f"data.mixture_without: {[*self.mixture_without, *unfit]}; or choose other data.cameras, no "
                "data.state, or what `hf-vla convert rlds` writes into a folder of the dataset's name in "
                "data.mixture_root, where actions have the common form, delta_ee with euler_xyz."
            )
        return datasets

    @property
    def roles(self) -> list[str]:
        """The cameras of all datasets, in the order in which the model sees them."""
        return list(dict.fromkeys(camera.name for dataset in self.datasets for camera in dataset.cameras))


def _calibrated(camera: CameraArguments, facts: OxeDataset) -> CameraArguments:
    """A camera of a mixture by its role; calibrated as the recipe says, unless more is known of it."""
    source, known = facts.cameras[camera.name], facts.intrinsics.get(camera.name)
    if known is None:
        return replace(camera, source=source)
    return CameraArguments(camera.name, None, [*map(list, known.intrinsics)], [known.width, known.height], source)
