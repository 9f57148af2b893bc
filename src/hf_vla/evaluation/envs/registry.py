"""Every simulator by its name; imported when it is asked for."""

from importlib import import_module

from hf_vla.evaluation.envs.base import SimulatedTask, check_known

ENVS = {
    "libero": "hf_vla.evaluation.envs.libero.LiberoTask",
    "metaworld": "hf_vla.evaluation.envs.metaworld.MetaWorldTask",
    "robosuite": "hf_vla.evaluation.envs.robosuite.RobosuiteTask",
    "simpler": "hf_vla.evaluation.envs.simpler.SimplerTask",
    "two_ways": "hf_vla.evaluation.envs.two_ways.TwoWaysTask",
}


def simulator(name: str) -> type[SimulatedTask]:
    """Return the class of a simulator's tasks.

    Raises:
        ValueError: the name is unknown.
    """
    check_known("simulator", name, ENVS)
    module, _, attribute = ENVS[name].rpartition(".")
    return getattr(import_module(module), attribute)
