"""Adapter files of every kind that people have: loaded at exactly the change that the format defines, or named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlr_peft.lora import (
    WEIGHT_NAME,
    AdapterFormatError,
    AdapterMismatchError,
    LayerNames,
    attach_lora,
    check_arrived,
    find_adapter,
    layers_of,
    load_lora,
    lora_parameters,
    merge_lora,
    save_lora,
    unload_lora,
)
from tests.families.image_pipelines import flux, pixart_sigma, sdxl
from tests.families.video_pipelines import wan, wan_two_experts
from tests.pipelines import tiny_stable_diffusion

BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
LINEAR = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0", f"{BLOCK}.ff.net.0.proj")
CONVOLUTIONS = ("unet.mid_block.resnets.0.conv1", "unet.mid_block.attentions.0.proj_in")
TEXT = ("text_encoder.encoder.layers.0.self_attn.q_proj", "text_encoder.encoder.layers.0.mlp.fc1")

Tensors = dict[str, Tensor]
Changes = dict[str, Callable[[Tensor], Tensor]]
"""By layer: its new weights from the old ones."""

draws = torch.Generator()


def noise(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=draws)


def weight(pipeline: Any, name: str) -> Tensor:
    return pipeline.get_submodule(name).weight if hasattr(pipeline, "get_submodule") else _module(pipeline, name).weight


def _module(pipeline: Any, name: str) -> Any:
    part, _, layer = name.partition(".")
    return getattr(pipeline, part).get_submodule(layer)


def kohya_name(name: str) -> str:
    part, _, layer = name.partition(".")
    layer = f"text_model.{layer}" if part == "text_encoder" else layer
    return f"lora_{ {'unet': 'unet', 'text_encoder': 'te'}[part] }_{layer.replace('.', '_')}"


def pair(shape: torch.Size, rank: int) -> tuple[Tensor, Tensor]:
    """Down and up for weights of this shape."""
    return noise(rank, *shape[1:]), noise(shape[0], rank, *(1 for _ in shape[2:]))


def product(down: Tensor, up: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def add(delta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda old: old + delta.reshape(old.shape)


def kohya_by_layer(base: Any, *, dora: bool = False, mid: bool = False) -> tuple[Tensors, Changes]:
    tensors: Tensors = {}
    changes: Changes = {}
    names = CONVOLUTIONS[:1] if mid else (*LINEAR, *CONVOLUTIONS, *TEXT)
    for index, name in enumerate(names):
        shape, key = _module(base, name).weight.shape, kohya_name(name)
        rank, alpha = [4, 2, 4, 4, 6, 1, 4][index], [1.0, 2.0, 8.0, None, 0.5, 3.0, 4.0][index]
        down, up = pair(shape, rank)
        delta = (1 if alpha is None else alpha / rank) * product(down, up)
        if mid:
            core, down = noise(rank, rank, 3, 3), noise(rank, shape[1], 1, 1)
            tensors[f"{key}.lora_mid.weight"] = core
            delta = alpha / rank * torch.einsum("or,rskl,si->oikl", up[..., 0, 0], core, down[..., 0, 0])
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        changes[name] = add(delta)
        if dora:
            magnitude = 0.5 + torch.rand(shape[0], *(1 for _ in shape[1:]), generator=draws)
            tensors[f"{key}.dora_scale"] = magnitude

            def decomposed(old: Tensor, delta: Tensor = delta, magnitude: Tensor = magnitude) -> Tensor:
                new = old + delta
                return magnitude * new / new.flatten(1).norm(dim=1).reshape(magnitude.shape)

            changes[name] = decomposed
    return tensors, changes


def loha(base: Any, *, tucker: bool = False) -> tuple[Tensors, Changes]:
    tensors: Tensors = {}
    changes: Changes = {}
    for name in CONVOLUTIONS[:1] if tucker else (LINEAR[0], CONVOLUTIONS[0], TEXT[1]):
        shape, key, factors = _module(base, name).weight.shape, kohya_name(name), []
        for n in "12":
            a, b = noise(shape[0], 3), noise(3, shape[1:].numel())
            if tucker:
                a, b, core = noise(3, shape[0]), noise(3, shape[1]), noise(3, 3, *shape[2:])
                tensors[f"{key}.hada_t{n}"] = core
            tensors |= {f"{key}.hada_w{n}_a": a, f"{key}.hada_w{n}_b": b}
            factors.append(torch.einsum("ijkl,jr,ip->prkl", core, b, a) if tucker else (a @ b).reshape(shape))
        tensors[f"{key}.alpha"] = torch.tensor(6.0)
        changes[name] = add(2 * factors[0] * factors[1])
    return tensors, changes


def lokr(base: Any) -> tuple[Tensors, Changes]:
    tensors: Tensors = {}
    changes: Changes = {}
    whole, low, both, convolution = LINEAR[0], LINEAR[1], TEXT[1], CONVOLUTIONS[0]
    for name in (whole, low, both, convolution):
        shape, key = _module(base, name).weight.shape, kohya_name(name)
        first, rows, columns = noise(2, 4), shape[0] // 2, shape[1] // 4
        second, scale = noise(rows, columns, *shape[2:]), 1.5
        if name == both:
            left, right = noise(2, 2), noise(2, 4)
            first = left @ right
            tensors |= {f"{key}.lokr_w1_a": left, f"{key}.lokr_w1_b": right}
        else:
            tensors[f"{key}.lokr_w1"] = first
        if name == whole:  # alpha then means nothing
            tensors[f"{key}.lokr_w2"], scale = second, 1.0
        else:
            left, right = noise(rows, 2), noise(2, columns * shape[2:].numel())
            second = (left @ right).reshape(rows, columns, *shape[2:])
            tensors |= {f"{key}.lokr_w2_a": left, f"{key}.lokr_w2_b": right}
        tensors[f"{key}.alpha"] = torch.tensor(3.0)
        changes[name] = add(scale * torch.kron(first.reshape(2, 4, *(1 for _ in shape[2:])), second.contiguous()))
    return tensors, changes


def spelled(pattern: str, down: str = "lora_A", up: str = "lora_B", names: tuple[str, ...] = LINEAR[:2]) -> Any:
    """A plain LoRA without alpha whose keys are made of `{part}`, `{name}`, `{matrix}`."""

    def make(base: Any) -> tuple[Tensors, Changes]:
        tensors: Tensors = {}
        changes: Changes = {}
        for full in names:
            matrices = pair(_module(base, full).weight.shape, 3)
            part, _, name = full.partition(".")
            for matrix, tensor in zip((down, up), matrices, strict=True):
                tensors[pattern.format(part=part, name=name, matrix=matrix, old=name.removesuffix(".0"))] = tensor
            changes[full] = add(product(*matrices))
        return tensors, changes

    return make


OLD_TEXT = (TEXT[0],)
FORMATS: dict[str, Callable[[Any], tuple[Tensors, Changes]]] = {
    "kohya, alpha and rank by layer": kohya_by_layer,
    "kohya, DoRA": lambda base: kohya_by_layer(base, dora=True),
    "LoCon with a middle matrix": lambda base: kohya_by_layer(base, mid=True),
    "LoHa": loha,
    "LoHa of Tucker's form": lambda base: loha(base, tucker=True),
    "LoKr": lokr,
    "diffusers": spelled("{part}.{name}.{matrix}.weight", names=(*LINEAR, *CONVOLUTIONS, *TEXT)),
    "diffusers, with the adapter's name": spelled("{part}.{name}.{matrix}.default_0.weight"),
    "peft, base_model.model": spelled("base_model.model.{name}.{matrix}.weight"),
    "peft, bare": spelled("{name}.{matrix}.weight"),
    "old processors": spelled("unet.{old}_lora.{matrix}.weight", "down", "up"),
    "old processors, .processor.": spelled("{old}_lora.{matrix}.weight", "down", "up"),
    "old text encoder": spelled("text_encoder.text_model.{name}.{matrix}.weight", "lora_linear_layer.down",
                                "lora_linear_layer.up", TEXT),
}  # fmt: skip


def with_processors(tensors: Tensors) -> Tensors:
    return {re.sub(r"\.(attn\d)\.", r".\1.processor.", key): value for key, value in tensors.items()}


def assert_changed(pipeline: Any, before: dict[str, Tensor], changes: Changes) -> None:
    """All weights of the merged pipeline are what the formula makes of the base's, and no others moved."""
    for name, old in before.items():
        new = _module(pipeline, name).weight
        expected = changes[name](old) if name in changes else old
        assert name not in changes or (expected - old).norm() > 0.01 or torch.equal(expected, old)
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def weights(pipeline: Any) -> dict[str, Tensor]:
    return {name: module.weight.detach().clone() for name, module in LayerNames(pipeline).layers.items()}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_change_is_what_the_format_defines(kind: str, tmp_path: Path) -> None:
    draws.manual_seed(3)
    pipeline = tiny_stable_diffusion()
    before = weights(pipeline)
    tensors, changes = FORMATS[kind](pipeline)
    tensors = with_processors(tensors) if "processor." in kind else tensors
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "mine.safetensors")
    assert load_lora(pipeline, tmp_path) == len(changes)
    merge_lora(pipeline)
    assert_changed(pipeline, before, changes)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, alpha_pattern={"attn1.to_q": 3}, rank_pattern={"conv1": 2}),
        peft.LoraConfig(r=3, lora_alpha=5, use_dora=True),
        peft.LoHaConfig(r=2, alpha=5, use_effective_conv2d=True),
        peft.LoKrConfig(r=2, alpha=5, decompose_both=True),
        peft.LoKrConfig(r=64, alpha=5),
    ],
    ids=["rsLoRA", "DoRA", "LoHa", "LoKr", "LoKr, whole matrices"],
)
def test_a_folder_of_pefts_is_what_peft_makes_of_it(config: Any, tmp_path: Path) -> None:
    config.target_modules = {"attn1.to_q", "ff.net.0.proj", "conv1"}
    source = tiny_stable_diffusion()
    model = peft.get_peft_model(source.unet, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path)
    files = find_adapter(str(tmp_path))
    pipeline = tiny_stable_diffusion()
    load_lora(pipeline, tmp_path)
    merge_lora(pipeline)
    merged = model.merge_and_unload().state_dict()
    for name, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=0, atol=1e-5)
    fingerprint = files.fingerprint()
    settings = tmp_path / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"use_rslora": true', '"use_rslora": false') + " ")
    assert files.fingerprint() != fingerprint, "another scale is another adapter"


