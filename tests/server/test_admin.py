"""/admin: controllers, checkpoints and experiments over HTTP."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

from echo_rl.controllers.policy.ppo import shipped
from echo_rl.server.api.controller_catalog import ControllerCatalog
from echo_rl.server.specs import public_spec
from tests.server.front_world import FakeEngineClient, client_of, make_app


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of an operator: a policy, a drafter, and a folder that holds nothing."""
    shutil.copytree(shipped(), tmp_path / "night-run")
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "manifest.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def engine_client():
    return FakeEngineClient()


@pytest.fixture
def client(engine_client, folder):
    with client_of(make_app(engine_client, checkpoints=folder)) as client:
        yield client


def test_what_can_be_chosen(client):
    offers = client.get("/admin/controllers").json()
    assert offers["checkpoints"] == ["night-run"]
    known = {offer["name"]: offer for offer in offers["controllers"]}
    assert {"none", "echo", "ppo"} <= set(known) and "oracle" not in known
    assert known["ppo"]["takes_checkpoint"] and not known["echo"]["takes_checkpoint"]
    assert known["ppo"]["options"] == {"deterministic": True, "seed": 0}
    assert "profile" not in known["echo"]["options"]


def test_swapping_the_controller(client, engine_client, caplog):
    caplog.set_level(logging.INFO)
    reply = client.put("/admin/controller", json={"controller": "chain:steps=2"})
    assert reply.json() == {"controller": "chain:steps=2", "previous": "echo"}
    assert client.get("/admin/controller").json()["controller"] == engine_client.controller == "chain:steps=2"
    assert any(r.message == "admin controller" and r.fields["previous"] == "echo" for r in caplog.records)


def test_a_checkpoint_is_put_in_force_by_its_name(client, engine_client, folder):
    for text, expected in (("ppo", "ppo:path="), ("ppo:seed=3", "ppo:seed=3,path=")):
        reply = client.put("/admin/controller", json={"controller": text, "checkpoint": "night-run"})
        assert engine_client.controller == f"{expected}{folder / 'night-run'}"
        shown = reply.json()["controller"]
        assert shown == f"{expected}night-run"  # no folders go out
        for again in (shown, shown.replace("path=", "checkpoint=")):
            engine_client.controller = "none"
            assert client.put("/admin/controller", json={"controller": again}).json()["controller"] == shown
            assert engine_client.controller == f"{expected}{folder / 'night-run'}"
        assert str(folder) not in client.get("/admin/controller").text


@pytest.mark.parametrize(
    "choice",
    [
        {"controller": "ppo:path=/etc"},
        {"controller": "ppo:path=../night-run"},
        {"controller": "ppo:path=night-run,path=night-run"},
        {"controller": "ppo:path=night-run", "checkpoint": "night-run"},
        {"controller": "echo:path=night-run"},
        {"controller": "ppo:path=1"},
        {"controller": "echo:profile=/etc/passwd"},
        {"controller": "echo:calibration=x"},
        {"controller": "ppo:deterministic=maybe"},
        {"controller": "oracle"},
        {"controller": "nonsense"},
        {"controller": "echo:x"},
        {"controller": ":"},
        {"controller": ""},
        {"controller": "ppo", "checkpoint": "../night-run"},
        {"controller": "ppo", "checkpoint": "/etc"},
        {"controller": "ppo", "checkpoint": "drafter"},
        {"controller": "ppo", "checkpoint": "."},
        {"controller": "ppo", "checkpoint": "empty"},
        {"controller": "echo", "checkpoint": "night-run"},
        {"checkpoint": "night-run"},
        {"controller": "static:depth=NaN"},  # refused by the engine's core
    ],
)
def test_what_is_not_offered_changes_nothing(client, engine_client, choice):
    reply = client.put("/admin/controller", json=choice)
    assert reply.status_code == 400 and "error" in reply.json()
    assert engine_client.controller == "echo"


def test_a_folder_that_would_break_a_spec_is_refused(tmp_path):
    shutil.copytree(shipped(), tmp_path / "a,seed=1")
    with pytest.raises(ValueError, match="rename it"):
        ControllerCatalog(tmp_path, "echo").spec("ppo", "a,seed=1")


def test_a_folder_of_checkpoints_that_is_gone_offers_none(tmp_path):
    assert ControllerCatalog(tmp_path / "gone", "echo").policies() == ()


