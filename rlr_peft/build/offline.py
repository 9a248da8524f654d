"""Without a connection to the Hub, a missing file is told at once."""

import logging
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

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
