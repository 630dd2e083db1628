"""A server that speaks SGLang's or OpenAI's protocol and goes wrong on demand: for tests of the benchmark's client.

Answers follow from the prompt, so they can be predicted: `answer(ids)`. It counts what it is asked. `fault` is what
goes wrong at the next answers, `times` how often; from answer `change_at` on it has other weights. `reasoning` is the
key under which it gives the first half of an answer, as with a reasoning parser; `text` stands before every raw answer.
`lies` are values of `meta_info`, or of the page of metrics, that are not true. `echo` is a status with which it refuses
every request, repeating all that it was sent; `authorizations` are the headers that it saw, `launch_command` what it
says that it was started with. With `wrong`, answers above temperature 0 are drawn by the seed, that part of them by a
verifier that is wrong.

    python fake_engine.py --port 1234 --num_steps 2 --die_after 5
"""

import argparse
import json
import os
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAMES = ("spec_verify_ct", "spec_num_correct_drafts", "spec_correct_drafts_histogram")
OLD_NAMES = ("spec_verify_ct", "spec_accept_token_num", "spec_accept_histogram")


def answer(ids, limit):
    """Tokens of the answer to a prompt."""
    return [(sum(ids) + 7 * i) % 6000 for i in range(min(limit, 4 + sum(ids) % 9))]


def drawn(ids, limit, seed, wrong=0.0):
    """Tokens of an answer above temperature 0: each one of three, by the token before it. In `wrong` of its rounds a
    wrong verifier takes the draft whatever its probability."""
    rng, output = random.Random(f"{seed} drawn"), [sum(ids) % 3]
    while len(output) < limit:
        weights = [[5, 3, 1], [1, 4, 4], [2, 2, 5]][output[-1]]
        draft = weights.index(max(weights))
        output.append(draft if rng.random() < wrong else rng.choices(range(3), weights)[0])
    return output


def chunks(length, num_steps):
    """(tokens, drafts accepted) of each verification step behind the first token."""
    found, left, turn = [], length - 1, 0
    while left:
        accepted = turn % (num_steps + 1)
        found.append((min(accepted + 1, left), accepted))
        left -= found[-1][0]
        turn += 1
    return found


def told(output, num_steps):
    """What vLLM says of one answer."""
    accepted = [drafts for _, drafts in chunks(len(output), num_steps)]
    histogram = [accepted.count(n) for n in range(num_steps + 1)]
    return {
        "num_spec_steps": len(accepted),
        "num_accepted_draft_tokens": sum(accepted),
        "acceptance_histogram": histogram,
    }


