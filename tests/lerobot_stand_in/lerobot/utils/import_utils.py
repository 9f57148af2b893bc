import importlib
import importlib.metadata

PREFIXES = ("lerobot_robot_", "lerobot_camera_", "lerobot_teleoperator_", "lerobot_policy_")


def register_third_party_plugins():
    """Import every installed distribution whose name, as it is written, begins as LeRobot's plug-ins do."""
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata.get("Name")
        if name and name.startswith(PREFIXES):
            importlib.import_module(name)
