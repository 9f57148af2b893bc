"""The expert of every simulator that has one; imported when it is asked for."""

from importlib import import_module

from hf_vla.evaluation.envs.base import Expert, check_known

EXPERTS = {
    "metaworld": "hf_vla.evaluation.envs.experts.metaworld.MetaWorldExpert",
    "robosuite": "hf_vla.evaluation.envs.experts.robosuite.RobosuiteExpert",
    "simpler": "hf_vla.evaluation.envs.experts.simpler.SimplerExpert",
    "two_ways": "hf_vla.evaluation.envs.experts.two_ways.TwoWaysExpert",
}


def expert(name: str) -> type[Expert]:
    """Return the class of a simulator's expert.

    Raises:
        ValueError: no simulator of this name has one.
    """
    check_known("simulator with an expert", name, EXPERTS)
    module, _, attribute = EXPERTS[name].rpartition(".")
    return getattr(import_module(module), attribute)
