"""An autoencoder on a hub that cannot be reached is refused before anything starts."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from diffit_train.data.autoencoder_source import require_from_hub
from diffit_train.errors import UserError

NAME = "nobody/has-this-one"


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """An endpoint that accepts connections."""
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        yield server


def test_a_hub_that_answers_is_left_to_the_download(listening: socket.socket) -> None:
    require_from_hub(NAME)


def test_a_hub_out_of_reach_is_refused_with_the_way_out(listening: socket.socket) -> None:
    listening.close()
    with pytest.raises(UserError, match=NAME) as caught:
        require_from_hub(NAME)
    assert f"autoencoder.alias={NAME}" in str(caught.value)


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        require_from_hub(NAME)
