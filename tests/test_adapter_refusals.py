"""Adapter files that cannot be loaded, or contradict themselves, are named with what is wrong and what to do."""

import io
import json
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlr_peft.cli import main
from rlr_peft.lora import (
    WEIGHT_NAME,
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    load_lora,
    unload_lora,
)
from tests.pipelines import tiny_stable_diffusion
from tests.test_adapter_formats import (
    BLOCK,
    LINEAR,
    Tensors,
    _module,
    kohya_name,
)

KEY = kohya_name(LINEAR[0])
DOWN, UP = torch.ones(2, 16), torch.ones(16, 2)
GOOD = {f"{KEY}.lora_down.weight": DOWN, f"{KEY}.lora_up.weight": UP}
ONE = torch.ones(1)
NATIVE = {f"{LINEAR[0]}.lora_A.weight": DOWN, f"{LINEAR[0]}.lora_B.weight": UP}


def settings(**values: object) -> dict[str, str]:
    own = {"r": 2, "lora_alpha": 4, **values}
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in own.items()})}


REFUSED: dict[str, tuple[Tensors, str]] = {
    "IA3": ({"base_model.model.mid_block.to_k.ia3_l": ONE}, "got an IA3 adapter"),
    "OFT": ({f"{KEY}.oft_blocks": ONE}, "got an OFT adapter"),
    "VeRA": ({"base_model.model.x.vera_lambda_b": ONE}, "got a VeRA adapter"),
    "Control-LoRA": ({"lora_controlnet": ONE, "input_blocks.0.0.up": ONE}, "got a Control-LoRA"),
    "whole differences": (GOOD | {f"{KEY}.diff_b": ONE}, "got an adapter with whole differences of weights"),
    "IP-Adapter": ({"image_proj.proj.weight": ONE}, "got an IP-Adapter"),
    "textual inversion": ({"<cat>": ONE}, "got a textual inversion, new words.*pipe.load_textual_inversion"),
    "ControlNet": ({"controlnet_cond_embedding.conv_in.weight": ONE}, "got a ControlNet"),
    "checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": ONE}, "got a whole checkpoint in one file"),
    "motion module": ({"down_blocks.0.motion_modules.0.proj_in.weight": ONE}, "got a motion module"),
    "VAE": ({"decoder.conv_in.weight": ONE}, "got a VAE"),
    "UNet": ({"down_blocks.0.resnets.0.conv1.weight": ONE}, "got the weights of a whole denoiser"),
    "text encoder": ({"text_model.encoder.layers.0.mlp.fc1.weight": ONE}, "got the weights of a text encoder"),
    "anything": ({"linear.weight": ONE}, r"got a file without a tensor that is named as LoRA weights are \(linear"),
    "another tensor": (GOOD | {"extra": ONE}, "got also extra, which is none and would be lost"),
    "no partner": ({f"{KEY}.lora_down.weight": DOWN}, "expected also 'up' beside .*lora_down.weight, got no such"),
    "ranks that differ": ({**GOOD, f"{KEY}.lora_up.weight": torch.ones(16, 3)}, "matrices that can be multiplied, got"),
    "not finite": ({**GOOD, f"{KEY}.lora_up.weight": UP / 0}, "with NaN or infinity in it: it is damaged"),
    "alpha not finite": (GOOD | {f"{KEY}.alpha": ONE / 0}, "alpha with NaN or infinity"),
    "several alphas": (GOOD | {f"{KEY}.alpha": DOWN}, "expected one number as alpha"),
    "empty": ({**GOOD, f"{KEY}.lora_up.weight": UP[:0]}, r"of shape \(0, 2\), without a number"),
    "integers": ({**GOOD, f"{KEY}.lora_up.weight": UP.to(torch.int8)}, "in int8; take the adapter in fp32"),
    "norms of inputs": (GOOD | {f"{KEY}.dora_scale": DOWN[:1]}, "got one for each input in unet.mid_block"),
    "DoRA in a part": (
        GOOD | {f"{KEY}.dora_scale": UP[:, :1]} | {key.replace("to_q", "to_k"): value for key, value in GOOD.items()},
        "expected a magnitude in all layers of the unet or in none, got none in 1 of 2",
    ),
    "twice": (GOOD | NATIVE, "expected one adapter, got two for the layer unet.mid_block"),
    "twice, two names": (
        NATIVE | {key.replace(".weight", ".other.weight"): tensor for key, tensor in NATIVE.items()},
        "expected one adapter, got two tensors for the same place",
    ),
}  # fmt: skip
SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "another rank": (settings(r=8), "the same rank in settings and tensors, got 8 and 2 in mid_block"),
    "no alpha": (settings(lora_alpha=None), "expected a number as lora_alpha, got 'None'"),
    "rank 0": (settings(r=0), "expected a number as r, got '0'"),
    "DoRA lost": (settings(use_dora=True), "expected a magnitude in its layers with use_dora = true"),
    "not whole": (settings(target_modules=["attn1.to_q"]), r"got none for \d layers of the base"),
    "a bad pattern": (settings(alpha_pattern={"(": 1}), "expected names of layers as patterns"),
    "no table": (settings(alpha_pattern=[1]), "expected a table as alpha_pattern"),
    "of another peft": (settings(use_qalora=True), "expected plain LoRA, got use_qalora"),
    "no JSON": ({"lora_adapter_metadata": "{"}, "expected a JSON object, got '{'"),
    "a number without end": (settings(lora_alpha=10**400), "expected a JSON object, got "),
    "no end of levels": ({"lora_adapter_metadata": '{"a":' * 900 + "1" + "}" * 900}, "expected a JSON object, got "),
}


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_stable_diffusion()


