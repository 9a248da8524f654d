"""The benchmark of real sizes, on a pipeline of toy size: the same code, and the plan foresees what it measures."""

import pytest
import torch

from benchmarks.real_size import CASES, TINY, main, measure_case
from rlr_peft.evaluation.memory_plan.architecture import shipped_ids


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels' workspaces count too")
@pytest.mark.parametrize("name", TINY)
def test_measured_and_planned_agree_on_a_toy(name: str) -> None:
    phases = measure_case(name)["phases"]
    assert phases.keys() == {"sampling", "decode + reward", "adjoint"}
    for numbers in phases.values():
        assert numbers["planned"] == pytest.approx(numbers["peak"], rel=0.05)
        assert numbers["seconds_per_step"] > 0
    assert phases["sampling"]["peak"] == 0 < phases["decode + reward"]["peak"] < phases["adjoint"]["peak"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real sizes need a GPU")
@pytest.mark.parametrize("name", [name for name in CASES if "checkpointed" in name])
def test_the_plan_is_within_15_percent_on_a_gpu(name: str) -> None:
    for numbers in measure_case(name)["phases"].values():
        assert numbers["planned"] == pytest.approx(numbers["peak"], rel=0.15)


def test_every_real_case_has_shipped_configs() -> None:
    assert {base for base, _, _ in CASES.values()} <= set(shipped_ids())


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_real_sizes_are_refused_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["real_size", "--case", "stable-diffusion-1.5-512"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and "expected a GPU for real sizes" in capsys.readouterr().err
