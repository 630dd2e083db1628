"""How long a server is waited for: one that is slow is not one that has stalled, and one failure ends no job."""

import asyncio
import json
import time
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers.fake_engine import FakeEngine
from helpers.listening import Listening
from helpers.paths import TINY

from swift_fastmtp.bench.engines import Engine
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.client import Sampling, Servers, longest_silence, repeat
from swift_fastmtp.errors import FastMTPError

ASKED = [{"role": "user", "content": "1 + 1 = ?"}]
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)


class SlowServer(Listening):
    """A chat server that answers its n-th request after `seconds[n]` (the last one from then on). `hanging`: it does
    not answer /health meanwhile either; `health`: what it answers there."""

    def __init__(self, seconds, health=200, hanging=False):
        self.seconds, self.health, self.hanging = seconds, health, hanging
        self.asked, self.probed, self.busy = 0, 0, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.probed += 1
                if server.hanging and server.busy:
                    time.sleep(5)
                if self.path == "/health":
                    return self.reply(server.health, {})
                return self.reply(200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                wait = server.seconds[min(server.asked, len(server.seconds) - 1)]
                server.asked += 1
                server.busy += 1
                time.sleep(wait)
                server.busy -= 1
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "2"}}
                self.reply(200, {"id": "1", "object": "chat.completion", "model": "fake", "choices": [choice]})

            def reply(self, status, value):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                """Clients that hang up are part of the tests."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


def ask(server, **options):
    """One answer of `Servers`."""

    @asynccontextmanager
    async def opened():
        servers = Servers([server.url], GREEDY, "fake", **options)
        try:
            yield servers
        finally:
            await servers.close()

    async def run():
        async with opened() as servers:
            return (await servers.reply(ASKED, None, 0))[0].content

    return asyncio.run(run())


def test_a_slow_server_that_lives_is_waited_for():
    """Ten times the time-out, one attempt; a page of models is as good as /health where there is none."""
    for health in (200, 404):
        with SlowServer([2.0], health=health) as server:
            assert ask(server, timeout=0.2, retry_seconds=0.1) == "2"
            assert server.asked == 1 and server.probed >= 3


def test_many_slow_requests_share_a_probe():
    with SlowServer([1.5]) as server:

        async def run():
            servers = Servers([server.url], GREEDY, "fake", timeout=0.6, concurrency=16)
            try:
                return await asyncio.gather(*(servers.reply(ASKED, None, i) for i in range(16)))
            finally:
                await servers.close()

        assert len(asyncio.run(run())) == 16
        assert server.asked == 16 and server.probed <= 8


@pytest.mark.parametrize("dead", [{"hanging": True}, {"health": 503}], ids=["hangs", "says so"])
def test_a_server_that_stalls_is_asked_again(dead):
    """Its stall is longer than `retry_seconds`, which begin at the first failure."""
    with SlowServer([4.0, 0.0], **dead) as server:
        started = time.monotonic()
        assert ask(server, timeout=0.3, retry_seconds=0.1) == "2"
        assert server.asked == 2 and time.monotonic() - started < 4


def test_a_server_that_never_answers_ends_the_job_after_several_attempts():
    with SlowServer([10.0], health=503) as server, pytest.raises(FastMTPError) as error:
        ask(server, timeout=0.2, retry_seconds=0.1)
    assert server.asked == 3
    assert "no usable answer in 3 attempts" in str(error.value) and "does not say that it lives" in str(error.value)


def test_a_request_that_a_living_server_lost_is_asked_again(monkeypatch):
    monkeypatch.setattr("swift_fastmtp.data.client.SLOWEST_REQUEST", 16.0)  # 8 tokens: half a second
    with SlowServer([10.0, 0.0]) as server:
        assert ask(server, timeout=0.3, retry_seconds=0.1) == "2"
        assert server.asked == 2 and server.probed >= 1


def test_longest_silence_grows_with_what_is_asked_for():
    assert longest_silence(600, 4096, 1) == 600 + 4096
    assert longest_silence(600, 32768, 128) == 600 + 32768 * 1.28


def test_retry_seconds_count_from_the_first_failure():
    """A first attempt longer than `retry_seconds` leaves them all to the next ones."""
    asked = []

    async def fail():
        asked.append(time.monotonic())
        if len(asked) == 1:
            await asyncio.sleep(1.0)
        raise asyncio.TimeoutError

    with pytest.raises(FastMTPError):
        asyncio.run(repeat(fail, ["http://server"], retry_seconds=0.9))
    assert len(asked) >= 3 and asked[-1] - asked[0] >= 1.5


def test_the_benchmark_waits_for_a_stream_that_goes_on():
    """Parts of an answer are signs of life: nobody is probed, and the whole may take longer than the time-out."""
    with FakeEngine(num_steps=1) as server:
        server.event_pause = 0.2

        async def run():
            engine = Engine(server.url, load_tokenizer(str(TINY)), GREEDY, timeout=0.5, retry_seconds=0.1)
            try:
                await engine.connect()
                return await engine.answer(ASKED, 0.0, 0)
            finally:
                await engine.close()

        answer = asyncio.run(run())
        assert answer.latency > 0.5 and server.asked == 1 and server.probed == 0


def test_the_benchmark_asks_again_where_a_stream_stops():
    with FakeEngine(num_steps=1) as server:
        server.fail("stall", 1)
        server.stall = 5.0

        async def run():
            engine = Engine(server.url, load_tokenizer(str(TINY)), GREEDY, timeout=0.3, retry_seconds=0.1)
            try:
                await engine.connect()
                return await engine.answer(ASKED, 0.0, 0)
            finally:
                await engine.close()

        server.dead = True
        assert asyncio.run(run()).latency < 3 and server.asked == 2 and server.probed >= 3


def doubts(version, num_steps, temperature=0.6):
    """What is said of sampled answers of such a vLLM server."""

    async def run(url):
        servers = Servers([url], Sampling(temperature=temperature))
        try:
            return await servers.check_sampling()
        finally:
            await servers.close()

    with FakeEngine(kind="vllm", num_steps=num_steps) as server:
        server.vllm_version = version
        return asyncio.run(run(server.url))


def test_sampled_answers_of_a_vllm_that_drafts_on_a_cpu():
    """Refused where the version says that it runs there; doubted where it does not say what it runs on."""
    with pytest.raises(
        FastMTPError, match=r"vLLM 0\.32\.0\+cpu cannot sample with drafts on a CPU .* --temperature 0$"
    ):
        doubts("0.32.0+cpu", 2)
    (doubt,) = doubts("0.32.0", 2)
    assert "if it runs on a CPU" in doubt and doubt.endswith("or give --temperature 0")


@pytest.mark.parametrize("server", [("0.33.0+cpu", 2), ("0.32.0+cpu", 0), ("0.32.0+cpu", 2, 0.0), ("0.11", 2)])
def test_other_sampled_answers_are_not_doubted(server):
    """Of another version, without drafts, and greedy ones."""
    assert doubts(*server) == []
