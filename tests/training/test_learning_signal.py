"""A reward that cannot teach anything is said at once and at the end, with the reason."""

import logging
import re
from pathlib import Path

import pytest
import yaml

from rlr_peft.training import METRICS_LOG, LearningSignal, finish, read_metrics, summary
from tests.training.runs import config_file, train_here

REWARDS = """
def constant(images, prompts):
    return images.sum((1, 2, 3)) * 0 + 1

def faint(images, prompts):
    return images.mean((1, 2, 3)) * 1e-30

def blind_constant(images, prompts):
    return [0.5] * len(images)

def small(images, prompts):
    return images.mean((1, 2, 3)) * 1e-4

blind_constant.differentiable = False
"""
CONSTANT = r"scored all images the same \({}\), so no image is better than another \(advantages are zero\), and its "
FAINT = r"is too faint, \d+e-3\d in a typical weight, against --adam_epsilon 1e-08, .* have it scaled: --reward_fn"
# Reward, options of the run, and why nothing is learnt; None where something is.
CASES = {
    "constant": ("constant", {}, CONSTANT.format(1)),
    "blind": ("blind_constant", {"estimator": "grpo"}, CONSTANT.format(0.5)),
    "faint": ("faint", {}, FAINT),
    "faint without a gradient": ("faint", {"estimator": "reinforce"}, FAINT),
    "faint but scaled": ("faint", {}, None),
    "small": ("small", {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_to_learn_is_said(case: str, workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward, options, why = CASES[case]
    (tmp_path / "rewards.py").write_text(REWARDS)
    spec = f"{tmp_path}/rewards.py:{reward}"
    config = config_file(workplace, tmp_path / "out", max_train_steps=2, num_inference_steps=2, **options)
    values = yaml.safe_load(config.read_text()) | {"reward_fn": {spec: 1.0} if case == "faint but scaled" else spec}
    config.write_text(yaml.safe_dump(values))
    with caplog.at_level(logging.WARNING):
        run, progress = train_here(config)
    said = [message for message in caplog.messages if "taught nothing" in message]
    sentence = LearningSignal.of(run).verdict(read_metrics(run.output_dir / METRICS_LOG))
    if why is None:
        assert not said and sentence is None
        return
    assert len(said) == 1 and said[0].startswith("Update 1 taught nothing: ")
    assert sentence is not None and sentence.startswith("Nothing was learnt in 2 updates: ")
    for words in (said[0], sentence):
        assert re.search(rf"reward 'rewards\.py:{reward}' {why}", words), words
    if case == "constant":
        assert sentence in summary(run, finish(run, progress, None))
        assert sentence in (run.output_dir / "README.md").read_text()
