import copy
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.divla.processing_divla import DiVLAProcessor
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor

PARTS = ("image_processor", "tokenizer", "statistics", "action_config", "camera_config", "prompt_config")
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
# That of Qwen/Qwen2-VL-2B-Instruct on the Hub, without what it says of videos and numbered pictures.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROBOTS = {"arm": {"action_dim": 3, "state_dim": 2}, "hand": {"action_dim": 2, "state_dim": 1}}
FRONT = [{"name": "front", "width": 40, "height": 30}]
# by dataset
EMBODIMENTS = {"arm_left": "arm", "arm_right": "arm", "hand": "hand"}


@pytest.fixture(scope="module")
def qwen():
    """What stands for Qwen2-VL's own processor: its special tokens, merges of bytes, its sizes of images."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=294, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["an action and the red cube, then reach for it and push the cube"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(QWEN, special_tokens=True)
    image_processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)  # as published
    return SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def qwen_options(backbones, qwen):
    """The configuration's ids."""
    image, end = qwen.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|im_end|>"])
    return {"backbone_config": {**backbones["qwen2_vl"].config, "image_token_id": image}, "end_token_id": end}


@pytest.fixture(scope="module")
def published(make_processor, qwen, qwen_options):
    return make_processor(vlm=qwen, **qwen_options)


@pytest.fixture(scope="module")
def robots_options():
    """Of a model of two robots."""
    return {"latent_dim": 4, "embodiments": ROBOTS}


@pytest.fixture(scope="module")
def datasets(robot):
    """What a processor has to know of three datasets of two robots."""
    statistics = {
        key: {
            "action": {"min": [-1.0] * sizes["action_dim"], "max": [2.0] * sizes["action_dim"]},
            "state": {"mean": [0.0] * sizes["state_dim"], "std": [2.0] * sizes["state_dim"]},
        }
        for key, sizes in ((key, ROBOTS[name]) for key, name in EMBODIMENTS.items())
    }
    return statistics, robot.processor[1], {"default": FRONT}


@pytest.fixture(scope="module")
def make_robots(make_config, backbones, datasets, robots_options):
    """Builds their processor."""

    def make(names, **options):
        config = make_config(**robots_options | options)
        return DiVLAProcessor.from_backbone(backbones["qwen2_vl"].processor, config, *datasets, embodiments=names)

    return make


@pytest.fixture(scope="module")
def robots(make_robots):
    return make_robots(EMBODIMENTS)


def rebuilt(processor, **changes):
    """The same processor with some of its parameters changed."""
    return DiVLAProcessor(**{name: getattr(processor, name) for name in PARTS} | changes)


def said(processor, labels):
    """What one sample's labels say."""
    return processor.tokenizer.decode(labels[labels != -100])


def spoken(processor, *texts):
    """The output of a model that says these texts, each padded with its end as models do."""
    rows = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, rows))
    rows = [row + [processor.end_token_id] * (length - len(row)) for row in rows]
    return VLAOutput(reasoning_ids=torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length))


