"""How stage prompts condition the steps of their stages: where `--dcot_form` is decided, for training and inference."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from diffusers import DiffusionPipeline

from rlr_peft.build.pipeline import denoiser_names
from rlr_peft.chain.stepped_pipeline import steers_from_texts
from rlr_peft.config import ChainArguments, Config
from rlr_peft.config.chain import AUTO, StageFormName
from rlr_peft.prompt import Prompt
from rlr_peft.prompts.chain_of_thought import as_contrast, as_part, is_split_by_rules
from rlr_peft.prompts.lengths import MAX_CHECKED, TextRoom


@dataclass(frozen=True)
class StageForm:
    """Conditions a stage on its own prompt, or on the whole one in contrast to the rest of it.

    With ``auto`` every prompt decides for itself, whatever is drawn beside it: a contrast harms no caption that was
    measured, but needs guidance away from a text and all of the caption; what somebody wrote for a stage is that
    stage's prompt.

    Attributes:
        name: as in the config.
        steers: whether there is guidance that leads away from a text.
        room: what the text encoders see.
    """

    name: StageFormName
    steers: bool
    room: TextRoom

    def __call__(self, prompt: Prompt, index: int) -> Prompt:
        """The prompt that conditions a stage."""
        return (as_contrast if self.is_contrast(prompt) else as_part)(prompt, index)

    def is_contrast(self, prompt: Prompt) -> bool:
        """Whether the whole prompt conditions all of its stages."""
        if self.name != AUTO:
            return self.name == "contrast"
        return self.steers and _fits_and_is_split_by_rules(prompt.text, prompt.stages, self.room)

    def contrasts_among(self, prompts: Sequence[Prompt]) -> tuple[int, int]:
        """How many of the different texts are contrasts, and of how many that were looked at."""
        looked_at = list({prompt.text: prompt for prompt in prompts if prompt.stages}.values())[:MAX_CHECKED]
        return sum(map(self.is_contrast, looked_at)), len(looked_at)

    def describe(self, prompts: Sequence[Prompt]) -> str:
        """In words for the log: `as a contrast (39 of 45 prompts, else as parts)`."""
        contrasts, looked_at = self.contrasts_among(prompts)
        if contrasts in (0, looked_at):
            return "as a contrast" if contrasts else "as parts"
        return f"as a contrast ({contrasts} of {looked_at} prompts, else as parts)"


@lru_cache(maxsize=MAX_CHECKED)  # asked at every step
def _fits_and_is_split_by_rules(text: str, stages: tuple[str, ...], room: TextRoom) -> bool:
    return is_split_by_rules(text, stages) and not room.beyond([text])


def stage_form(config: Config, pipeline: DiffusionPipeline) -> StageForm:
    """That of a run.

    Raises:
        ValueError: a contrast is asked for where no guidance leads away from a text.
    """
    name = config.chain_of_thought.dcot_form
    return choose_stage_form(name, pipeline, config.chain, denoiser_names(config))


def choose_stage_form(
    name: StageFormName, pipeline: DiffusionPipeline, arguments: ChainArguments, denoisers: Sequence[str] | None = None
) -> StageForm:
    """That of a chain; the guidance of training decides, also where images are drawn with another.

    Raises:
        ValueError: a contrast is asked for where no guidance leads away from a text.
    """
    steers = steers_from_texts(pipeline, arguments, denoisers)
    if name == "contrast" and not steers:
        raise ValueError(
            f"dcot_form: expected guidance that leads away from a text with contrast, which {type(pipeline).__name__} "
            "lacks here: it is off, built into the model, or takes no negative prompt. Raise --guidance_scale or "
            "--true_cfg_scale, or use --dcot_form parts."
        )
    return StageForm(name, steers, TextRoom.of(pipeline, arguments.max_sequence_length))
