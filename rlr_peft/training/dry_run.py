"""Everything but training: loads, plans the memory, takes two updates, and says what the whole run takes."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from rlr_peft.build.machine import describe_hardware, peak_memory_mb, total_memory
from rlr_peft.build.reporting import errors_only
from rlr_peft.build.run import Run, build_run
from rlr_peft.config import Config
from rlr_peft.errors import UserError
from rlr_peft.plan.parts import MemoryPlan, host_plan
from rlr_peft.plan.run import plan_run
from rlr_peft.reports import duration
from rlr_peft.training.finishing import num_divergence_samples
from rlr_peft.training.tracking import form_in_words, stage_prompts_in_words
from rlr_peft.training.update import calibrate, calibration_due, calibration_interval, take_update
from rlr_peft.training.validation import evaluate_adapter, save_validation_images

GIB = 2**30
# Steps from which on fewer are worth a try, and how many then.
MANY_STEPS, FEWER_STEPS = 20, 10


@dataclass(frozen=True)
class Seconds:
    """What the parts of a run take.

    Attributes:
        first: the first update, which loads kernels, compiles and encodes.
        update: an update after it.
        calibration: all calibrations of the run.
        evaluation: base and adapter on all their images, and the divergence between them.
        validation: all validation images of the run.
        updates: their number in the run.
    """

    first: float
    update: float
    calibration: float
    evaluation: float
    validation: float
    updates: int

    @property
    def total(self) -> float:
        """Of the run; loading and saving do not count."""
        return self.first + (self.updates - 1) * self.update + self.calibration + self.evaluation + self.validation

    @property
    def evaluation_share(self) -> float:
        """Of evaluations and validation images, of the total."""
        return (self.evaluation + self.validation) / self.total


def take_dry_run(config: Config) -> str:
    """Does it, in a folder of its own that is gone afterwards; returns what there is to say.

    Raises:
        UserError: whatever would stop the run before its third update.
    """
    with tempfile.TemporaryDirectory(prefix="rlr-peft-dry-run-") as folder:
        training = replace(config.training, output_dir=folder)
        checkpointing = replace(config.checkpointing, resume_from_checkpoint=None)
        run = build_run(replace(config, training=training, checkpointing=checkpointing))
        plan = _plan(config)  # now that all could be read: it may take longer than the rest
        seconds = measure(run)
        text = in_words(run, plan, seconds)
        run.processes.close()
        run.accelerator.end_training()
    return text


def _plan(config: Config) -> MemoryPlan | UserError:
    """Or why there is none: some pipelines cannot be planned, and yet be trained."""
    try:
        with errors_only():
            return plan_run(config)
    except UserError as error:
        return error


def measure(run: Run) -> Seconds:
    """Takes two updates and draws one batch of every kind of images in every process."""
    arithmetic, validation = run.arithmetic, run.config.validation
    knobs, calibrations, calibration = run.config.estimator.calibration, 0, 0.0
    if knobs is not None and calibration_due(run, 0):
        calibration = _seconds(lambda: calibrate(run, 0))
        calibrations = ceil(arithmetic.max_train_steps / calibration_interval(run, knobs))
        if not run.estimator.wants_calibration(run.objective.has_gradient):
            calibrations = 1  # whose images have shown that there is no gradient
    first = _seconds(lambda: take_update(run, 0))
    update = _seconds(lambda: take_update(run, 1))
    evaluated = shown = 0.0
    if run.evaluation_prompts is not None:
        size = min(validation.evaluation_batch_size * run.processes.count, arithmetic.evaluation_images)
        drawn = 2 * (arithmetic.evaluation_images + num_divergence_samples(run))
        evaluated = drawn / size * _seconds(lambda: evaluate_adapter(run, size))
    if run.validation_prompts:
        interval, last = validation.validation_steps, arithmetic.max_train_steps - 1
        times = (0 if interval is None else 1 + last // interval) + (not validation.skip_final_inference)
        shown = times * _seconds(lambda: save_validation_images(run, 0, "validation")) if times else 0.0
    return Seconds(first, update, calibrations * calibration, evaluated, shown, arithmetic.max_train_steps)


def _seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def in_words(run: Run, plan: MemoryPlan | UserError, seconds: Seconds) -> str:
    """What was measured, and what follows for the run."""
    arithmetic, device = run.arithmetic, run.accelerator.device
    lines = [
        "Dry run: everything works up to the second update; nothing was trained or saved.",
        *_memory(run, plan),
        f"  Estimator = {run.method}: {run.method_in_words}",
        f"  Update: the first {duration(seconds.first)}, then {duration(seconds.update)} each, for "
        f"{run.samples_per_update} samples on {describe_hardware(device, run.accelerator.num_processes)}.",
        f"  Whole run: about {duration(seconds.total)} for {seconds.updates} updates, after loading.",
    ]
    if seconds.calibration:
        lines.append(f"    calibrations: {duration(seconds.calibration)}")
    if seconds.evaluation:
        lines.append(
            f"    base and adapter on {arithmetic.evaluation_images} images each: {duration(seconds.evaluation)}"
        )
    if seconds.validation:
        lines.append(f"    validation images: {duration(seconds.validation)}")
    lines.append(f"    share of evaluations: {seconds.evaluation_share:.0%}")
    if run.chain.num_steps >= MANY_STEPS and run.config.validation.evaluation_steps is None:
        steps = run.chain.num_steps
        lines.append(
            f"  Every sample is drawn in {steps} steps. Trained in fewer, adapters gained as much in a race for less: "
            f"try --num_inference_steps {FEWER_STEPS} --evaluation_steps {steps}."
        )
    if stage_prompts := stage_prompts_in_words(run):
        lines += [f"  Chain-of-Thought {form_in_words(run)}, for example:", *(f"    {line}" for line in stage_prompts)]
    return "\n".join(lines)


def _memory(run: Run, plan: MemoryPlan | UserError) -> list[str]:
    device = run.accelerator.device
    used, there = peak_memory_mb(device) / 1024, total_memory(device)
    of_all = "" if there is None else f" of {there / GIB:.1f}"
    lines = [f"  Memory: {used:.1f}{of_all} GiB used at most so far."]
    if isinstance(plan, UserError):
        return [*lines, f"    It cannot be planned: {plan}"]
    planned = plan.peak if device.type == "cuda" else host_plan(plan).without_gpu
    place = f", in {plan.peak_phase}" if device.type == "cuda" else ""
    return [*lines, f"    planned for the whole run: {planned / GIB:.1f} GiB{place}"]
