"""A whole checkpoint: a model and its processor, from a folder or the Hub."""

from contextlib import nullcontext
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoModel, AutoProcessor

import hf_vla.models.auto  # noqa: F401  (registers the Auto classes)
from hf_vla.models.base import base_of_adapter, check_folder, options_of_revision, recorded_base
from hf_vla.models.hub_errors import hub_errors


def load_checkpoint(path, name=None, revision=None, token=None):
    """Load a model, in evaluation mode and on the CPU, and its processor.

    Args:
        path (`str`): folder or Hub name.
        name (`str`, *optional*): what errors call it.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        token (`str`, *optional*): for what is private on the Hub; by default HF_TOKEN, or that of `hf auth login`.

    Returns:
        `tuple`: the [`~transformers.PreTrainedModel`] and the [`~transformers.ProcessorMixin`].

    Raises:
        ValueError: a revision of a folder; see [`load_processor`] and the model's `from_pretrained`.
        OSError: there is no checkpoint, or the Hub refuses it or the model that it adapts; the text says why.
    """
    check_folder(path, name or str(path))
    if Path(path).is_dir() and revision is not None:
        raise ValueError(f"{path} is a folder, which has no revision {revision!r}: leave it out.")
    hub = {name: value for name, value in (("revision", revision), ("token", token)) if value is not None}
    source = base_of_adapter(Path(path)) if Path(path).is_dir() else str(path)
    if source is not None and Path(path).is_dir():
        recorded_base(Path(path, "adapter_config.json"))  # AutoModel takes none for a name on the Hub
    on_hub = source is not None and not Path(source).is_dir()
    with hub_errors(source, revision, token) if on_hub else nullcontext():
        if on_hub and not _is_cached(source, revision):
            HfApi().model_info(source, **hub)  # without a network transformers would try every file six times
        processor = load_processor(path, **hub)
        return AutoModel.from_pretrained(path, **options_of_revision(path, **hub)), processor


def _is_cached(name, revision):
    files = ("config.json", "adapter_config.json")
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)


def load_processor(path, **hub):
    """Load a checkpoint's processor.

    Args:
        path (`str` or `Path`): folder or Hub name.
        hub: `revision` and `token`.

    Returns:
        [`~hf_vla.models.processing.VLAProcessor`]

    Raises:
        ValueError: there is none, where transformers would fall back on a bare tokenizer, or it is of another family.
    """
    if Path(path).is_dir() and not Path(path, "processor_config.json").is_file():
        raise ValueError(f"{path} was saved without its processor: call processor.save_pretrained on it, too.")
    processor = AutoProcessor.from_pretrained(path, **hub)
    if not hasattr(processor, "action_codec"):
        raise ValueError(
            f"Expected the processor of a hf_vla family in {path}, came {type(processor).__name__}: the checkpoint is "
            "of another family, or was saved without its processor."
        )
    return processor
