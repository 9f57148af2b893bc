"""What simulators on MuJoCo share."""

from hf_vla.evaluation.envs.base import SimulatedTask


class MujocoTask(SimulatedTask):
    """A task of a simulator that is built on MuJoCo.

    `_make` ends with `_film`.
    """

    def _film(self, model, data, **options) -> None:
        """Set up the cameras of a scene; see [`~hf_vla.evaluation.envs.rendering.MujocoCameras`]."""
        from hf_vla.evaluation.envs.rendering import MujocoCameras

        self._cameras = MujocoCameras(model, data, self.sizes, self.rendering == "fast", **options)
        self.camera_specs = self._cameras.specs

    def _pictures(self, camera, depth):
        return self._cameras.picture(camera), self._cameras.depth(camera) if depth else None

    def camera_pose(self, camera):
        """Camera to world; see the base class."""
        return self._cameras.pose(camera)

    def close(self):
        """Give the renderers back."""
        self._cameras.close()
