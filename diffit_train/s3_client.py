"""What differs from aiobotocore's own S3 client: it gives up on a server that falls silent.

The policy of `waiting` counts attempts; so a request is one attempt here, and ends where nothing is
heard for too long. Imported only where S3 is used.
"""

from __future__ import annotations

import socket
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession

from diffit_train import waiting

# Requests that a process has under way; botocore's default is 10.
CONNECTIONS = 32


def client_config() -> dict[str, Any]:
    """Arguments of botocore's configuration."""
    seconds = waiting.attempt_s()
    return {
        "max_pool_connections": CONNECTIONS,
        "connect_timeout": seconds,
        "read_timeout": seconds,
        "retries": {"total_max_attempts": 1},
        "connector_args": {"socket_factory": impatient_socket},
        "http_session_cls": UnexpectingSession,
    }


def impatient_socket(address: tuple[Any, ...]) -> socket.socket:
    """A connection that breaks where what it sends is not taken; aiohttp has no limit for that.

    Args:
        address: family, type and protocol are its first three items.
    """
    connection = socket.socket(*address[:3])
    connection.setblocking(False)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        milliseconds = round(1000 * waiting.attempt_s())
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return connection


class UnexpectingSession(AIOHTTPSession):  # type: ignore[misc]
    """Sends the body of a request at once.

    botocore asks with `Expect: 100-continue` whether it may, and aiohttp waits for the answer
    without any limit.
    """

    async def send(self, request: Any) -> Any:
        """Send a request; the header is not among those that are signed."""
        request.headers.pop("Expect", None)
        return await super().send(request)
