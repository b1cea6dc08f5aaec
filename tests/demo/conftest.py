"""The demo of tiny models, served on a free port."""

import http.client
import json
import threading
from contextlib import ExitStack, contextmanager

import pytest

import demo_rag

FLAGS = {"num_beams": 2, "max_length": 8, "n_docs": 3, "port": 0}


def parsed(model, **flags):
    words = [(f"--{name}", str(value)) for name, value in ({"model_name_or_path": model} | FLAGS | flags).items()]
    return demo_rag.parse_args([word for pair in words for word in pair])


class Client:
    """Requests to a server, each on a connection of its own."""

    def __init__(self, server):
        self.server, self.port = server, server.server_port

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict, bytes]:
        """Status, headers and body of the response; a header of the request is named with underscores."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, dict(response.headers), content

    def post(self, path: str, **content) -> tuple[int, list[dict]]:
        """Status and the lines of the response."""
        status, _, body = self.send("POST", path, json.dumps(content).encode(), Content_Type="application/json")
        return status, [json.loads(line) for line in body.splitlines()]

    def ask(self, question: str, **settings) -> dict:
        """What all lines of an answer say together; of partial texts the list."""
        status, lines = self.post("/ask", question=question, **settings)
        assert status == 200 and list(lines[0]) == ["found"] and list(lines[-1]) == ["answer"], lines
        partial = [line["partial"] for line in lines[1:-1]]
        return lines[0]["found"] | lines[-1]["answer"] | {"partial": partial}

    def error(self, path: str = "/ask", **content) -> str:
        """The one line that says why there is no answer."""
        status, lines = self.post(path, **content)
        assert status == 400 and len(lines) == 1 and list(lines[0]) == ["error"] and "\n" not in lines[0]["error"]
        return lines[0]["error"]


@contextmanager
def serving(args):
    """A client of the demo that these flags make."""
    server = demo_rag.opened(args)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Client(server)
    finally:
        server.shutdown()
        server.end()
        thread.join(timeout=60)


@pytest.fixture(scope="module")
def rag_folder(checkpoint):
    return checkpoint("rag_token", "bart")


@pytest.fixture(scope="module")
def client(serve, rag_folder):
    return serve(rag_folder)


@pytest.fixture(scope="module")
def serve():
    """A function from flags to a client, whose server is open until the module's tests are done."""
    with ExitStack() as stack:
        yield lambda model, **flags: stack.enter_context(serving(parsed(model, **flags)))