@pytest.mark.parametrize("text", ["clear the table", "  wipe «Tür 3» \n"])
def test_published_prompt(published, pictures, text):
    """Qwen2-VL's chat template, pictures first, whatever else a batch is for."""
    batch = published(images=pictures[0], text=text, state=[0.0, 0.0])
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text.strip()}]
    expected = published.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    front, wrist = batch["image_grid_thw"].prod(-1).tolist()
    for count in (front // 4, wrist // 4):
        expected = expected.replace("<|image_pad|>", "<image>" * count, 1)
    assert published.tokenizer.decode(batch["input_ids"][0]) == expected.replace("<image>", "<|image_pad|>")
    assert batch["attention_mask"].all() and "labels" not in batch


def test_published_answer(published, pictures, chunks):
    """Behind the very prompt of inference; the loss is on the answer alone, with its end."""
    prompt = published(images=pictures[0], text="push", state=[0.0, 0.0])["input_ids"]
    batch = published(images=pictures[0], text="push", state=[0.0, 0.0], actions=chunks[0], reasoning="reach for it")
    length = prompt.shape[1]
    assert torch.equal(batch["input_ids"][:, :length], prompt)
    assert torch.equal(batch["labels"][:, length:], batch["input_ids"][:, length:])
    assert (batch["labels"][:, :length] == -100).all() and batch["attention_mask"].all()
    assert published.tokenizer.decode(batch["input_ids"][0, length:]) == "reach for itNext action:<|im_end|>"
    assert batch["input_ids"][0, -1] == published.end_token_id


def test_prompt_and_answer_share_no_token(make_processor, qwen, qwen_options, pictures):
    """Though a tokenizer that saw both at once would find one."""
    processor = make_processor(vlm=qwen, prompt_config={"template": "{images}{instruction} act"}, **qwen_options)
    given = {"images": pictures[0], "text": "push", "state": [0.0, 0.0]}
    prompt, batch = processor(**given)["input_ids"], processor(**given, reasoning="ion")
    together = qwen.tokenizer(qwen.tokenizer.decode(batch["input_ids"][0]), add_special_tokens=False)["input_ids"]
    assert together != batch["input_ids"][0].tolist()
    assert torch.equal(batch["input_ids"][:, : prompt.shape[1]], prompt)


def test_published_picture_size(published):
    """320 x 240 becomes 308 x 252: 18 x 22 patches, 99 tokens; cameras need not be of one size."""
    cameras = {"robot": [{**FRONT[0], "width": 320, "height": 240}, {"name": "wrist", "width": 96, "height": 64}]}
    processor = rebuilt(published, camera_config=cameras)
    pictures = {"front": np.zeros((240, 320, 3), np.uint8), "wrist": np.full((64, 96, 3), 255, np.uint8)}
    batch = processor(images=pictures, text="push", state=[0.0, 0.0])
    assert batch["image_grid_thw"].tolist() == [[1, 18, 22], [1, 4, 6]]
    assert (batch["input_ids"] == processor.image_token_id).sum() == 99 + 6
    assert batch["pixel_values"].shape == (18 * 22 + 4 * 6, 3 * 2 * 14 * 14)
    dark, bright = batch["pixel_values"].split([18 * 22, 4 * 6])
    assert (dark < 0).all() and (bright > 0).all()
    missing = processor(images={**pictures, "front": None}, text="push", state=[0.0, 0.0])
    assert torch.equal(missing["input_ids"], batch["input_ids"])
    assert torch.equal(missing["pixel_values"], batch["pixel_values"])
    is_front = (batch["input_ids"] == processor.image_token_id).cumsum(-1) <= 99
    is_front &= batch["input_ids"] == processor.image_token_id
    assert torch.equal(missing["attention_mask"], batch["attention_mask"].masked_fill(is_front, 0))


def test_published_resizing(published):
    """Published code resizes bicubically by itself, to sizes with which the image processor is content."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8))
    processor = rebuilt(published, camera_config={"robot": FRONT})
    resized = picture.resize((308, 252), Image.Resampling.BICUBIC)
    first, second = (processor(images=each, text="", state=[0.0, 0.0]) for each in (picture, resized))
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["input_ids"], second["input_ids"])


@pytest.mark.parametrize("reasoning", [None, ["reach for it", None], ["", "lift the red cube"]])
def test_one_of_a_batch_is_the_sample_alone(processor, make_batch, pictures, chunks, reasoning):
    """With padding in front of it, which is masked and has no label."""
    pictures[0]["wrist"] = None
    texts, states = ["pick up the red cube", "push"], np.array([[0.3, 1.0], [-0.2, 2.0]])
    together = make_batch(text=texts, state=states, reasoning=reasoning)
    assert ("labels" in together) == (reasoning is not None)
    patches = together["pixel_values"].split(together["image_grid_thw"].prod(-1).view(2, 2).sum(-1).tolist())
    for index in range(2):
        own = None if reasoning is None else [reasoning[index]]
        alone = processor(
            images=[pictures[index]],
            text=texts[index],
            state=states[index],
            actions=chunks[index],
            reasoning=own,
        )
        padding = together["input_ids"].shape[1] - alone["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(together[name][index, padding:], alone[name][0])
            assert not together[name][index, :padding].any()
        for name in ("state", "actions", "action_mask"):
            assert torch.equal(together[name][index], alone[name][0])
        assert torch.equal(together["image_grid_thw"].view(2, 2, 3)[index], alone["image_grid_thw"])
        assert torch.equal(patches[index], alone["pixel_values"])
        if reasoning is not None:
            expected = alone.get("labels", torch.full_like(alone["input_ids"], -100))[0]
            assert torch.equal(together["labels"][index, padding:], expected)
            assert (together["labels"][index, :padding] == -100).all()


def test_every_sample_may_have_its_own_reasoning_or_none(processor, make_batch, pictures):
    images, text = [pictures[0]] * 4, "push"
    reasonings = [None, "", "  reach\tfor it \n", "hebe den roten Würfel 🟥"]
    batch = make_batch(images=images, text=text, state=np.zeros((4, 2)), actions=None, reasoning=reasonings)
    expected = ["", "Next action:<eos>", "reach\tfor itNext action:<eos>", "hebe den roten Würfel 🟥Next action:<eos>"]
    assert [said(processor, labels) for labels in batch["labels"]] == expected
    is_label = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_label], batch["input_ids"][is_label])
    assert batch["labels"].dtype == torch.int64
    one = make_batch(reasoning="lift")
    assert [said(processor, labels) for labels in one["labels"]] == ["liftNext action:<eos>"] * 2
    assert "labels" not in make_batch(reasoning=[None, None])


@pytest.mark.parametrize(
    ("reasoning", "message"),
    [
        (["lift"], "Got 1 reasonings for 2 samples: give one per sample"),
        (["lift"] * 3, "Got 3 reasonings for 2 samples"),
        (["lift", 3.0], "Expected a reasoning in words, got 3.0"),
        (3, "Expected `reasoning` to be a text, or a list with one per sample, got 3"),
        ({"front": "lift"}, "Expected `reasoning` to be a text, or a list"),
        ("lift<eos>", r"Expected a reasoning in words, got the control tokens \['<eos>'\] in it: 'lift<eos>'"),
        ("lift <|image_pad|>", r"control tokens \['<\|image_pad\|>'\] in it"),
        ("<|im_start|>", r"control tokens \['<\|im_start\|>'\] in it"),
    ],
)
def test_bad_reasonings(make_batch, reasoning, message):
    with pytest.raises(ValueError, match=message):
        make_batch(reasoning=reasoning)


@pytest.mark.parametrize("name", ["qwen", "bytes"])
def test_what_is_encoded_is_decoded(request, processor, pictures, name):
    """Words of any script, and the words that always follow a reasoning."""
    chosen = request.getfixturevalue("published") if name == "qwen" else processor
    reasonings = [
        "reach for it",
        "",
        "Würfel → 紅い方塊 🟥",
        "the Next action: is to lift",
        "Next action:",
        "a  b\n\nc",
    ]
    images, states = [pictures[0]] * len(reasonings), np.zeros((len(reasonings), 2))
    labels = chosen(images=images, text="push", state=states, reasoning=reasonings)["labels"]
    rows = [row[row != -100].tolist() for row in labels]
    length = max(map(len, rows)) + 1
    ids = torch.tensor([row + [chosen.end_token_id] * (length - len(row)) for row in rows])
    assert chosen.decode_reasoning(VLAOutput(reasoning_ids=ids)) == reasonings
    assert chosen.decode_reasoning(VLAOutput(reasoning_ids=ids.numpy())) == reasonings


def test_decoding_of_unfinished_reasonings(processor):
    texts = ["lift", "liftNext act<eos>", "liftNext action:", "<eos>lift", "Next action:<eos>", "lift<eos>push<pad>"]
    expected = ["lift", "liftNext act", "lift", "", "", "lift"]
    assert processor.decode_reasoning(spoken(processor, *texts)) == expected
    # other control tokens are no words
    assert processor.decode_reasoning(spoken(processor, "<|im_start|>li<|image_pad|>ft<eos>")) == ["lift"]
    assert processor.decode_reasoning(spoken(processor, "", "")) == ["", ""]
    assert processor.decode_reasoning(spoken(processor, "lift")) == ["lift"]  # without any end


def test_a_character_that_is_cut_in_two_is_marked(processor):
    output = spoken(processor, "heb 🟥")
    output.reasoning_ids = output.reasoning_ids[:, :-2]
    assert processor.decode_reasoning(output) == ["heb \N{REPLACEMENT CHARACTER}"]


def test_undecodable_output(processor):
    with pytest.raises(ValueError, match="got a VLAOutput without `reasoning_ids`: was the reasoning given to it?"):
        processor.decode_reasoning(VLAOutput(actions=torch.zeros(1, 4, 3)))


def test_another_answer(make_processor, make_batch, processor):
    """Around a reasoning may stand what a dataset's own texts do not say."""
    other = make_processor(prompt_config={"answer": "<|im_start|>Plan: {reasoning}.{eos}"})
    batch = make_batch(of=other, reasoning="lift")
    assert said(other, batch["labels"][0]) == "<|im_start|>Plan: lift.<eos>"
    ids = batch["labels"][0][batch["labels"][0] != -100][None]
    assert other.decode_reasoning(VLAOutput(reasoning_ids=ids)) == ["lift"]
    assert make_processor(vlm=other).prompt_config["answer"] == other.prompt_config["answer"]
    assert make_processor(vlm=other, prompt_config={"answer": "{reasoning}{eos}"}).prompt_config == {
        **processor.prompt_config,
        "answer": "{reasoning}<eos>",
    }


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("Next action:<eos>", r"Expected \{reasoning\} once in prompt_config\['answer'\], got 'Next action:<eos>'"),
        ("{reasoning}{reasoning}<eos>", r"Expected \{reasoning\} once"),
        (None, r"Expected a text in prompt_config\['answer'\], got None"),
        ("{reasoning}", "Expected prompt_config.'answer'. to end with its only end token, got '{reasoning}'"),
        ("{reasoning}<eos>.", "to end with its only end token"),
        ("{reasoning}<eos>\n<eos>", "to end with its only end token"),
        ("<eos>{reasoning}<eos>", "to end with its only end token"),
        ("{reasoning}<|im_over|>", r"Expected <\|im_over\|> of prompt_config\['answer'\] to be one token"),
        ("{reasoning}<|im_end|>", r"with the token 1, as config.end_token_id says, but .*<\|im_end\|>' ends with 265"),
    ],
)
def test_bad_answers(make_processor, answer, message):
    with pytest.raises(ValueError, match=message):
        make_processor(prompt_config={"answer": answer})


