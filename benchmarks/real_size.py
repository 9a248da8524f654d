"""Peak memory and time of every phase of a training step at real sizes, against the memory plan.

    python -m benchmarks.real_size                                   # on a GPU: all cases
    python -m benchmarks.real_size --case stable-diffusion-1.5-512   # one of them; also on a CPU
    python -m benchmarks.real_size --tiny                            # on a CPU: the same code on a pipeline of toy size

Weights are random: memory and time do not depend on them, and nothing is downloaded. Each case runs in a process of its
own. Real sizes are written to ``benchmarks/results/real_size.json``, those of a CPU to ``real_size_cpu.json``; what is
there already of the same machine is not measured again. On a CPU an update has one sample and nothing is run twice: the
tape is counted, and the process's resident memory beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import describe_machine, most_resident, read_results, return_freed_memory, write_results
from rlr_peft.build import (
    DTYPES,
    attach_adapters,
    build_chain,
    build_optimizer,
    enable_checkpointing,
    keep_weights_as_quantized,
    prepare_machine,
)
from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain import Segment, Trajectory, family_of, run
from rlr_peft.config import Config, load_config, read_quantization
from rlr_peft.estimators import DecodedReward
from rlr_peft.plan import (
    ADJOINT,
    DECODE,
    LIBRARIES_BYTES,
    SAMPLING,
    MemoryPlan,
    build_pipeline,
    find_architecture,
    plan_run,
)
from rlr_peft.rewards import CallableReward
from rlr_peft.tiny_shapes import PIPELINE_NAME, pipeline_path

IS_GPU = torch.cuda.is_available()
RESIDENT_PEAK = Path("/proc/self/clear_refs")  # of Linux
RESULTS = "real_size" if IS_GPU else "real_size_cpu"
SEGMENT_STEPS = 3
CHECKPOINTED = "--gradient_checkpointing true --vae_gradient_checkpointing true".split()
BATCH = "--train_batch_size 2 --num_images_per_prompt 2 --decode_batch_size 1 --num_inference_steps 4".split()
ONE_SAMPLE = "--train_batch_size 1 --num_images_per_prompt 1 --num_inference_steps 2 --estimator full-bp".split()
FP32 = ("--mixed_precision", "no")
# Where text encoders are planned to rest in host memory they are dropped on a CPU, once the prompts are encoded. T5 is
# left out from the start: SD3 draws without it, with zeros in place of its embeddings.
OFFLOADED = ("--offload_text_encoders", "true")
WITHOUT_T5 = {"text_encoder_3": None}
# The C library of Linux keeps freed blocks for later, of up to 32 MiB; with this it gives all above 1 MiB back at once.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
CASES = {
    "stable-diffusion-1.5-512": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, ()),
    "stable-diffusion-1.5-512-checkpointed": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, CHECKPOINTED),
    "stable-diffusion-xl-1024-checkpointed": ("stabilityai/stable-diffusion-xl-base-1.0", 1024, CHECKPOINTED),
    "stable-diffusion-3.5-medium-512": ("stabilityai/stable-diffusion-3.5-medium", 512, ()),
    "stable-diffusion-3.5-medium-512-checkpointed": ("stabilityai/stable-diffusion-3.5-medium", 512, CHECKPOINTED),
    "flux.1-dev-512-checkpointed": ("black-forest-labs/FLUX.1-dev", 512, CHECKPOINTED),
    "flux.1-dev-512-nf4-checkpointed": ("black-forest-labs/FLUX.1-dev", 512, (*CHECKPOINTED, "nf4")),
    "stable-diffusion-1.5-512-fp32-checkpointed": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        512,
        (*CHECKPOINTED, *FP32),
    ),
    "stable-diffusion-xl-512-checkpointed": ("stabilityai/stable-diffusion-xl-base-1.0", 512, CHECKPOINTED),
}
FREED_CASES = {"stable-diffusion-1.5-512-freed-at-once": CASES["stable-diffusion-1.5-512"]}
CPU_CASES = {
    **FREED_CASES,
    "stable-diffusion-3.5-medium-512-checkpointed-encoded": (
        "stabilityai/stable-diffusion-3.5-medium",
        512,
        (*CHECKPOINTED, *OFFLOADED),
    ),
}
ON_CPU = (
    "stable-diffusion-1.5-512",
    *FREED_CASES,
    "stable-diffusion-1.5-512-checkpointed",
    "stable-diffusion-1.5-512-fp32-checkpointed",
    "stable-diffusion-xl-512-checkpointed",
    "stable-diffusion-3.5-medium-512-checkpointed-encoded",
)
TINY = {
    "tiny": (PIPELINE_NAME, 64, ()),
    "tiny-checkpointed": (PIPELINE_NAME, 64, CHECKPOINTED),
    "tiny-nf4": (PIPELINE_NAME, 64, ("nf4",)),
    "tiny-encoded": (PIPELINE_NAME, 64, OFFLOADED),
}


def main() -> None:
    """Runs the cases, each in its own process, prints and writes the comparison."""
    parser = argparse.ArgumentParser(description="Real sizes on random weights, against the memory plan.")
    parser.add_argument(
        "--case", choices=[*CASES, *CPU_CASES, *TINY], action="append", help="one case; may be given again"
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--here", metavar="FILE.json", help="run the one case in this process")
    parsed = parser.parse_args()
    names = parsed.case or list(TINY if parsed.tiny else CASES if IS_GPU else ON_CPU)
    if parsed.here:
        Path(parsed.here).write_text(json.dumps(measure_case(names[0])), encoding="utf-8")
        return
    kept = read_results(RESULTS)
    results = kept["cases"] if kept.get("machine") == describe_machine() else {}
    for name in names:
        if "phases" not in results.get(name, {}):
            results[name] = _in_process(name)
            if name not in TINY:
                write_results(RESULTS, {"cases": results})
        print(_table(name, results[name]), flush=True)
    if any("error" in results[name] for name in names):
        sys.exit(1)


def measure_case(name: str) -> dict[str, Any]:
    """Peaks in bytes and seconds of one case's phases, with what the plan says of each."""
    device = torch.device("cuda" if IS_GPU else "cpu")
    base, resolution, flags = (CASES | CPU_CASES | TINY)[name]
    with tempfile.TemporaryDirectory() as folder:
        config = _config(base, resolution, flags, Path(folder))
        planned = plan_run(config)
        run_phases = _build(config, device)
        phases = run_phases(planned)
    return {"base": base, "resolution": resolution, "flags": list(flags), "phases": phases}


