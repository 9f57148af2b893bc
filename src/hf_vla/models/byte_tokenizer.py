"""A text tokenizer that needs no files: one token a byte, for models that are trained from scratch."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>")


def byte_tokenizer(num_action_tokens: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer: `<pad> <eos> <bos>`, the 256 bytes, `<image>`, then `<ACTION00000>` and so on.

    Args:
        num_action_tokens (`int`): size of the action vocabulary.

    Returns:
        `PreTrainedTokenizerFast` with `num_action_tokens + 260` tokens, padding on the left.
    """
    vocab = {
        token: index for index, token in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, eos, bos = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, padding_side="left"
    )
    actions = [f"<ACTION{index:05d}>" for index in range(num_action_tokens)]
    tokenizer.add_tokens(["<image>", *actions], special_tokens=True)
    return tokenizer