def test_bad_prompts(processor):
    without = {key: value for key, value in processor.prompt_config.items() if key != "answer"}
    with pytest.raises(ValueError, match=r"Expected \{reasoning\} once in prompt_config\['answer'\], got ''"):
        rebuilt(processor, prompt_config=without)
    with pytest.raises(ValueError, match=r"Unknown keys \['readout'\] in prompt_config; known are .*'answer'\]"):
        rebuilt(processor, prompt_config=processor.prompt_config | {"readout": ""})
    with pytest.raises(ValueError, match=r"Expected a prompt_config with \['template'"):
        rebuilt(processor, prompt_config=None)
    with pytest.raises(ValueError, match="Expected prompt_config to be a dictionary, got 'template'"):
        DiVLAProcessor.from_backbone(processor, None, *[None] * 3, prompt_config="template")


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("llava_clip", "questions. USER: {images}\n{instruction} ASSISTANT:  "),
        ("paligemma", "{images}<bos>{instruction}\n"),
        ("smolvlm", "<|im_start|>User:{images}{instruction}<end_of_utterance>\nAssistant:"),
        ("qwen2_5_vl", "user\n{images}{instruction}<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_prompts_of_other_backbones(make_processor, make_batch, backbone, expected):
    """They end where the model begins to speak."""
    processor = make_processor(backbone)
    assert processor.prompt_config["template"].endswith(expected)
    assert processor.prompt_config["answer"] == "{reasoning}Next action:<eos>"
    labels = make_batch(of=processor, reasoning="lift")["labels"]
    assert said(processor, labels[0]) == "liftNext action:<eos>"


@pytest.mark.parametrize("backbone", ["qwen2_vl", "llava_clip"])
def test_families_exchange_prompts(make_processor, make_batch, backbones, robot, backbone):
    """A backbone that was trained as a TinyVLA's reasons like any other, and the other way round."""
    config = {"backbone_config": backbones[backbone].config, "head_config": {"type": "regression"}, **robot.sizes}
    first = len(backbones[backbone].processor.tokenizer)
    config = TinyVLAConfig(**config, num_readout_tokens=3, readout_token_id=first)
    tinyvla = TinyVLAProcessor.from_backbone(backbones[backbone].processor, config, *robot.processor)
    ours, fresh = make_processor(backbone, vlm=tinyvla), make_processor(backbone)
    assert ours.prompt_config == fresh.prompt_config
    assert torch.equal(make_batch(of=ours)["input_ids"], make_batch(of=fresh)["input_ids"])
    again = TinyVLAProcessor.from_backbone(ours, config, *robot.processor)
    given = {"actions": None, "reasoning": None}
    assert torch.equal(make_batch(of=again, **given)["input_ids"][1, -3:], torch.arange(first, first + 3))
    assert (
        "answer" not in again.prompt_config and make_processor(backbone, vlm=ours).prompt_config == fresh.prompt_config
    )


@pytest.mark.parametrize("size", [[320, 240], (320, 240)])
def test_every_picture_becomes_one_size(published, tmp_path, size):
    """Resized whatever its shape, so that each takes as many tokens as the model was trained on."""
    cameras = {"robot": [FRONT[0], {"name": "wrist", "width": 1280, "height": 720}]}
    changes = {"camera_config": cameras, "prompt_config": published.prompt_config | {"image_size": size}}
    rebuilt(published, **changes).save_pretrained(tmp_path)
    processor, random = AutoProcessor.from_pretrained(tmp_path), np.random.default_rng(0)
    for height, width in ((240, 320), (480, 640), (720, 1280)):
        picture = Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8))
        given = {"text": "push", "state": [0.0, 0.0]}
        batch = processor(images={"front": picture, "wrist": None}, **given)
        assert batch["image_grid_thw"].tolist() == [[1, 18, 22]] * 2
        assert (batch["input_ids"] == processor.image_token_id).sum() == 2 * 99
        resized = picture.resize((320, 240), Image.Resampling.BICUBIC)
        expected = rebuilt(published, camera_config={"robot": FRONT})(images=resized, **given)["pixel_values"]
        assert torch.equal(batch["pixel_values"][: 18 * 22], expected)


