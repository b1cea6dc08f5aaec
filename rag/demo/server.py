"""The demo over HTTP: one page, and the questions that it asks, answered in turn.

    server = open_server("127.0.0.1", 7860)
    server.models, server.page = models, render(models, server.nonce)
    server.serve_forever()

GET / is the page. POST /ask streams lines of JSON, as `DemoModel.ask` tells them, and ends with the answer or
{"error"}; POST /search is one object. What cannot be answered is {"error"}, one line, with status 400. Whoever listens
on loopback is asked by pages of its own machine alone: another name in Host, as a site has that points its own name
here, is refused, and so is a body that is not declared as JSON, which a foreign site cannot send without asking first.
"""

import contextlib
import errno
import ipaddress
import json
import logging
import secrets
import select
import socket
import socketserver
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from rag.demo.questions import read_question
from rag.errors import UserError, one_line

logger = logging.getLogger(__name__)

MOST_BYTES = 65_536  # of a request's body
SECONDS_OF_SILENCE = 30  # that a client may take to say what it wants, or to take what it is sent


class DemoServer(ThreadingHTTPServer):
    """Listens from the start; answers as soon as it has models and page.

    Attributes:
        models: what is asked (`DemoModel`).
        page: HTML, in UTF-8.
        nonce: what the page's own script and style are marked with: the browser runs no other.
        turn: held while a question is answered.
    """

    daemon_threads = False  # `end` waits for them: Python must not go while one of them is in torch's code

    def __init__(self, host: str, port: int):
        self.models: Sequence[Any] = []
        self.page, self.nonce = b"", secrets.token_urlsafe(16)
        self.connections: set[Any] = set()
        self.turn, self.is_ending = threading.Lock(), False
        self.is_on_loopback = is_loopback(host)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would ask the network for this machine's name
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What goes wrong with a connection itself is the client's affair."""

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.connections.discard(request)

    def end(self) -> None:
        """Close the port and every connection; wait for the search that runs, which ends at its next step."""
        self.is_ending = True
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: DemoServer
    timeout = SECONDS_OF_SILENCE
    disable_nagle_algorithm = True  # a line goes out when it is written
    server_version, sys_version = "rag-demo", ""
    is_streaming = False

    def do_GET(self) -> None:
        self._answer(self._send_page)

    def do_POST(self) -> None:
        self._answer(self._answer_question)

    def _send_page(self) -> None:
        if urlsplit(self.path).path != "/":
            return self.send_error(HTTPStatus.NOT_FOUND, "there is one page, at /")
        nonce = f"'nonce-{self.server.nonce}'"
        policy = f"default-src 'none'; script-src {nonce}; style-src {nonce}; connect-src 'self'; img-src data:"
        policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page, {"Content-Security-Policy": policy})

    def _answer_question(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        if path not in ("/ask", "/search"):
            return self.send_error(HTTPStatus.NOT_FOUND, "questions go to /ask and /search")
        model, question = read_question(body, self.server.models)
        with self.server.turn:
            self._require_client()
            if path == "/ask":
                return model.ask(question, self._stream)
            found = model.search(question)
        self._send_json(HTTPStatus.OK, found)

    def _answer(self, act: Callable[[], None]) -> None:
        """Act, unless the request came by another machine's name; whatever is raised becomes one line of JSON."""
        try:
            if self.server.is_on_loopback and not is_loopback(_name_in(self.headers.get("Host", ""))):
                return self.send_error(HTTPStatus.FORBIDDEN, "this page is served to this machine alone")
            act()
        except (ConnectionError, TimeoutError):  # the client is gone, or stuck: what it asked ends here
            self.close_connection = True
        except UserError as error:
            self._tell_error(HTTPStatus.BAD_REQUEST, "; ".join(str(error).splitlines()))
        except Exception as error:  # a library's: the next question may be answered
            logger.error(f"{self.path[:80]}: {type(error).__name__}: {one_line(error, 300)}")
            what = f"no answer ({type(error).__name__}: {one_line(error, 200)})"
            self._tell_error(HTTPStatus.INTERNAL_SERVER_ERROR, what)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9 or int(length) > MOST_BYTES:
            raise UserError(f"Content-Length {length[:20]!r} must be a number up to {MOST_BYTES:,}")
        body = self.rfile.read(int(length))
        kind = self.headers.get_content_type()
        if kind != "application/json":
            raise UserError(f"Content-Type {kind[:80]} must be application/json")
        return body

    def _require_client(self) -> None:
        """Raise `ConnectionError` if nobody waits for the answer any more."""
        waiting = select.poll()
        waiting.register(self.connection, select.POLLIN)
        is_readable = waiting.poll(0)
        if self.server.is_ending or (is_readable and not self.connection.recv(1, socket.MSG_PEEK)):
            raise ConnectionAbortedError

    def _stream(self, line: dict[str, Any]) -> None:
        """A line of the answer, which goes on until the connection is closed."""
        self._require_client()
        if not self.is_streaming:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "application/x-ndjson")
            self.end_headers()
            self.is_streaming = True
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def _tell_error(self, status: HTTPStatus, message: str) -> None:
        try:
            if self.is_streaming:
                self._stream({"error": message})
            else:
                self.send_error(status, message)
        except OSError:
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._send_json(code, {"error": message or HTTPStatus(code).phrase})

    def _send_json(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: int, kind: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        for name, value in {
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        super().end_headers()

    def finish(self) -> None:
        """Take what the client still sends: closed over it, the connection would be reset, and the response lost."""
        super().finish()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            for _ in range(16):
                if not self.connection.recv(MOST_BYTES):
                    break

    def log_message(self, format: str, *args: Any) -> None:
        """Questions are not written to the terminal."""


def open_server(host: str, port: int) -> DemoServer:
    """A server that listens.

    Raises:
        UserError: the port is in use or not for this user, or there is no such address here.
    """
    try:
        return DemoServer(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} is in use on {host}; give another one, or 0 for a free one") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UserError(f"--port {port} is not for every user; give one above 1023, or 0 for a free one") from error
        reason = error.strerror or one_line(error)
        raise UserError(f"--host {host} cannot be listened on ({reason}); give 127.0.0.1, or leave it out") from error


def is_loopback(name: str) -> bool:
    """Whether a name or address is this machine's own, whatever a name server says."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name_in(host: str) -> str:
    """The name in a Host header, without the port; "" of a faulty one."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
