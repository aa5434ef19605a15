"""Without a network, names are refused at once, and what was downloaded before is used."""

from __future__ import annotations

import socket

import huggingface_hub.file_download
import pytest
from conftest import hf
from huggingface_hub import constants

import hookedlm
from hookedlm import HookedTransformer, reach
from hookedlm.errors import LoadError
from hookedlm.model_configs import get_pretrained_model_config


@pytest.fixture
def unproxied(monkeypatch):
    monkeypatch.setattr(reach, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def nobody(monkeypatch, unproxied):
    """A hub whose port nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield


@pytest.mark.usefixtures("nobody")
def test_nobody_there_means_local_files():
    assert reach.where_found({"revision": "x"}) == {"revision": "x", "local_files_only": True}


@pytest.mark.usefixtures("unproxied")
def test_a_hub_that_answers_is_asked(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert reach.where_found({"revision": "x"}) == {"revision": "x"}


@pytest.mark.usefixtures("nobody")
def test_proxies_and_the_user_decide_first(monkeypatch):
    assert reach.where_found({"local_files_only": False}) == {"local_files_only": False}
    monkeypatch.setattr(reach, "getproxies", lambda: {"https": "http://proxy"})
    assert reach.where_found({}) == {}


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    "load",
    [
        hookedlm.load,
        HookedTransformer.from_pretrained,
        get_pretrained_model_config,
    ],
)
def test_no_file_is_asked_for_over_and_over(load, monkeypatch):
    def asked(*args, **kwargs):
        pytest.fail("a request to the hub")

    monkeypatch.setattr(huggingface_hub.file_download, "_request_wrapper", asked, raising=False)
    monkeypatch.setattr(huggingface_hub.file_download, "get_hf_file_metadata", asked)
    with pytest.raises(LoadError, match="gpt2-medium"):
        load("gpt2-medium")


@pytest.mark.usefixtures("nobody")
def test_a_module_under_a_hub_name_asks_for_no_tokenizer(monkeypatch):
    def asked(*args, **kwargs):
        pytest.fail("a request to the hub")

    monkeypatch.setattr(huggingface_hub.file_download, "get_hf_file_metadata", asked)
    model = HookedTransformer.from_pretrained("gpt2", hf_model=hf("gpt2-base"))
    assert model.tokenizer is None
