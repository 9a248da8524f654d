"""`rlr-peft serve-reward`: a reward behind HTTP, so that it can live in another environment or on another machine."""

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, Literal

from jsonargparse import ArgumentParser

PROG = "rlr-peft serve-reward"


def serve_reward_command(words: Sequence[str]) -> int:
    """Loads the reward, prints `Serving REWARD at URL`, and answers until it is interrupted."""
    arguments = _parser().parse_args(list(words))

    from rlr_peft.training.logs import set_up_logging

    set_up_logging()

    # Only now the heavy imports: a wrong flag is refused at once.
    import torch

    from rlr_peft.rewards.model_files import ModelFiles
    from rlr_peft.rewards.model_reward import DTYPES, ModelSettings
    from rlr_peft.rewards.registry import RewardSettings, load_reward
    from rlr_peft.rewards.server import RewardServer
    from rlr_peft.training.errors import reporting_errors

    with reporting_errors():
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = ModelSettings(device, DTYPES[arguments.reward_dtype], files=ModelFiles(arguments.reward_model_path))
        reward = load_reward(arguments.reward, device, RewardSettings(model))
        with RewardServer(reward, arguments.host, arguments.port, device) as server:
            signal.signal(signal.SIGTERM, _leave)
            print(f"Serving {reward.name} at {server.url}", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("Stopped.", file=sys.stderr)
    return 0


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
    return parser