def sgm_name(name: str, layers_per_block: int) -> str:
    """kohya's name of an SDXL layer, after the original UNet."""
    side, block, kind, number, rest = re.fullmatch(r"unet\.(\w+)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()  # type: ignore[union-attr]
    per_block = layers_per_block + 1
    index = {"down": 1 + int(block) * per_block + int(number), "up": int(block) * per_block + int(number)}[side]
    word = {"down": "input", "up": "output"}[side]
    inner = {"resnets": 0, "attentions": 1}[kind]
    rest = rest.replace("conv1", "in_layers_2")
    return f"lora_unet_{word}_blocks_{index}_{inner}_{rest.replace('.', '_')}"


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_sdxl_by_the_names_of_its_original_unet(dora: bool, tmp_path: Path) -> None:
    draws.manual_seed(4)
    pipeline = sdxl()
    before, tensors, changes = weights(pipeline), {}, {}
    layers_per_block = pipeline.unet.config.layers_per_block
    names = [
        name
        for name in before
        if re.search(r"^unet\..*_blocks\.\d\.(attentions\.0.*attn2\.to_(k|out\.0)|resnets\.0\.conv1)$", name)
    ]
    assert len(names) > 4
    for index, name in enumerate(names):
        down, up = pair(before[name].shape, 2)
        key, alpha = sgm_name(name, layers_per_block), 0.5 * (index + 1)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        changes[name] = add(alpha / 2 * product(down, up))
        if dora:
            new = changes[name](before[name])
            shape = (-1, *(1 for _ in new.shape[1:]))
            tensors[f"{key}.dora_scale"] = 1.3 * new.flatten(1).norm(dim=1).reshape(shape)
            changes[name] = add(1.3 * new - before[name])
    save_file(tensors, tmp_path / "xl.safetensors")
    load_lora(pipeline, tmp_path / "xl.safetensors")
    merge_lora(pipeline)
    assert_changed(pipeline, before, changes)


def test_flux_by_the_names_of_its_original_transformer(tmp_path: Path) -> None:
    """One matrix for query, key and value, and alphas that diffusers multiplies into the weights; it drops DoRA."""
    draws.manual_seed(5)
    pipeline = flux()
    before = weights(pipeline)
    width = before["transformer.transformer_blocks.0.attn.to_q"].shape[1]
    down, up = noise(2, width), noise(3 * width, 2)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(5.0)}
    save_file(tensors, tmp_path / "flux.safetensors")
    assert load_lora(pipeline, tmp_path) == 3
    merge_lora(pipeline)
    decomposed = tensors | {f"{key}.dora_scale": torch.ones(3 * width, 1)}
    save_file(decomposed, tmp_path / "dora.safetensors")
    with pytest.raises(
        AdapterMismatchError, match=r"without loss: expected 96 changed outputs.* and 1 tensors of DoRA"
    ):
        load_lora(flux(), tmp_path / "dora.safetensors")
    parts = (2.5 * up @ down).chunk(3)
    names = [f"transformer.transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    assert_changed(pipeline, before, {name: add(part) for name, part in zip(names, parts, strict=True)})


def test_two_experts_each_get_their_own(tmp_path: Path) -> None:
    pipeline = wan_two_experts()
    for name, seed in (("transformer", 1), ("transformer_2", 2)):
        for parameter in attach_lora(getattr(pipeline, name), target_modules=["attn1.to_q"], lora_alpha=2 * seed):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    save_lora(pipeline, tmp_path)
    fresh = wan_two_experts()
    load_lora(fresh, tmp_path)
    for name in ("transformer", "transformer_2"):
        trained, loaded = getattr(pipeline, name), getattr(fresh, name)
        expected = lora_parameters(trained).values()
        assert all(
            torch.equal(*both) for both in zip(expected, lora_parameters(loaded, "default_0").values(), strict=True)
        )
    with pytest.raises(AdapterMismatchError, match="have no place in it"):
        load_lora(wan(), tmp_path)


def test_pickles_fp8_and_half_precision(tmp_path: Path) -> None:
    draws.manual_seed(6)
    pipeline = tiny_stable_diffusion()
    before = weights(pipeline)
    tensors, changes = kohya_by_layer(pipeline)
    torch.save(tensors, tmp_path / "mine.bin")
    load_lora(pipeline, tmp_path)
    merge_lora(pipeline)
    assert_changed(pipeline, before, changes)
    base = tiny_stable_diffusion()
    name = LINEAR[0]
    down, up = (tensor.to(torch.float8_e4m3fn) for tensor in pair(before[name].shape, 2))
    key = kohya_name(name)
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "fp8.safetensors")
    load_lora(base, tmp_path / "fp8.safetensors")
    merge_lora(base)
    assert_changed(base, before, {name: add(up.float() @ down.float())})
    half = tiny_stable_diffusion(dtype=torch.bfloat16)
    torch.save({"state_dict": tensors}, tmp_path / "other.pt")
    assert load_lora(half, tmp_path / "other.pt") == len(changes)
    unload_lora(half)


