"""From the config to a publisher: before anything is loaded, so that a wrong token costs seconds and not a run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlr_peft.config import Config
from rlr_peft.publishing.hub_access import open_destination
from rlr_peft.publishing.hub_client import HubError
from rlr_peft.publishing.publisher import Publisher

logger = logging.getLogger(__name__)


@contextmanager
def open_publisher(config: Config) -> Iterator[Publisher | None]:
    """Checks token, name and right to write, and creates the repository; None where this process publishes nothing.

    Raises:
        HubError: it could not be published there.
    """
    hub = config.hub
    if not hub.push_to_hub or os.environ.get("RANK", "0") != "0":
        yield None
        return
    folder = Path(config.training.output_dir)
    try:
        destination = open_destination(
            hub.hub_model_id or folder.resolve().name,
            token=hub.hub_token,
            private=hub.hub_private_repo,
            revision=hub.hub_revision,
        )
    except HubError as error:
        raise HubError(
            f"{error} Training was not started. It needs no Hub: without --push_to_hub the run stays here, and "
            f"`rlr-peft push {folder}` publishes it afterwards."
        ) from error
    logger.info("The adapter will be published on %s", destination.url)
    publisher = Publisher(destination)
    try:
        yield publisher
    finally:
        publisher.stop()
