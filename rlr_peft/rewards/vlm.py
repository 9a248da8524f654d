"""Vision-language models of `transformers` as judges: what they read, and how much surer one is of yes than of no.

The image processors of the Qwen-VL and SmolVLM families are written out in torch, so that gradients pass; they agree
with the models' own to within the 8-bit rounding of those. Any other model is read through its own processor, which
works on 8-bit images and has no gradient. UnifiedReward 2.0 (Wang et al., 2025) writes three scores.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from rlr_peft.config.reward import VLM_PREFIX
from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.model_files import UNIFIED_QUESTION, ModelFiles, template_in
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, loading
from rlr_peft.rewards.names import UNIFIED_REWARD
from rlr_peft.rewards.preprocessing import normalize, resize_like_pil, to_8_bit
from rlr_peft.rewards.remote import RemoteSettings
from rlr_peft.rewards.scores import describe_samples
from rlr_peft.rewards.vlm_endpoint import Endpoint, JudgeSettings, Question, questions_of, spellings

FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SMOL = ("smolvlm", "idefics3")


class ReadByProcessor:
    """Through the model's own processor.

    Args:
        name: of the reward, for errors.
        only_reads: a model that writes down the text of images, and needs no question where it has no chat template.

    Raises:
        RewardError: it has no chat template, or needs a package that is not there.
    """

    differentiable = False

    def __init__(self, name: str, folder: Path, config: Any, only_reads: bool = False) -> None:
        try:
            self._processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        except ImportError as error:
            wanted = " ".join(str(error).split())
            raise RewardError(
                f"reward '{name}': the processor of its model needs more than is installed: {wanted:.200}; take a "
                f"model of another family, such as {' or '.join((*QWEN[1:3], SMOL[0]))}, or one behind --vlm_endpoint"
            ) from None
        self._asks = not only_reads or self._processor.chat_template is not None
        if self._asks:
            _check_template(name, folder, self._processor)
        self.tokenizer = self._processor.tokenizer
        self._dtype = config.dtype

    def __call__(self, images: Tensor, questions: list[str]) -> dict[str, Any]:
        """The model's arguments, for as many images (B, 3, H, W) as questions; padded on the left."""
        pictures = [Image.fromarray(pixels) for pixels in to_8_bit(images)]
        if self._asks:
            text = [_ask(self._processor, question) for question in questions]
            words = {"text": text, "padding": True, "padding_side": "left", "add_special_tokens": False}
            read = self._processor(images=[[picture] for picture in pictures], return_tensors="pt", **words)
        else:
            read = self._processor(images=pictures, return_tensors="pt")
        return dict(read.to(images.device, self._dtype))  # of ids and masks the dtype stays


class ReadInTorch(ABC):
    """What the two families share: a chat template, in which a text stands for the image.

    Args:
        name: of the reward, for errors.
        options: of the image processor, in place of its own.

    Raises:
        RewardError: it has no chat template.
    """

    differentiable = True
    image_token: str
    kind = "image"

    def __init__(self, name: str, folder: Path, config: Any, **options: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        older = folder / "chat_template.json"  # where processors kept it until `chat_template.jinja`
        if older.is_file():
            self.tokenizer.chat_template = json.loads(older.read_text(encoding="utf-8"))["chat_template"]
        _check_template(name, folder, self.tokenizer)
        self.processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, **options)
        self.config = config

    def __call__(self, images: Tensor, questions: list[str]) -> dict[str, Any]:
        """The model's arguments, for as many images (B, 3, H, W) as questions; padded on the left."""
        pixels, placeholder = self.pixels(images)
        asked = [_ask(self.tokenizer, question, self.kind) for question in questions]
        text = [one.replace(self.image_token, placeholder, 1) for one in asked]
        tokens = self.tokenizer(
            text, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        ).to(images.device)
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, **pixels}

    @abstractmethod
    def pixels(self, images: Tensor) -> tuple[dict[str, Tensor], str]:
        """The image processor's part of the arguments, and what stands in the text for one image."""

    def _resized(self, images: Tensor, height: int, width: int) -> Tensor:
        return resize_like_pil(images, height, width, FILTERS[int(self.processor.resample)])

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images, tuple(self.processor.image_mean), tuple(self.processor.image_std))