def test_fine_tuning_keeps_the_size_of_pictures(make_processor, processor):
    sized = make_processor(prompt_config={"image_size": [96, 64]})
    assert make_processor(vlm=sized).prompt_config == processor.prompt_config | {"image_size": [96, 64]}


@pytest.mark.parametrize(
    "size", [320, "320x240", [320], [320, 240, 3], [320.0, 240], [0, 240], [True, 240], {"width": 3, "height": 2}]
)
def test_bad_sizes_of_pictures(processor, size):
    with pytest.raises(ValueError, match=r"Expected \[width, height\] in pixels, or None, in prompt_config\['image_s"):
        rebuilt(processor, prompt_config=processor.prompt_config | {"image_size": size})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": None}, r"Expected a text in prompt_config\['template'\], got None"),
        ({"image_token": None}, r"Expected a text in prompt_config\['image_token'\], got None"),
        ({"image_token": ""}, "The tokenizer has no token ''"),
        ({"image_prefix": 3}, r"Expected a text in prompt_config\['image_prefix'\], got 3"),
        ({"answer": ["{reasoning}"]}, r"Expected a text in prompt_config\['answer'\], got"),
        ({"image_seq_length": "3"}, r"Expected a number of tokens, or None, in .*'image_seq_length'\], got '3'"),
        ({"image_seq_length": 0}, "Expected a number of tokens, or None, .* got 0"),
    ],
)
def test_entries_of_a_prompt_are_texts_and_numbers(processor, make_processor, changes, message):
    with pytest.raises(ValueError, match=message):
        rebuilt(processor, prompt_config=processor.prompt_config | changes)
    if "image_token" not in changes:  # which from_backbone takes from the tokenizer
        with pytest.raises(ValueError, match=message):
            make_processor(prompt_config=changes)


