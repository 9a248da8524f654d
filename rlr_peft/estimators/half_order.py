"""Half order (HO): the sampler's own noise as likelihood ratio, times the Jacobian of a short block of steps.

A block ``j..j+h-1`` contributes the gradient of ``A < eps_j / sigma_j, mu_{j:j+h-1}(x_{j+h-1}) >`` with the noises
inside the block held fixed. With h = 1 on every step this is REINFORCE (DDPO on policy).

Two things make its advantages less noisy: antithetic noise next to the image (black-box tail), and a state baseline.
The paper's form takes the longest blocks that a budget of compute or of memory allows.
"""

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from rlr_peft.chain.adjoint import Segment
from rlr_peft.chain.steps import Chain
from rlr_peft.config import window_steps
from rlr_peft.config.chain import AUTO
from rlr_peft.config.estimator import ScoreTermArguments, ThreeOrdersArguments
from rlr_peft.estimators.base import CoverageError, RunShape
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.reports import counted

StartSampler = Literal["uniform", "gradient-norm", "window"]

# Share of uniform draws mixed into gradient-norm sampling where its probabilities become weights 1 / q.
DEFENSIVE_SHARE = 0.1

# A variance below this share of the mean square is rounding: the predictions are all the same.
ROUNDING = 1e-9

# Weight of the past in the state baseline's running moments.
BASELINE_DECAY = 0.9

HALF_ORDER = "half_order"


