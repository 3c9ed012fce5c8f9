"""Who gets in."""

from __future__ import annotations

import pytest

from echo_rl.errors import ConfigError
from echo_rl.server.api.auth import Keys, is_loopback
from echo_rl.server.config import ServerConfig
from tests.server.front_world import FakeEngineClient, client_of, make_app

ADMIN = "/admin/controller"
BOTH = Keys(api=b"for-all", admin=b"for-me")


def bearer(key: str | bytes) -> dict:
    return {"Authorization": b"Bearer " + (key if isinstance(key, bytes) else key.encode())}


def status(path: str, headers=None, keys=Keys(), peer="127.0.0.1", url="http://127.0.0.1", **settings) -> int:  # noqa: B008
    with client_of(make_app(FakeEngineClient(), keys, **settings), peer, url) as client:
        return client.get(path, headers=headers or {}).status_code


@pytest.mark.parametrize(
    ("key", "expected"),
    [("for-all", 200), ("for-me", 401), ("for-al", 401), ("for-all2", 401), ("", 401), (b"\xff\xfe", 401)],
)
def test_the_api_key(key, expected):
    assert status("/v1/models", bearer(key), BOTH) == expected


def test_no_key_is_as_bad_as_a_wrong_one_and_says_how_to_give_it():
    with client_of(make_app(FakeEngineClient(), BOTH)) as client:
        for headers in ({}, {"Authorization": "Basic Zm9yLWFsbA=="}):
            reply = client.get("/v1/models", headers=headers)
            assert reply.status_code == 401 and reply.headers["WWW-Authenticate"] == "Bearer"
            assert reply.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 401


def test_a_key_may_hold_any_letters():
    keys = Keys(api="Schlüssel".encode())
    assert status("/v1/models", bearer("Schlüssel".encode()), keys) == 200
    assert status("/v1/models", bearer("Schlussel"), keys) == 401


def test_without_an_api_key_v1_is_open_and_health_always_is():
    assert status("/v1/models", peer="10.0.0.9") == 200
    assert status("/health", keys=BOTH, peer="10.0.0.9") == 200


@pytest.mark.parametrize(("key", "expected"), [("for-me", 200), ("for-all", 401), ("x", 401)])
@pytest.mark.parametrize("peer", ["127.0.0.1", "10.0.0.9"])
def test_the_admin_key_counts_from_anywhere(key, expected, peer):
    assert status(ADMIN, bearer(key), BOTH, peer, host="0.0.0.0") == expected


def test_with_an_admin_key_this_machine_needs_it_too():
    assert status(ADMIN, keys=BOTH) == 401


@pytest.mark.parametrize(
    ("bound", "peer", "url", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", "http://127.0.0.1", 200),
        ("::1", "::1", "http://[::1]:8000", 200),
        ("127.0.0.1", "127.0.0.1", "http://localhost:8000", 200),
        ("0.0.0.0", "127.0.0.1", "http://127.0.0.1", 403),  # others can reach this server
        ("127.0.0.1", "10.0.0.9", "http://127.0.0.1", 403),
        ("127.0.0.1", "127.0.0.1", "http://evil.example", 403),  # a name that was bent to this machine
        ("somewhere", "127.0.0.1", "http://127.0.0.1", 403),  # not an address
    ],
)
def test_without_an_admin_key_only_this_machine_on_a_loopback_server(bound, peer, url, expected):
    assert status(ADMIN, peer=peer, url=url, host=bound) == expected


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"])
def test_behind_a_proxy_the_peer_proves_nothing(header):
    assert status(ADMIN, {header: "127.0.0.1"}) == 403


def test_the_live_view_shows_its_page_but_no_data():
    assert status("/ui", keys=BOTH) == 200
    assert status("/ui/events", keys=BOTH) == 401
    assert status("/ui/events", peer="10.0.0.9") == 403


def test_keys_come_from_files_before_the_environment(tmp_path):
    file = tmp_path / "key"
    file.write_text("from-file\n")
    environment = {"ECHO_RL_API_KEY": "from-environment", "ECHO_RL_ADMIN_KEY": " spaced "}
    keys = Keys.load(ServerConfig(api_key_file=file), environment)
    assert keys == Keys(b"from-file", b"spaced")
    assert "from-file" not in repr(keys) and Keys.load(ServerConfig(), {}) == Keys()


def test_unusable_keys(tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        Keys.load(ServerConfig(admin_key_file=empty), {})
    with pytest.raises(ConfigError, match="cannot read"):
        Keys.load(ServerConfig(admin_key_file=tmp_path / "nowhere"), {})
    with pytest.raises(ConfigError, match="ECHO_RL_API_KEY is empty"):
        Keys.load(ServerConfig(), {"ECHO_RL_API_KEY": ""})


def test_names_are_no_loopback_addresses():
    assert is_loopback("127.0.0.2") and is_loopback("::1")
    assert not any(is_loopback(address) for address in ("0.0.0.0", "10.0.0.1", "localhost", ""))
