"""The host's share of the memory plan, and the proof of the adapter: against a real process, and part by part."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from rlr_peft.build import BLOCK_PROMPTS, BLOCK_UPDATES, Rollback, build_lr_scheduler, build_optimizer
from rlr_peft.cli import main
from rlr_peft.config import load_config
from rlr_peft.estimators import RunShape, build_estimator
from rlr_peft.plan import (
    ENCODING,
    EVALUATION,
    LIBRARIES_BYTES,
    LOADING,
    TRAINING,
    VERIFICATION,
    HostPlan,
    MemoryPlan,
    Options,
    add_up,
    host_plan,
    host_verdict,
    plan_run,
)
from rlr_peft.tiny_shapes import pipeline_path
from tests.pipelines import tiny_stable_diffusion

ROOT = Path(__file__).parents[2]
GIB = 2**30
# How far a process's peak may be from the plan.
TOLERANCE = 0.1


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> MemoryPlan:
    folder = tmp_path_factory.mktemp("tiny-sd")
    tiny_stable_diffusion(sample_size=32).save_pretrained(folder)
    return plan_run(load_config(words(folder, "--evaluation_prompt_path", "tiny-shapes/test", "--resolution", "64")))


def words(folder: Path, *more: str) -> list[str]:
    required = ["--prompt_path", "tiny-shapes/train", "--reward_fn", "jpeg-compressibility"]
    return ["--pretrained_model_name_or_path", str(folder), *required, "--num_inference_steps", "2", *more]


def with_options(plan: MemoryPlan, **changes: Any) -> MemoryPlan:
    return add_up(plan.facts, replace(plan.options, **changes))


def sizes(plan: HostPlan) -> dict[str, int]:
    return {part.name: part.size for part in plan.parts}


# A program's recorded peak begins with that of the process which started it, and that of a long run of tests is larger
# than what is measured here: so a small process starts the training and tells its peak.
MEASURE = """
import resource, subprocess, sys
status = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def test_a_run_without_gpu_holds_what_the_plan_foresees(tmp_path: Path) -> None:
    """Tiny shapes with a text encoder of 260 MiB, which no rounding of the libraries' share can hide."""
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_path())
    settings = pipeline.text_encoder.config.to_dict()
    settings["vocab_size"] = 2**26 // settings["hidden_size"]  # costs no arithmetic
    pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(**settings))
    encoder = sum(4 * parameter.numel() for parameter in pipeline.text_encoder.parameters())
    pipeline.to(torch.bfloat16)  # widened while it is loaded, so that all of it is there and not only in the file
    pipeline.save_pretrained(tmp_path / "base")
    more = "--train_batch_size 2 --num_images_per_prompt 2 --max_train_steps 1 --rank 4 --report_to none".split()
    more += ["--learning_rate", "0.001"]  # a measured one takes long and holds nothing more
    more += ["--evaluation_prompt_path", "tiny-shapes/test", "--num_evaluation_images", "2"]
    flags = words(tmp_path / "base", "--output_dir", str(tmp_path / "out"), *more)
    planned = host_plan(plan_run(load_config(flags))).without_gpu

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", MEASURE, str(ROOT / "train_rlr_lora.py"), *flags]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.rpartition("peak ")[2]) * (1 if sys.platform == "darwin" else 2**10)
    assert planned == pytest.approx(peak, rel=TOLERANCE)
    assert encoder > 2 * TOLERANCE * (peak - encoder) > 0  # a plan without the encoder would not pass


def test_the_host_holds_what_is_offloaded(plan: MemoryPlan) -> None:
    facts = replace(plan.facts, rewards=GIB, rewards_at_once=GIB)
    plan = add_up(facts, plan.options)
    pipeline = sum(facts.weights.values())
    encoders = facts.weights["text_encoder"]
    plain = sizes(host_plan(plan))
    assert "offloaded models" not in plain and "offloaded rewards" not in plain
    assert plain["weights while they are loaded"] == max(pipeline, GIB)
    assert sizes(host_plan(with_options(plan, offload=True)))["offloaded models"] == pipeline
    assert sizes(host_plan(with_options(plan, offload_text_encoders=True)))["offloaded models"] == encoders
    assert sizes(host_plan(with_options(plan, offload_rewards=True)))["offloaded rewards"] == GIB


def test_pictures_wait_until_the_page_is_written(plan: MemoryPlan) -> None:
    """12 of 256 evaluation images of 64 pixels as float32, all of them as files of at most a byte for a number."""
    facts = replace(plan.facts, compared=256, validated=8)
    host = host_plan(add_up(facts, plan.options))
    image = 64 * 64 * 3
    assert facts.measured.picture == 4 * image
    assert sizes(host)["images of the base"] == sizes(host)["images of the adapter"] == (12 * 4 + 256) * image
    assert sizes(host)["validation images"] == 3 * 8 * 4 * image
    phases = {part.name: part.phases for part in host.parts}
    assert phases["images of the base"] == (TRAINING, EVALUATION, VERIFICATION)
    assert phases["images of the adapter"] == (EVALUATION, VERIFICATION)
    assert LOADING not in phases["validation images"]
    without = sizes(host_plan(add_up(replace(facts, compared=0), plan.options)))
    assert "images of the base" not in without


