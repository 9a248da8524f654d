"""The processor of Qwen-Image-Edit where there is no torchvision, which transformers asks for because of videos."""

from typing import Any

from transformers import ProcessorMixin, Qwen2VLProcessor


class PictureProcessor(Qwen2VLProcessor):
    """transformers' ``Qwen2VLProcessor`` without its part for videos; a saved pipeline names transformers' own class.

    Args:
        image_processor: as there.
        tokenizer: as there.
        chat_template: as there.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


PictureProcessor.__name__, PictureProcessor.__module__ = Qwen2VLProcessor.__name__, Qwen2VLProcessor.__module__
