"""What the plan counts for rewards, from their architectures."""

from pathlib import Path

import pytest
import torch
from transformers import TrOCRConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

from benchmarks.vlm_checkpoints import write_vlm
from rlr_peft.plan import is_black_box, reward_memory
from rlr_peft.rewards import ModelFiles, available_rewards, load_reward


def test_rewards_of_known_size_and_of_the_users_own() -> None:
    aesthetic, preference = reward_memory("aesthetic", 1), reward_memory("pickscore", 1)
    assert aesthetic is not None and preference is not None
    assert aesthetic.weights / 4e6 == pytest.approx(304, rel=0.01)
    assert preference.weights / 4e6 == pytest.approx(986, rel=0.01)
    half = reward_memory("pickscore", 1, torch.float16)
    assert half is not None and half.weights == pytest.approx(preference.weights / 2, rel=1e-3)
    assert preference.scoring > aesthetic.scoring > 0
    assert reward_memory("mine.py:reward", 1) is None


def test_a_judge_of_7_billion_weights_and_one_whose_config_is_at_hand(tmp_path: Path) -> None:
    judge = reward_memory("hpsv3", 1, torch.float16)
    # 7.6 billion of the language model, less the words' second matrix, and the image tower; in bf16.
    assert judge is not None and judge.weights / 2e9 == pytest.approx(7.75, rel=0.01)
    assert 2 * judge.scoring > judge.weights > judge.scoring
    written = write_vlm(tmp_path, "qwen2_5_vl")
    small = reward_memory(f"vlm:{tmp_path}", 2, torch.float32, 64 * 64)
    assert small is not None and small.weights == pytest.approx(4 * written.num_parameters(), rel=0.01)
    larger = reward_memory(f"vlm:{tmp_path}", 2, torch.float32, 128 * 128)
    assert larger is not None and larger.scoring > small.scoring > 0
    assert reward_memory(f"vlm:{tmp_path}/none", 1) is None


def test_a_judge_that_cuts_images_into_tiles_is_counted_with_its_gradient(tmp_path: Path) -> None:
    written = write_vlm(tmp_path, "smolvlm")
    differentiated, seen = (reward_memory(f"vlm:{tmp_path}", 2, with_gradient=wanted) for wanted in (True, False))
    assert differentiated is not None and seen is not None
    assert differentiated.weights == pytest.approx(4 * written.num_parameters(), rel=0.01)
    assert differentiated.scoring > seen.scoring > 0


def test_rewards_without_gradient_are_counted_without_a_tape() -> None:
    for name in ("detector", "unifiedreward"):
        asked, plain = (reward_memory(name, 1, torch.float16, with_gradient=wanted) for wanted in (True, False))
        assert asked == plain and asked is not None and 0 < asked.scoring < asked.weights


def test_what_has_no_gradient_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    files = ModelFiles()
    for name in ("jpeg-compressibility", "jpeg-incompressibility", "ocr", "temporal-flicker", "tiny-shapes/color"):
        assert is_black_box(name, files, None) is (load_reward(name).differentiable is False), name
    assert all(is_black_box(name, files, None) for name in ("detector", "unifiedreward", "ocr:a/b", "https://h/"))
    assert not any(is_black_box(name, files, None) for name in ("hpsv3", "vlm:owner/none", "mine.py:reward"))
    assert is_black_box("vlm:owner/none", files, "http://h/v1")
    write_vlm(tmp_path, "qwen2_5_vl")
    assert not is_black_box(f"vlm:{tmp_path}", files, None)


def test_of_a_model_of_another_family_the_weights_alone_are_known(tmp_path: Path) -> None:
    config = TrOCRConfig(vocab_size=64, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    encoder = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, config))
    model.save_pretrained(tmp_path)
    memory = reward_memory(f"ocr:{tmp_path}", 1)
    assert memory is not None and memory.scoring == 0
    assert memory.weights == pytest.approx(4 * model.num_parameters(), rel=0.01)
    assert is_black_box(f"vlm:{tmp_path}", ModelFiles(), None)


def test_every_built_in_reward_is_known_to_the_plan() -> None:
    unknown = [name for name in available_rewards() if reward_memory(name, 1, torch.float16) is None]
    assert unknown == []
