"""Without a connection to the Hub, a missing file is told at once."""

import logging
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from rlr_peft.config import Config

logger = logging.getLogger(__name__)

SECONDS = 3.0


def work_offline_without_hub() -> None:
    """Sets HF_HUB_OFFLINE where nothing answers at the Hub's address; to be called before huggingface_hub is imported.

    Its client would try again for about half a minute for every file that is not in the cache. What the user says by
    that variable, or by a proxy, stays as it is.
    """
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if "HF_HUB_OFFLINE" in os.environ or endpoint.scheme in getproxies() or endpoint.hostname is None:
        return
    try:
        port = endpoint.port or {"http": 80}.get(endpoint.scheme, 443)
        socket.create_connection((endpoint.hostname, port), timeout=SECONDS).close()
    except OSError:
        logger.warning("%s does not answer: only files in the cache are used.", endpoint.hostname)
        os.environ["HF_HUB_OFFLINE"] = "1"


def refuse_missing_rewards(config: Config) -> None:
    """Where only the cache is used, looks for the files of all rewards, before torch and the base are loaded.

    With a connection they are downloaded when the rewards are loaded, once the output folder is known to be free.

    Raises:
        RewardError: a file is missing; it names reward, repository, file and the command to get it.
    """
    from huggingface_hub import constants

    from rlr_peft.rewards.model_files import ModelFiles

    if not constants.HF_HUB_OFFLINE:
        return
    reward = config.reward
    files = ModelFiles(reward.reward_model_path, config.model.cache_dir)
    for spec in reward.specs:
        files.refuse_missing(spec, reward.vlm_endpoint)
