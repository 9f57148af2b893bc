"""Meta-World MT50: a Sawyer arm and fifty tasks on a table.

Actions: xyz in units of a centimetre (+-1), and the gripper's effort, -1 opens; 80 Hz. The objects of a seed lie where
Meta-World's own seeded sampler puts them. Instructions are those of LeRobot's table, but that of push-back-v3, which
there is push-v3's.

Source: https://arxiv.org/abs/1910.10897; the four splits: https://arxiv.org/abs/2206.14244
"""

from typing import ClassVar

from hf_vla.actions.spec import ActionSpec, GripperSpec, StateSpec
from hf_vla.evaluation.envs.mujoco import MujocoTask

EASY = {
    "button-press-topdown-v3": "Press a button from the top",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
    "button-press-v3": "Press a button",
    "button-press-wall-v3": "Bypass a wall and press a button",
    "coffee-button-v3": "Push a button on the coffee machine",
    "dial-turn-v3": "Rotate a dial 180 degrees",
    "door-close-v3": "Close a door with a revolving joint",
    "door-lock-v3": "Lock the door by rotating the lock clockwise",
    "door-open-v3": "Open a door with a revolving joint",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
    "drawer-close-v3": "Push and close a drawer",
    "drawer-open-v3": "Open a drawer",
    "faucet-close-v3": "Rotate the faucet clockwise",
    "faucet-open-v3": "Rotate the faucet counter-clockwise",
    "handle-press-side-v3": "Press a handle down sideways",
    "handle-press-v3": "Press a handle down",
    "handle-pull-side-v3": "Pull a handle up sideways",
    "handle-pull-v3": "Pull a handle up",
    "lever-pull-v3": "Pull a lever down 90 degrees",
    "peg-unplug-side-v3": "Unplug a peg sideways",
    "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
    "plate-slide-back-v3": "Get a plate from the cabinet",
    "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
    "plate-slide-v3": "Slide a plate into a cabinet",
    "reach-v3": "Reach a goal position",
    "reach-wall-v3": "Bypass a wall and reach a goal",
    "window-close-v3": "Push and close a window",
    "window-open-v3": "Push and open a window",
}
MEDIUM = {
    "basketball-v3": "Dunk the basketball into the basket",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
    "box-close-v3": "Grasp the cover and close the box with it",
    "coffee-pull-v3": "Pull a mug from a coffee machine",
    "coffee-push-v3": "Push a mug under a coffee machine",
    "hammer-v3": "Hammer a screw on the wall",
    "peg-insert-side-v3": "Insert a peg sideways",
    "push-wall-v3": "Bypass a wall and push a puck to a goal",
    "soccer-v3": "Kick a soccer into the goal",
    "sweep-into-v3": "Sweep a puck into a hole",
    "sweep-v3": "Sweep a puck off the table",
}
HARD = {
    "assembly-v3": "Pick up a nut and place it onto a peg",
    "hand-insert-v3": "Insert the gripper into a hole",
    "pick-out-of-hole-v3": "Pick up a puck from a hole",
    "pick-place-v3": "Pick and place a puck to a goal",
    "push-back-v3": "Push the puck back to a goal",
    "push-v3": "Push the puck to a goal",
}
VERY_HARD = {
    "disassemble-v3": "Pick a nut out of the a peg",
    "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    "shelf-place-v3": "Pick and place a puck onto a shelf",
    "stick-pull-v3": "Grasp a stick and pull a box with the stick",
    "stick-push-v3": "Grasp a stick and push a box using the stick",
}
INSTRUCTIONS = {**EASY, **MEDIUM, **HARD, **VERY_HARD}
MT10 = (
    *("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3"),
    *("button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3"),
)
EASIEST = (  # the ten that the expert does soonest, in 34 to 54 steps; a choice of this library
    *("handle-press-v3", "coffee-button-v3", "handle-press-side-v3", "door-unlock-v3", "reach-v3"),
    *("plate-slide-side-v3", "reach-wall-v3", "plate-slide-back-side-v3", "plate-slide-v3", "plate-slide-back-v3"),
)
UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")
GRIPPER = GripperSpec(index=3, open=-1.0, closed=1.0)


class MetaWorldTask(MujocoTask):
    """One of Meta-World's fifty tasks; see [`~hf_vla.evaluation.envs.base.SimulatedTask`].

    Cameras: corner, corner2, corner3, corner4 (the closest look at the workspace), topview, behindGripper,
    gripperPOV.
    """

    name, robot = "metaworld", "sawyer"
    default_cameras: ClassVar = {"corner4": (128, 128)}
    horizon = 500
    action_spec = ActionSpec(("x", "y", "z", "gripper"), "delta_ee", frame="world", control_hz=80.0, gripper=GRIPPER)
    state_spec = StateSpec(("x", "y", "z", "gripper"), frame="world")

    @classmethod
    def splits(cls):
        """The splits of the literature, MT10 and MT50, and the ten easiest."""
        splits = {"easy": EASY, "medium": MEDIUM, "hard": HARD, "very_hard": VERY_HARD, "mt50": INSTRUCTIONS}
        return {name: tuple(tasks) for name, tasks in splits.items()} | {"mt10": MT10, "easiest": EASIEST}

    def _make(self):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.instruction = INSTRUCTIONS[self.task]
        self.simulator = ALL_V3_ENVIRONMENTS[self.task]()
        # `reset(seed)` is ignored; these let `seed` decide, and show the expert where the goal is
        self.simulator._freeze_rand_vec, self.simulator.seeded_rand_vec = False, True
        self.simulator._set_task_called, self.simulator._partially_observable = True, False
        self.simulator.__dict__.pop("sawyer_observation_space", None)  # made before, it would cut the goal away
        self._film(self.simulator.model, self.simulator.data, upside_down=UPSIDE_DOWN)

    def _restart(self, seed):
        self.simulator.seed(seed)
        self.numbers, _ = self.simulator.reset()
        self._cameras.settle()  # else the previous goal is still to be seen

    def _advance(self, action):
        self.simulator.curr_path_length = 0  # its own end of an episode, which is not ours
        self.numbers, _, _, _, info = self.simulator.step(action)
        return info["success"] > 0

    def _state(self):
        return self.numbers[:4]
