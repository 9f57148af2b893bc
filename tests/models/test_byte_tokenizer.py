import pytest
from transformers import AutoTokenizer

from hf_vla.models.byte_tokenizer import byte_tokenizer


@pytest.mark.parametrize("text", ["pick up the red cube", "nimm den roten Würfel", "拿起红色方块", "a  b\n", ""])
def test_round_trip(text, tmp_path):
    tokenizer = byte_tokenizer(3)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode()) and all(3 <= index < 259 for index in ids)
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == ids


def test_special_tokens():
    tokenizer = byte_tokenizer(3)
    assert len(tokenizer) == 263
    names = ["<pad>", "<eos>", "<bos>", "<image>", "<ACTION00000>", "<ACTION00002>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 259, 260, 262]
