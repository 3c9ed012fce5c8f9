"""The live view's data: frames, streams, tokens. No browser."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_rl.contracts import RequestTree
from echo_rl.server import ui
from echo_rl.server.api.auth import Keys
from echo_rl.server.messages import ExperimentReport, Ready
from echo_rl.server.ui import feed, stream
from echo_rl.server.ui.feed import COUNTERS, MOST_TREES, Feed, add_ragged, encode
from echo_rl.server.ui.sessions import MOST_SESSIONS, SESSION_SECONDS, Sessions
from echo_rl.server.ui.stream import Viewers
from tests.conftest import FakeClock, FakeTokenizer
from tests.server.engine_clients import tiny_client
from tests.server.front_world import changed, client_of, listening, make_app, serving, stats, wait_until
from tests.server.live_world import LiveWorld, LiveWorldClient

COUNT = st.integers(0, 50)


# ----------------------------------------------------------------------------- frames


def frames_of(steps, cuts):
    """The frames that a feed makes of the steps when it is emptied after each cut."""
    found, gathering = [], Feed()
    for i, step in enumerate(steps):
        gathering.add(step)
        if i in cuts:
            found.append(gathering.take()[0][1])
    return [*found, gathering.take()[0][1]]


@given(st.integers(0, 1000), st.integers(1, 40), st.sets(st.integers(0, 40)))
def test_frames_lose_and_repeat_nothing(seed, count, cuts):
    world = LiveWorld(requests=1 + seed % 9, seed=seed, controller="none" if seed % 5 == 0 else "echo")
    steps = [world.step() for _ in range(count)]
    frames = [frame for frame in frames_of(steps, cuts) if frame["steps"]]
    assert sum(frame["steps"] for frame in frames) == count
    for name in COUNTERS:
        assert sum(frame[name] for frame in frames) == sum(getattr(stats.step, name) for stats in steps)
    for name, total in (("requests", "batch"), ("committed", "committed")):
        assert sum(frame[name] for frame in frames) == sum(getattr(stats, total) for stats in steps)
    reached = accepted = ()
    for frame in frames:
        reached = add_ragged(reached, frame["reached_by_depth"])
        accepted = add_ragged(accepted, frame["accepted_by_depth"])
    assert sum(accepted) == sum(stats.step.accepted for stats in steps)
    assert sum(reached) == sum(sum(stats.step.reached_by_depth) for stats in steps)
    spent = sum(sum(frame["times"].values()) for frame in frames)
    assert spent == pytest.approx(sum(stats.step.seconds for stats in steps))


def test_a_frame_shows_the_latest_state_and_the_last_step_that_decoded():
    world = LiveWorld(requests=3)
    first, second = world.step(), world.step()
    prefill = changed(second, end=second.step.end + 1, batch_size=0, running=1, verified=0, trees=(), controller="none")
    gathering = Feed()
    for step in (first, second, prefill):
        gathering.add(step)
    (name, frame), *others = gathering.take()
    assert (name, others) == ("steps", [])
    assert (frame["time"], frame["batch"], frame["running"], frame["controller"]) == (prefill.step.end, 0, 1, "none")
    assert frame["step"]["time"] == second.step.end
    assert [tree["id"] for tree in frame["step"]["trees"]] == [tree.id for tree in second.trees]
    assert frame["step"]["trees"][0]["parents"] == second.trees[0].parents


def test_knees_that_are_not_known_do_not_count():
    assert frames_of([stats(knee=0), stats(knee=10), stats(knee=20)], set())[0]["knee"] == 15
    assert frames_of([stats(knee=0)], set())[0]["knee"] is None


def test_a_feed_without_steps_says_so():
    gathering = Feed()
    gathering.add(stats())
    gathering.take()
    assert gathering.take() == [("steps", {"steps": 0})]


def test_only_the_newest_report_of_an_experiment_is_told_and_only_once():
    gathering = Feed()
    for blocks in (1, 2):
        gathering.add(ExperimentReport("running", {"blocks": blocks}))
    assert gathering.take()[1:] == [("experiment", {"state": "running", "blocks": 2})]
    assert gathering.take()[1:] == []


def test_folders_of_policies_are_not_told():
    gathering = Feed()
    gathering.add(stats(controller="ppo:path=/home/someone/night"))
    gathering.add(ExperimentReport("done", {"control": "none", "treatment": "ppo:path=/home/someone/night"}))
    said = b"".join(map(encode, gathering.take()))
    assert b"night" in said and b"someone" not in said


def test_a_frame_holds_no_more_trees_than_the_page_shows():
    trees = tuple(RequestTree(str(i), (-1,), (0,), (), 1) for i in range(MOST_TREES + 5))
    frame = frames_of([stats(batch_size=len(trees), trees=trees)], set())[0]
    assert [tree["id"] for tree in frame["step"]["trees"]] == [str(i) for i in range(MOST_TREES)]


@given(st.lists(COUNT), st.lists(COUNT))
def test_ragged_sums(left, right):
    total = add_ragged(tuple(left), tuple(right))
    assert len(total) == max(len(left), len(right)) and sum(total) == sum(left) + sum(right)


def test_events_are_valid_json_whatever_the_numbers():
    data = {"a": float("nan"), "b": [float("inf"), 1.5, ("x\ny", None, True)]}
    name, text = encode(("steps", data)).decode().removesuffix("\n\n").split("\n")
    assert name == "event: steps"
    assert json.loads(text.removeprefix("data: ")) == {"a": None, "b": [None, 1.5, ["x\ny", None, True]]}


# ----------------------------------------------------------------------------- tokens


def test_a_token_opens_once_and_for_a_minute():
    clock = FakeClock()
    sessions = Sessions(clock)
    first, second = sessions.issue(), sessions.issue()
    assert first != second and len(first) >= 32
    assert sessions.redeem(first) and not sessions.redeem(first)
    clock.now += SESSION_SECONDS
    assert not sessions.redeem(second)
    assert not sessions.redeem("")


def test_unused_tokens_do_not_pile_up():
    sessions = Sessions(FakeClock())
    tokens = [sessions.issue() for _ in range(MOST_SESSIONS + 1)]
    assert [sessions.redeem(token) for token in tokens] == [False] + [True] * MOST_SESSIONS


# ----------------------------------------------------------------------------- streams


async def received(viewers: Viewers, events: int) -> tuple[list[str], list[dict]]:
    """Names and data of a stream's first events; the viewer leaves after them."""
    names, data = [], []
    source = viewers.stream()
    async for chunk in source:
        name, text = chunk.decode().split("\n", 1)
        names.append(name.removeprefix("event: "))
        data.append(json.loads(text.removeprefix("data: ")))
        if len(names) == events:
            break
    await source.aclose()
    await asyncio.sleep(0)
    return names, data


