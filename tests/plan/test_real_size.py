"""The benchmark of real sizes, on a pipeline of toy size: the same code, and the plan foresees what it measures."""

import pytest
import torch
from torch import nn

from benchmarks.real_size import CASES, TINY, measure_case, quantize
from rlr_peft.plan import shipped_ids


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels' workspaces count too")
@pytest.mark.parametrize("name", TINY)
def test_measured_and_planned_agree_on_a_toy(name: str) -> None:
    phases = measure_case(name)["phases"]
    assert phases.keys() == {"sampling", "decode + reward", "adjoint"}
    for numbers in phases.values():
        assert numbers["planned"] == pytest.approx(numbers["peak"], rel=0.05)
        assert numbers["seconds_per_step"] > 0
    assert phases["sampling"]["peak"] == 0 < phases["decode + reward"]["peak"] < phases["adjoint"]["peak"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes repacks weights on CPUs only")
@pytest.mark.parametrize("in_features", [48, 64], ids=["rows shorter than a block", "whole blocks"])
@pytest.mark.parametrize("repacks", [True, False], ids=["AVX512-BF16", "older processor"])
def test_four_bit_layers_keep_their_weights_on_every_processor(
    monkeypatch: pytest.MonkeyPatch, repacks: bool, in_features: int
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: repacks)
    weight = torch.randn(32, in_features, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(in_features, 32, bias=False))
    model.load_state_dict({"0.weight": weight})
    quantize(model, {"bnb_4bit_quant_type": "nf4"})
    model.eval()
    packed = model[0].weight.data.clone()
    x = torch.randn(2, in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(model[0].weight.data, packed)
    (gradient,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x)
    # The layer is linear, and so a sum of its inputs times the gradient is a sum of its outputs.
    assert (gradient * x).sum().item() == pytest.approx(expected.sum().item(), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real sizes need a GPU")
@pytest.mark.parametrize("name", [name for name in CASES if "checkpointed" in name])
def test_the_plan_is_within_15_percent_on_a_gpu(name: str) -> None:
    for numbers in measure_case(name)["phases"].values():
        assert numbers["planned"] == pytest.approx(numbers["peak"], rel=0.15)


def test_every_real_case_has_shipped_configs() -> None:
    assert {base for base, _, _ in CASES.values()} <= set(shipped_ids())