@pytest.mark.parametrize(
    ("first", "shown"),
    [
        ("echo:profile=cal/p.json,calibration=cal/gates.json", "echo:profile=p.json,calibration=gates.json"),
        ("ppo:path=/models/night-run", "ppo:path=night-run"),
    ],
)
def test_the_servers_first_controller_is_put_back_as_it_is_shown(engine_client, folder, first, shown):
    engine_client.controller = first
    with client_of(make_app(engine_client, checkpoints=folder)) as client:
        assert client.get("/admin/controller").json()["controller"] == shown
        client.put("/admin/controller", json={"controller": "none"})
        assert client.put("/admin/controller", json={"controller": shown}).json()["controller"] == shown
    assert engine_client.controller == first


def test_a_checkpoint_that_looks_like_the_first_policy_is_that_one_or_refused(folder, monkeypatch):
    assert ControllerCatalog(folder, "ppo:path=/models/night-run").spec("ppo:seed=3", "night-run").endswith("night-run")
    with pytest.raises(ValueError, match="rename its folder"):
        ControllerCatalog(folder, "ppo:path=/models/night-run").spec("ppo", "night-run")
    monkeypatch.chdir(folder)
    assert ControllerCatalog(folder, "ppo:path=night-run").spec("ppo", "night-run") == "ppo:path=night-run"


def test_specs_without_folders():
    assert public_spec("ppo:path=/a/b/c,seed=1") == "ppo:path=c,seed=1"
    assert public_spec("echo") == "echo" and public_spec("echo:width=2") == "echo:width=2"


def test_an_experiment_from_start_to_stop(client, engine_client):
    assert client.get("/admin/ab").json() == {"state": "none", "value": {}}
    body = {"control": "none", "treatment": {"controller": "ppo", "checkpoint": "night-run"}, "blocks": 4}
    started = client.post("/admin/ab", json=body).json()
    assert started["state"] == "running" and started["value"]["blocks"] == 4
    assert engine_client.experiment.value["treatment"].startswith("ppo:path=")
    for shown in (started, client.get("/admin/ab").json()):
        assert shown["value"]["treatment"] == "ppo:path=night-run", "a folder went out"
    again = client.post("/admin/ab", json=body)
    assert again.status_code == 409
    assert client.delete("/admin/ab").json()["state"] == "stopped"
    assert client.delete("/admin/ab").json()["state"] == "stopped"  # nothing runs, nothing happens


@pytest.mark.parametrize(
    "change", [{"blocks": 0}, {"block_seconds": 0}, {"harm": 2}, {"control": "ppo:path=x"}, {"treatment": None}]
)
def test_bad_experiments(client, engine_client, change):
    reply = client.post("/admin/ab", json={"control": "none", "treatment": "echo", **change})
    assert reply.status_code == 400 and engine_client.experiment is None


def test_no_foreign_page_can_start_one(client, engine_client):
    """A browser sends a plain-text body without asking first; only JSON is read."""
    text = json.dumps({"control": "none", "treatment": "echo"})
    reply = client.post("/admin/ab", content=text, headers={"Content-Type": "text/plain"})
    assert reply.status_code == 400 and engine_client.experiment is None


def test_stats(client, engine_client):
    engine_client.restarts, engine_client.fallbacks, engine_client.rollbacks = 2, {"nan": 3}, 1
    stats = client.get("/admin/stats").json()
    assert stats["restarts"] == 2 and stats["fallbacks"] == {"nan": 3} and stats["core"] == {"running": 0}
    assert stats["environment"] == {"model": "fake"} and stats["admitted"] == 0
    assert stats["rollbacks"] == 1 and stats["serving"] == {"device": 4}


def test_what_the_core_holds_names_no_folder(client, engine_client):
    experiment = {"control": "none", "treatment": "ppo:path=/a/b/night"}

    async def inspect():
        return {"controller": "ppo:path=/a/b/night", "previous": "ppo:seed=1,path=/a/b/day", "experiment": experiment}

    engine_client.inspect = inspect
    core = client.get("/admin/stats").json()["core"]
    assert (core["controller"], core["previous"]) == ("ppo:path=night", "ppo:seed=1,path=day")
    assert core["experiment"]["treatment"] == "ppo:path=night"


def test_while_the_engine_loads(client, engine_client):
    engine_client.ready = False
    assert client.put("/admin/controller", json={"controller": "none"}).status_code == 503
    assert client.post("/admin/ab", json={"control": "none", "treatment": "echo"}).status_code == 503
    assert client.get("/admin/stats").json()["core"] == {}