def test_trees_are_asked_for_from_the_first_viewer_to_the_last():
    engine_client = LiveWorldClient()

    async def scene():
        viewers = Viewers(engine_client)
        one, two = asyncio.create_task(received(viewers, 2)), asyncio.create_task(received(viewers, 4))
        await one
        assert engine_client.traced == [True] and viewers.count == 1
        await two
        assert engine_client.traced == [True, False] and viewers.count == 0
        await received(viewers, 1)
        assert engine_client.traced == [True, False] * 2

    asyncio.run(scene())


def test_a_viewer_that_is_cut_off_leaves_nothing_behind():
    engine_client = LiveWorldClient()

    async def scene():
        viewers = Viewers(engine_client)
        task = asyncio.create_task(received(viewers, 1000))
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert viewers.count == 0 and engine_client.traced == [True, False]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scene())


def test_a_stream_greets_and_then_sends_at_most_ten_frames_a_second():
    engine_client = LiveWorldClient()

    async def scene():
        start = time.monotonic()
        names, data = await received(Viewers(engine_client), 6)
        assert names == ["hello", *["steps"] * 5]
        assert time.monotonic() - start > 4 * stream.FRAME_SECONDS
        assert data[0]["environment"]["model"] == "smollm2" and data[0]["experiment"] is None
        times = [frame["time"] for frame in data[1:]]
        assert times == sorted(set(times))
        assert data[1]["in_flight"] == engine_client.in_flight

    asyncio.run(scene())


def test_fallbacks_are_those_over_all_restarts():
    engine_client = LiveWorldClient()
    engine_client.restarts, engine_client.fallbacks = (
        1,
        {"nan": 20},
    )  # its steps tell those of the core of the moment: none
    _, data = asyncio.run(received(Viewers(engine_client), 3))
    assert [event["fallbacks"] for event in data] == [{"nan": 20}] * 3


def test_an_idle_server_still_gives_signs_of_life(monkeypatch):
    monkeypatch.setattr(stream, "IDLE_SECONDS", 0.02)
    engine_client = LiveWorldClient()
    engine_client.idle = True
    _, (_, first, second) = asyncio.run(received(Viewers(engine_client), 3))
    assert first["steps"] == second["steps"] == 0
    assert second["time"] > first["time"] == pytest.approx(time.time(), abs=60)


def test_a_stream_ends_with_its_host():
    engine_client = LiveWorldClient()

    async def scene():
        source = Viewers(engine_client).stream()
        await anext(source)
        engine_client.alive = False
        async with asyncio.timeout(5):
            async for _ in source:
                pass

    asyncio.run(scene())