@pytest.mark.parametrize("make", [tiny_stable_diffusion, pixart_sigma], ids=["diffusers' loader", "without one"])
def test_a_scale_or_tensor_that_did_not_arrive_is_found(make: Callable[[], Any], tmp_path: Path) -> None:
    pipeline = make()
    name = next(name for name in LayerNames(pipeline).layers if name.endswith("attn1.to_q"))
    down, up = pair(_module(pipeline, name).weight.shape, 2)
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / WEIGHT_NAME)
    load_lora(pipeline, tmp_path)
    (layer,) = layers_of(tensors, "it")
    check_arrived(pipeline, {name: layer}, "default_0", "it")
    module = _module(pipeline, name)
    module.scaling["default_0"] = 2.0
    with pytest.raises(AdapterMismatchError, match=f"missing or different are {name}"):
        check_arrived(pipeline, {name: layer}, "default_0", "it")
    module.scaling["default_0"] = 1.0
    module.lora_B["default_0"].weight.data[0, 0] += 1
    with pytest.raises(AdapterMismatchError, match=f"missing or different are {name}"):
        check_arrived(pipeline, {name: layer}, "default_0", "it")
    with pytest.raises(AdapterMismatchError, match="expected 0 layers, got 1"):
        check_arrived(pipeline, {}, "default_0", "it")


@pytest.mark.parametrize("pattern", ["(.*.*.*)*x", "(a+)+$", ".*.*.*to_q", "(to_q|to_k){1,}"])
def test_patterns_whose_search_may_never_end_are_refused(pattern: str, tmp_path: Path) -> None:
    """peft searches layers by the patterns of a file, which may be anybody's."""
    pipeline = tiny_stable_diffusion()
    model = peft.get_peft_model(pipeline.unet, peft.LoraConfig(r=4, target_modules=["attn1.to_q"]))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for patterns, refused in (({pattern: 8}, True), ({r"down_blocks\.\d+\..*to_q": 8}, False)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"alpha_pattern": patterns}))
        if refused:
            with pytest.raises(AdapterFormatError, match="whose search may never end; name the layers"):
                load_lora(tiny_stable_diffusion(), tmp_path)
        else:
            assert load_lora(tiny_stable_diffusion(), tmp_path) > 0
