"""Every simulator by its name; one is imported when it is asked for."""

from importlib import import_module

from hf_vla.evaluation.envs.base import SimulatedTask, check_known

ENVS = {
    "metaworld": "hf_vla.evaluation.envs.metaworld.MetaWorldTask",
}


def simulator(name: str) -> type[SimulatedTask]:
    """Return the class of a simulator's tasks.

    Raises:
        ValueError: the name is unknown.
        ImportError: the simulator is not installed; the text says how to.
    """
    check_known("simulator", name, ENVS)
    module, _, attribute = ENVS[name].rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise ImportError(
            f"The simulator {name!r} needs {error.name}: `pip install 'hf-vla[sim]'`, and see docs/simulators.md."
        ) from error
