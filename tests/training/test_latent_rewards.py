"""A reward of latents: no decode for it, its exact gradient, and a run with what looks at images beside it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlr_peft.build import evaluation_chain
from rlr_peft.errors import RewardError
from rlr_peft.estimators import DecodedReward
from rlr_peft.lora import adapter_disabled
from rlr_peft.rewards import CallableReward, JpegReward, RewardServer, Term, WeightedRewards, load_reward
from rlr_peft.training import evaluate_base, read_metrics
from tests.training.runs import config_file, train_here


class Decoder:
    """Counts what is decoded."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, latents: torch.Tensor, prompts: Sequence[object]) -> torch.Tensor:
        self.decoded += len(latents)
        return latents[:, :3].sigmoid()


def squares(latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return -latents.square().flatten(1).sum(1)


def reward() -> CallableReward:
    function = squares
    function.takes_latents = True  # type: ignore[attr-defined]
    return CallableReward("squares", function)


@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (2, 4, 3, 4, 4), (2, 12, 16)], ids=str)
def test_latents_of_any_shape_are_scored_and_differentiated_as_they_are(shape: tuple[int, ...]) -> None:
    decoder, latents = Decoder(), torch.randn(shape)
    measured = DecodedReward(decoder, reward(), batch_size=1).measure(latents, ["a", "b"])
    torch.testing.assert_close(measured.rewards, squares(latents, []))
    torch.testing.assert_close(measured.reward_gradient, -2 * latents)
    assert decoder.decoded == 0
    torch.testing.assert_close(DecodedReward(decoder, reward(), 2).score(latents, ["a", "b"]), measured.rewards)


def test_a_held_out_reward_sees_images_all_the_same() -> None:
    decoder, latents = Decoder(), torch.randn(2, 4, 8, 8)
    measured = DecodedReward(decoder, reward(), 2, heldout=JpegReward(compressible=True)).measure(latents, ["a", "b"])
    assert measured.heldout is not None and (measured.heldout.scores < 0).all() and decoder.decoded == 2


def test_where_there_are_images_alone_it_is_refused(workplace: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"all judge images or all judge latents.*squares \(latents\), jpeg"):
        WeightedRewards([Term(reward(), 1.0), Term(JpegReward(compressible=True), 1.0)])
    with pytest.raises(RewardError, match=r"judges latents \(takes_latents\), but a server gets images"):
        RewardServer(reward(), "127.0.0.1", 0)
    spec = f"{workplace / 'rewards.py'}:small_latents"
    assert load_reward(spec).takes_latents
    with pytest.raises(RewardError, match="but a held-out reward gets images"):
        train_here(config_file(workplace, tmp_path / "run", heldout_reward_fn=[spec], max_train_steps=1))


def test_a_run_raises_it_and_compares_base_and_adapter(workplace: Path, tmp_path: Path) -> None:
    values = {"evaluation_prompt_path": str(workplace / "unseen.txt"), "num_evaluation_images": 2}
    values |= {"heldout_reward_fn": ["jpeg-compressibility"], "max_train_steps": 2, "estimator": "full-bp"}
    run, progress = train_here(config_file(workplace, tmp_path / "run", "small_latents", **values))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2 and all(line["reward"] < 0 and "heldout" in line for line in lines)
    assert progress.step == 2
    evaluation = evaluate_base(run)
    assert evaluation is not None
    chain = evaluation_chain(run.config, run.chain)
    with torch.no_grad(), adapter_disabled(run.chain.denoiser):
        latents = chain.sample(evaluation.prompts, evaluation.seeds).latents[0]
    torch.testing.assert_close(evaluation.scores["reward"], -latents.square().flatten(1).mean(1))
