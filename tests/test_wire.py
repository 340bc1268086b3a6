"""Asking a server: what comes back is whole, in time and of bounded size, or it is an error in one line; nothing is followed elsewhere."""
import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from emo_r3.scenes import make_scenes
from emo_r3.data import is_address
from emo_r3.wire import NoAnswer, Server, data_url, in_a_line


@contextmanager
def server_of(handle, **options):
    "A server on this machine; `handle(handler)` answers every request."
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def begin(self, code, *headers):
            self.send_response(code)
            for name, value in headers: self.send_header(name, value)
            self.end_headers()
        def do_GET(self):
            try: handle(self)
            except OSError: pass  # whoever asked is gone
        do_POST = do_GET
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield Server(f"http://127.0.0.1:{server.server_port}", **{"timeout_s": 5, **options})
    finally: server.shutdown(); server.server_close()


def refused(server, path="/"):
    with pytest.raises(NoAnswer) as caught: server.ask(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    return caught.value


@pytest.mark.parametrize("mode, size", [("RGB", (97, 101)), ("L", (1, 1)), ("RGBA", (20, 300))])
def test_a_picture_travels_without_loss(mode, size):
    image = make_scenes("in_domain", "train", 1)[0].load_image().resize(size).convert(mode)
    kind, _, text = data_url(image).partition(",")
    back = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    assert kind == "data:image/png;base64" and back.mode == mode and back.tobytes() == image.tobytes()


def test_what_is_sent_and_what_comes_back():
    seen = []
    def handle(h):
        body = h.rfile.read(int(h.headers.get("Content-Length", 0)))
        seen.append((h.command, h.path, body, h.headers["Content-Type"], h.headers["X-Key"]))
        h.begin(200), h.wfile.write(b"x" * 300_000)  # of unannounced length
    with server_of(handle) as server:
        assert server.ask("/a") == server.ask("/b", {"n": "\u00e9"}, {"X-Key": "k"}) == b"x" * 300_000
    assert seen[0] == ("GET", "/a", b"", "application/json", None) and seen[1][:2] == ("POST", "/b") and json.loads(seen[1][2]) == {"n": "\u00e9"} and seen[1][4] == "k"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_redirection_is_followed(code):
    came = []
    with server_of(lambda h: (came.append(h.path), h.begin(200))) as other, server_of(lambda h: h.begin(code, ("Location", other.url + "/there"))) as server:
        error = refused(server)
    assert came == [] and error.status == code and not error.passing


def test_an_answer_s_size_is_bounded_announced_or_not():
    sent = []
    def handle(h):
        h.begin(200, *([("Content-Length", "1000000000000")] if h.path == "/announced" else []))
        while True: h.wfile.write(b" " * 2**16); sent.append(2**16)
    with server_of(handle, most=2**18) as server:
        for path in ("/announced", "/not"):
            sent.clear()
            assert "more than 262,144 bytes" in str(refused(server, path)) and sum(sent) < 2**25  # what the sockets hold between
    with server_of(lambda h: (h.begin(200), h.wfile.write(b"x" * 2**18)), most=2**18) as server: assert len(server.ask("/")) == 2**18  # exactly as many is fine


@pytest.mark.parametrize("code", [200, 500])
@pytest.mark.parametrize("drip", [False, True])
def test_an_answer_s_time_is_bounded_also_that_of_a_refusal(code, drip):
    over = threading.Event()
    def handle(h):
        if drip: h.begin(code, ("Content-Length", "100000"))
        while not over.wait(0.05): drip and h.wfile.write(b" ")
    with server_of(handle, timeout_s=0.4, limit="judge_timeout_s") as server:
        began = time.monotonic()
        error = refused(server)
        assert time.monotonic() - began < 4 and error.passing  # a drip of 100,000 would take more than an hour
        if not (drip and code == 500): assert str(error) == "no answer within judge_timeout_s = 0.4"
        over.set()


@pytest.mark.parametrize("headers, body", [([("Content-Length", "1000")], b'{"a": 1'), ([("Transfer-Encoding", "chunked")], b"ffff\r\nonly this")])
def test_an_answer_that_breaks_off_is_none(headers, body):
    with server_of(lambda h: (h.begin(200, *headers), h.wfile.write(body))) as server: assert (error := refused(server)).passing and "broke off" in str(error)


@pytest.mark.parametrize("sent", [b"", b"HELLO\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200, b"HTTP/1.1 999999 \xff\x00\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_what_is_no_http_is_an_error_in_words(sent):
    with server_of(lambda h: h.wfile.write(sent)) as server: refused(server)


@pytest.mark.parametrize("code, passing", [(400, False), (401, False), (404, False), (408, True), (429, True), (500, True), (502, True), (503, True), (504, True)])
def test_which_refusals_may_pass(code, passing):
    with server_of(lambda h: (h.begin(code), h.wfile.write(b"because\n\x1b[2J \xff" + b"y" * 10_000))) as server: error = refused(server)
    assert (error.status, error.passing) == (code, passing) and f"answered {code}" in str(error) and "because \\x1b[2J" in str(error)


def test_nobody_there_and_no_such_host():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        assert "cannot be reached (ConnectionRefusedError" in str(refused(Server(f"http://127.0.0.1:{s.getsockname()[1]}", 5)))
    for url in ("http://" + "a" * 70, "http://a..b"): refused(Server(url, 1))


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server_of(lambda h: (h.begin(200), h.wfile.write(b"here"))) as server: assert server.ask("/") == b"here"


def test_addresses_and_words():
    assert all(map(is_address, ("http://a", "https://a:1/v1", "http://[::1]:80"))) and not any(map(is_address, ("a:1", "ftp://a", "http://", "http:///v1", "http://[", "http://a:x", "http://a:65536", "http://a:0", 3, None, "")))
    assert in_a_line("a\n b\x1b\u202e") == "a b\\x1b\\u202e" and len(in_a_line("\x00" * 10**6)) == 300 and in_a_line(b"\xff") == "\ufffd"


def test_it_needs_no_torch():
    out = subprocess.run([sys.executable, "-c", "import emo_r3.wire, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
