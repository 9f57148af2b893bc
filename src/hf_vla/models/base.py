"""What the model families share: no re-initialised weights, one precision, no inputs that nobody reads."""

import inspect
import json
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file, has_file
from transformers.utils.peft_utils import find_adapter_config_file

from hf_vla.models.names import refuse_unknown

BASE = "base"  # folder of a model that adapters of a training were added to, beside them


class VLAPreTrainedModel(PreTrainedModel):
    """`PreTrainedModel` whose `from_pretrained` raises where transformers only warns."""

    # The loss is a mean over the batch: scaling it by the number of items in a step would be wrong.
    accepts_loss_kwargs = False

    def __init__(self, config: PreTrainedConfig):
        # A part would else be built in the precision that its own, published configuration names.
        _set_dtype_of_parts(config, torch.get_default_dtype())
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """Load a checkpoint; arguments and result are those of [`~transformers.PreTrainedModel.from_pretrained`].

        The base model of an adapter is the folder `base` that was saved with it, or is looked for where it was; on the
        Hub likewise.

        Raises:
            ValueError: the checkpoint lacks weights of the model, or holds them in another shape or as a pickle, or an
                adapter's base model is nowhere.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("Weights are read from safetensors alone: leave use_safetensors out.")
        adapter = str(pretrained_model_name_or_path)
        pretrained_model_name_or_path = base_of_adapter(Path(adapter)) or pretrained_model_name_or_path
        in_repository = not kwargs.get("subfolder") and _has_base(pretrained_model_name_or_path, kwargs)
        if in_repository:
            kwargs["subfolder"] = BASE
        if in_repository or str(pretrained_model_name_or_path) != adapter:
            given = kwargs.get("adapter_kwargs") or {}
            kwargs["adapter_kwargs"] = {"subfolder": "", "_adapter_model_path": adapter, **given}
        _refuse_pickles(pretrained_model_name_or_path, "model", "pytorch_model", kwargs)
        given = kwargs.get("adapter_kwargs") or {}
        adapter, options = given.get("_adapter_model_path", adapter), kwargs | {"subfolder": ""} | given
        if find_adapter_config_file(adapter, **_hub_options(options)) is not None:
            _refuse_pickles(adapter, "adapter_model", "adapter_model", options)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
        if wrong:
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} lacks {len(wrong)} weights of {cls.__name__}, "
                f"or has them in another shape, among them {wrong[:5]}; they would be random. Does config.json belong "
                "to it?"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *, save_original_format=False, **kwargs):
        """Save in the layout of the model's own parameter names, which the Trainer reads back when it resumes.

        Arguments are those of [`~transformers.PreTrainedModel.save_pretrained`], which would write the names that
        older versions of transformers gave to the backbones' parameters.
        """
        _set_dtype_of_parts(self.config, self.dtype)
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)

    def check_inputs(self, method: str, others: dict[str, Any], known: Iterable[str] = ()) -> dict[str, Any]:
        """Refuse inputs that nobody would read.

        Args:
            method (`str`): name of the method that was called.
            others (`dict`): what it was given beside its own parameters; wrappers such as peft's hand on some None.
            known (`Iterable[str]`): names that it hands on.

        Returns:
            `dict`: `others` without those that are None.

        Raises:
            ValueError: a name is not known; the text says which was probably meant.
        """
        given = {name: value for name, value in others.items() if value is not None}
        if unknown := given.keys() - set(known):
            parameters = inspect.signature(getattr(type(self), method)).parameters.values()
            own = {each.name for each in parameters if each.kind != each.VAR_KEYWORD} - {"self"}
            refuse_unknown(f"{type(self).__name__}.{method}", unknown, {*own, *known})
        return given


def check_folder(path: str | Path, name: str) -> None:
    """Say at once that a local folder is no checkpoint, rather than look for its name on the Hub.

    Args:
        path (`str` or `Path`): folder or Hub name.
        name (`str`): what to call it.

    Raises:
        FileNotFoundError: it is no Hub name and no folder of a checkpoint.
    """
    folder, source = Path(path), str(path)
    if folder.is_dir():
        if not any((folder / each).is_file() for each in ("config.json", "adapter_config.json")):
            within = sorted(config.parent for config in folder.glob("*/config.json"))
            hint = f" Did you mean {str(within[0])!r}?" if within else ""
            raise FileNotFoundError(f"{name}: no checkpoint in this folder, it has no config.json.{hint}")
        return
    if folder.is_file():
        raise FileNotFoundError(
            f"{name}: a file; expected the folder of a checkpoint, such as {str(folder.parent)!r}."
        )
    # lerobot/pi0_base may well be meant for the Hub where a folder lerobot lies: only a near miss counts as a folder.
    siblings = list(folder.parent.iterdir()) if len(folder.parts) > 1 and folder.parent.is_dir() else []
    close = get_close_matches(folder.name, [each.name for each in siblings], n=1)
    if close or source.count("/") > 1 or source.startswith((".", "/", "~")):
        hint = f" Did you mean {str(folder.parent / close[0])!r}?" if close else ""
        raise FileNotFoundError(f"{name}: no such folder.{hint}")


def base_of_adapter(folder: Path) -> str | None:
    """Folder or Hub name of the model that an adapter adapts; None where the folder holds none, or whole weights.

    Raises:
        ValueError: it is nowhere.
    """
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() or any(folder.glob("model*.safetensors*")):
        return None
    # A base that was saved with its adapters moves with them, and another run's may lie where it was.
    beside = [folder / BASE] + [folder.parent / BASE] * ("checkpoint" in folder.name)
    here = next((base for base in beside if (base / "config.json").is_file()), None)
    recorded = str(here) if here else recorded_base(adapter)
    if not Path(recorded).is_absolute() or (Path(recorded) / "config.json").is_file():
        return recorded
    raise ValueError(
        f"{str(folder)!r} is an adapter of {recorded!r}, which is not there: put it back, lay it in {beside[0]}, or "
        "correct base_model_name_or_path in adapter_config.json."
    )


def recorded_base(adapter: Path) -> str:
    """Read from an `adapter_config.json` which model it was of.

    Raises:
        ValueError: it does not say so.
    """
    try:
        recorded = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{adapter}: expected JSON with base_model_name_or_path ({error!r}); mend it.") from error
    if not isinstance(recorded, str) or not recorded:
        raise ValueError(
            f"{adapter}: expected a folder or a name on the Hub as base_model_name_or_path, came {recorded!r}: write "
            "which model was adapted."
        )
    return recorded


def options_of_revision(name: str, **options) -> dict[str, Any]:
    """Say how AutoModel is to be asked for a revision: of adapters to another repository's model, it is theirs alone.

    Args:
        name (`str`): folder or Hub name.
        options: of AutoModel, `revision` among them.

    Returns:
        `dict`: options of AutoModel.
    """
    found = None if options.get("revision") is None else find_adapter_config_file(name, **_hub_options(options))
    if found is None or recorded_base(Path(found)) == name:
        return options
    return options | {"revision": None, "adapter_kwargs": {"revision": options["revision"]}}


def _refuse_pickles(name: str | Path | None, kind: str, pickled: str, options: dict[str, Any]) -> None:
    """Raise where transformers would unpickle weights, or have somebody convert them."""
    if name is None or options.get("state_dict") is not None or options.get("gguf_file") is not None:
        return
    start = f"{options['subfolder']}/" if options.get("subfolder") else ""
    names = ("revision", "token", "local_files_only", "cache_dir")
    hub = {each: options[each] for each in names if options.get(each) is not None}

    def there(file):
        return any(has_file(name, f"{start}{file}{end}", **hub) for end in ("", ".index.json"))

    if not there(f"{kind}.safetensors") and there(f"{pickled}.bin"):
        raise ValueError(
            f"Expected {kind}.safetensors in {str(name)!r}, came {pickled}.bin alone: a pickle, which could run any "
            "code and is never read here. Where you trust it, load it with torch.load(file, weights_only=True) and "
            "write it with safetensors.torch.save_file."
        )


def _has_base(name: str | Path | None, options: dict[str, Any]) -> bool:
    """Whether this is a repository on the Hub that holds an adapter, and its base model in a folder."""
    if name is None or Path(name).exists():
        return False
    hub = _hub_options(options)
    if find_adapter_config_file(name, **hub) is None:
        return False
    return cached_file(name, f"{BASE}/config.json", **hub, _raise_exceptions_for_missing_entries=False) is not None


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")
    return {each: options[each] for each in names if each in options}


def _set_dtype_of_parts(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            part.dtype = dtype
            _set_dtype_of_parts(part, dtype)