def _config(base: str, resolution: int, flags: Sequence[str], folder: Path) -> Config:
    words = ["--pretrained_model_name_or_path", base, "--resolution", str(resolution)]
    words += ["--prompt_path", "tiny-shapes/train", "--reward_fn", "benchmarks.rewards:Centered"]
    words += BATCH if IS_GPU or base == PIPELINE_NAME else ONE_SAMPLE
    if "--mixed_precision" not in flags:
        words += ["--mixed_precision", "no" if base == PIPELINE_NAME else "bf16"]
    if "nf4" in flags:
        path = folder / "nf4.json"
        path.write_text(json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}), encoding="utf-8")
        words += ["--bnb_quantization_config_path", str(path)]
    return load_config([*words, *(flag for flag in flags if flag != "nf4")])


def _build(config: Config, device: torch.device) -> Callable[[MemoryPlan], dict[str, Any]]:
    """The run as training builds it, on random weights; returns the function that measures its phases."""
    model = config.model
    if device.type == "cuda":
        prepare_machine(model, device)
    name = model.pretrained_model_name_or_path
    architecture = find_architecture(str(pipeline_path()) if name == PIPELINE_NAME else name)
    without = WITHOUT_T5 if model.offload_text_encoders else None
    pipeline = build_pipeline(architecture, device, DTYPES[model.mixed_precision], without)
    family = family_of(pipeline)
    if model.bnb_quantization_config_path is not None:
        quantize(getattr(pipeline, family.denoisers[0]), read_quantization(model.bnb_quantization_config_path))
    parameters = attach_adapters(config, pipeline, family)
    if model.vae_gradient_checkpointing:
        enable_checkpointing(pipeline.vae, "vae_gradient_checkpointing")
    chain = build_chain(config, pipeline)
    reward = CallableReward("mean brightness", lambda images, prompts: images.mean((1, 2, 3)))
    objective = DecodedReward(chain, reward, config.reward.decode_batch_size or 1)
    optimizer = build_optimizer(parameters, config.optimizer)
    for parameter in parameters:  # the state of the optimiser and the gradients are there from the second update on
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    prompts = ["a", "b"][: config.training.train_batch_size]

    def run_phases(planned: MemoryPlan) -> dict[str, Any]:
        sampled: list[Trajectory] = []
        measured: list[torch.Tensor] = []

        def sample() -> None:
            sampled.append(chain.sample(prompts, list(range(len(prompts)))))

        def score() -> None:
            gradient = objective.measure(sampled[-1].latents[0], prompts).reward_gradient
            measured.append(torch.zeros_like(sampled[-1].latents[0]) if gradient is None else gradient)

        steps_back = min(SEGMENT_STEPS, chain.num_steps - 1)
        warms_up = chain.num_steps > SEGMENT_STEPS  # on a CPU a step of a large model takes a minute

        def pull_back() -> None:
            run(chain, sampled[-1], Segment("first_order", range(1, steps_back + 1), measured[-1]))

        def call_plainly() -> None:
            options = chain.call_arguments
            pipeline(prompt=prompts, num_inference_steps=chain.num_steps, output_type="latent", **options)

        chain.encode(prompts)
        if model.offload_text_encoders:
            for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
                setattr(pipeline, name, None)
        phases = {}
        works = ((SAMPLING, sample, chain.num_steps), (DECODE, score, 1), (ADJOINT, pull_back, steps_back))
        for phase, work, steps in works:
            if warms_up:
                work()  # kernels are chosen and workspaces allocated
            del sampled[:-1], measured[:-1]
            with _watched(device) as watched:
                work()
            del sampled[:-1], measured[:-1]
            phases[phase] = {
                **watched,
                "seconds_per_step": watched["seconds"] / steps,
                **_prediction(planned, phase, device),
            }
            if phases[phase]["peak"]:
                phases[phase]["planned_over_measured"] = phases[phase]["planned"] / phases[phase]["peak"]
        # The pipeline's own call with its own scheduler: what driving it as a chain adds.
        if not warms_up or model.offload_text_encoders:
            return phases
        call_plainly()
        with _watched(device) as watched:
            call_plainly()
        phases[SAMPLING]["plain_seconds_per_step"] = watched["seconds"] / chain.num_steps
        return phases

    return run_phases