def test_copies_of_the_adapter_are_counted_where_they_are_kept(tmp_path: Path) -> None:
    """On the host what a real rollback holds; on the GPU the start that is the reference, and the best weights."""
    tiny_stable_diffusion(sample_size=32).save_pretrained(tmp_path)
    flags = words(tmp_path, "--resolution", "16", "--learning_rate", "0.001", "--heldout_reward_fn", "ocr")
    config = load_config([*flags, "--estimator", "nft"])
    plan = plan_run(config)
    weight = torch.nn.Parameter(torch.zeros(plan.facts.lora // 4))
    optimizer = build_optimizer([weight], config.optimizer)
    estimator = build_estimator(config.estimator, RunShape(2))
    estimator.load_state_dict({"old": [weight.detach().clone()], "updates": 0, "followed": 0})
    rollback = Rollback([weight], optimizer, build_lr_scheduler(optimizer, config.optimizer, 9), estimator, None)
    for _ in range(BLOCK_UPDATES):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        rollback.see(torch.ones(BLOCK_PROMPTS), 1)
    assert sizes(host_plan(plan))["state to go back to"] == pytest.approx(tensor_bytes(rollback.state_dict()), rel=0.01)

    rlr = plan_run(load_config([*flags, "--estimator", "rlr"]))
    assert "state to go back to" not in sizes(host_plan(rlr))
    start = ["--init_adapter", str(tmp_path), "--reference", "init_adapter", "--early_stopping_steps", "5"]
    kept = plan_run(load_config([*flags, "--estimator", "nft", *start]))
    assert {part.name: part.size for part in kept.parts if part not in plan.parts} == {
        "reference's copy of the LoRA weights (fp32)": plan.facts.lora,
        "best LoRA weights (fp32)": plan.facts.lora,
    }


def tensor_bytes(state: Any) -> int:
    """Of all tensors in nested containers."""
    if torch.is_tensor(state):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(tensor_bytes, values))


def test_the_proof_of_the_adapter_loads_nothing_but_the_adapter_again(plan: MemoryPlan) -> None:
    facts, measured = plan.facts, plan.facts.measured
    images = 2 * measured.picture

    def extra(options: Options) -> dict[str, int]:
        parts = add_up(facts, options).parts
        return {part.name: part.size for part in parts if part.phases == (VERIFICATION,)}

    sampling, decode = measured.verification
    drawing = max(measured.encoding, sampling, decode + images)
    assert extra(plan.options) == {"drawing 2 to compare": drawing, "reloaded adapter": facts.lora}
    for options in (replace(plan.options, offload=True), replace(plan.options, quantized=True)):
        assert extra(options)["reloaded adapter"] == facts.lora
    encoders = with_options(plan, offload_text_encoders=True)
    present = {part.name: part.phases for part in encoders.parts}
    assert present["weights: text_encoder"] == () and present["block of a text encoder"] == (ENCODING,)
    drawing = max(measured.encoding + facts.encoding_block, sampling, decode + images)
    assert extra(encoders.options)["drawing 2 to compare"] == drawing


def test_without_a_gpu_everything_is_host_memory_once(plan: MemoryPlan) -> None:
    alone = host_plan(plan).without_gpu
    pipeline = sum(plan.facts.weights.values())
    assert alone > LIBRARIES_BYTES + 2 * pipeline  # two pipelines in the proof
    moved_nowhere = host_plan(with_options(plan, offload_text_encoders=True, offload_rewards=True))
    assert moved_nowhere.without_gpu == alone


def test_the_command_says_whether_host_memory_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plan: MemoryPlan
) -> None:
    tiny_stable_diffusion(sample_size=32).save_pretrained(tmp_path / "base")
    command = ["plan", *words(tmp_path / "base", "--resolution", "16")]
    output = tmp_path / "plan.json"
    assert main([*command, "--host_memory", "1", "--gpu_memory", "24", "--output", str(output)]) == 1
    printed = capsys.readouterr().out
    assert "peak host memory in GiB" in printed and "verification" in printed
    assert "Fits 24 GiB, with" in printed and "Does not fit 1 GiB of host memory: 1.67 GiB too much" in printed
    host = json.loads(output.read_text())["host"]
    assert sum(part["bytes"] for part in host["parts"] if TRAINING in part["phases"]) == host["total"][TRAINING]
    assert host["without GPU"] > LIBRARIES_BYTES
    assert host_verdict(host_plan(plan), 64).startswith("Fits 64 GiB of host memory, with ")
    with pytest.raises(SystemExit) as left:
        main([*command, "--host_memory", "0"])
    assert left.value.code == 2 and "host_memory: expected above 0, got 0.0" in capsys.readouterr().err


def test_without_gpu_rewards_are_counted_in_float32(tmp_path: Path) -> None:
    """`reward_dtype: auto` means half precision on a GPU alone."""
    flags = ["--resolution", "16", "--heldout_reward_fn", "clipscore"]
    tiny_stable_diffusion(sample_size=32).save_pretrained(tmp_path)
    half, single = (plan_run(load_config(words(tmp_path, *flags, "--reward_dtype", name))) for name in ("auto", "fp32"))
    assert 2 * half.facts.rewards == pytest.approx(single.facts.rewards, rel=1e-4) and half.facts.rewards > 0
    assert host_plan(half).without_gpu == pytest.approx(host_plan(single).without_gpu, rel=0.01)