@dataclass(frozen=True)
class StageWindow:
    """A stage of the chain as a window: steps ``first..last``, counted from the clean end."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class HalfOrder:
    """How half-order blocks are laid and drawn.

    Attributes:
        length: h, steps per block.
        blocks: "all" tiles every step beyond the first-order tail; a number M draws that many blocks at random.
        start: how random blocks are drawn: uniformly, by the softmax of running gradient norms (paper, section 3.2),
            or uniformly within a window of steps (paper, section on DCoT).
        window: first and last step t in which a block may start, with ``start="window"``.
        stage_windows: the stages from which the window is chosen by measured gradient energy; empty for a given window.
    """

    length: int
    blocks: int | Literal["all"]
    start: StartSampler = "uniform"
    window: tuple[int, int] | None = None
    stage_windows: tuple[StageWindow, ...] = ()

    @classmethod
    def from_arguments(cls, arguments: ScoreTermArguments, shape: RunShape, length: int = 1) -> Self:
        """Of blocks of so many steps."""
        window, measured = None, tuple[StageWindow, ...]()
        num_steps, stages = shape.num_inference_steps, shape.stages
        if arguments.ho_window is not None:
            window = window_steps(arguments.ho_window, num_steps, stages)
        if stages is not None and arguments.ho_window == (AUTO,):
            measured = tuple(StageWindow(name, *stages.window(name, num_steps)) for name in stages.names)
        return cls(length, arguments.ho_blocks, arguments.ho_start, window, measured)

    def describe(self, alone: bool) -> str:
        """In words, for logs and cards; `alone` says that no other term covers steps."""
        if self.blocks == "all":
            blocks = f" in blocks of {self.length}" if self.length > 1 else ""
            return f"score terms on all {'' if alone else 'other '}steps{blocks}"
        window = "the stage with the largest measured gradient energy" if self.stage_windows else f"steps {self.window}"
        how = {"uniform": "uniformly", "gradient-norm": "by gradient norm", "window": f"from {window}"}
        blocks = f"{counted(self.blocks, 'block')} of {counted(self.length, 'step')}"
        return f"score terms on {blocks}, drawn {how[self.start]}"

    def draws_beyond(self, covered_tail: int) -> bool:
        """Whether anything is left to draw when steps 1..covered_tail are covered by other terms.

        Not where these have come to cover the whole window, as a measured K may in mid-training.
        """
        return self.start != "window" or self.window is None or self.window[1] > covered_tail


def tiles(first_step: int, last_step: int, length: int, noiseless: Container[int] = ()) -> list[range]:
    """Disjoint blocks that cover ``first_step..last_step``; the last one is shorter if need be.

    No block starts at a noiseless step, which has no likelihood ratio: such a step is skipped unless a block that
    started before it reaches over it.
    """
    blocks, t = [], first_step
    while t <= last_step:
        if t in noiseless:
            t += 1
            continue
        blocks.append(range(t, min(t + length, last_step + 1)))
        t += length
    return blocks


def free_blocks(first_step: int, last_step: int, length: int) -> list[range]:
    """Every block of the given length within ``first_step..last_step``; they overlap."""
    return [range(j, j + length) for j in range(first_step, last_step - length + 2)]


def draw_probabilities(
    blocks: Sequence[range], half_order: HalfOrder, running_norms: Mapping[int, float], defensive_share: float = 0.0
) -> torch.Tensor:
    """Probability of every block in a single draw, (len(blocks),), float64.

    Args:
        running_norms: running gradient norm by first step; blocks never drawn count as average.
        defensive_share: share of uniform probability mixed in, in [0, 1].

    Raises:
        CoverageError: no block starts within the window.
    """
    if half_order.start == "window":
        if half_order.window is None:
            raise ValueError("Expected a window (a, b) for start='window', got none.")
        low, high = half_order.window
        inside = torch.tensor([float(low <= block[0] <= high) for block in blocks], dtype=torch.float64)
        if inside.sum() == 0:
            raise CoverageError(
                f"Expected a block that starts within steps {low}..{high}, got starts "
                f"{[block[0] for block in blocks]}. Widen ho_window, or lower "
                "fo_steps, black_box_steps or ho_length."
            )
        return inside / inside.sum()
    uniform = torch.full((len(blocks),), 1 / len(blocks), dtype=torch.float64)
    known = [running_norms[block[0]] for block in blocks if block[0] in running_norms]
    if half_order.start == "uniform" or not known:
        return uniform
    average = sum(known) / len(known)
    norms = torch.tensor([running_norms.get(block[0], average) for block in blocks], dtype=torch.float64)
    return (1 - defensive_share) * norms.softmax(0) + defensive_share * uniform


def expected_draws(probabilities: torch.Tensor, num_draws: int) -> torch.Tensor:
    """Expected number of times that ``draw`` returns every block, (number of blocks,)."""
    return torch.clamp(probabilities * num_draws, max=1.0) if _is_uniform(probabilities) else probabilities * num_draws


def draw(probabilities: torch.Tensor, num_draws: int, generator: torch.Generator) -> list[int]:
    """Indices of the drawn blocks: distinct ones where the draw is uniform, independent draws otherwise."""
    distinct = _is_uniform(probabilities)
    possible = int((probabilities > 0).sum())
    count = min(num_draws, possible) if distinct else num_draws
    return torch.multinomial(probabilities, count, replacement=not distinct, generator=generator).tolist()


def half_order_segment(
    rollout: Rollout, block: range, advantages: torch.Tensor, weight: float = 1.0, note: Any = None
) -> Segment:
    """The segment of a block; its weight is 1 for a block that is always used, 1 / q for one drawn with chance q."""
    cotangent = rollout.score_cotangent(block[0], advantages)
    return Segment(HALF_ORDER, block, cotangent, weight, score_steps=(block[0],), note=note)


def black_box_segment(chain: Chain, objective: Objective, rollout: Rollout, t: int, weight: float = 1.0) -> Segment:
    """Black-box tail (FB): a low-variance score term of step t for a reward without gradient.

    It costs t - 1 extra denoiser evaluations and one reward per sample.
    """
    advantages = mirrored_advantages(chain, objective, rollout, t)
    return Segment("black_box", (t,), rollout.score_cotangent(t, advantages), weight)


def mirrored_advantages(chain: Chain, objective: Objective, rollout: Rollout, t: int) -> torch.Tensor:
    """``A = (R(x_0) - R(x'_0)) / 2`` of step t, (B,).

    The sample is continued once more from ``x'_{t-1} = x_{t-1} - 2 sigma_t eps_t``, the mirror image of its noise, with
    the same later noises: the difference cancels all of the reward that step t did not cause.
    """
    trajectory = rollout.trajectory
    mirrored = trajectory.latents[t - 1] - 2 * trajectory.std(t) * trajectory.noise(t)
    mirrored_rewards = objective.score(chain.denoise(trajectory, t - 1, mirrored), trajectory.prompts)
    return (rollout.rewards - mirrored_rewards) / 2


def choose_stage(stages: Sequence[StageWindow], energies: torch.Tensor, covered_tail: int) -> StageWindow:
    """``ho_window auto``: the stage with the largest share of the gradient's energy gets the half-order blocks.

    arXiv:2502.00639 aims half-order starts at the deficient scale by hand. Here it is measured where the parameters
    move the reward, noise included: a proxy, because nothing measured knows what the images lack.

    Args:
        stages: of the chain; only those count that reach beyond the covered tail.
        energies: of the steps, at index t - 1, as ``step_energies`` gives them.
        covered_tail: these last steps need no half order: K, or the black-box tail of a reward without gradient.
    """
    possible = [stage for stage in stages if stage.last > covered_tail]
    return max(possible or stages, key=lambda stage: float(energies[stage.first - 1 : stage.last].sum()))


def _is_uniform(probabilities: torch.Tensor) -> bool:
    positive = probabilities[probabilities > 0]
    return bool(torch.all(positive == positive[0]))


@dataclass(frozen=True)
class BaselineObservation:
    """Advantages and predicted advantages of one micro-batch at step t."""

    t: int
    advantages: list[float]
    predictions: list[float]


class StateBaseline:
    """State baseline (SB): what the sample's own state already tells of its reward, taken off its advantage.

    ``A_t = A - kappa_t (R(x0hat(x_t)) - R_others - m_t)``, with kappa_t = Cov / Var and m_t of past updates only. At
    step t the denoiser predicts the image from x_t, before the step's noise is drawn, so the reward of that prediction
    may be subtracted without bias. It costs one reward call per sample and step, and tells something only late in the
    chain.
    """

    def __init__(self) -> None:
        # by step: mean of predictions, of their squares, and of their products with the advantages
        self._moments: dict[int, tuple[float, float, float]] = {}

    def kappa(self, t: int) -> float:
        """Regression coefficient of the advantage on the prediction at step t; 0 while nothing is known."""
        mean, square, product = self._moments.get(t, (0.0, 0.0, 0.0))
        variance = square - mean**2
        return product / variance if variance > ROUNDING * square else 0.0

    def correct(
        self, objective: Objective, rollout: Rollout, advantages: torch.Tensor, t: int
    ) -> tuple[torch.Tensor, BaselineObservation]:
        """Advantages (B,) for the score term of step t, and what to remember of them."""
        predicted = objective.score(rollout.trajectory.pred_original_samples[t - 1], rollout.trajectory.prompts)
        predictions = predicted - (rollout.rewards - advantages)  # relative to the others of the prompt
        mean = self._moments.get(t, (0.0, 0.0, 0.0))[0]
        corrected = advantages - self.kappa(t) * (predictions - mean)
        return corrected, BaselineObservation(t, advantages.tolist(), predictions.tolist())

    def learn(self, observations: Iterable[BaselineObservation]) -> None:
        """Blends the observations of a finished update into the running moments."""
        by_step: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        for seen in observations:
            by_step[seen.t].extend(zip(seen.advantages, seen.predictions, strict=True))
        for t, pairs in by_step.items():
            advantage, prediction = torch.tensor(pairs, dtype=torch.float64).T
            newer = (
                float(prediction.mean()),
                float(prediction.square().mean()),
                float((advantage * prediction).mean()),
            )
            older = self._moments.get(t, newer)
            blended = [BASELINE_DECAY * a + (1 - BASELINE_DECAY) * b for a, b in zip(older, newer, strict=True)]
            self._moments[t] = (blended[0], blended[1], blended[2])

    def state_dict(self) -> dict[str, Any]:
        """The running moments."""
        return {"moments": {t: list(moments) for t, moments in self._moments.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._moments = {t: (moments[0], moments[1], moments[2]) for t, moments in state["moments"].items()}


def half_order_length(arguments: ThreeOrdersArguments, num_inference_steps: int) -> int:
    """The given length; or, `auto`, the longest that all given budgets allow.

    Raises:
        ValueError: a budget that does not allow a block of one step, or one that cannot decide the length.
    """
    if arguments.ho_length != "auto":
        return arguments.ho_length
    fo_steps, blocks, lengths = arguments.fo_steps, arguments.ho_blocks, []
    if arguments.nfe_budget is not None:
        if blocks == "all" or fo_steps == "auto":
            raise ValueError(
                "Expected numbers for ho_blocks and fo_steps beside ho_length auto and nfe_budget, got "
                f"ho_blocks = {blocks} and fo_steps = {fo_steps}: tiling every step costs the same for every "
                "length, and a measured K is not known beforehand. Set both, or use --estimator rlr-paper."
            )
        evaluations = arguments.zo_chains * num_inference_steps
        lengths.append(
            half_order_length_for_compute(arguments.nfe_budget, num_inference_steps, fo_steps, blocks, evaluations)
        )
    if arguments.memory_budget is not None:
        assert arguments.ho_step_memory is not None and arguments.zo_step_memory is not None  # the config's checks
        lengths.append(
            half_order_length_for_memory(
                arguments.memory_budget, arguments.ho_step_memory, arguments.zo_step_memory, num_inference_steps
            )
        )
    return min(lengths)


def half_order_length_for_compute(
    nfe_budget: float, num_steps: int, first_order_steps: int, num_blocks: int, zeroth_order_evaluations: int
) -> int:
    """The longest block that a compute budget allows, at least 1.

    Args:
        nfe_budget: denoiser evaluations per sample and update.
        num_steps: T, spent on sampling.
        first_order_steps: K, replayed by the first-order term.
        num_blocks: M, half-order blocks per update.
        zeroth_order_evaluations: denoiser evaluations of the zeroth-order term.

    Raises:
        ValueError: the budget does not even allow h = 1.
    """
    fixed = num_steps + first_order_steps + zeroth_order_evaluations
    length = math.floor((nfe_budget - fixed) / num_blocks)
    if length < 1:
        raise ValueError(
            f"Expected nfe_budget >= {fixed + num_blocks} (sampling {num_steps}, first order {first_order_steps}, "
            f"zeroth order {zeroth_order_evaluations}, one step for each of {num_blocks} blocks), got {nfe_budget}."
        )
    return max(1, min(length, num_steps - first_order_steps))


def half_order_length_for_memory(
    memory_budget: float, half_order_step: float, zeroth_order_step: float, num_steps: int
) -> int:
    """The paper's budget rule ``h* = floor((B - B_z (T - 1)) / (B_h - B_z))``, within 1..T - 1 (1 for T = 1).

    It is about a tape that holds all h steps. Ours holds one (see ``rlr_peft.chain.adjoint``), so memory never forces a
    small h here; the rule is kept for comparison with the paper, whose second bound never acts.

    Args:
        memory_budget: B in GB.
        half_order_step: B_h, GB per half-order step on the tape.
        zeroth_order_step: B_z, GB per zeroth-order step.
        num_steps: T.

    Raises:
        ValueError: the budget does not allow h = 1.
    """
    length = math.floor((memory_budget - zeroth_order_step * (num_steps - 1)) / (half_order_step - zeroth_order_step))
    if length < 1:
        needed = half_order_step + zeroth_order_step * (num_steps - 2)
        raise ValueError(f"Expected memory_budget >= {needed:.2f} GB for h = 1, got {memory_budget} GB.")
    return max(1, min(length, num_steps - 1))
