"""Addresses to listen on, and how a client of this machine reaches them."""

from __future__ import annotations

import ipaddress
import socket

from shards.errors import UserError

_REACHED = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}


def is_loopback(host: str) -> bool:
    """Whether a name or address is that of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def local_url(host: str, port: int) -> str:
    """Of what listens there, for a client of this machine."""
    reached = _REACHED.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def usable_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        UserError: it cannot be listened on.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        # As servers do: what earlier connections left behind is no obstacle.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            remedy = "another --port, or 0: a free one is found"
            found = f"{host}:{port} cannot be listened on ({error.strerror})"
            raise UserError("--port", found, remedy=remedy) from None
        free: int = trial.getsockname()[1]
        return free
