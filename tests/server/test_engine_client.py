"""The engine client: requests, controllers, updates, draining, and an engine that exits, hangs or doesn't load."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import pytest

from echo_rl.errors import ConfigError, EchoError, RequestError
from echo_rl.server.client.engine_client import EngineClient, SupervisorConfig, Unavailable
from echo_rl.server.client.streams import SLOW_READER, Inbox
from echo_rl.server.client.supervisor import WORKERS
from echo_rl.server.config import ControllerManagerOptions, ExperimentOptions
from echo_rl.server.core.worker import ThreadWorker
from echo_rl.server.ipc import ClientChannel, CoreChannel
from echo_rl.server.messages import ExperimentReport, Stepped, StepStats
from tests.server.engine_clients import collect, fake_client, request_of, running, serve_fake, tiny_client, until
from tests.server.front_world import stats

QUICK = {"backoff": 0.01, "stop_seconds": 5.0}


def text_of(outputs) -> str:
    return "".join(output.text for output in outputs)


# ----------------------------------------------------------------------------- requests


def test_many_requests_at_once_get_their_own_outputs():
    async def main():
        async with running(fake_client()) as client:
            assert client.ready and client.alive and client.ready_info.max_context == 2048
            outputs = await asyncio.gather(
                *(collect(client, request_of("x" * n, max_new_tokens=n)) for n in range(1, 30))
            )
            for n, parts in enumerate(outputs, 1):
                assert text_of(parts) == "".join(chr(ord("a") + (n + i) % 26) for i in range(n))
                assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
            assert client.in_flight == 0
            assert (await client.inspect())["in_flight"] == 0
        assert not client.alive

    asyncio.run(main())


def test_several_requests_are_one_stream_that_ends_with_the_last():
    async def main():
        async with running(fake_client()) as client:
            stream = client.submit(*(request_of("x" * n, str(n), max_new_tokens=10 * n) for n in range(1, 5)))
            taken = []
            while outputs := await stream.take():
                taken += outputs
            for n in range(1, 5):
                parts = [output for output in taken if output.id == str(n)]
                assert text_of(parts) == "".join(chr(ord("a") + (n + i) % 26) for i in range(10 * n))
            assert await stream.take() == [] and client.in_flight == 0

            with pytest.raises(RequestError, match="twice"):
                client.submit(request_of("abc", "twice"), request_of("abcd", "twice"))
            async with aclosing(client.submit(request_of("a", "short", 1), request_of("b", "long", 10**6))) as stream:
                while not any(output.finish_reason for output in await stream.take()):
                    pass
                assert client.in_flight == 1
            await until(lambda: client.in_flight == 0)
            assert (await client.inspect())["in_flight"] == 0

    asyncio.run(main())


def test_one_refusal_among_several_is_raised():
    async def main():
        async with running(fake_client()) as client:
            with pytest.raises(RequestError, match="'!'"):
                async with aclosing(client.submit(request_of("abc", "a", 10**6), request_of("abc!", "b"))) as stream:
                    async for _ in stream:
                        pass
            assert client.in_flight == 0
            assert (await client.inspect())["in_flight"] == 0

    asyncio.run(main())


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_only_a_process_of_the_engine_freezes_its_heap(isolation):
    async def main():
        client = EngineClient(SupervisorConfig("none", isolation, **QUICK), serve_counting_frozen)
        async with running(client):
            await collect(client, request_of("abc"))
            assert (client.serving["frozen"] > 10_000) is (isolation == "process")

    asyncio.run(main())


def serve_counting_frozen(switch: ControllerManagerOptions):
    served = serve_fake(switch)
    return replace(served, options=replace(served.options, serving_counts=lambda: {"frozen": gc.get_freeze_count()}))


def test_a_refused_request_raises_and_an_id_in_use_does_so_at_once():
    async def main():
        async with running(fake_client()) as client:
            with pytest.raises(RequestError, match="take it out"):
                await collect(client, request_of("a!"))
            async with aclosing(client.submit(request_of("abc", "x", max_new_tokens=1000))):
                with pytest.raises(RequestError, match="in use"):
                    client.submit(request_of("abc", "x"))
            assert client.in_flight == 0

    asyncio.run(main())


async def _close(stream, reader):
    await anext(stream)
    await stream.aclose()


async def _cancel_reader(stream, reader):
    task = asyncio.create_task(reader(stream))
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _never_read(stream, reader):
    await stream.aclose()


@pytest.mark.parametrize("leave", [_close, _cancel_reader, _never_read])
def test_whoever_stops_reading_cancels_the_request(leave):
    async def reader(stream):
        async for _ in stream:
            pass

    async def main():
        async with running(fake_client()) as client:
            stream = client.submit(request_of("abc", max_new_tokens=10**6))
            await leave(stream, reader)
            assert client.in_flight == 0
            assert (await client.inspect())["in_flight"] == 0
            assert len(await collect(client, request_of("abc"))) == 8, "the others go on"

    asyncio.run(main())


def test_twenty_swaps_over_the_channel_change_no_token(tmp_path):
    async def main():
        async with running(
            tiny_client(tmp_path, command_seconds=30.0, switch=ControllerManagerOptions(deadline=5.0))
        ) as client:
            asked = [request_of("some prompt " + str(n), f"p{n}", 60, ignore_eos=True) for n in range(12)]
            plain = asyncio.gather(*(collect(client, request) for request in asked))
            await client.set_controller("none")
            expected = [text_of(parts) for parts in await plain]
            swaps = 0
            going = True

            async def serve_on():
                rounds = 0
                while going:
                    got = await asyncio.gather(*(collect(client, request) for request in asked))
                    assert [text_of(parts) for parts in got] == expected
                    rounds += 1
                return rounds

            serving = asyncio.create_task(serve_on())
            for spec in ("echo", "ppo", "chain", "none", "eagle3") * 4:
                await client.set_controller(spec)
                assert client.controller == spec
                assert (await client.inspect())["kv"] == "conserved"
                swaps += 1
                await asyncio.sleep(0.02)
            going = False
            assert await serving >= 1
            assert (await client.inspect())["swaps"] == swaps + 1 == 21
            assert client.in_flight == 0

    asyncio.run(main())


# ----------------------------------------------------------------------------- controllers and news


def test_a_bad_controller_is_refused_with_the_reason_and_the_old_one_stays():
    async def main():
        async with running(fake_client()) as client:
            with pytest.raises(ConfigError, match="did you mean 'echo'"):
                await client.set_controller("ecko")
            assert client.controller == "none"
            assert (await client.set_controller("chain:steps=2"))["previous"] == "none"
            assert client.controller == "chain:steps=2"

    asyncio.run(main())


def test_an_experiment_reports_to_subscribers_and_its_control_stays():
    async def main():
        async with running(fake_client(switch=ControllerManagerOptions(deadline=5.0))) as client:
            news = client.subscribe()
            stream = client.submit(request_of("abc", max_new_tokens=10**6))
            await client.start_experiment(
                ExperimentOptions("chain:steps=2", "none", block_seconds=0.01, blocks=3, harm=0.0)
            )
            assert client.experiment.state == "running" and client.controller == "chain:steps=2"
            with pytest.raises(ConfigError, match="is running"):
                await client.start_experiment(ExperimentOptions("none", "none"))
            with pytest.raises(ConfigError, match="is running"):
                await client.set_controller("echo")
            await until(lambda: client.experiment.state == "done")
            await stream.aclose()
            assert client.controller == "chain:steps=2"
            states, arms = [], set()
            while "done" not in states:
                item = await anext(news)
                states += [item.state] if isinstance(item, ExperimentReport) else []
                arms |= {item.controller} if isinstance(item, StepStats) else set()
            assert states == ["running"] * 6 + ["done"] and arms >= {"none", "chain:steps=2"}
            with pytest.raises(ConfigError, match="no experiment"):
                await client.stop_experiment()

    asyncio.run(main())


def test_callbacks_see_every_step_and_a_failing_one_harms_nobody(caplog):
    async def main():
        seen = []
        async with running(fake_client()) as client:
            client.on_stats(lambda stats: 1 / 0)
            client.on_stats(seen.append)
            assert len(await collect(client, request_of("abc", max_new_tokens=9))) == 9
            assert len(seen) == 9 and all(isinstance(stats, StepStats) for stats in seen)

    asyncio.run(main())
    assert "a callback on steps failed" in caplog.text


def test_a_slow_subscriber_misses_the_oldest_and_all_end_with_the_client():
    async def main():
        async with running(fake_client(step_seconds=0.0)) as client:
            slow = client.subscribe()
            await collect(client, request_of("abc", max_new_tokens=SLOW_READER + 50))
        rest = [item async for item in slow]
        assert len(rest) == SLOW_READER
        assert rest[-1].committed == 1

    asyncio.run(main())


def test_an_inbox_gives_what_it_has_and_then_ends():
    async def main():
        inbox = Inbox()
        reader = asyncio.ensure_future(anext(inbox))
        await asyncio.sleep(0)
        inbox.put(1)
        inbox.put(2)
        inbox.end()
        assert [await reader, await anext(inbox)] == [1, 2]
        with pytest.raises(StopAsyncIteration):
            await anext(inbox)

    asyncio.run(main())


def test_trees_are_watched_over_a_restart(tmp_path):
    async def main():
        async with running(tiny_client(tmp_path, controller="chain:steps=2", **QUICK)) as client:
            trees = []
            client.on_stats(lambda stats: trees.append(len(stats.trees)))
            await collect(client, request_of("abc", "a", 20, ignore_eos=True))
            assert not any(trees)
            client.trace_trees(True)
            await collect(client, request_of("abc", "b", 20, ignore_eos=True))
            assert trees[-1] == 1
            client._channel.close()
            await until(lambda: client.restarts == 1)
            await collect(client, request_of("abc", "c", 20, ignore_eos=True))
            assert trees[-1] == 1

    asyncio.run(main())


# ----------------------------------------------------------------------------- draining


def test_draining_waits_for_what_is_in_flight_and_then_cancels_the_rest():
    async def main():
        async with running(fake_client()) as client:
            short = asyncio.create_task(collect(client, request_of("abc", "short", max_new_tokens=20)))
            long = asyncio.create_task(collect(client, request_of("abc", "long", max_new_tokens=10**6)))
            await asyncio.sleep(0.01)
            draining = asyncio.create_task(client.drain(0.5))
            await asyncio.sleep(0.01)
            assert not client.ready and client.alive
            with pytest.raises(Unavailable, match="shutting down"):
                client.submit(request_of("abc", "late"))
            await draining
            assert (await short)[-1].finish_reason == "length"
            assert (await long)[-1].finish_reason == "cancelled"
            assert client.in_flight == 0 and (await client.inspect())["in_flight"] == 0

    asyncio.run(main())


def test_stopping_ends_streams_and_commands():
    async def main():
        client = fake_client()
        await client.start()
        reading = asyncio.create_task(collect(client, request_of("abc", max_new_tokens=10**6)))
        await asyncio.sleep(0.02)
        await client.stop()
        assert (await reading)[-1].finish_reason == "error"
        with pytest.raises(Unavailable):
            await client.inspect()
        with pytest.raises(Unavailable):
            client.submit(request_of("abc"))

    asyncio.run(main())


# ----------------------------------------------------------------------------- exits


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_an_exit_ends_everybody_with_an_error_and_the_engine_comes_back(isolation):
    async def main():
        config = {"isolation": isolation, "switch": ControllerManagerOptions(trial_steps=5, deadline=5.0), **QUICK}
        async with running(fake_client(**config)) as client:
            await client.set_controller("chain:steps=2")
            await collect(client, request_of("abc", max_new_tokens=40))
            healthy = asyncio.create_task(collect(client, request_of("abc", "healthy", max_new_tokens=10**6)))
            await asyncio.sleep(0.05)
            poison = (await collect(client, request_of("#")))[-1]
            assert (poison.finish_reason, poison.tokens) == ("error", ())
            assert "ZeroDivisionError" in poison.error
            assert (await healthy)[-1].finish_reason == "error"
            await until(lambda: client.restarts == 1 and client.ready, 60.0)
            assert client.controller == "chain:steps=2", "it had served its trial"
            assert len(await collect(client, request_of("abc"))) > 1

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_is_replaced(number):
    async def main():
        async with running(fake_client(isolation="process", **QUICK)) as client:
            reading = asyncio.create_task(collect(client, request_of("abc", max_new_tokens=10**6)))
            asking = asyncio.create_task(client.set_controller("chain"))
            await asyncio.sleep(0.0)
            os.kill(client._supervisor.worker.pid, number)
            last = (await reading)[-1]
            assert (last.finish_reason, last.error) == (
                "error",
                f"the engine died: the engine process was killed by {number.name}",
            )
            with contextlib.suppress(Unavailable):
                await asking
            await until(lambda: client.restarts == 1 and client.ready, 60.0)
            assert len(await collect(client, request_of("abc"))) > 1

    asyncio.run(main())


def test_signals_to_the_whole_group_do_not_end_the_engine():
    async def main():
        async with running(fake_client(isolation="process", **QUICK)) as client:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(client._supervisor.worker.pid, number)
            assert len(await collect(client, request_of("abc", max_new_tokens=20))) == 20
            assert client.restarts == 0

    asyncio.run(main())


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_hang_counts_as_an_exit(isolation):
    async def main():
        async with running(fake_client(isolation=isolation, stall_seconds=0.5, **QUICK)) as client:
            healthy = asyncio.create_task(collect(client, request_of("abc", "healthy", max_new_tokens=10**6)))
            await asyncio.sleep(0.05)
            last = (await collect(client, request_of("~")))[-1]
            assert last.finish_reason == "error" and "no step for" in last.error
            assert (await healthy)[-1].finish_reason == "error"
            await until(lambda: client.ready, 60.0)
            assert len(await collect(client, request_of("abc"))) > 1
            assert client.restarts == 1

    asyncio.run(main())


def test_an_idle_engine_does_not_count_as_hung():
    async def main():
        async with running(fake_client(stall_seconds=0.1, **QUICK)) as client:
            await asyncio.sleep(0.4)
            assert len(await collect(client, request_of("abc"))) == 8
            assert client.restarts == 0

    asyncio.run(main())


def test_an_engine_that_keeps_dying_is_given_up():
    async def main():
        async with running(fake_client(most_restarts=2, **QUICK)) as client:
            for attempt in range(3):
                await until(lambda: client.ready)
                assert (await collect(client, request_of("#", f"r{attempt}")))[-1].finish_reason == "error"
            await until(lambda: not client.alive)
            assert client.restarts == 2 and not client.ready
            with pytest.raises(Unavailable):
                client.submit(request_of("abc"))

    asyncio.run(main())


def test_a_restart_that_cannot_spawn_is_tried_again(monkeypatch):
    left = []

    class Refused(ThreadWorker):
        def __init__(self, sock, *more):
            if len(left) < 2:
                left.append(sock)
                raise OSError(errno.EAGAIN, "no more processes")
            super().__init__(sock, *more)

    async def main():
        async with running(fake_client(**QUICK)) as client:
            monkeypatch.setitem(WORKERS, "thread", Refused)
            await collect(client, request_of("#"))
            await until(lambda: client.restarts == 1 and client.ready)
            assert len(await collect(client, request_of("abc"))) == 8
            assert [sock.fileno() for sock in left] == [-1, -1]

    asyncio.run(main())


def test_a_restart_that_can_never_spawn_is_given_up(monkeypatch):
    def full():
        raise OSError(errno.EMFILE, "too many open files")

    async def main():
        async with running(fake_client(most_restarts=2, **QUICK)) as client:
            monkeypatch.setattr(socket, "socketpair", full)
            await collect(client, request_of("#"))
            await until(lambda: not client.alive)

    asyncio.run(main())


def test_a_controller_that_has_not_served_its_trial_does_not_survive_an_exit():
    async def main():
        async with running(fake_client(**QUICK)) as client:
            await client.set_controller("chain")
            await collect(client, request_of("abc"))
            await collect(client, request_of("#"))
            await until(lambda: client.restarts == 1 and client.ready)
            assert client.controller == "none"

    asyncio.run(main())


def test_an_exit_ends_the_experiment():
    async def main():
        async with running(fake_client(**QUICK)) as client:
            await client.start_experiment(ExperimentOptions("chain", "none", block_seconds=100.0))
            await collect(client, request_of("#"))
            await until(lambda: client.restarts == 1 and client.ready)
            assert client.experiment.state == "stopped" and "the engine died" in client.experiment.value["reason"]
            assert client.controller == "none", "the control had not served its trial"

    asyncio.run(main())


def test_a_control_serves_its_trial_like_any_other_controller():
    async def main():
        async with running(
            fake_client(switch=ControllerManagerOptions(trial_steps=5, deadline=5.0), **QUICK)
        ) as client:
            await client.start_experiment(ExperimentOptions("chain", "none", block_seconds=100.0))
            await client.stop_experiment()
            assert client.controller == "chain"
            await collect(client, request_of("abc", max_new_tokens=40))
            await collect(client, request_of("#"))
            await until(lambda: client.restarts == 1 and client.ready)
            assert client.controller == "chain"

    asyncio.run(main())


def test_a_report_tells_who_decides_after_a_control_that_failed():
    async def main():
        async with running(fake_client()) as client:
            client.on_event(ExperimentReport("running", {"controller": "bad"}))
            assert client.controller == "bad"
            client.on_event(ExperimentReport("stopped", {"controller": "none"}))
            assert client.controller == "none"

    asyncio.run(main())


def test_what_a_core_counts_lasts_over_restarts():
    async def main():
        async with running(fake_client(**QUICK)) as client:
            client.on_event(Stepped((), stats(fallbacks={"nan": 3}, rollbacks=2, serving={"device": 5})))
            await collect(client, request_of("#"))
            await until(lambda: client.restarts == 1 and client.ready)
            await collect(client, request_of("abc"))
            assert (client.fallbacks["nan"], client.rollbacks, client.serving) == (3, 2, {"device": 5})

    asyncio.run(main())


@pytest.mark.parametrize("step", ["eager", "device"])
def test_how_steps_were_served_is_counted_where_the_engine_counts_it(tmp_path, step):
    async def main():
        async with running(tiny_client(tmp_path, {"step": step}, controller="none")) as client:
            steps = []
            client.on_stats(steps.append)
            await collect(client, request_of("abc", max_new_tokens=4))
            assert client.serving.get("device", 0) == (len(steps) if step == "device" else 0)
            assert (client.serving.get("graphs:plain", 0) > 0) == (step == "device")

    asyncio.run(main())


# ----------------------------------------------------------------------------- loading


def _no_weights(switch):
    raise EchoError("the weights are missing; fetch them")


def _slow(switch):
    time.sleep(3.0)
    return serve_fake(switch)


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_an_engine_that_does_not_load_says_why(isolation):
    async def main():
        client = EngineClient(SupervisorConfig("none", isolation), _no_weights)
        with pytest.raises(EchoError, match="the weights are missing; fetch them"):
            await client.start()
        assert not client.alive
        client = EngineClient(SupervisorConfig("nonsense", isolation), serve_fake)
        with pytest.raises(EchoError, match="no controller is called 'nonsense'"):
            await client.start()

    asyncio.run(main())


def test_an_engine_that_loads_for_ever_is_given_up():
    async def main():
        client = EngineClient(SupervisorConfig("none", "thread", start_seconds=0.1), _slow)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="not loaded within"):
            await client.start()
        assert time.monotonic() - began < 2.9

    asyncio.run(main())


def test_isolation_is_one_of_two():
    with pytest.raises(ConfigError, match="process, thread"):
        SupervisorConfig(isolation="docker")


def test_the_front_loads_no_torch():
    code = "import sys, echo_rl.server.client.engine_client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ----------------------------------------------------------------------------- the channel


def test_frames_survive_any_cut_and_order_is_kept():
    async def main():
        ours, theirs = socket.socketpair()
        core = CoreChannel(theirs, last_command="gone")
        got, lost = [], asyncio.Event()
        front = ClientChannel(got.append, lost.set)
        await front.open(ours)
        messages = [b"x" * size for size in (0, 1, 10**6, 3)] + list(range(1000))
        writer = asyncio.create_task(asyncio.to_thread(lambda: [core.send(message) for message in messages]))
        await writer
        await until(lambda: len(got) == len(messages))
        assert got == messages
        for message in messages:
            front.send(message)
        received = []
        while len(received) < len(messages):
            received += await asyncio.to_thread(core.receive, 5.0)
        assert received == messages
        assert core.receive(0.0) == []
        front.close()
        assert await asyncio.to_thread(core.receive, 5.0) == ["gone"]
        await asyncio.wait_for(lost.wait(), 5.0)
        with pytest.raises(OSError):
            for _ in range(10):
                core.send("anybody?")

    asyncio.run(main())


def test_a_frame_in_pieces_is_one_event():
    got = []
    front = ClientChannel(got.append, lambda: None)
    from echo_rl.server.ipc import frame

    stream = frame("first") + frame({"second": 2}) + frame(None)
    for i in range(len(stream)):
        front.data_received(stream[i : i + 1])
    assert got == ["first", {"second": 2}, None]


@pytest.mark.parametrize("prompt", ["abc", "~"], ids=["busy", "hung"])
def test_an_orphaned_process_ends_by_itself(prompt):
    """The front is killed with a request in flight: its engine must not go on."""
    code = (
        "import asyncio, sys; sys.path[:0] = ['.', 'kernels']\n"
        "from tests.server.engine_clients import fake_client, request_of\n"
        "async def main():\n"
        "    client = fake_client(isolation='process'); await client.start()\n"
        f"    client.submit(request_of({prompt!r}, max_new_tokens=10**6)); await asyncio.sleep(0.2)\n"
        "    print(client._supervisor.worker.pid, flush=True); await asyncio.sleep(60)\n"
        "if __name__ == '__main__': asyncio.run(main())\n"
    )
    front = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        engine = int(front.stdout.readline())
    finally:
        front.kill()
        front.wait()
    end = time.monotonic() + 20.0
    while _running(engine):
        assert time.monotonic() < end, "the engine outlived its front"
        time.sleep(0.05)


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_factory_may_be_partial():
    assert partial(serve_fake, step_seconds=0.0)(ControllerManagerOptions()).environment == {"model": "fake"}
