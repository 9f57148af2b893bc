"""Pictures and depth of MuJoCo scenes, and where their cameras are."""

import math
import weakref

import mujoco
import numpy as np

from hf_vla.actions.spec import CameraSpec
from hf_vla.evaluation.envs.base import check_known

QUICK = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)  # flags that cost most


class MujocoCameras:
    """Cameras of a MuJoCo scene.

    Args:
        model (`mujoco.MjModel`), data (`mujoco.MjData`): the scene.
        sizes (`Mapping[str, tuple[int, int]]`): width and height in pixels of every camera.
        fast (`bool`): no shadows, reflections and multisampling.
        upside_down (`Collection[str]`): cameras that stand on their heads; their pictures are turned by 180 degrees.
        geom_groups (`Collection[int]`, *optional*): the groups of geoms to show; MuJoCo's own choice otherwise.
        scene_names (`Mapping[str, str]`, *optional*): a camera's name -> the scene's name for it, where they differ.

    Raises:
        ValueError: the scene has no such camera.
    """

    def __init__(self, model, data, sizes, fast=True, upside_down=(), geom_groups=None, scene_names=None):
        ours = {theirs: name for name, theirs in (scene_names or {}).items()}
        cameras = {ours.get(theirs, theirs): theirs for theirs in (model.camera(i).name for i in range(model.ncam))}
        for name in sizes:
            check_known("camera of this scene", name, cameras)
        self.model, self.data, self.fast, self.upside_down = model, data, fast, frozenset(upside_down)
        self._scene_names = cameras
        self._options = mujoco.MjvOption()
        if geom_groups is not None:
            self._options.geomgroup[:] = [group in geom_groups for group in range(len(self._options.geomgroup))]
        if fast:
            model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(width for width, _ in sizes.values())
        model.vis.global_.offheight = max(height for _, height in sizes.values())
        self._renderers = {size: self._renderer(*size) for size in {*sizes.values()}}
        self._close = weakref.finalize(self, _close, tuple(self._renderers.values()))  # EGL must be there still
        self._sizes = dict(sizes)
        self.specs = {name: self._spec(name, *size) for name, size in sizes.items()}

    def _renderer(self, width, height):
        renderer = mujoco.Renderer(self.model, height, width)
        if self.fast:
            for flag in QUICK:
                renderer.scene.flags[flag] = 0
        return renderer

    def _spec(self, name, width, height):
        focal = 0.5 * height / math.tan(math.radians(self.model.camera(self._scene_names[name]).fovy[0]) / 2)
        intrinsics = ((focal, 0.0, width / 2), (0.0, focal, height / 2), (0.0, 0.0, 1.0))
        return CameraSpec(name, width, height, intrinsics)

    def settle(self) -> None:
        """Let everything that is drawn follow from the simulator's state."""
        mujoco.mj_forward(self.model, self.data)

    def picture(self, name: str) -> np.ndarray:
        """Picture of a camera, `(H, W, 3)` uint8."""
        return self._render(name)

    def depth(self, name: str) -> np.ndarray:
        """Metres along the optical axis, `(H, W)` float32."""
        renderer = self._renderers[self._sizes[name]]
        renderer.enable_depth_rendering()
        try:
            return self._render(name)
        finally:
            renderer.disable_depth_rendering()

    def _render(self, name):
        renderer = self._renderers[self._sizes[name]]
        renderer.update_scene(self.data, self._scene_names[name], self._options)
        picture = renderer.render()
        return np.ascontiguousarray(picture[::-1, ::-1]) if name in self.upside_down else picture

    def pose(self, name: str) -> np.ndarray:
        """Camera to world, `(4, 4)`, metres; x to the right of the picture, y down, z ahead."""
        camera, pose = self.data.camera(self._scene_names[name]), np.eye(4)
        turned = np.diag([-1.0, 1.0, -1.0] if name in self.upside_down else [1.0, -1.0, -1.0])
        pose[:3, :3], pose[:3, 3] = camera.xmat.reshape(3, 3) @ turned, camera.xpos
        return pose

    def close(self) -> None:
        """Give the renderers back."""
        self._close()


def _close(renderers):
    for renderer in renderers:
        renderer.close()