def test_the_end_of_the_answer_is_the_configurations(make_processor, qwen, qwen_options):
    with pytest.raises(
        ValueError, match=r"with the token 3, as config.end_token_id says, but .*Next action:<\|im_end"
    ):
        make_processor(vlm=qwen, **qwen_options | {"end_token_id": 3})
    endless = copy.deepcopy(qwen)
    endless.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="to end with its only end token, got '{reasoning}Next action:'"):
        make_processor(vlm=endless, **qwen_options)


def test_save_and_load(robots, published, make_batch, tmp_path):
    """In JSON alone; nothing that is only derived is saved."""
    for name, processor in {"robots": robots, "published": published}.items():
        processor.save_pretrained(tmp_path / name)
        again = AutoProcessor.from_pretrained(tmp_path / name)
        assert type(again) is DiVLAProcessor and {file.suffix for file in (tmp_path / name).iterdir()} == {".json"}
        for parameter in (*PARTS[2:], "embodiments", "end_token_id", "chat_template"):
            assert getattr(again, parameter) == getattr(processor, parameter)
        saved = json.loads((tmp_path / name / "processor_config.json").read_text())
        assert saved.keys() == {*PARTS, "embodiments", "processor_class"} - {"tokenizer"}
    first, second = make_batch(of=published), make_batch(of=again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert again.image_processor.to_dict() == published.image_processor.to_dict()


def test_a_chat_template_is_kept_and_not_needed(processor, make_batch, tmp_path):
    """It needs no processor of videos either, as Qwen2-VL's own does."""
    assert processor.get_attributes() == ["image_processor", "tokenizer"]
    messages = [{"role": "user", "content": [{"type": "text", "text": "push"}]}]
    with pytest.raises(ValueError, match="this processor does not have a chat template"):
        processor.apply_chat_template(messages)
    rebuilt(processor, chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.chat_template == CHAT_TEMPLATE
    assert again.apply_chat_template(messages).endswith("<|im_start|>user\npush<|im_end|>\n")
    assert torch.equal(make_batch(of=again)["input_ids"], make_batch(of=processor)["input_ids"])


def test_numpy_output(make_batch, robots, pictures):
    assert all(isinstance(value, np.ndarray) for value in make_batch(return_tensors="np").values())
    batch = robots(images=pictures[0]["front"], text="push", state=[0.0], unnorm_key="hand", return_tensors="np")
    assert batch.pop("embodiment") == "hand"
    assert all(isinstance(value, np.ndarray) for value in batch.values())


def test_a_batch_is_of_one_robot(robots, pictures):
    given = {"images": [views["front"] for views in pictures], "text": "push"}
    for keys, expected in (("hand", "hand"), (["arm_left", "arm_right"], "arm"), (["hand", "hand"], "hand")):
        states = np.zeros((2, ROBOTS[expected]["state_dim"]))
        assert robots(**given, state=states, unnorm_key=keys)["embodiment"] == expected
    # before anything is said of states that fit only one of them
    with pytest.raises(ValueError, match=r"a batch of one embodiment, got \['arm', 'hand'\]: batch them apart"):
        robots(**given, state=np.zeros((2, 2)), unnorm_key=["arm_left", "hand"])
    with pytest.raises(ValueError, match="choose unnorm_key among"):
        robots(**given)
    with pytest.raises(ValueError, match="No action statistics for 'hands'.*Did you mean 'hand'"):
        robots(**given, unnorm_key="hands")


def test_the_robot_travels_with_its_batch(robots, pictures):
    given = {"images": pictures[0]["front"], "text": "push", "state": [0.3], "actions": np.full((4, 2), 0.3)}
    batch = robots(**given, unnorm_key="hand")
    actions = batch["actions"].clone()
    for other in (copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        moved = other.to("cpu", torch.bfloat16)
        assert type(moved) is type(batch) and moved["embodiment"] == "hand"
        assert moved["pixel_values"].dtype == torch.bfloat16 and torch.equal(moved["actions"], actions)


@pytest.mark.parametrize("key", ["arm_right", "hand"])
def test_the_model_takes_a_robots_batch(make_model, robots, robots_options, pictures, key):
    model, sizes = make_model(**robots_options), ROBOTS[EMBODIMENTS[key]]
    given = {"images": [views["front"] for views in pictures], "text": ["push", "lift"], "unnorm_key": key}
    given["state"] = np.zeros((2, sizes["state_dim"]))
    actions = np.random.default_rng(0).uniform(0, 1, (2, 4, sizes["action_dim"]))
    output = model(**robots(**given, actions=actions, reasoning=["reach", None]))
    assert output.loss.isfinite() and output.ntp_loss > 0
    output = model.predict_action(**robots(**given))
    assert robots.decode_actions(output, key).shape == actions.shape
    assert len(robots.decode_reasoning(output)) == 2
    output = model.predict_action(**robots(**given, reasoning="reach"))
    assert robots.decode_actions(output, key).shape == actions.shape


def test_a_single_robot_needs_no_name(make_config, backbones, datasets, pictures):
    config = make_config(latent_dim=4, embodiments={"arm": ROBOTS["arm"]}, state_dim=7, action_dim=7)
    statistics = {key: value for key, value in datasets[0].items() if key != "hand"}
    processor = DiVLAProcessor.from_backbone(backbones["qwen2_vl"].processor, config, statistics, *datasets[1:])
    batch = processor(images=pictures[0]["front"], text="push", state=[0.0, 0.0], unnorm_key="arm_left")
    assert processor.embodiments is None and "embodiment" not in batch


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ({"arm_left": "arm"}, {}, r"name the robot of each of \['arm_left', 'arm_right', 'hand'\], got \{'arm_left'"),
        (EMBODIMENTS | {"leg": "arm"}, {}, "to name the robot of each of"),
        (["arm", "hand"], {}, r"to be a dictionary \{unnorm_key: name\}, got \['arm', 'hand'\]"),
        (EMBODIMENTS | {"hand": ["hand"]}, {}, r"to be a dictionary \{unnorm_key: name\}, got"),
        (EMBODIMENTS | {"hand": "foot"}, {}, r"robot of 'hand' among .* the model knows, \['arm', 'hand'\], got"),
        (None, {}, r"the robot of 'arm_left' among .*\['arm', 'hand'\], got None"),
        (EMBODIMENTS | {"hand": "arm"}, {}, "an action_dim of 'hand' of 3, as the config says, got 2"),
        (EMBODIMENTS, {"latent_dim": None, "embodiments": None}, r"among those that the model knows, \[\], got"),
    ],
)
def test_robots_are_the_models(make_robots, names, options, message):
    with pytest.raises(ValueError, match=message):
        make_robots(names, **options)


def test_from_scratch(make_config, robot, make_batch, datasets, robots_options):
    config = DiVLAConfig.from_preset("tiny", **robot.sizes)
    processor = DiVLAProcessor.from_scratch(config, *robot.processor)
    square = {"front": np.zeros((96, 96, 3), np.uint8), "wrist": np.zeros((400, 400, 3), np.uint8)}
    batch = make_batch(of=processor, images=[square, square])
    assert ((batch["input_ids"] == config.image_token_id).sum(-1) == 2 * 9).all()
    assert batch["image_grid_thw"].tolist() == [[1, 6, 6]] * 4
    text = processor.tokenizer.decode(batch["input_ids"][1]).replace("<image>" * 9, "<image>")
    picture = "<|vision_start|><image><|vision_end|>"
    assert text == f"{picture * 2}pick up the red cube\nliftNext action:<eos>"
    backbone, tokens = config.backbone_config, ["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    ids = [backbone.video_token_id, backbone.vision_start_token_id, backbone.vision_end_token_id]
    assert processor.tokenizer.convert_tokens_to_ids(tokens) == ids
    several = DiVLAConfig.from_preset("tiny", **robot.sizes | robots_options)
    assert DiVLAProcessor.from_scratch(several, *datasets, EMBODIMENTS).embodiments == EMBODIMENTS
    with pytest.raises(ValueError, match="config's id 151655, but the tokenizer has None there"):
        DiVLAProcessor.from_scratch(DiVLAConfig(**robot.sizes), *robot.processor)
    with pytest.raises(ValueError, match="Expected a Qwen2-VL, got 'llava': build its processor with from_backbone"):
        DiVLAProcessor.from_scratch(make_config("llava_clip"), *robot.processor)