class QwenInputs(ReadInTorch):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: whole images of a flexible size, cut into patches."""

    image_token = "<|image_pad|>"

    def __call__(self, images: Tensor, questions: list[str]) -> dict[str, Any]:
        """As the base's; and where the image is in the text."""
        inputs = super().__call__(images, questions)
        return inputs | {"mm_token_type_ids": (inputs["input_ids"] == self.config.image_token_id).int()}

    def pixels(self, images: Tensor) -> tuple[dict[str, Tensor], str]:
        """`pixel_values` (B * patches, values of a patch) and `image_grid_thw` (B, 3)."""
        still = images[:, None].expand(-1, self.processor.temporal_patch_size, -1, -1, -1)
        patches, grids, length = self._patches(still)
        return {"pixel_values": patches, "image_grid_thw": grids}, self.image_token * length

    def _patches(self, videos: Tensor) -> tuple[Tensor, Tensor, int]:
        """Of videos (B, F, 3, H, W), F a multiple of the frames of a patch: (B * patches, values), the grids (B, 3) of
        frames, rows and columns, and the tokens of one video."""
        # The size that it becomes is asked of the processor itself.
        blank = Image.new("RGB", (videos.shape[-1], videos.shape[-2]))
        _, rows, columns = torch.as_tensor(self.processor(images=blank, return_tensors="pt")["image_grid_thw"])[
            0
        ].tolist()
        patch, merge, deep = self.processor.patch_size, self.processor.merge_size, self.processor.temporal_patch_size
        resized = self._normalized(self._resized(videos.flatten(0, 1), rows * patch, columns * patch))
        blocks = resized.reshape(
            *(len(videos), -1, deep, 3, rows // merge, merge, patch, columns // merge, merge, patch)
        ).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)  # neighbours that are merged stand together
        grid = torch.tensor([videos.shape[1] // deep, rows, columns], device=videos.device)
        count = int(grid.prod())
        return blocks.reshape(len(videos) * count, -1), grid.expand(len(videos), -1), count // merge**2


class QwenVideoInputs(QwenInputs):
    """Videos (B, F, 3, H, W) of an even number of frames, for Qwen2-VL; every frame as an image in its size."""

    image_token = "<|video_pad|>"
    kind = "video"

    def pixels(self, images: Tensor) -> tuple[dict[str, Tensor], str]:
        """`pixel_values_videos` (B * patches, values of a patch) and `video_grid_thw` (B, 3)."""
        patches, grids, length = self._patches(images)
        return {"pixel_values_videos": patches, "video_grid_thw": grids}, self.image_token * length


class SmolInputs(ReadInTorch):
    """SmolVLM and Idefics3: an image enlarged to whole tiles, and once more as a single tile."""

    image_token = "<image>"

    def pixels(self, images: Tensor) -> tuple[dict[str, Tensor], str]:
        """`pixel_values` (B, tiles, 3, side, side)."""
        side = self.processor.max_image_size["longest_edge"]
        height, width = _rescaled(images.shape[-2], images.shape[-1], self.processor.size["longest_edge"])
        enlarged = self._resized(images, height, width)
        tiles, rows, columns = [], 0, 0
        if self.processor.do_image_splitting:
            height, width = _whole_tiles(height, width, side)
            enlarged = self._resized(enlarged, height, width)
            if max(height, width) > side:
                rows, columns = height // side, width // side
                tiles = [part for row in enlarged.split(side, -2) for part in row.split(side, -1)]
        tiles.append(self._resized(enlarged, side, side))
        values = self._normalized(torch.stack(tiles, 1).flatten(0, 1)).unflatten(0, (len(images), -1))
        vision = self.config.vision_config
        length = (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2
        return {"pixel_values": values}, self._in_text(rows, columns, self.image_token * length)

    def _in_text(self, rows: int, columns: int, tile: str) -> str:
        around, text = "<fake_token_around_image>", ""
        for row in range(1, rows + 1):
            text += "".join(f"{around}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
        return f"{text}{chr(10) if rows else ''}{around}<global-img>{tile}{around}"


def read_inputs(name: str, folder: Path, config: Any, only_reads: bool = False) -> ReadByProcessor | ReadInTorch:
    """How a model reads images and questions.

    Args:
        name: of the reward, for errors.
        only_reads: as of `ReadByProcessor`.

    Raises:
        RewardError: it has no chat template, or its processor needs a package that is not there.
    """
    if config.model_type in QWEN:
        return QwenInputs(name, folder, config)
    if config.model_type in SMOL:
        return SmolInputs(name, folder, config)
    return ReadByProcessor(name, folder, config, only_reads)


def _ask(templated: Any, question: str, kind: str = "image") -> str:
    """The text of one turn, image or video first, up to where the answer begins."""
    content = [{"type": kind}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return str(templated.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _check_template(name: str, folder: Path, templated: Any) -> None:
    if templated.chat_template is None:
        raise RewardError(
            f"reward '{name}': expected a chat template beside the model, got none in {folder}; take a model that was "
            "tuned to answer questions (its name often ends in Instruct)"
        )


def _rescaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """SmolVLM's first size: the longest side of a given length, the other one even."""
    shape = width / height
    if width >= height:
        height = int(longest / shape)
        return height + height % 2, longest
    width = int(longest * shape)
    return longest, width + width % 2


def _whole_tiles(height: int, width: int, side: int) -> tuple[int, int]:
    """The longest side up to whole tiles, and then the other one."""
    shape = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        return math.ceil(int(width / shape) / side) * side, width
    height = math.ceil(height / side) * side
    return height, math.ceil(int(height * shape) / side) * side


class VlmJudge(ModelReward):
    """log P(yes) - log P(no) of the next token, in nats, averaged over the questions about an image.

    Of a question with another right answer, the odds of that answer. All spellings of an answer that begin with a token
    of their own count, small or capitalised. Differentiable for the families that `ReadInTorch`
    knows, a black box for any other.

    Args:
        settings: how the network is held. Weights are in bf16 where others would be in fp16, in which these networks
            overflow.

    Raises:
        RewardError: the model cannot be loaded or read, or its tokens do not tell the answers apart.
    """

    def __init__(self, model: str, judge: JudgeSettings, settings: ModelSettings) -> None:
        name = shown_spec(VLM_PREFIX, model)
        folder = settings.files.snapshot(name, model)
        network = load_vlm(name, folder, settings)
        super().__init__(name, settings, network)
        with loading(name, folder):
            self._inputs = read_inputs(name, folder, network.config)
        self.differentiable = self._inputs.differentiable
        self._judge = judge
        good, bad = (self._begin(answer) for answer in judge.answers)
        self._common = good & bad
        self._tokens: dict[str, list[int]] = {}
        if not all(map(self._first_tokens, judge.answers)):
            raise RewardError(
                f"reward '{self.name}': expected answers that begin with different tokens, got "
                f"{' and '.join(map(repr, self._judge.answers))}; take other --vlm_answers"
            )

    def check_prompts(self, prompts: list[str], metadata: Metadata) -> None:
        """Refuses questions of another form."""
        questions_of(self.name, self._judge, prompts, metadata)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32, any real number."""
        asked = questions_of(self.name, self._judge, prompts, metadata)
        rows = torch.tensor([row for row, of_one in enumerate(asked) for _ in of_one], device=images.device)
        questions = [question for of_one in asked for question in of_one]
        inputs = self._inputs(images[rows], [question.text for question in questions])
        logits = self.network(**inputs, logits_to_keep=1).logits[:, -1].float()
        odds = torch.stack([self._odds(*pair) for pair in zip(logits, questions, strict=True)])
        counts = torch.tensor([len(of_one) for of_one in asked], device=images.device)
        return torch.zeros(len(prompts), device=images.device).index_add(0, rows, odds) / counts

    def _odds(self, logits: Tensor, question: Question) -> Tensor:
        right = self._first_tokens(question.right)
        others = torch.ones_like(logits, dtype=torch.bool)
        others[right] = False
        wrong = logits[others] if question.wrong is None else logits[self._first_tokens(question.wrong)]
        return logits[right].logsumexp(0) - wrong.logsumexp(0)

    def _first_tokens(self, answer: str) -> list[int]:
        """Of all spellings of an answer; what both answers begin with, such as a space, tells nothing."""
        if answer not in self._tokens:
            self._tokens[answer] = sorted(self._begin(answer) - self._begin(" ") - self._common)
        return self._tokens[answer]

    def _begin(self, answer: str) -> set[int]:
        return {self._inputs.tokenizer(text, add_special_tokens=False).input_ids[0] for text in spellings(answer)}


def shown_spec(prefix: str, model: str) -> str:
    """The reward's name: of a model in a folder without the path to it."""
    place = Path(model).expanduser()
    return f"{prefix}{place.resolve().name if place.is_dir() else model}"


def load_vlm(name: str, folder: Path, settings: ModelSettings) -> Any:
    """A network that answers questions about images, from a folder with its files.

    Raises:
        RewardError: it is none, or damaged.
    """
    dtype = torch.bfloat16 if settings.dtype == torch.float16 else settings.dtype
    with loading(name, folder):
        return AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )


MOST_TOKENS = 256  # of an answer


def written_answers(network: Any, inputs: Mapping[str, Any], tokenizer: Any, stop: str | None = None) -> list[str]:
    """What a model writes down, word by likeliest word, up to its end or the stop."""
    end = {} if stop is None else {"stop_strings": [stop], "tokenizer": tokenizer}
    written = network.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False, **end)
    start = 0 if network.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answers: list[str] = tokenizer.batch_decode(written[:, start:], skip_special_tokens=True)
    return answers


SERVED_NAME = "UnifiedReward"  # as its authors' server calls it
_SCORE = re.compile(r"(Alignment|Coherence|Style) Score \(1-5\):\s*(-?\d+(?:\.\d+)?)")


class UnifiedReward(ModelReward):
    """The mean of the scores for alignment, coherence and style; greedy, without gradient.

    Raises:
        RewardError: files are missing.
    """

    def __init__(self, settings: ModelSettings) -> None:
        script, folder = settings.files.of(UNIFIED_REWARD)
        self._question = published_question(script)
        network = load_vlm(UNIFIED_REWARD, folder, settings)
        super().__init__(UNIFIED_REWARD, settings, network)
        self.differentiable = False
        with loading(UNIFIED_REWARD, folder):
            self._inputs = read_inputs(UNIFIED_REWARD, folder, network.config)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) float32 from 1 to 5, and the three scores."""
        inputs = self._inputs(images, [self._question.replace("{prompt}", prompt) for prompt in prompts])
        return read_scores(written_answers(self.network, inputs, self._inputs.tokenizer), prompts)


class UnifiedRewardEndpoint(Reward):
    """The same of a model behind an OpenAI-compatible URL, which knows it as `UnifiedReward`."""

    name = UNIFIED_REWARD
    overlaps = True

    def __init__(self, url: str, files: ModelFiles, settings: RemoteSettings) -> None:
        self._question = published_question(files.place(UNIFIED_REWARD, UNIFIED_QUESTION))
        self._endpoint = Endpoint(UNIFIED_REWARD, url, SERVED_NAME, settings)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """Metadata are not looked at."""
        questions = [self._question.replace("{prompt}", prompt) for prompt in prompts]
        choices = self._endpoint.ask(images, questions, max_tokens=MOST_TOKENS)
        scores, info = read_scores([str(choice["message"]["content"]) for choice in choices], prompts)
        return Scored(scores, info=info)


def published_question(script: Path) -> str:
    """With `{prompt}` in the place of the prompt, out of the authors' own script."""
    return template_in(UNIFIED_REWARD, script, "prompt")


def read_scores(answers: list[str], prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) means of three scores from 1 to 5, and each of them.

    Raises:
        RewardError: an answer does not hold each of them once, or one is out of range: it is never taken for a number.
    """
    rows = []
    for index, answer in enumerate(answers):
        found = [(name.lower(), float(value)) for name, value in _SCORE.findall(answer)]
        scores = dict(found)
        if len(found) != 3 or len(scores) != 3 or not all(1 <= value <= 5 for value in scores.values()):
            raise RewardError(
                f"reward '{UNIFIED_REWARD}': expected the scores for alignment, coherence and style, from 1 to 5 and "
                f"once each, got the answer {answer!r:.400} for {describe_samples([index], prompts)}"
            )
        rows.append(scores)
    info = {name: torch.tensor([row[name] for row in rows]) for name in ("alignment", "coherence", "style")}
    return torch.stack(list(info.values())).mean(0), info