def refusal(base: Any, place: Path, kind: type[Exception] = AdapterFormatError) -> str:
    with pytest.raises(kind) as caught:
        load_lora(base, place)
    message = str(caught.value)
    assert "\n" not in message and str(place) in message
    assert not any(getattr(part, "peft_config", {}) for part in (base.unet, base.text_encoder))
    return message


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_loaded_is_named(kind: str, base: Any, tmp_path: Path) -> None:
    tensors, expected = REFUSED[kind]
    path = tmp_path / "mine.safetensors"
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    assert re.search(expected, refusal(base, path))


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_contradict_the_tensors_are_named(kind: str, base: Any, tmp_path: Path) -> None:
    metadata, expected = SETTINGS[kind]
    path = tmp_path / "mine.safetensors"
    save_file(NATIVE, path, metadata=metadata)
    assert re.search(expected, refusal(base, path))


def test_an_adapter_of_another_family_says_which(base: Any, tmp_path: Path) -> None:
    key = kohya_name(f"{BLOCK}.attn2.to_k")
    path = tmp_path / "mine.safetensors"
    save_file({f"{key}.lora_down.weight": torch.ones(2, 2048), f"{key}.lora_up.weight": UP}, path)
    message = refusal(base, path, AdapterMismatchError)
    assert "the down matrix has shape (2, 2048) in the file and (2, 8) in the base; it is for SDXL" in message
    save_file({key.replace("mid_block", "middle_block"): tensor for key, tensor in NATIVE.items()}, path)
    message = refusal(base, path, AdapterMismatchError)
    assert "1 of the 1 layers in the file, which is in diffusers' format, have no place in it" in message


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("code ran",))


def legacy_pickle(damage: Callable[[bytes], bytes]) -> bytes:
    """What torch saved before it made archives of it: the reader of that form trusts it more than the present one."""
    file = io.BytesIO()
    torch.save({"lora": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    return damage(file.getvalue())


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda whole: re.sub(rb"\d{8,}(?=[^\d]{1,40}$)", lambda key: b"1" * len(key[0]), whole), AssertionError),
        (lambda whole: whole[:28], struct.error),
        (lambda whole: whole[:20], EOFError),
        (lambda whole: b"\x80\x02.", IndexError),
        (lambda whole: b"\x80\x02X\x03\0\0\0\xff\xff\xff.", UnicodeDecodeError),
        (lambda whole: whole[:-4], RuntimeError),
    ],
)
def test_whatever_damaged_bytes_make_of_torchs_reader(
    base: Any, tmp_path: Path, damage: Callable[[bytes], bytes], kind: type[Exception]
) -> None:
    (tmp_path / "old.bin").write_bytes(legacy_pickle(damage))
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(AdapterFormatError, match="a pickle that cannot be") as e,
    ):
        load_lora(base, tmp_path / "old.bin")
    assert isinstance(e.value.__context__, kind), "the case no longer shows what it is for"


