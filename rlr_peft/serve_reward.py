"""`rlr-peft serve-reward`: a reward behind HTTP, so that it can live in another environment or on another machine."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Literal

from rlr_peft.build.reporting import work_offline_without_hub
from rlr_peft.config import ConfigError, RewardArguments
from rlr_peft.config.knob import Group, knob, preset
from rlr_peft.config.parsing import read_words
from rlr_peft.config.reward import VLM_ANSWERS, VLM_QUESTION
from rlr_peft.foreign_text import say

if TYPE_CHECKING:
    import torch

    from rlr_peft.rewards.base import Reward
    from rlr_peft.rewards.server import RewardServer, ServerLimits

PROG = "rlr-peft serve-reward"
DESCRIPTION = "Serve a reward over HTTP, for --reward_fn http://HOST:PORT/ (the protocol is in docs/rewards.md)."


@dataclass(frozen=True)
class ServeFlags(Group):
    """The server"""

    reward: str = knob(MISSING, "A name or callable, as for --reward_fn.")
    host: str = knob("127.0.0.1", "Address to listen at; there is no authentication, so open it to trusted nets only.")
    port: int = knob(8000, "Port to listen at; 0 takes a free one.", within="[0, 65535]")
    device: str | None = knob(None, "Where the reward runs; null means a GPU if there is one.")
    reward_dtype: Literal["auto", "fp32", "fp16", "bf16"] = preset(RewardArguments, "reward_dtype", "auto")
    reward_model_path: dict[str, str] | None = preset(RewardArguments, "reward_model_path", None)
    vlm_question: str = preset(RewardArguments, "vlm_question", VLM_QUESTION)
    vlm_answers: tuple[str, ...] = preset(RewardArguments, "vlm_answers", VLM_ANSWERS)
    max_megapixels: float = knob(
        70.0, "Pixels of all images of a request together.", unit="millions", within="(0, 1e6]"
    )
    max_waiting_megabytes: float = knob(
        512.0, "Bytes of all requests together that arrive, wait or are scored.", unit="MB", within="(0, 1e6]"
    )
    request_timeout: float = knob(
        60.0, "Time in which a request must have arrived whole.", unit="seconds", within="(0, 86400]"
    )


def serve_reward_command(words: Sequence[str]) -> int:
    """Loads the reward, prints `Serving REWARD at URL`, and answers until it is interrupted."""
    own = read_words(words, ServeFlags, PROG, DESCRIPTION, example="--reward pickscore --port 8000").own

    # Only now the network and the heavy imports: a wrong flag is refused at once.
    work_offline_without_hub()

    from rlr_peft.build.machine import package_versions
    from rlr_peft.compare.kept import digest, reward_identity
    from rlr_peft.rewards.model_files import ModelFiles
    from rlr_peft.rewards.model_reward import ModelSettings, weights_dtype
    from rlr_peft.rewards.registry import RewardSettings, load_reward
    from rlr_peft.rewards.server import ServerLimits
    from rlr_peft.rewards.vlm_endpoint import JudgeSettings

    device = _device(own.device)
    files = ModelFiles(own.reward_model_path)
    model = ModelSettings(device, weights_dtype(own.reward_dtype, device), files=files)
    judge = JudgeSettings(own.vlm_question, own.vlm_answers)
    reward = load_reward(own.reward, RewardSettings(model, judge=judge))
    limits = ServerLimits(
        max_pixels=round(own.max_megapixels * 1e6),
        max_waiting_bytes=round(own.max_waiting_megabytes * 1e6),
        request_timeout=own.request_timeout,
    )
    version = digest(
        *(reward_identity(own.reward), files.identity(), own.reward_dtype, device.type, judge), package_versions()
    )
    with _listening(reward, own.host, own.port, device, version, limits) as server:
        signal.signal(signal.SIGTERM, _leave)
        say(f"Serving {reward.name} at {server.url}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("Stopped.", sys.stderr)
    return 0


def _device(name: str | None) -> "torch.device":
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # a name that torch knows need not be a device of this machine
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"device: expected a device that is here, such as cpu or cuda:0, got {name} ({reason}); "
            "correct it, or leave it out."
        ) from error
    return device


def _listening(
    reward: "Reward", host: str, port: int, device: "torch.device", version: str, limits: "ServerLimits"
) -> "RewardServer":
    from rlr_peft.rewards.server import RewardServer

    try:
        return RewardServer(reward, host, port, device, version, limits)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"port: expected an address that is free to listen at, got {host}:{port} ({error}); choose another, or 0 "
            "for any free port."
        ) from error


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