# ----------------------------------------------------------------------------- HTTP


@pytest.fixture
def client():
    with client_of(make_app(LiveWorldClient(), Keys(admin=b"k"))) as client:
        yield client


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(client):
    page = client.get("/ui")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for name in (path.name for path in (Path(ui.__file__).parent / "static").iterdir()):
        asset = client.get(f"/ui/static/{name}")
        assert asset.status_code == 200 and asset.content
        text = asset.text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, name
    for inline in ("<style", " style=", "javascript:", " onclick="):
        assert inline not in page.text
    assert page.text.count("<script") == page.text.count('<script type="module" src="ui/static/')


def test_browsers_that_have_a_file_are_told_so(client):
    tag = client.get("/ui").headers["etag"]
    again = client.get("/ui", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2f__init__.py", "%2e%2e/feed.py"])
def test_no_other_file_is_served(client, name):
    assert client.get(f"/ui/static/{name}").status_code == 404


def test_data_needs_the_key(client):
    right, wrong = {"Authorization": "Bearer k"}, {"Authorization": "Bearer x"}
    for headers in ({}, wrong):
        assert client.post("/ui/session", headers=headers).status_code == 401
        assert client.get("/ui/events", headers=headers).status_code == 401
    assert client.get("/ui/stream").status_code == 401
    assert client.get("/ui/stream?token=guess").status_code == 401
    session = client.post("/ui/session", headers=right)
    assert session.json()["expires_in"] == SESSION_SECONDS and session.json()["ready"] is True
    assert session.headers["cache-control"] == "no-store"


def test_the_view_stays_out_of_the_schema(client):
    assert not [path for path in client.get("/openapi.json").json()["paths"] if path.startswith("/ui")]


def test_a_stream_over_http():
    engine_client = LiveWorldClient()
    with listening(make_app(engine_client, Keys(admin=b"k"))) as url, httpx.Client(base_url=url) as client:
        key = {"Authorization": "Bearer k"}
        path = "/ui/stream?token=" + client.post("/ui/session", headers=key).json()["token"]
        for target, headers in ((path, {}), ("/ui/events", key)):
            with client.stream("GET", target, headers=headers) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                lines = answer.iter_lines()
                assert next(lines) == "event: hello"
                assert any(line == "event: steps" for line in lines)
            wait_until(lambda: engine_client.traced and not engine_client.traced[-1])
        assert client.get(path).status_code == 401  # used up


def test_a_real_engine_is_watched(tmp_path):
    """Trees of a served request reach the viewer, and add up to what the step verified."""
    with (
        serving(partial(tiny_client, tmp_path, controller="chain:steps=2"), FakeTokenizer()) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        wait_until(lambda: client.get("/health/ready").status_code == 200, 60)
        with client.stream("GET", "/ui/events") as answer, ThreadPoolExecutor(1) as pool:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))
            assert json.loads(next(lines))["controller"] == "chain:steps=2"
            body = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 200, "temperature": 0}
            asked = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=30)
            shown = (json.loads(line) for line in lines)
            frame = next(f for f in shown if f.get("step") and f["step"]["trees"])
            assert asked.result().status_code == 200
    step = frame["step"]
    assert sum(len(tree["parents"]) for tree in step["trees"]) == step["verified"]
    assert sum(len(tree["accepted"]) for tree in step["trees"]) == step["accepted"]
    assert frame["committed"] >= frame["requests"] > 0


def test_who_comes_too_early_or_too_late_is_told():
    engine_client = LiveWorldClient()
    engine_client.ready, engine_client.ready_info = False, Ready("echo", 1, 1)
    with client_of(make_app(engine_client)) as client:
        early = client.get("/ui/events")
        assert early.status_code == 503 and early.headers["retry-after"]
        assert client.post("/ui/session").json()["ready"] is False


def test_viewers_are_bounded(monkeypatch):
    monkeypatch.setattr(stream, "MOST_VIEWERS", 0)
    with client_of(make_app(LiveWorldClient())) as client:
        assert client.get("/ui/events").status_code == 503


def test_phases_of_a_frame_are_those_of_a_step():
    assert set(feed.phases(SimpleNamespace(**dict.fromkeys(feed.PHASES, 1.0)))) == set(feed.PHASES)
    script = client_script("charts.js")
    for phase in (*feed.PHASES, "other"):
        assert f'"{phase}"' in script


def client_script(name: str) -> str:
    with client_of(make_app(LiveWorldClient())) as client:
        return client.get(f"/ui/static/{name}").text
