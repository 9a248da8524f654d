"""Which errors end a program with one message, and which keep their traceback."""

import pytest
import torch

from rlr_peft.training.errors import reporting_errors


def test_a_full_gpu_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, reporting_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nat some kernel")
    assert left.value.code == 1
    message = capsys.readouterr().err
    assert "Tried to allocate 2.00 GiB." in message and "`rlr-peft plan --gpu_memory GIB`" in message
    assert "at some kernel" not in message


def test_other_errors_of_torch_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), reporting_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)
