"""SpatialVLA's adaptive action grid: one id for the translation, one for the rotation, one for the gripper.

The translation is binned in polar coordinates: theta (polar angle from +z), phi (azimuth), r (length).
Source: https://huggingface.co/papers/2501.15830
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from hf_vla.actions.tokenizers.base import FixedLengthTokenizer, check_actions

SPHERICAL = {"theta": (0.0, math.pi), "phi": (-math.pi, math.pi), "r": (0.0, math.sqrt(3.0))}
CARTESIAN = {"x": (-1.0, 1.0), "y": (-1.0, 1.0), "z": (-1.0, 1.0)}
ROTATION = {"roll": (-1.0, 1.0), "pitch": (-1.0, 1.0), "yaw": (-1.0, 1.0)}
NUM_BINS = (16, 32, 8, 16, 16, 16)
DISTRIBUTIONS = ("gaussian", "uniform", "quantile", "mixture")
TURNING = {"theta": (math.pi / 2,), "phi": (-math.pi / 2, 0.0, math.pi / 2)}  # where sine or cosine turn inside
MIN_WIDTH = 1e-6  # of an axis' range: no fitted bin is narrower, so that edges increase whatever the data


class GaussianGridTokenizer(FixedLengthTokenizer):
    """Bins of equal probability per axis, fitted to a dataset; 16x32x8 + 16x16x16 + 2 = 8194 ids by default.

    An action is `(x, y, z, roll, pitch, yaw, gripper)`, or `(x, y, z, gripper)` for a grid of three axes. The
    gripper belongs in [0, 1] and becomes 0 or 1. Ids: translation `(theta * n_phi + phi) * n_r + r`, then rotation
    `(roll * n_pitch + pitch) * n_yaw + yaw`, then the gripper's two, each block after the one before.

    Args:
        edges (`dict[str, list[float]]`, *optional*): increasing bin edges of each axis, used exactly as they are.
            Without them the distribution must be `"uniform"`; `fit`, `from_gaussians` and `from_published` make them.
        num_bins (`list[int]`, *optional*): bins of each axis; with `edges` it only has to agree with them.
        distribution (`str`, defaults to `"gaussian"`): what the edges were fitted to (see `fit`).
        min_sigma (`float`, defaults to 0.0): floor of the Gaussians' standard deviation; kept for the record.
        use_spherical (`bool`, defaults to `True`): False bins x, y and z themselves.
        uniform_weight (`float`, defaults to 0.5): uniform floor of "quantile" and "mixture"; kept for the record.
    """

    type = "gaussian_grid"

    def __init__(
        self,
        edges: Mapping[str, ArrayLike] | None = None,
        num_bins: Sequence[int] | None = None,
        distribution: str = "gaussian",
        min_sigma: float = 0.0,
        use_spherical: bool = True,
        uniform_weight: float = 0.5,
    ):
        _check_distribution(distribution, uniform_weight)
        if edges is None:
            if distribution != "uniform":
                raise ValueError(f"A {distribution!r} grid needs bin edges; make it with GaussianGridTokenizer.fit.")
            axes = _axes(num_bins or NUM_BINS, use_spherical)
            edges = {name: np.linspace(low, high, n + 1) for name, (low, high, n) in axes.items()}
        order = [*(SPHERICAL if use_spherical else CARTESIAN), *ROTATION]  # JSON files come with their keys sorted
        edges = {name: edges[name] for name in order if name in edges} | dict(edges)
        self.edges = {name: _check_edges(name, values) for name, values in edges.items()}
        self.num_bins = tuple(len(values) - 1 for values in self.edges.values())
        if num_bins is not None and self.num_bins != tuple(num_bins):
            raise ValueError(f"Expected edges for {list(num_bins)} bins; got edges of {list(self.num_bins)} bins.")
        axes = _axes(self.num_bins, use_spherical)
        if [*axes] != [*self.edges]:
            raise ValueError(f"Expected edges of the axes {[*axes]}; got {[*self.edges]}.")
        self.ranges = {name: (low, high) for name, (low, high, _) in axes.items()}
        self.distribution, self.min_sigma, self.use_spherical = distribution, float(min_sigma), bool(use_spherical)
        self.uniform_weight = float(uniform_weight)

        self._inner = [values[1:-1] for values in self.edges.values()]
        centers = [(values[:-1] + values[1:]) / 2 for values in self.edges.values()]
        self._tables = [_grid(centers[i : i + 3]) for i in range(0, len(centers), 3)]
        self._tables[0] = self._translation(self._tables[0])
        ends = np.cumsum([0, *(len(table) for table in self._tables), 2]).tolist()
        names = ["translation", "rotation"][: len(self._tables)] + ["gripper"]
        self.blocks = list(zip(names, ends[:-1], ends[1:], strict=True))
        self.vocab_size = ends[-1]
        self.action_dim = len(centers) + 1

    @classmethod
    def fit(
        cls,
        actions: np.ndarray,
        num_bins: Sequence[int] = NUM_BINS,
        distribution: str = "gaussian",
        min_sigma: float = 0.0,
        use_spherical: bool = True,
        uniform_weight: float = 0.5,
    ) -> "GaussianGridTokenizer":
        """Fit the bin edges to a dataset.

        Args:
            actions (`np.ndarray` of shape `(..., 7)`, or `(..., 4)` with three `num_bins`): normalised.
            num_bins (`list[int]`, defaults to 16, 32, 8, 16, 16, 16): bins of theta, phi, r(, roll, pitch, yaw).
            distribution (`str`, defaults to `"gaussian"`): what every bin shall hold the same mass of.
                - `"gaussian"`: the Gaussian of each axis' mean and standard deviation, as the paper does. Where an
                  axis hardly moves, all its bins crowd around the mean and other values are lost.
                - `"mixture"`: that Gaussian plus a uniform floor.
                - `"quantile"`: the empirical distribution plus a uniform floor; no floor, equal counts.
                - `"uniform"`: bins of equal width, whatever the data.
            min_sigma (`float`, defaults to 0.0): floor of the standard deviation, in the axis' units.
            use_spherical (`bool`, defaults to `True`): False bins x, y and z themselves, in [-1, 1].
            uniform_weight (`float`, defaults to 0.5): share w of the floor. No bin is then wider than `1 / w` times
                that of a uniform grid, nor more than `1 / (1 - w)` times that of the fitted distribution alone.

        Translations of length zero have no direction and do not count for theta and phi.

        Raises:
            ValueError: NaN or infinity, another shape, or an unknown distribution.
        """
        _check_distribution(distribution, uniform_weight)
        axes = _axes(num_bins, use_spherical)
        columns = np.clip(check_actions(actions, len(axes) + 1).reshape(-1, len(axes) + 1), -1.0, 1.0)
        columns = columns.T.astype(np.float64)
        if use_spherical:
            columns[:3] = _to_spherical(*columns[:3])
        samples = dict(zip(axes, columns, strict=False))
        if use_spherical and samples["r"].any():
            samples |= {name: samples[name][samples["r"] > 0] for name in ("theta", "phi")}
        if distribution != "quantile":
            gaussians = {name: (values.mean(), values.std()) for name, values in samples.items()}
            return cls.from_gaussians(gaussians, num_bins, distribution, min_sigma, use_spherical, uniform_weight)
        edges = {}
        for name, (low, high, n) in axes.items():
            ranks = np.linspace(0.0, 1.0, len(samples[name]))
            empirical = functools.partial(np.interp, xp=np.sort(samples[name]), fp=ranks)
            edges[name] = _spread(_floored_edges(empirical, low, high, n, uniform_weight), low, high)
        return cls(edges, None, distribution, min_sigma, use_spherical, uniform_weight)

    @classmethod
    def from_gaussians(
        cls,
        gaussians: Mapping[str, tuple[float, float]],
        num_bins: Sequence[int] = NUM_BINS,
        distribution: str = "gaussian",
        min_sigma: float = 0.0,
        use_spherical: bool = True,
        uniform_weight: float = 0.5,
    ) -> "GaussianGridTokenizer":
        """Build from the mean and standard deviation of each axis, `{"theta": (mean, std), ...}`.

        Raises:
            ValueError: an axis is missing or unknown, or its mean lies outside its range.
        """
        _check_distribution(distribution, uniform_weight)
        axes = _axes(num_bins, use_spherical)
        if distribution == "quantile":
            raise ValueError("Quantiles need data, a mean and a deviation do not tell them; use fit.")
        if set(gaussians) != set(axes):
            raise ValueError(f"Expected a (mean, std) for each of {[*axes]}; got {[*gaussians]}.")
        edges = {}
        for name, (low, high, n) in axes.items():
            mean, std = gaussians[name]
            if not (low <= mean <= high and 0 <= std < math.inf):
                raise ValueError(f"Expected a mean of {name} in [{low:g}, {high:g}] and std >= 0; got {mean}, {std}.")
            raw = _model_edges(distribution, mean, max(std, min_sigma), low, high, n, uniform_weight)
            edges[name] = _spread(raw, low, high)
        return cls(edges, None, distribution, min_sigma, use_spherical, uniform_weight)

    @classmethod
    def from_published(
        cls, action_config: Mapping[str, Any], bin_policy: Mapping[str, Any] | None, min_sigma: float = 0.0
    ) -> "GaussianGridTokenizer":
        """Build from the dictionaries of a published SpatialVLA `processor_config.json`; its edges are exact.

        Its cartesian grids (`use_spherical` false) call the axes theta, phi and r as well and give them the polar
        ranges; x, y and z are binned by those edges, as published.

        Raises:
            ValueError: a bin count that disagrees with the edges, or no edges for a grid that is not uniform.
        """
        published = [f"{axis}_bins" for axis in (*SPHERICAL, *ROTATION)]
        try:
            use_spherical, distribution = action_config["use_spherical"], action_config["distribution"]
            counts = action_config["num_bins"]["translation"] | action_config["num_bins"]["rotation"]
            num_bins, edges = [counts[key] for key in published], None
            if bin_policy is not None:
                policy = bin_policy["translation"] | bin_policy["rotation"]
                names = [*(SPHERICAL if use_spherical else CARTESIAN), *ROTATION]
                edges = {name: policy[key] for name, key in zip(names, published, strict=True)}
        except KeyError as error:
            raise ValueError(f"Expected {error} in a published action_config and bin_policy; it is missing.") from None
        return cls(edges, num_bins, distribution, min_sigma, use_spherical)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Assign translation, rotation and gripper to their grid cells, in float64; a value on an edge goes up.

        Args:
            actions (`np.ndarray` of shape `(..., T, action_dim)`): in [-1, 1]; clipped outside.

        Returns:
            `np.ndarray` of shape `(..., T * 3)` (`T * 2` without rotation): ids in `[0, vocab_size)`.

        Raises:
            ValueError: `actions` hold NaN or infinity, or have another shape.
        """
        actions = check_actions(actions, self.action_dim)
        columns = np.clip(actions, -1.0, 1.0).reshape(-1, self.action_dim).T.astype(np.float64, order="C")
        if self.use_spherical:
            columns[:3] = _to_spherical(*columns[:3])
        ids = np.empty((columns.shape[1], len(self.blocks)), dtype=np.int64)
        for block in range(len(self._tables)):
            a, b, c = (_digitize(columns[i], self._inner[i]) for i in range(3 * block, 3 * block + 3))
            _, n_b, n_c = self.num_bins[3 * block : 3 * block + 3]
            ids[:, block] = (a.astype(np.int64) * n_b + b) * n_c + c + self.blocks[block][1]
        ids[:, -1] = (columns[-1] >= 0.5) + self.blocks[-1][1]
        return ids.reshape(*actions.shape[:-2], actions.shape[-2] * len(self.blocks))

    def decode(self, ids: np.ndarray, horizon: int | None = None) -> np.ndarray:
        """Return the cell centres of ids `(..., T * 3)`, shape `(..., T, action_dim)`, float64.

        The translation is clipped to [-1, 1] (corners of the polar grid lie outside); the gripper is 0 or 1.

        Raises:
            ValueError: no whole number of actions, not `horizon` of them, or an id outside its block.
        """
        steps = self._check_ids(ids, horizon)
        actions = np.empty((*steps.shape[:-1], self.action_dim))
        for block, table in enumerate(self._tables):
            actions[..., 3 * block : 3 * block + 3] = table.take(steps[..., block] - self.blocks[block][1], axis=0)
        actions[..., -1] = steps[..., -1] - self.blocks[-1][1]
        return actions

    def resolution(self) -> np.ndarray:
        """Return the worst round-trip error, shape `(action_dim,)`: the farthest point of any cell from its centre.

        The gripper's is 1 for values in [-1, 1], half of that for those in [0, 1] where it belongs.
        """
        worst = np.zeros(self.action_dim)
        worst[-1] = 1.0
        candidates = []
        for (name, (low, high)), edges in zip(self.ranges.items(), self.edges.values(), strict=True):
            reach = np.array([min(low, edges[0]), *edges[1:-1], max(high, edges[-1])])
            turns = (-math.inf, *TURNING.get(name, ()), math.inf)
            candidates.append([np.clip(turn, reach[:-1], reach[1:]) for turn in turns])
        for block, table in enumerate(self._tables):
            axes = slice(3 * block, 3 * block + 3)
            for corner in itertools.product(*candidates[axes]):
                points = _grid(corner)
                if block == 0:
                    points = self._translation(points)
                worst[axes] = np.maximum(worst[axes], np.abs(points - table).max(axis=0))
        return worst

    def _translation(self, points: np.ndarray) -> np.ndarray:
        """Return the x, y, z, in the cube, of points `(n, 3)` on the translation's axes."""
        if self.use_spherical:
            theta, phi, r = points.T
            flat = r * np.sin(theta)
            points = np.stack([flat * np.cos(phi), flat * np.sin(phi), r * np.cos(theta)], axis=1)
        return np.clip(points, -1.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the options with the exact edges, JSON-safe."""
        return {
            "type": self.type,
            "edges": {name: values.tolist() for name, values in self.edges.items()},
            "num_bins": list(self.num_bins),
            "distribution": self.distribution,
            "min_sigma": self.min_sigma,
            "use_spherical": self.use_spherical,
            "uniform_weight": self.uniform_weight,
        }


def transfer_embeddings(
    embeddings: np.ndarray,
    source: GaussianGridTokenizer,
    target: GaussianGridTokenizer,
    periodic_azimuth: bool = False,
) -> np.ndarray:
    """Interpolate pretrained token embeddings onto another grid: the paper's spatial embedding adaptation.

    Trilinear between the source's cell centres, in the axes' own units, so that an embedding stays with its motion.
    Beyond the outermost centres the outermost embedding holds, for the azimuth too: -pi and +pi are two ends of the
    grid, as published. With `periodic_azimuth` it is interpolated across that seam instead.

    Args:
        embeddings (`np.ndarray` of shape `(source.vocab_size, H)`): floating point.
        source, target (`GaussianGridTokenizer`): of the same axes; any resolutions.
        periodic_azimuth (`bool`, defaults to `False`): interpolate phi across its seam.

    Returns:
        `np.ndarray` of shape `(target.vocab_size, H)`, same dtype; gripper rows are copied.

    Raises:
        ValueError: grids of different axes, another number of rows, or `periodic_azimuth` of a cartesian grid.
    """
    if [*source.edges] != [*target.edges]:
        raise ValueError(f"Expected grids of the same axes; got {[*source.edges]} and {[*target.edges]}.")
    if periodic_azimuth and not source.use_spherical:
        raise ValueError("Expected spherical grids with periodic_azimuth; a cartesian grid has no azimuth.")
    if embeddings.ndim != 2 or len(embeddings) != source.vocab_size or embeddings.dtype.kind != "f":
        raise ValueError(
            f"Expected floating point embeddings of shape ({source.vocab_size}, H), a row for each id of the source; "
            f"got {embeddings.dtype} of shape {embeddings.shape}."
        )
    weights = [
        _axis_weights(old, target.edges[name], periodic_azimuth and name == "phi").astype(embeddings.dtype)
        for name, old in source.edges.items()
    ]
    out = np.empty((target.vocab_size, embeddings.shape[1]), dtype=embeddings.dtype)
    for block, (_, first, end) in enumerate(source.blocks[:-1]):
        values, done = embeddings[first:end], 1
        for weight in weights[3 * block : 3 * block + 3]:
            values = weight @ values.reshape(done, weight.shape[1], -1)
            done *= weight.shape[0]
        out[slice(*target.blocks[block][1:])] = values.reshape(done, -1)
    out[-2:] = embeddings[-2:]
    return out


def _axis_weights(old_edges: np.ndarray, new_edges: np.ndarray, periodic: bool) -> np.ndarray:
    """Return the matrix `(new bins, old bins)` that interpolates values at the old centres to the new ones."""
    old, new = ((edges[:-1] + edges[1:]) / 2 for edges in (old_edges, new_edges))
    rows = np.eye(len(old))
    if periodic:
        old = np.array([old[-1] - 2 * math.pi, *old, old[0] + 2 * math.pi])
        rows = np.concatenate([rows[-1:], rows, rows[:1]])
    return np.stack([np.interp(new, old, column) for column in rows.T], axis=1)


def _axes(num_bins: Sequence[int], use_spherical: bool) -> dict[str, tuple[float, float, int]]:
    """Return `{axis: (low, high, bins)}`."""
    if len(num_bins) not in (3, 6) or min(num_bins) < 1:
        raise ValueError(f"Expected 6 bin counts, or 3 for a grid without rotation, all >= 1; got {num_bins}.")
    ranges = (SPHERICAL if use_spherical else CARTESIAN) | (ROTATION if len(num_bins) == 6 else {})
    return {name: (*ends, int(n)) for (name, ends), n in zip(ranges.items(), num_bins, strict=True)}


def _check_distribution(distribution: str, uniform_weight: float) -> None:
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"Unknown distribution {distribution!r}; expected one of {list(DISTRIBUTIONS)}.")
    if not 0.0 <= uniform_weight <= 1.0:
        raise ValueError(f"Expected a uniform_weight in [0, 1]; got {uniform_weight}.")


def _check_edges(name: str, values: ArrayLike) -> np.ndarray:
    edges = np.asarray(values, dtype=np.float64)
    if edges.ndim != 1 or len(edges) < 2 or not np.isfinite(edges).all() or not (np.diff(edges) > 0).all():
        raise ValueError(f"Expected at least two finite, strictly increasing edges of {name}; got {values!r}.")
    return edges


def _model_edges(
    distribution: str, mean: float, sigma: float, low: float, high: float, n: int, weight: float
) -> np.ndarray:
    sigma = max(sigma, MIN_WIDTH * (high - low))
    if distribution == "uniform":
        return np.linspace(low, high, n + 1)
    first, last = ndtr((low - mean) / sigma), ndtr((high - mean) / sigma)
    if distribution == "mixture":
        return _floored_edges(lambda x: (ndtr((x - mean) / sigma) - first) / (last - first), low, high, n, weight)
    return np.clip(ndtri(np.linspace(first, last, n + 1)) * sigma + mean, low, high)


def _floored_edges(cdf: Callable[[np.ndarray], Any], low: float, high: float, n: int, weight: float) -> np.ndarray:
    """Return edges of equal mass under `(1 - weight) * cdf + weight * uniform`, by bisection."""
    left, right, wanted = np.full(n + 1, low), np.full(n + 1, high), np.linspace(0.0, 1.0, n + 1)
    for _ in range(60):
        middle = (left + right) / 2
        mass = (1 - weight) * cdf(middle) + weight * (middle - low) / (high - low)
        left, right = np.where(mass < wanted, middle, left), np.where(mass < wanted, right, middle)
    return np.array([low, *right[1:-1], high])


def _spread(edges: np.ndarray, low: float, high: float) -> np.ndarray:
    """Push coinciding edges (constant or degenerate data) apart, within the range; others stay as they are."""
    width = MIN_WIDTH * (high - low)
    if np.diff(edges).min() >= width:
        return edges
    steps = np.arange(len(edges)) * width
    edges = np.maximum.accumulate(edges - steps) + steps
    return np.minimum(edges, high - steps[::-1])


def _to_spherical(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    flat = x * x + y * y
    return np.arctan2(np.sqrt(flat), z), np.arctan2(y, x), np.sqrt(flat + z * z)


def _grid(axes: Sequence[np.ndarray]) -> np.ndarray:
    """Return every combination of the axes' values, first axis slowest, shape `(product of lengths, axes)`."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


def _digitize(values: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Return how many inner edges each value has reached, as `np.digitize` does."""
    if len(inner) > 64:
        return np.searchsorted(inner, values, side="right")
    # A pass over the values for each edge vectorises and has no branches: 9 times searchsorted's speed at 16 bins.
    count, reached = np.zeros(values.shape, dtype=np.uint8), np.empty(values.shape, dtype=bool)
    for edge in inner:
        count += np.greater_equal(values, edge, out=reached)
    return count
