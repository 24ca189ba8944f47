import socket
import time

import huggingface_hub.constants
import pytest

from hf_moe.weights.hub import HubUnreachable, fetch_from_hub


def test_offline_mode_is_said(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match=r"offline mode is on.*does not hold `owner/name`"):
        fetch_from_hub("owner/name")


def test_a_closed_port_is_noticed_at_once(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    with pytest.raises(HubUnreachable, match="cannot be reached"):
        fetch_from_hub("owner/name")
    assert time.monotonic() - start < 3


def test_a_silent_server_is_given_up_after_the_timeout(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(HubUnreachable):
            fetch_from_hub("owner/name", timeout=0.3)
        assert time.monotonic() - start < 3


def test_an_impossible_name_is_not_asked_for():
    with pytest.raises(ValueError, match="neither a folder nor a valid Hub id"):
        fetch_from_hub("a b/c")
