"""Code that came with a checkpoint stays with it when the installed classes save it.

This file is part of that code, so it does not import what writes it, `hf_vla.models.remote_code`.
"""

from importlib import import_module
from pathlib import Path


class KeepsCode:
    """Mixin of configurations and processors, whose files name in `auto_map` the classes that lie beside them."""

    def to_json_file(self, json_file_path, *args, **kwargs):
        """Write the file and, where `auto_map` names our code, that code beside it.

        An `auto_map` of others' code is left out: the code would not be there, nor could it read what we write. Where
        this class itself came with a checkpoint, transformers copies its code.

        Arguments are those of transformers' method.

        Raises:
            ValueError: the folder has files of the code's names that are not ours.
        """
        if getattr(self, "auto_map", None) and type(self).__module__.startswith("hf_vla."):
            remote_code = import_module("hf_vla.models.remote_code")
            model_type = type(self).__module__.split(".")[2]
            if self.auto_map.items() & remote_code.auto_map(model_type).items():
                remote_code.write_code(Path(json_file_path).parent, model_type)
            else:
                del self.auto_map
        super().to_json_file(json_file_path, *args, **kwargs)
