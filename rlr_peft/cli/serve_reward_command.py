"""`rlr-peft serve-reward`: a reward behind HTTP, so that it can live in another environment or on another machine."""

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat

from rlr_peft.config import ConfigError
from rlr_peft.config.parsing import parse_or_exit
from rlr_peft.foreign_text import say

if TYPE_CHECKING:
    import torch

    from rlr_peft.rewards.base import Reward
    from rlr_peft.rewards.server import RewardServer, ServerLimits

PROG = "rlr-peft serve-reward"


def serve_reward_command(words: Sequence[str]) -> int:
    """Loads the reward, prints `Serving REWARD at URL`, and answers until it is interrupted."""
    arguments = parse_or_exit(_parser(), words)

    from rlr_peft.build.reporting import set_up_logging

    set_up_logging()

    # Only now the heavy imports: a wrong flag is refused at once.
    from rlr_peft.build.machine import package_versions
    from rlr_peft.build.reporting import reporting_errors
    from rlr_peft.compare.kept import digest, reward_identity
    from rlr_peft.rewards.model_reward import DTYPES, ModelFiles, ModelSettings
    from rlr_peft.rewards.registry import RewardSettings, load_reward
    from rlr_peft.rewards.server import ServerLimits

    with reporting_errors():
        device = _device(arguments.device)
        files = ModelFiles(arguments.reward_model_path)
        model = ModelSettings(device, DTYPES[arguments.reward_dtype], files=files)
        reward = load_reward(arguments.reward, RewardSettings(model))
        limits = ServerLimits(
            max_pixels=round(arguments.max_megapixels * 1e6),
            max_waiting_bytes=round(arguments.max_waiting_megabytes * 1e6),
            request_timeout=arguments.request_timeout,
        )
        version = digest(
            *(reward_identity(arguments.reward), files.identity(), arguments.reward_dtype, device.type),
            package_versions(),
        )
        with _listening(reward, arguments.host, arguments.port, device, version, limits) as server:
            signal.signal(signal.SIGTERM, _leave)
            say(f"Serving {reward.name} at {server.url}")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                say("Stopped.", sys.stderr)
    return 0


def _device(name: str | None) -> "torch.device":
    import torch

    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device: expected a device of torch such as cuda:0 or cpu, got {name}.") from error
    if device.type == "cuda" and not has_gpu:
        raise ConfigError(f"--device: expected a machine with a GPU for {name}, got none; use --device cpu.")
    return device


def _listening(
    reward: "Reward", host: str, port: int, device: "torch.device", version: str, limits: "ServerLimits"
) -> "RewardServer":
    from rlr_peft.rewards.server import RewardServer

    try:
        return RewardServer(reward, host, port, device, version, limits)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port: expected an address that is free to listen at, got {host}:{port} ({error}); choose another, or 0 "
            "for any free port."
        ) from error


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROG, description="Serves a reward over HTTP (the protocol is in docs/rewards.md).")

    def flag(name: str, type_: Any, default: Any, help_: str) -> None:
        parser.add_argument(f"--{name}", type=type_, default=default, help=help_)

    parser.add_argument("--reward", type=str, required=True, help="a name or callable, as for --reward_fn")
    flag("host", str, "127.0.0.1", "address to listen at; there is no authentication, so open it to trusted nets only")
    flag("port", int, 8000, "port to listen at; 0 takes a free one")
    flag("device", str | None, None, "where the reward runs; a GPU if there is one")
    flag("reward_dtype", Literal["fp32", "fp16", "bf16"], "fp32", "number format of a built-in reward model's weights")
    flag("reward_model_path", dict[str, str] | None, None, "local copies of reward models, `{REPOSITORY: PATH, ...}`")
    flag("max_megapixels", PositiveFloat, 70.0, "pixels of all images of a request together, in millions")
    flag(
        "max_waiting_megabytes", PositiveFloat, 512.0, "bytes of all requests together that arrive, wait or are scored"
    )
    flag("request_timeout", PositiveFloat, 60.0, "seconds in which a request must have arrived whole")
    return parser
