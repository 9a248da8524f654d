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
        by_rules: whether the rules split prompts. What is theirs word for word is still not theirs where columns or a
            model told it.
    """

    name: StageFormName
    steers: bool
    room: TextRoom
    by_rules: bool = True

    def __call__(self, prompt: Prompt, index: int) -> Prompt:
        """The prompt that conditions a stage."""
        return (as_contrast if self.is_contrast(prompt) else as_part)(prompt, index)

    def is_contrast(self, prompt: Prompt) -> bool:
        """Whether the whole prompt conditions all of its stages."""
        if self.name != AUTO:
            return self.name == "contrast"
        return self.steers and self.by_rules and _fits_and_is_split_by_rules(prompt.text, prompt.stages, self.room)

    def contrasts_among(self, prompts: Sequence[Prompt]) -> tuple[int, int]:
        """How many of the different texts are contrasts, and of how many that were looked at."""
        looked_at = _different(prompts)
        return sum(map(self.is_contrast, looked_at)), len(looked_at)

    def describe(self, prompts: Sequence[Prompt]) -> str:
        """In words for the log: `as parts (guidance leads away from no text)`."""
        contrasts, looked_at = self.contrasts_among(prompts)
        if contrasts == looked_at > 0:
            return "as a contrast"
        if self.name != AUTO:
            return "as parts"
        why = self._why_parts(_different(prompts))
        some = f"as a contrast ({contrasts} of {looked_at} prompts, else as parts: {why})"
        return some if contrasts else f"as parts ({why})"

    def _why_parts(self, prompts: Sequence[Prompt]) -> str:
        """What keeps these from being contrasts, as far as they are none."""
        if not self.by_rules:
            return "the rules did not split the prompts"
        if not self.steers:
            return "guidance leads away from no text"
        cut = len(self.room.beyond([prompt.text for prompt in prompts]))
        edited = sum(not self.is_contrast(prompt) for prompt in prompts) - cut
        reasons = {"longer than the text encoder holds": cut, "with stage prompts that were edited": edited}
        return ", ".join(f"{count:,} {words}" for words, count in reasons.items() if count)


def _different(prompts: Sequence[Prompt]) -> list[Prompt]:
    """One prompt of every text, up to so many that looking at them costs nothing."""
    return list({prompt.text: prompt for prompt in prompts if prompt.stages}.values())[:MAX_CHECKED]


@lru_cache(maxsize=MAX_CHECKED)  # asked at every step
def _fits_and_is_split_by_rules(text: str, stages: tuple[str, ...], room: TextRoom) -> bool:
    return is_split_by_rules(text, stages) and not room.beyond([text])


def stage_form(config: Config, pipeline: DiffusionPipeline) -> StageForm:
    """That of a run.

    Raises:
        ValueError: a contrast is asked for where no guidance leads away from a text.
    """
    asked = config.chain_of_thought
    return choose_stage_form(asked.dcot_form, pipeline, config.chain, denoiser_names(config), by_rules=asked.dcot_rules)


def choose_stage_form(
    name: StageFormName,
    pipeline: DiffusionPipeline,
    arguments: ChainArguments,
    denoisers: Sequence[str] | None = None,
    *,
    by_rules: bool = True,
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
    return StageForm(name, steers, TextRoom.of(pipeline, arguments.max_sequence_length), by_rules)
