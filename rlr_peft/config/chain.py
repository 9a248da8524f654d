"""The chain and the prompts of its stages: knobs, and what of them cannot be together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from rlr_peft.config.knob import Group, knob
from rlr_peft.prompt import Stages, make_stages
from rlr_peft.reports import counted

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config

StepKind = Literal["ancestral", "flow-sde", "cps", "ode"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
StageFormName = Literal["auto", "parts", "contrast"]
AUTO: Final = "auto"
SOURCES = ("dcot_columns", "dcot_rules", "dcot_model", "dcot_endpoint")
"""The knobs that say where stage prompts come from."""


@dataclass(frozen=True)
class MovingWindow:
    """Some neighbouring steps with noise, drawn anew for every update (Flow-GRPO-Fast) or sliding (MixGRPO 2507.21802).

    Attributes:
        first, last: the steps among which it moves, counted from the clean end.
        length: number of its steps.
        slide: updates after which it moves one step towards the clean end, from where it begins again at the noise;
            None draws it.
    """

    first: int
    last: int
    length: int
    slide: int | None

    @property
    def places(self) -> int:
        """Number of places where it may lie."""
        return self.last - self.first - self.length + 2

    def at(self, update: int, seed: int) -> tuple[int, int]:
        """First and last step with noise in an update."""
        place = seed % self.places if self.slide is None else update // self.slide % self.places
        last = self.last - place
        return last - self.length + 1, last

    def shares(self) -> dict[int, float]:
        """In what share of the updates every step from ``first`` to ``last`` has noise."""
        ends = range(self.first + self.length - 1, self.last + 1)
        steps = range(self.first, self.last + 1)
        return {t: sum(end - self.length < t <= end for end in ends) / self.places for t in steps}

    def describe(self) -> str:
        """In words, what a step of it is."""
        how = "drawn for every update" if self.slide is None else f"sliding every {counted(self.slide, 'update')}"
        return f"left out in updates where it has no noise ({counted(self.length, 'step')} at a time, {how})"


@dataclass(frozen=True)
class ChainArguments(Group):
    """Chain: how images are sampled while training"""

    num_inference_steps: int = knob(50, "Number T of denoising steps of a chain.", unit="steps", within="[1, 1000]")
    step_kind: StepKind | Literal["auto"] = knob(
        AUTO,
        "Kind of denoising step; `ode` adds no noise at all. `auto` is ancestral for methods that need noise, measured "
        "KL and evaluation_eta above 0, and ode for the others: they train what a deterministic sampler draws.",
    )
    eta: float = knob(
        1.0,
        "Noise added at each step relative to the kind's own: 0 is deterministic, 1 the full noise.",
        unit="factor",
        within="[0, 10]",
    )
    noise_window: tuple[int, ...] | None = knob(
        None,
        "First and last step with noise, counted from 1 (clean) to T (noise); all others are deterministic, and score "
        "terms train those of the window alone. null means all.",
        unit="steps",
    )
    noise_steps: int | None = knob(
        None,
        "Neighbouring steps of noise_window that have noise in one update; null means all of them.",
        unit="steps",
        within="[1, 1000]",
    )
    noise_slide: int | None = knob(
        None,
        "Updates after which noise_steps move by one towards the clean end, from where they begin again at the noise "
        "(MixGRPO); null draws them for every update (Flow-GRPO-Fast).",
        unit="updates",
        within="[1, 1e9]",
    )
    timestep_spacing: TimestepSpacing | None = knob(
        None, "Where the steps lie; null means the family's choice. `trailing` keeps the last step from being dead."
    )
    scheduler_type: Literal["diffusion", "flow"] | None = knob(
        None, "Kind of noising path the model was trained on; null takes it from the pipeline's scheduler."
    )
    guidance_scale: float | None = knob(
        None,
        "Classifier-free guidance scale; null means the pipeline's own default.",
        unit="factor",
        within="[0, 1000]",
    )
    true_cfg_scale: float | None = knob(
        None,
        "Classifier-free guidance of pipelines whose guidance_scale is built into the model, such as FLUX.",
        unit="factor",
        within="[0, 1000]",
    )
    resolution: int | None = knob(
        None, "Height and width of the images; null means the pipeline's default.", unit="pixels", within="[1, 16384]"
    )
    height: int | None = knob(
        None, "Height of images or videos, over resolution; null means resolution.", unit="pixels", within="[1, 16384]"
    )
    width: int | None = knob(
        None, "Width of images or videos, over resolution; null means resolution.", unit="pixels", within="[1, 16384]"
    )
    num_frames: int | None = knob(
        None, "Frames of a video; null means the pipeline's default.", unit="frames", within="[1, 10000]"
    )
    fps: int | None = knob(
        None,
        "Frame rate of the videos, for models that take it as input; null means the pipeline's default, or 8.",
        unit="frames per second",
        within="[1, 1000]",
    )
    max_sequence_length: int | None = knob(
        None,
        "Longest prompt that the text encoder sees; null means the pipeline's default.",
        unit="tokens",
        within="[1, 65536]",
    )
    negative_prompt: str | None = knob(
        None, "Text that guidance leads away from, used for every prompt.", found="words"
    )

    @property
    def kind_of_steps(self) -> StepKind:
        """Of the chain, as long as it has noise."""
        return "ancestral" if self.step_kind == AUTO else self.step_kind

    @property
    def moving_window(self) -> MovingWindow | None:
        """Where noise is in which update; None where the same steps have it in all."""
        if self.noise_steps is None or self.noise_window is None:
            return None
        first, last = self.noise_window
        return MovingWindow(first, last, self.noise_steps, self.noise_slide)

    @property
    def why_noiseless(self) -> str | None:
        """The knob that takes all noise from the chain, in words; None where there is noise."""
        if self.step_kind == "ode":
            return "step_kind ode"
        return f"eta {self.eta}" if self.eta == 0 else None

    def check(self, config: "Config") -> Iterator[str]:
        if self.noise_window is not None:
            first, *others = self.noise_window
            if len(others) != 1 or not 1 <= first <= others[0] <= self.num_inference_steps:
                got = " ".join(map(str, self.noise_window))
                yield (
                    "noise_window: expected two steps a b with 1 <= a <= b <= num_inference_steps "
                    f"({self.num_inference_steps}), got {got}; write --noise_window a b."
                )
            elif self.why_noiseless:
                yield f"noise_window: expected noise in the chain, got {self.why_noiseless}; drop one of the two."
        yield from self._check_moving_noise(config)
        if self.kind_of_steps in ("ancestral", "cps"):
            for name, eta in (("eta", self.eta), ("evaluation_eta", config.validation.evaluation_eta)):
                if eta > 1:
                    yield f"{name}: expected 0 to 1 with step_kind {self.kind_of_steps}, got {eta}; lower --{name}."

    def _check_moving_noise(self, config: "Config") -> Iterator[str]:
        steps, window = self.noise_steps, self.noise_window
        if steps is None:
            if self.noise_slide is not None:
                yield f"noise_slide: expected noise_steps with it, got {self.noise_slide} alone; give --noise_steps."
            return
        if not config.estimator.trains_steps_alone:
            yield (
                f"noise_steps: expected a method that trains single steps and measures none (grpo, ddpo or d3po), got "
                f"{config.estimator.estimator}; leave --noise_steps out, or change --estimator."
            )
        if window is None or len(window) != 2 or window[1] - window[0] + 1 < steps:
            got = "none" if window is None else " ".join(map(str, window))
            yield f"noise_window: expected {steps} steps or more beside noise_steps {steps}, got {got}; widen it."
        elif window[0] == 1:
            yield (
                "noise_window: expected to begin at 2 or later beside noise_steps, as step 1 ends nearly clean, got "
                f"{' '.join(map(str, window))}; write --noise_window 2 {window[1]}."
            )


@dataclass(frozen=True)
class ChainOfThoughtArguments(Group):
    """Diffusive Chain-of-Thought: a prompt for every stage of the chain (off unless a source of them is given)"""

    dcot_columns: tuple[str, ...] | None = knob(
        None,
        "Columns of the stage prompts in the prompt data, noise first, for example `coarse mid fine`.",
        found="words",
    )
    dcot_rules: bool = knob(False, "Split prompts into coarse, mid and fine by built-in rules.")
    dcot_model: str | None = knob(
        None, "Split prompts with a text-generation model of transformers: Hub id or local folder.", found="model"
    )
    dcot_endpoint: str | None = knob(
        None,
        "Split prompts with a model behind an OpenAI-compatible URL, `http://localhost:8000/v1`; the key is read from "
        "the environment variable OPENAI_API_KEY.",
    )
    dcot_endpoint_model: str | None = knob(None, "Name of the model behind dcot_endpoint.")
    dcot_cache: str | None = knob(
        None,
        "JSONL file of stage prompts, to read and edit; null means `stage_prompts.jsonl` in output_dir.",
    )
    dcot_form: StageFormName = knob(
        AUTO,
        "How stage prompts are used. `parts` gives each stage its own prompt. `contrast` gives all stages the whole "
        "prompt, and as negative prompt the whole without the part of the stage. `auto` takes the contrast for prompts "
        "that the rules split, if they fit the text encoder and guidance has a negative prompt, and parts for others.",
    )
    dcot_stages: tuple[str, ...] | None = knob(
        None,
        "Names of the stages, noise first; null means those of dcot_columns, else coarse, mid and fine.",
        found="words",
    )
    dcot_fractions: tuple[float, ...] | None = knob(
        None, "Share of the steps of every stage, noise first, with sum 1; null means equal parts.", unit="fraction"
    )

    def sources(self) -> list[str]:
        """The names of the sources of stage prompts that are given."""
        return [name for name in SOURCES if getattr(self, name)]

    def stages(self) -> Stages | None:
        """The stages of the chain; None for a run without a Diffusive Chain-of-Thought.

        Raises:
            ValueError: names and fractions that do not fit each other.
        """
        return make_stages(self.dcot_stages or self.dcot_columns, self.dcot_fractions) if self.sources() else None

    def check(self, config: "Config") -> Iterator[str]:
        sources, columns = self.sources(), self.dcot_columns
        if len(sources) > 1:
            yield f"{sources[0]}: expected one source of stage prompts, got {' and '.join(sources)}; keep one."
            return
        needless = {
            "dcot_stages": self.dcot_stages,
            "dcot_fractions": self.dcot_fractions,
            "dcot_cache": self.dcot_cache,
            "dcot_form": self.dcot_form if self.dcot_form == "contrast" else None,  # auto and parts ask for nothing
        }
        for name, value in needless.items():
            if value is not None and not sources:
                yield (
                    f"{name}: expected only with a source of stage prompts, got none; give --dcot_columns, "
                    "--dcot_rules, --dcot_model or --dcot_endpoint."
                )
                return
        if (self.dcot_endpoint is None) != (self.dcot_endpoint_model is None):
            yield (
                f"dcot_endpoint_model: expected together with dcot_endpoint, got {self.dcot_endpoint_model} and "
                f"{self.dcot_endpoint}; give both or neither."
            )
        if config.prompts.streaming and ("dcot_model" in sources or "dcot_endpoint" in sources):
            yield (
                f"{sources[0]}: expected dcot_columns or dcot_rules with streaming, got {sources[0]}; split the "
                "prompts of a dataset that is not streamed."
            )
        try:
            stages = self.stages()
            if stages is None:
                return
            stages.steps(config.chain.num_inference_steps)
        except ValueError as error:
            names, fractions = self.dcot_stages or columns or ("the default",), self.dcot_fractions or ("equal",)
            got = f"stages {' '.join(names)} and fractions {' '.join(map(str, fractions))}"
            yield f"dcot_fractions: {error}, got {got}; change --dcot_stages or --dcot_fractions."
            return
        scale = config.chain.true_cfg_scale or config.chain.guidance_scale
        if self.dcot_form == "contrast" and scale is not None and scale <= 1:
            yield (
                f"dcot_form: expected guidance above 1 with contrast, which is guidance away from a text, got {scale}; "
                "raise --guidance_scale (or --true_cfg_scale), or use --dcot_form parts."
            )
        if self.dcot_rules and stages.names != ("coarse", "mid", "fine"):
            yield (
                f"dcot_stages: expected coarse mid fine with dcot_rules, got {' '.join(stages.names)}; drop "
                "--dcot_stages, or take the stage prompts from columns or a model."
            )
        if columns is None and "prompt" in stages.names:
            yield (
                "dcot_stages: expected other names than prompt, which the file of stage prompts calls the whole text, "
                f"got {' '.join(stages.names)}; rename the stage."
            )
        if columns is not None and len(columns) != stages.count:
            yield (
                f"dcot_columns: expected one column for each of {stages.count} stages, got {' '.join(columns)}; change "
                "--dcot_columns or --dcot_stages."
            )


def window_steps(window: tuple[int | str, ...], num_steps: int, stages: Stages | None) -> tuple[int, int] | None:
    """First and last step of a window, counted from the clean end; None for ``auto``, which is measured.

    Args:
        window: two steps, names of stages (from the first to the last of them), or ``auto``.
        num_steps: T.
        stages: None where the chain has none.

    Raises:
        ValueError: neither; the message says what was expected.
    """
    numbers = [part for part in window if isinstance(part, int)]
    names = [part for part in window if isinstance(part, str)]
    if numbers:
        first, last = numbers[0], numbers[-1]
        if names or len(numbers) != 2 or not 1 <= first <= last <= num_steps:
            raise ValueError(f"expected two steps a b with 1 <= a <= b <= num_inference_steps ({num_steps})")
        return first, last
    if stages is None:
        raise ValueError(
            "expected two steps a b, since stages have names only in a Chain-of-Thought (dcot_columns, dcot_rules, "
            "dcot_model or dcot_endpoint)"
        )
    if names == [AUTO]:
        return None
    if unknown := [name for name in names if name not in stages.names]:
        raise ValueError(
            f"expected two steps a b, auto, or stages of {', '.join(stages.names)} instead of {unknown[0]}"
        )
    spans = [stages.window(name, num_steps) for name in names]
    return min(span[0] for span in spans), max(span[1] for span in spans)


def stages_from_config(config: "Config") -> Stages | None:
    """The stages of the chain; None for a run without a Diffusive Chain-of-Thought.

    Raises:
        ValueError: names and fractions that do not fit each other.
    """
    return config.chain_of_thought.stages()
