"""What is tried again, and what is not."""

import aiohttp
import pytest
from yarl import URL

from shards.errors import StorageError
from shards.retry import RetryPolicy, retried

THRICE = RetryPolicy(attempts=3, first_delay_sec=0.0)


def answer(status: int) -> aiohttp.ClientResponseError:
    url = URL("http://images.test/00000.tar")
    request = aiohttp.RequestInfo(url, "GET", {}, url)  # type: ignore[arg-type]
    return aiohttp.ClientResponseError(request, (), status=status, message="no")


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        *((answer(status), 1) for status in (400, 401, 403, 410, 451)),
        *((answer(status), 3) for status in (408, 425, 429, 500, 502, 503)),
        (aiohttp.ClientPayloadError("cut short"), 3),
        (ConnectionResetError("reset"), 3),
        (TimeoutError("slow"), 3),
        (PermissionError("denied"), 1),
        (OSError(28, "No space left on device"), 1),
    ],
    ids=lambda value: getattr(value, "status", None) or type(value).__name__,
)
def test_what_may_pass_is_tried_again_and_what_cannot_is_not(error, attempts):
    tried = []

    def operation() -> None:
        tried.append(True)
        raise error

    with pytest.raises(StorageError, match=r"^here: reading failed"):
        retried(operation, where="here", action="reading", policy=THRICE)
    assert len(tried) == attempts


def test_an_error_of_ours_passes_through_at_once():
    tried = []

    def operation() -> None:
        tried.append(True)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        retried(operation, where="here", action="reading", policy=THRICE)
    assert len(tried) == 1
