"""A proxy in front of a real server that fails as networks and servers fail: for the fault drill."""

import http.client
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.listening import Listening

FAULTS = ("drop", "429", "500", "503", "garbage", "half", "cut", "no_choices", "abort", "stall")
STALL_SECONDS = 3.0  # longer than the drill's --timeout


class Proxy(Listening):
    """`with Proxy(port) as proxy:` answers on `proxy.port`; a share `rate` of chat requests meets a random fault."""

    def __init__(self, port, rate=0.4, seed=0):
        self.upstream = port
        self.rate = rate
        self.random = random.Random(seed)
        self.met = dict.fromkeys((*FAULTS, "none"), 0)
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.http = _Server(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port

    def fault(self, path):
        with self.lock:
            bad = path.endswith("chat/completions") and self.random.random() < self.rate
            name = self.random.choice(FAULTS) if bad else "none"
            self.met[name] += 1
        return name


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A killed client hangs up; that is what the drill is about."""


class _Handler(BaseHTTPRequestHandler):
    owner: Proxy

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def answer(self, method):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.owner.fault(self.path)
        if fault == "drop":
            self.connection.close()
        elif fault in ("429", "500", "503"):
            self.reply(int(fault), b'{"error": "not now"}', {"Retry-After": "0"} if fault == "429" else {})
        elif fault == "garbage":
            self.reply(200, b"<html>gateway</html>", {"Content-Type": "text/html"})
        elif fault == "no_choices":
            self.reply(200, b'{"id": "1", "object": "chat.completion", "choices": []}')
        elif fault == "stall":
            time.sleep(STALL_SECONDS)
            self.connection.close()
        else:
            self.forward(method, body, fault)

    def forward(self, method, body, fault):
        upstream = http.client.HTTPConnection("127.0.0.1", self.owner.upstream, timeout=60)
        try:
            upstream.request(method, self.path, body, {"Content-Type": "application/json"})
            response = upstream.getresponse()
            status, data = response.status, response.read()
        except OSError:  # the server is gone
            self.connection.close()
            return
        finally:
            upstream.close()
        if fault == "abort":
            data = data.replace(b'"finish_reason":"stop"', b'"finish_reason":"abort"')
            data = data.replace(b'"finish_reason":"length"', b'"finish_reason":"abort"')
        if fault == "half":
            data = data[: len(data) // 2]
        self.reply(status, data, cut=fault == "cut")

    def reply(self, status, data, headers=None, cut=False):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data[: len(data) // 3] if cut else data)
        self.close_connection = True
