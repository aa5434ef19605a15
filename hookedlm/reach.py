"""Whether Hugging Face's hub can be reached, asked once instead of by every file's retries."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

PATIENCE = 5.0
"""Seconds a connection may take."""


def where_found(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of transformers' ``from_pretrained``; without a network, with
    ``local_files_only``: what was downloaded before is used, and the rest is refused at once rather
    than after half a minute of retries for each file."""
    asked = "local_files_only" in options or constants.HF_HUB_OFFLINE
    if asked or getproxies() or _answers(constants.ENDPOINT):
        return dict(options)
    return {**options, "local_files_only": True}


def _answers(endpoint: str) -> bool:
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True
