"""Which classes make up a model family, and how transformers' Auto classes come to know them.

`import hf_vla` imports this file and must stay cheap, so transformers is not imported here. Hooks
(`wrapt.when_imported`) register the families as soon as somebody imports the Auto classes, at once where that has
happened already. Three circles are to be avoided, whichever file is imported first:

- Our configuration and processing files import transformers, which may import an Auto class while ours are still
  unfinished. So the hook on an Auto class only imports ours, and each of ours is registered when it is finished.
- transformers imports `AutoModel` in the middle of its own modeling files, which ours need. So models are registered
  as a [`LazyClass`], which the first `from_pretrained` that wants one resolves.
- A configuration that inherits from one of transformers' imports `AutoModel`, and needs it finished. So nobody imports
  configurations while `AutoModel` is unfinished, and whichever of the two is finished last registers the model.
"""

import sys
from importlib import import_module

from wrapt import when_imported

# model_type: (configuration, model, processor), in `hf_vla.models.<model_type>.<kind>_<model_type>`
FAMILIES = {
    "divla": ("DiVLAConfig", "DiVLAForActionPrediction", "DiVLAProcessor"),
    "pi0_vla": ("PI0VLAConfig", "PI0VLAForActionPrediction", "PI0VLAProcessor"),
    "spatialvla": ("SpatialVLAConfig", "SpatialVLAForConditionalGeneration", "SpatialVLAProcessor"),
    "tinyvla": ("TinyVLAConfig", "TinyVLAForActionPrediction", "TinyVLAProcessor"),
}
KINDS = ("configuration", "modeling", "processing")


def family_module(model_type, kind):
    """Name of the module that holds one class of a family; `kind` is "configuration", "modeling" or "processing"."""
    return f"hf_vla.models.{model_type}.{kind}_{model_type}"


def family_class(model_type, kind):
    """Import one class of a family.

    Args:
        model_type (`str`): a key of `FAMILIES`.
        kind (`str`): "configuration", "modeling" or "processing".

    Returns:
        `type`: the class.
    """
    return getattr(import_module(family_module(model_type, kind)), FAMILIES[model_type][KINDS.index(kind)])


class LazyClass(tuple):
    """One (model_type, kind) that reads as its class; Auto classes accept a tuple of classes per configuration."""

    def __iter__(self):
        return (family_class(*reference) for reference in super().__iter__())

    def __getitem__(self, index):
        return tuple(self)[index]


def _auto_models():
    """The Auto classes of models; empty where their module is not imported, or not finished."""
    module = sys.modules.get("transformers.models.auto.modeling_auto")
    return [getattr(module, name) for name in ("AutoModel", "AutoModelForImageTextToText") if hasattr(module, name)]


@when_imported("transformers.models.auto.configuration_auto")
def _import_configurations(_):
    if "transformers.models.auto.modeling_auto" in sys.modules and not _auto_models():
        return  # its own hook, below, comes next
    for model_type in FAMILIES:
        import_module(family_module(model_type, "configuration"))


@when_imported("transformers.models.auto.processing_auto")
def _import_processors(_):
    for model_type in FAMILIES:
        import_module(family_module(model_type, "processing"))


def _register_model(model_type):
    """Do so if both the Auto classes and the configuration are finished; else the unfinished one's hook will."""
    config_class = getattr(sys.modules[family_module(model_type, "configuration")], FAMILIES[model_type][0], None)
    for auto_class in _auto_models() if config_class is not None else ():
        auto_class.register(config_class, LazyClass([(model_type, "modeling")]), exist_ok=True)


@when_imported("transformers.models.auto.modeling_auto")
def _register_models(_):
    for model_type in FAMILIES:
        import_module(family_module(model_type, "configuration"))
        _register_model(model_type)


def _register_family(model_type):
    @when_imported(family_module(model_type, "configuration"))
    def register_configuration(_):
        from transformers.models.auto.configuration_auto import AutoConfig

        AutoConfig.register(model_type, family_class(model_type, "configuration"), exist_ok=True)
        _register_model(model_type)

    @when_imported(family_module(model_type, "processing"))
    def register_processor(_):
        from transformers.models.auto.processing_auto import AutoProcessor

        config_class, processor_class = (family_class(model_type, kind) for kind in ("configuration", "processing"))
        AutoProcessor.register(config_class, processor_class, exist_ok=True)


for _model_type in FAMILIES:
    _register_family(_model_type)
