"""What every processor checks and converts alike: samples, arrays of any kind, training targets, predictions."""

from collections.abc import Iterable

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase

from hf_vla.actions.codec import ActionCodec

IGNORED = -100  # a label that no loss reads


class VLAFeatures(BatchFeature):
    """A batch whose measurements stay float32 when `.to(dtype)` casts the rest: bfloat16 would shift them."""

    def to(self, *args, **kwargs) -> "VLAFeatures":
        """Move to a device, cast to a precision, or both; arrays stay as they are."""
        measured = {key: self[key] for key in ("intrinsics", "depth", "state", "actions") if key in self}
        super().to(*args, **kwargs)
        tensors = {key: value for key, value in measured.items() if isinstance(value, torch.Tensor)}
        self.update({key: value.to(self[key].device) for key, value in tensors.items()})
        return self


def is_batch(images) -> bool:
    """Whether `images` hold one entry per sample, rather than one image."""
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) >= 4


def per_sample(images, text, unnorm_key) -> tuple[list, list[str], list[str | None]]:
    """Images, instructions and datasets of a batch, one of each per sample.

    Raises:
        ValueError: images or text are missing, text is something else, or the counts differ.
    """
    if images is None or text is None:
        raise ValueError(f"Expected `images` and `text`, got no {'images' if images is None else 'text'}.")
    images = list(images) if is_batch(images) else [images]
    texts = one_each(text, len(images), "text")
    keys = list(unnorm_key) if isinstance(unnorm_key, (list, tuple)) else [unnorm_key] * len(images)
    if not len(texts) == len(keys) == len(images) or not images:
        raise ValueError(
            f"Got {len(images)} images, {len(texts)} texts and {len(keys)} unnorm_keys: give one per sample."
        )
    return images, texts, keys


def one_each(texts, batch_size: int, name: str) -> list:
    """List what is given as a list, and repeat what serves the whole batch: a text, or None.

    Raises:
        ValueError: it is none of these.
    """
    if texts is None or isinstance(texts, str):
        return [texts] * batch_size
    if isinstance(texts, (list, tuple)) or getattr(texts, "ndim", 0) == 1:
        return list(texts)
    raise ValueError(f"Expected `{name}` to be a text, or a list with one per sample, got {texts!r}.")


def as_numpy(values) -> np.ndarray:
    """Tensors of any device and precision, arrays and lists alike."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    return np.stack([as_numpy(value) for value in values]) if _is_list_of_arrays(values) else np.asarray(values)


def rows(values, ndim: int) -> list[np.ndarray]:
    """One array of `ndim` axes for each sample, as long as its robot's numbers are: those of a batch may differ.

    Args:
        values: of one sample, or of a batch: an array, or a list of what `as_numpy` takes.
        ndim (`int`): axes of one sample's.
    """
    if isinstance(values, (list, tuple)) and len({np.shape(value) for value in values}) > 1:
        return [as_numpy(value) for value in values]
    values = as_numpy(values)
    return list(values[None] if values.ndim == ndim else np.atleast_1d(values))


def _is_list_of_arrays(values) -> bool:
    return isinstance(values, (list, tuple)) and any(isinstance(value, (torch.Tensor, np.ndarray)) for value in values)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of a token that the tokenizer must know.

    Raises:
        ValueError: it does not.
    """
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id:
        raise ValueError(f"The tokenizer has no token {token!r}: is it that of another model?")
    return index


def control_ids(tokenizer: PreTrainedTokenizerBase, *others: int) -> set[int]:
    """What no instruction may hold: special tokens and others, but for the one that stands for unknown characters."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*others, *special, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}


def check_words(
    text: str, tokenizer: PreTrainedTokenizerBase, control_ids: set[int], what: str = "an instruction"
) -> None:
    """Refuse an instruction that is no text, or that holds tokens which control the model.

    An empty one is allowed: there are datasets without instructions.

    Raises:
        ValueError: it does.
    """
    if not isinstance(text, str):
        raise ValueError(f"Expected {what} in words, got {text!r}.")
    if control := sorted(control_ids.intersection(tokenizer(text, add_special_tokens=False)["input_ids"])):
        tokens = tokenizer.convert_ids_to_tokens(control)
        raise ValueError(f"Expected {what} in words, got the control tokens {tokens} in it: {text!r}.")


def padded(rows: Iterable[list[int]], fill: int, left: bool = False) -> np.ndarray:
    """Rows of different lengths as one array, filled up on the right or on the left."""
    rows = list(rows)
    length = max(map(len, rows))
    fills = [[fill] * (length - len(row)) for row in rows]
    return np.array([more + row if left else row + more for row, more in zip(rows, fills, strict=True)])


def targets(actions, action_mask, batch_size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Chunks of `(T, D)`, D being a robot's own, and their mask `(batch_size, T)`; what stands at a padded place is 0.

    Raises:
        ValueError: the shapes do not fit.
    """
    chunks = rows(actions, 2)
    if action_mask is None:
        mask = np.ones((len(chunks), *(chunks[0].shape[:-1] if chunks else ())), bool)
    else:
        mask = as_numpy(action_mask).astype(bool)
        mask = mask.reshape(-1, mask.shape[-1])
    if len(chunks) != batch_size or mask.ndim != 2 or any(each.shape[:-1] != mask.shape[1:] for each in chunks):
        shapes = {each.shape for each in chunks}
        raise ValueError(
            f"Expected actions of shape ({batch_size}, T, D) and an action_mask of shape ({batch_size}, T), got "
            f"{(len(chunks), *shapes.pop()) if len(shapes) == 1 else sorted(shapes)} and {mask.shape}."
        )
    return [np.where(real[:, None], chunk, 0.0) for chunk, real in zip(chunks, mask, strict=True)], mask


def decode_predictions(codec: ActionCodec, predictions: np.ndarray, unnorm_key) -> np.ndarray:
    """Robot actions of a batch of predictions; `unnorm_key` is one for all or a list with one per sample.

    Where the robots of a list have different numbers of dimensions, NaN stands behind those of the smaller ones.

    Raises:
        ValueError: the counts differ, or [`~hf_vla.actions.codec.ActionCodec.decode`] refuses one of them.
    """
    if not isinstance(unnorm_key, (list, tuple)):
        return codec.decode(predictions, unnorm_key)
    if len(unnorm_key) != len(predictions):
        raise ValueError(f"Got {len(predictions)} predictions and {len(unnorm_key)} unnorm_keys: give one per sample.")
    chunks = [codec.decode(row, key) for row, key in zip(predictions, unnorm_key, strict=True)]
    width = max(chunk.shape[-1] for chunk in chunks)
    return np.stack([np.pad(each, ((0, 0), (0, width - each.shape[-1])), constant_values=np.nan) for each in chunks])