def test_files_that_cannot_be_read_are_named(base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written(content: bytes, name: str = "mine.safetensors") -> str:
        (tmp_path / name).write_bytes(content)
        return refusal(base, tmp_path / name)

    huge = (2**62).to_bytes(8, "little") + b"{}"
    for content in (b"", b"<html>not found</html>", huge, (10).to_bytes(8, "little") + b"{"):
        assert "got a file that cannot be read as safetensors (" in written(content)
    assert "got a Git LFS pointer" in written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    torch.save({"lora": Trap()}, tmp_path / "trap.bin")
    assert "got a pickle that would run code when it is read, which is refused" in refusal(base, tmp_path / "trap.bin")
    assert "code ran" not in capsys.readouterr().out
    whole = (tmp_path / "trap.bin").read_bytes()
    assert "got a pickle that cannot be read" in written(whole[: len(whole) // 2], "half.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    assert "got a pickled list" in refusal(base, tmp_path / "list.bin")
    torch.save({f"{KEY}.lora_down.weight": 3}, tmp_path / "number.bin")
    assert "a int; take another file" in refusal(base, tmp_path / "number.bin")
    base.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(AdapterNotFoundError, match=r"got a whole pipeline \(it has a model_index"):
        load_lora(base, tmp_path / "pipeline")


def test_what_is_no_adapter_is_refused_before_the_base_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"model.diffusion_model.out.2.weight": ONE}, tmp_path / "sd.safetensors")
    adapter = f"--adapter={tmp_path / 'sd.safetensors'}"
    for command in (
        ["merge", adapter, "--base=no/such-base", f"--output={tmp_path / 'o'}"],
        ["compare", adapter, "--base=no/such-base", "--reward=jpeg-compressibility", f"--output={tmp_path / 'o'}",
         f"--prompts={tmp_path / 'prompts.txt'}"],
    ):  # fmt: skip
        (tmp_path / "prompts.txt").write_text("a ball")
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 1
        error = capsys.readouterr().err
        assert "got a whole checkpoint in one file, a base and no adapter" in error and "Traceback" not in error


def with_biases(folder: Path) -> Path:
    """peft's lora_bias on a layer that has a bias and on one that has none."""
    names = (LINEAR[0], LINEAR[1])
    tensors = {f"{name}.lora_{matrix}": value for name in names
               for matrix, value in (("A.weight", DOWN), ("B.weight", UP), ("B.bias", torch.arange(16.0)))}  # fmt: skip
    save_file({key: value.clone() for key, value in tensors.items()}, folder / WEIGHT_NAME)
    return folder


def test_biases_are_loaded_and_cannot_be_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_stable_diffusion()
    layer = _module(pipeline, LINEAR[0])
    features = torch.linspace(-1, 1, 16)
    plain = layer(features)
    load_lora(pipeline, with_biases(tmp_path))
    expected = plain + UP @ DOWN @ features + torch.arange(16.0)
    torch.testing.assert_close(_module(pipeline, LINEAR[0])(features), expected, rtol=0, atol=1e-4)
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    words = [
        f"--{flag}={tmp_path / name}" for flag, name in (("base", "base"), ("adapter", WEIGHT_NAME), ("output", "o"))
    ]
    with pytest.raises(SystemExit):
        main(["merge", *words])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "got one with biases (peft's lora_bias) for 1 layers that have none (unet.mid_block" in line
    assert not (tmp_path / "o").exists()


def test_an_alpha_of_0_or_none_is_reported(base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(GOOD | {f"{KEY}.alpha": 0 * ONE}, tmp_path / "mine.safetensors")
    load_lora(base, tmp_path)
    unload_lora(base)
    assert "changes nothing: alpha is 0 in all its layers" in caplog.text and "names no alpha" not in caplog.text
    save_file(GOOD, tmp_path / "mine.safetensors")
    load_lora(base, tmp_path)
    unload_lora(base)
    assert "in kohya's format, names no alpha for 1 of its 1 layers: it is taken as their rank" in caplog.text


def test_a_header_whose_length_looks_like_a_pickle(base: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    for padding in range(0, 512, 8):
        save_file(NATIVE, path, metadata=settings() | {"padding": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    load_lora(base, path)
    assert _module(base, LINEAR[0]).scaling["default_0"] == 2
    unload_lora(base)
