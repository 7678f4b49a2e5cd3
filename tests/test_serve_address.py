"""Addresses: whose they are, and whether they can be had."""

import socket

import pytest

from serve.address import is_loopback, local_url, usable_port
from shards.errors import UserError


def test_loopback_is_told_from_names_that_look_like_it():
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "localhost", "::1"]))
    assert not any(map(is_loopback, ["127.0.0.1.test", "10.0.0.1", "0.0.0.0", "host", "::", ""]))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_what_listens_everywhere_is_reached_through_loopback(host, url):
    assert local_url(host, 80) == url


def test_a_free_port_is_found_and_a_taken_one_refused():
    port = usable_port("127.0.0.1", 0)
    assert port > 0
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port: 127.0.0.1:{taken} cannot be listened on"):
            usable_port("127.0.0.1", taken)
    assert usable_port("127.0.0.1", taken) == taken  # free again, at once
    with pytest.raises(UserError, match="--port"):
        usable_port("203.0.113.77", 0)  # an address that no machine has
