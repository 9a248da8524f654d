"""Names of rewards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlr_peft.errors import RewardError
from rlr_peft.rewards import LARGE_REWARDS, MODEL_REWARDS, available_rewards, load_reward
from rlr_peft.rewards.names import UNIFIED_REWARD
from rlr_peft.train import train_command


def test_the_list_holds_every_form() -> None:
    names = available_rewards()
    assert {"jpeg-compressibility", "tiny-shapes", "tiny-shapes/texture", "tiny-shapes-heldout/shape"} <= set(names)
    assert {"aesthetic", "pickscore", "hpsv2/v2.0", "imagereward", "clipscore", "temporal-flicker"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [
        ("jpeg-compresibility", "jpeg-compressibility"),
        ("tiny-shape", "tiny-shapes"),
        ("tiny-shapes/textur", "tiny-shapes/texture"),
        ("tiny_shapes_heldout", "tiny-shapes-heldout"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(spec: str, nearest: str) -> None:
    with pytest.raises(RewardError, match=f"unknown reward '{spec}'. Did you mean '{nearest}'") as caught:
        load_reward(spec)
    assert "jpeg-incompressibility" in str(caught.value)
    assert "file.py:callable" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pickscor", "unknown reward 'pickscor'. Did you mean 'pickscore'?"),
        ("vlm:", "reward 'vlm:': expected a Hub id or a folder behind the colon, got none"),
        ("pickscore:0.5", "reward 'pickscore:0.5': a weight is written as --reward_fn '{pickscore: 0.5}'"),
    ],
)
def test_training_knows_the_names_before_torch_is_there(
    spec: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        train_command(["--config", "tiny_shapes", "--output_dir", "none", "--heldout_reward_fn", spec])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_file_is_told_before_torch_is_there(tmp_path: Path) -> None:
    """Training tells it as the reward does when it is loaded, whichever of the rewards misses it."""
    code = """if True:
        import sys
        from rlr_peft.rewards.model_files import PARTS
        from rlr_peft.train import train_command
        words = ["--config", "tiny_shapes", "--cache_dir", sys.argv[1], "--output_dir", sys.argv[1] + "/run"]
        for name in (*PARTS, "vlm:owner/model"):
            try:
                train_command([*words, "--heldout_reward_fn", "jpeg-compressibility", name])
            except SystemExit as left:
                print(name, left.code)
        assert not {"torch", "transformers"} & set(sys.modules)
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": ""}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    networks = [*MODEL_REWARDS, *LARGE_REWARDS, UNIFIED_REWARD]
    assert sorted(done.stdout.splitlines()) == sorted(f"{name} 1" for name in (*networks, "vlm:owner/model"))
    assert done.stderr.count("not in the local cache") + done.stderr.count("not on the Hub") == len(networks) + 1
    assert "reward 'pickscore' needs the file config.json" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spec", ["", "aesthetic-and-much-more", "tiny-shapes/"])
def test_what_resembles_nothing_still_gets_the_list(spec: str) -> None:
    with pytest.raises(RewardError, match="There are: aesthetic, "):
        load_reward(spec)


def test_a_file_without_a_function_is_told_how_to_name_one() -> None:
    with pytest.raises(RewardError, match=r"name it: `mine.py:callable`"):
        load_reward("mine.py")


def test_importing_rewards_imports_no_model_library() -> None:
    unwanted = "{'torchvision', 'diffusers', 'transformers'}"
    code = f"import sys, rlr_peft.rewards.registry; print({unwanted} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