class FakeEngine:
    """`with FakeEngine(num_steps=2) as server:` answers at `server.url`."""

    def __init__(self, num_steps=0, kind="sglang", version="0.5.23", port=0, die_after=0, pause=0.0, burn=0.0):
        self.num_steps, self.kind, self.version, self.vllm_version = num_steps, kind, version, "0.11"
        self.die_after, self.pause, self.burn = die_after, pause, burn
        self.weights, self.model = "default", "fake"
        self.reasoning, self.reason, self.text = "", "stop", ""
        self.conversations, self.prompts = [], []
        self.fault, self.times, self.asked, self.flushed, self.shift = "", 0, 0, 0, 0
        self.change_at = 10**9
        self.wrong = None  # answers above temperature 0 are `drawn`, so much of them wrongly
        self.event_pause, self.stall = 0.0, 0.0  # seconds behind each part of an answer; of the fault "stall"
        self.dead, self.probed = False, 0  # what /health says, and how often it was asked
        self.drafts, self.accepted = 0, [0] * num_steps
        self.tells = False  # as vLLM with --per-request-spec-decode-metrics
        self.lies = {}
        self.echo, self.launch_command, self.authorizations = 0, None, set()
        self.lock = threading.Lock()
        self.http = Quiet(("127.0.0.1", port), type("Handler", (Handler,), {"engine": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def fail(self, fault, times=10**9):
        self.fault, self.times = fault, times

    def work(self):
        """Use `burn` seconds of CPU time."""
        end = time.thread_time() + self.burn
        while time.thread_time() < end:
            pass

    def next_fault(self):
        with self.lock:
            self.asked += 1
            if self.asked >= self.change_at:
                self.weights = "42"
            if self.die_after and self.asked > self.die_after:
                print("RuntimeError: CUDA error: the fake card fell out", flush=True)
                os._exit(3)
            if self.times <= 0:
                return ""
            self.times -= 1
            return self.fault


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_):
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    engine: FakeEngine

    def log_message(self, *_):
        pass

    def do_GET(self):
        engine = self.engine
        engine.authorizations.add(self.headers["Authorization"])
        if engine.echo == 401 and self.path != "/health":
            return self.repeat(b"")
        sglang = engine.kind == "sglang"
        pages = {"/v1/models": {"object": "list", "data": [{"id": engine.model, "object": "model"}]}}
        if sglang:
            spec = {"speculative_algorithm": "EAGLE", "speculative_num_steps": engine.num_steps}
            pages["/server_info"] = {"version": engine.version, **(spec if engine.num_steps else {})}
            if engine.launch_command:
                pages["/server_info"]["launch_command"] = engine.launch_command
            pages["/model_info"] = {"model_path": engine.model, "weight_version": engine.weights}
        elif engine.kind == "vllm":
            pages["/version"] = {"version": engine.vllm_version}
        if self.path == "/metrics" and engine.kind == "vllm":
            lines = [f'vllm:spec_decode_num_drafts_total{{engine="0"}} {engine.drafts}.0']
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{i}"}} {n}.0'
                for i, n in enumerate(engine.accepted)
            ]
            if "metrics" in engine.lies and engine.drafts:
                lines = engine.lies["metrics"]
            return self.reply(200, "\n".join(lines).encode(), "text/plain")
        if self.path == "/health":
            engine.probed += 1
            return self.reply(503 if engine.dead else 200, b"{}")
        if self.path in pages:
            return self.reply(200, json.dumps(pages[self.path]).encode())
        return self.reply(404, b"{}")

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(content or b"{}")
        self.engine.authorizations.add(self.headers["Authorization"])
        if self.engine.echo and self.path != "/flush_cache":
            return self.repeat(content)
        if self.path == "/flush_cache":
            self.engine.flushed += 1
            return self.reply(200, b"ok")
        fault = self.engine.next_fault()
        if fault == "garbage":
            return self.reply(200, b"<html>gateway</html>", "text/html")
        if fault == "500":
            return self.reply(500, b'{"error": "not now"}')
        if fault == "refuse":
            return self.reply(400, b'{"error": {"message": "the prompt is too long"}}')
        time.sleep(self.engine.pause)
        self.engine.work()
        return self.generate(body, fault) if self.path == "/generate" else self.chat(body)

    def repeat(self, content):
        sent = dict(self.headers)
        what = f"wrong key {self.headers['Authorization'].split()[-1]}; you sent {sent} and {content.decode()}"
        self.reply(self.engine.echo, json.dumps({"error": {"message": what}}).encode())

    def generate(self, body, fault):
        engine = self.engine
        limit = body["sampling_params"]["max_new_tokens"]
        engine.prompts.append(body["input_ids"])
        output = answer(body["input_ids"], limit)
        if engine.wrong is not None and body["sampling_params"]["temperature"]:
            output = drawn(body["input_ids"], limit, body["sampling_params"]["sampling_seed"], engine.wrong)
        if engine.shift:
            output[-1] += engine.shift
        if fault == "empty":
            output = output[:1]
        parts = chunks(len(output), engine.num_steps)
        sent, accepted = 1, 0
        histogram = [0] * (engine.num_steps + 1)
        self.begin()
        for tokens, drafts in [(0, None), *parts]:
            sent += tokens
            if drafts is not None:
                accepted += drafts
                histogram[drafts] += 1
            done = sent == len(output)
            meta = {"completion_tokens": sent, "prompt_tokens": len(body["input_ids"]), "finish_reason": None}
            meta["weight_version"] = engine.weights
            if done:
                meta["finish_reason"] = {"type": "length" if sent == limit else engine.reason}
                if engine.num_steps and parts and fault != "no metadata":
                    names = OLD_NAMES if engine.version == "0.5.9" else NAMES
                    if fault == "wrong histogram":
                        histogram[0] += 1
                    meta |= dict(zip(names, (len(parts), accepted, histogram), strict=True))
                    meta |= engine.lies
            if fault == "error in stream":
                self.event({"error": {"message": "the scheduler is gone", "code": 503}})
                break
            ids = ["x"] * sent if fault == "no integers" else output[:sent]
            text = "" if fault == "empty" else engine.text + " ".join(map(str, ids))
            self.event({"text": text, "output_ids": ids, "meta_info": meta})
            if fault == "hang up" and sent > 1:
                self.connection.close()
                return
            if fault == "stall" and sent > 1:
                time.sleep(engine.stall)
        self.wfile.write(b"data: [DONE]\n\n")

    def chat(self, body):
        engine = self.engine
        engine.conversations.append(body["messages"])
        prompt = [len(m["content"]) for m in body["messages"]]
        output = answer(prompt, body["max_tokens"])
        self.begin()
        common = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": engine.model}
        sent = 0
        for tokens, drafts in [(1, None), *chunks(len(output), engine.num_steps)]:
            new = output[sent : sent + tokens]
            sent += tokens
            if drafts is not None and engine.num_steps:
                engine.drafts += 1
                for i in range(drafts):
                    engine.accepted[i] += 1
            key = engine.reasoning if engine.reasoning and sent <= len(output) / 2 else "content"
            choice = {"index": 0, "delta": {key: " ".join(map(str, new)) + " "}, "finish_reason": None}
            if engine.kind == "vllm":
                choice["token_ids"] = new
            self.event({**common, "choices": [choice]})
        end = "length" if sent == body["max_tokens"] else engine.reason
        self.event({**common, "choices": [{"index": 0, "delta": {}, "finish_reason": end}]})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": sent, "total_tokens": sent + len(prompt)}
        last = {**common, "choices": [], "usage": usage}
        if engine.tells:
            last["metrics"] = {"speculative_decoding": told(output, engine.num_steps) | engine.lies}
        self.event(last)
        self.wfile.write(b"data: [DONE]\n\n")

    def begin(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def event(self, value):
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()
        time.sleep(self.engine.event_pause)

    def reply(self, status, data, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--num_steps", type=int, default=0)
    parser.add_argument("--die_after", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--burn", type=float, default=0.0)
    parser.add_argument("--api-key")
    parser.add_argument("--admin-api-key")
    parser.add_argument("--echo", type=int, default=0)
    args = parser.parse_args()
    if args.api_key:  # as servers print their arguments
        print(args, os.environ.get("SERVER_TOKEN"), os.environ.get("WHATEVER"), flush=True)
    engine = FakeEngine(args.num_steps, port=args.port, die_after=args.die_after, pause=args.pause, burn=args.burn)
    engine.echo = args.echo
    engine.launch_command = " ".join(sys.argv)
    engine.http.serve_forever()


if __name__ == "__main__":
    main()
