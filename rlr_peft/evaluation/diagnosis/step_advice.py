"""Advice on single steps and stages of the chain."""

from collections.abc import Iterator

from rlr_peft.evaluation.diagnosis.diagnosis import Diagnosis
from rlr_peft.evaluation.diagnosis.wording import steps_in_words


def window_advice(diagnosis: Diagnosis) -> Iterator[str]:
    """The third of the chain where most of the gradient is, and how to train it alone."""
    evidence, tail = diagnosis.evidence, diagnosis.comparison.first_order_steps
    stages = [stage for stage in diagnosis.profile.stages if stage.energy_share is not None]
    if not stages or not evidence.noisy_steps:
        return
    stage = max(stages, key=lambda stage: stage.energy_share or 0.0)
    yield (
        f"The {stage.name} stage ({steps_in_words(stage.steps)}) holds {stage.energy_share:.0%} of the gradient energy."
    )
    low = max(stage.first_step, tail + 1)
    if low > stage.last_step:
        yield f"The pathwise gradient covers all of it with K = {tail}, so a window for score terms gains nothing."
        return
    yield (
        f"To train this scale alone, draw score terms from it: `--fo_steps {tail} --ho_blocks 1 --ho_start window "
        f"--ho_window {low} {stage.last_step}`. That is biased by choice: steps outside the window and beyond "
        f"K = {tail} get nothing."
    )


def hot_step_advice(diagnosis: Diagnosis) -> Iterator[str]:
    """Steps where a score term is very noisy."""
    tail = "pathwise gradient" if diagnosis.evidence.differentiable else "black-box tail"
    for t, ratio in diagnosis.profile.hot_steps.items():
        is_covered = t <= diagnosis.comparison.covered_tail
        covered = f"the {tail} covers it" if is_covered else "a score term there is very noisy"
        yield f"Step {t} is hot: its mean moves {ratio:.1f} times its noise per unit of denoiser output; {covered}."


def last_step_advice(diagnosis: Diagnosis) -> Iterator[str]:
    """What to do about a last step that hardly reacts to the denoiser."""
    profile = diagnosis.profile
    if profile.last_step_is_dead:
        yield (
            f"The last step is nearly dead: the image moves only {profile.last_step_sensitivity:.3f} per unit of "
            "denoiser output there, so truncated backpropagation with K = 1 hardly trains. Use a larger K, or another "
            "grid (`--timestep_spacing trailing`, unless this is one)."
        )
