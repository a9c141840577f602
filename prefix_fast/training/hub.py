"""Whether the Hugging Face hub is within reach: asked before a download, whose own retries take half a minute."""

import socket
import urllib.request
from urllib.parse import urlparse


def hub_is_reachable(timeout: float = 5.0) -> bool:
    """Whether a connection to the hub can be opened (assumed when a proxy does the connecting)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlparse(constants.ENDPOINT)
    if endpoint.scheme in urllib.request.getproxies():
        return True
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=timeout):
            return True
    except OSError:
        return False