def quantize(model: nn.Module, settings: dict[str, Any]) -> None:
    """Replaces the linear layers of random weights by bitsandbytes' 4-bit ones, as loading through diffusers does."""
    from bitsandbytes.nn import Linear4bit

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear:
                continue
            packed = Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=layer.weight.dtype,
                compress_statistics=bool(settings.get("bnb_4bit_use_double_quant", False)),
                quant_type=settings.get("bnb_4bit_quant_type", "fp4"),
            )
            packed.load_state_dict({key: value.cpu() for key, value in layer.state_dict().items()})
            setattr(parent, name, packed.to(layer.weight.device).requires_grad_(False))
    keep_weights_as_quantized(model)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks


@contextmanager
def _watched(device: torch.device) -> Iterator[dict[str, Any]]:
    """Fills in seconds and peak bytes: of the GPU's allocator, on a CPU of autograd's tape."""
    result: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif RESIDENT_PEAK.exists():
        return_freed_memory()
        RESIDENT_PEAK.write_text("5")  # it is counted anew
    started, worked = time.perf_counter(), time.process_time()
    with counted_tape() as tape:
        yield result
        if device.type == "cuda":
            torch.cuda.synchronize()
    result["seconds"] = time.perf_counter() - started
    if device.type == "cpu":
        result["processor_seconds"] = time.process_time() - worked
        if RESIDENT_PEAK.exists():
            result["resident"] = most_resident()
    result["peak"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else tape.peak
    result["peak_of"] = "all tensors" if device.type == "cuda" else "autograd's tape"


def _prediction(planned: MemoryPlan, phase: str, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"planned": planned.tensors(phase)}
    measured, options = planned.facts.measured, planned.options
    tape = {
        SAMPLING: 0,
        DECODE: measured.decode[options.decode_batch_size, options.vae_gradient_checkpointing].saved,
        ADJOINT: measured.step[options.gradient_checkpointing].saved,
    }
    return {"planned": tape[phase], "planned_resident": LIBRARIES_BYTES + planned.tensors(phase)}


def _in_process(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.real_size", "--case", name, "--here", str(path)]
        environment = os.environ | (FREED_AT_ONCE if name in FREED_CASES else {})
        finished = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, env=environment)
        if finished.returncode != 0:
            return {"error": finished.stderr.strip().splitlines()[-8:]}
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result


def _table(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{name}: failed, {result['error']}"
    lines = [f"{name} ({next(iter(result['phases'].values()))['peak_of']})"]
    for phase, numbers in result["phases"].items():
        measured, planned = numbers["peak"] / 2**30, numbers["planned"] / 2**30
        plain = numbers.get("plain_seconds_per_step")
        beside = "" if plain is None else f", the pipeline's own call {plain:.3f} s"
        lines.append(
            f"  {phase:<16} measured {measured:7.3f} GiB, planned {planned:7.3f} GiB, ratio "
            f"{numbers.get('planned_over_measured', 1):5.2f}, {numbers['seconds_per_step']:.3f} s a step{beside}"
        )
        if "resident" in numbers:
            lines.append(
                f"  {'':16} resident {numbers['resident'] / 2**30:7.3f} GiB, planned "
                f"{numbers['planned_resident'] / 2**30:7.3f} GiB, {numbers['processor_seconds']:.1f} s of the processor"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
