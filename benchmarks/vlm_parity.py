"""How far judges are from the published way: the model's own processor on 8-bit images, and its own forward pass."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)

from benchmarks.vlm_checkpoints import IMAGE_SEQ_LEN, Kind, write_hpsv3, write_vlm
from rlr_peft.rewards import ModelFiles, ModelSettings, RewardSettings, load_reward, score_images
from rlr_peft.rewards.model_files import HPSV3, HPSV3_CODE, QWEN2_VL

KINDS: dict[Kind, Any] = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "smolvlm": SmolVLMProcessor,
}
QUESTION = 'Does this image show "{}"? Answer with one word, yes or no.'


def published_processor(folder: Path, kind: Kind) -> Any:
    """The class itself, without the part for videos, which would need torchvision, and words for numbers of frames."""
    options = {"image_seq_len": IMAGE_SEQ_LEN} if kind == "smolvlm" else {}
    tokenizer, images = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    with (
        patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None),
        patch("transformers.models.smolvlm.processing_smolvlm.num2words", str),
    ):
        return KINDS[kind](images, tokenizer, None, chat_template=tokenizer.chat_template, **options)


def published_inputs(processor: Any, images: list[Image.Image], questions: list[str]) -> dict[str, Tensor]:
    """What the processor makes of one turn with an image and a question each."""
    text = []
    for question in questions:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text.append(processor.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    read = processor(
        text=text,
        images=[[image] for image in images],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    return dict(read)


@torch.no_grad()
def judge_parity(folder: Path, kind: Kind) -> dict[str, float]:
    """As the rows of `reward_parity.network_parity`, of one tiny random model; `network` is on images that no resizing
    changes."""
    from benchmarks.reward_parity import PROMPTS, mixed_images, to_tensor

    torch.manual_seed(0)
    write_vlm(folder, kind)
    reward = load_reward(f"vlm:{folder}", RewardSettings(ModelSettings()))
    processor, model = published_processor(folder, kind), AutoModelForImageTextToText.from_pretrained(folder)
    good, bad = (processor.tokenizer.convert_tokens_to_ids(answers) for answers in (["Yes", "yes"], ["No", "no"]))
    results = {}
    # Resized without change: what is of the right size, and for SmolVLM, which always resizes, what has one colour.
    plain = [Image.new("RGB", (32, 32), (60 * number, 200, 30)) for number in range(len(PROMPTS))]
    unchanged = plain if kind == "smolvlm" else mixed_images((32, 32), len(PROMPTS))
    for name, images in (("network", unchanged), ("whole", mixed_images((70, 90), len(PROMPTS)))):
        inputs = published_inputs(processor, images, [QUESTION.format(prompt) for prompt in PROMPTS])
        logits = model(**inputs).logits[:, -1]
        expected = logits[:, good].logsumexp(1) - logits[:, bad].logsumexp(1)
        got = score_images(reward, to_tensor(images), PROMPTS)
        results[name] = float((got - expected).abs().max())
        results["spread"] = float(expected.std())
    return results


@torch.no_grad()
def hpsv3_parity(folder: Path) -> dict[str, float]:
    """The same of HPSv3: one image after the other, without padding, through all words of the published classes."""
    from benchmarks.reward_parity import PROMPTS, mixed_images, to_tensor

    torch.manual_seed(0)
    model, head = write_hpsv3(folder / "qwen", folder / "HPSv3.safetensors", folder / "code.py")
    files = ModelFiles({QWEN2_VL: str(folder / "qwen"), HPSV3: str(folder), HPSV3_CODE: str(folder / "code.py")})
    reward = load_reward("hpsv3", RewardSettings(ModelSettings(files=files)))
    processor = published_processor(folder / "qwen", "qwen2_vl")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    processor.image_processor.size = {"shortest_edge": 256 * 28 * 28, "longest_edge": 256 * 28 * 28}
    results = {}
    # The first size is that to which every image is brought.
    for name, shape in (("network", (448, 448)), ("whole", (70, 90))):
        images, expected = mixed_images(shape, len(PROMPTS)), []
        for image, prompt in zip(images, PROMPTS, strict=True):
            question = f"\nHow good is it?  \nIts text: {prompt}\n\nThe score: <|Reward|>\n\nEND\n"
            inputs = published_inputs(processor, [image], [question])
            embeddings = model.model.language_model.embed_tokens(inputs["input_ids"])
            seen = torch.cat(list(model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])[1]))
            embeddings[inputs["input_ids"] == model.config.image_token_id] = seen
            states = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
            place = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
            expected.append(head(states[place])[0, 0])
        got = score_images(reward, to_tensor(images), PROMPTS)
        results[name] = float((got - torch.stack(expected)).abs().max())
        results["spread"] = float(torch.stack(expected).std())
    return results
