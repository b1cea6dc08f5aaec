"""What `demo_rag.py` refuses, each in one line; its page; and the command, until it is interrupted."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

import demo_rag
from rag.demo import model as demo_model
from rag.demo.questions import MOST_CHARACTERS
from rag.demo.server import is_loopback, open_server
from rag.errors import UserError
from rag.files import write_lines
from tests.conftest import PASSAGES, QUESTIONS, ROOT
from tests.demo.conftest import FLAGS, Client, parsed

QUESTION = QUESTIONS[0][0]
JSON = {"Content_Type": "application/json"}


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "question is missing; write one"),
        ({"question": "  "}, "question is missing; write one"),
        ({"question": 7}, "question is missing; write one"),
        ({"question": "x" * (MOST_CHARACTERS + 1)}, "question has 2,001 characters, more than 2,000; shorten it"),
        ({"question": "\ud800"}, "half a surrogate pair"),
        ({"n_docs": 0}, "n_docs 0 must be a whole number from 1 to 8"),
        ({"n_docs": 9}, "n_docs 9 must be a whole number from 1 to 8"),
        ({"n_docs": "3"}, 'n_docs "3" must be a whole number'),
        ({"n_docs": True}, "n_docs true must be a whole number"),
        ({"num_beams": 1000}, "num_beams 1000 must be a whole number from 1 to 32"),
        ({"ef_search": 2**31}, "ef_search 2147483648 must be a whole number from 1 to 65,536"),
        ({"model": 1}, "model 1 must be a whole number from 0 to 0"),
        ({"max_length": 3}, "'max_length' is no setting of this model"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line(client, content, message):
    assert message in client.error(**{"question": QUESTION} | content if content else content)
    assert message in client.error("/search", **{"question": QUESTION} | content if content else content)


def test_requests_that_are_none(client):
    whole = json.dumps({"question": QUESTION}).encode()
    for body, headers, status, message in [
        (b"what?", JSON, 400, "the request is no JSON"),
        (b"[1]", JSON, 400, "the request is no JSON object"),
        (b"[" * 10_000, JSON, 400, "the request is no JSON"),
        (b"\xff", JSON, 400, "the request is no JSON"),
        (whole, {"Content_Type": "text/plain"}, 400, "Content-Type text/plain must be application/json"),
        (whole, {"Content_Type": "application/x-www-form-urlencoded"}, 400, "must be application/json"),
        (b" " * 100_000, JSON, 400, "Content-Length '100000' must be a number up to 65,536"),
        (whole, JSON | {"Content_Length": "many"}, 400, "Content-Length 'many' must be a number"),
        (whole, JSON | {"Host": "rebound.example"}, 403, "this page is served to this machine alone"),
        (whole, JSON | {"Host": "127.0.0.1.rebound.example:80"}, 403, "this machine alone"),
        (whole, JSON | {"Host": "["}, 403, "this machine alone"),
    ]:
        found, _, content = client.send("POST", "/ask", body, **headers)
        assert (found, list(json.loads(content))) == (status, ["error"])
        assert message in json.loads(content)["error"]
    for method, path, status in [
        ("POST", "/", 404),
        ("GET", "/ask", 404),
        ("GET", "/../etc/passwd", 404),
        ("PUT", "/ask", 501),
    ]:
        found, _, content = client.send(method, path, whole, **JSON)
        assert (found, list(json.loads(content))) == (status, ["error"])
    assert client.send("GET", "/", Host="rebound.example")[0] == 403
    for host in ("localhost", f"localhost:{client.port}", "127.0.0.1:1", "[::1]:80"):
        assert client.send("GET", "/", Host=host)[0] == 200


def test_whoever_listens_elsewhere_is_asked_by_any_name():
    server = open_server("0.0.0.0", 0)
    server.page = b"a page"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    assert Client(server).send("GET", "/", Host="box.example")[::2] == (200, b"a page")
    server.shutdown()
    server.end()
    assert [is_loopback(name) for name in ("127.8.0.1", "::1", "localhost", "0.0.0.0", "box", "")] == [True] * 3 + [
        False
    ] * 3


def test_what_fails_on_the_way_is_told_in_one_line(client, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of\n  memory")

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "answer_contexts", fail)
        status, lines = client.post("/ask", question=QUESTION)
        assert status == 200 and [list(line) for line in lines] == [["found"], ["error"]]
        assert lines[1]["error"] == "no answer (RuntimeError: out of memory)"
    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "fetch_contexts", fail)
        status, lines = client.post("/ask", question=QUESTION)
        assert (status, lines) == (500, [{"error": "no answer (RuntimeError: out of memory)"}])
    assert client.ask(QUESTION)["answer"]


def test_a_question_without_given_passages(serve, checkpoint, tmp_path):
    record = {"question": QUESTION, "titles": ["paris"], "texts": [PASSAGES[0][1]], "scores": [1.0]}
    write_lines([json.dumps(record)], tmp_path / "found.jsonl")
    client = serve(checkpoint("rag_sequence", "bart"), passages_file=tmp_path / "found.jsonl", n_docs=1)
    assert client.ask(QUESTION)["titles"] == ["paris"]
    assert "has no passages for the question 'what is near'" in client.error(question="what is near")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": 70_000}, "--port 70000 is no port; give one from 1 to 65535, or 0 for a free one"),
        ({"host": ""}, "--host '' is no address"),
        ({"n_docs": 0}, "--n_docs 0 must be 1 or more"),
        ({"num_beams": 10_001}, "--num_beams 10001 is too much; give 10,000 or fewer"),
        ({"max_length": 1}, "--max_length 1 must be 2 or more"),
    ],
)
def test_flags_out_of_range(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parsed("somewhere", **flags)


def test_checkpoints_that_cannot_be_asked(rag_folder, bart_folder, tmp_path):
    for model, flags, message in [
        (tmp_path / "none", {}, f"--model_name_or_path {tmp_path / 'none'}"),
        (rag_folder, {"compare_with": tmp_path / "none"}, f"--compare_with {tmp_path / 'none'}"),
        (bart_folder, {}, "is a bart model, which retrieves nothing; give a RAG checkpoint"),
        (rag_folder, {"compare_with": bart_folder}, f"--compare_with {bart_folder} is a bart model"),
        (rag_folder, {"decoding": "fast"}, "--decoding fast is for rag_sequence; leave it out"),
        (rag_folder, {"index_path": "no/such/index"}, "--index_path no/such/index does not exist"),
        (rag_folder, {"n_docs": 9}, "--n_docs 9 is more than the 8 passages of the index"),
        (rag_folder, {"max_length": 500}, "--max_length 500 is more than the 128 tokens"),
    ]:
        with pytest.raises(UserError) as raised:
            demo_rag.main(parsed(model, **flags))
        assert message in str(raised.value) and "\n" not in str(raised.value)


# --- The page, and the command ----------------------------------------------------------------------------------------


def test_the_page_runs_its_own_script_alone(serve, rag_folder, tmp_path):
    odd = tmp_path / "<b>it's & co"
    odd.symlink_to(rag_folder)
    client = serve(odd)
    status, headers, page = client.send("GET", "/?q=%3Cscript%3E")
    page = page.decode()
    nonce = client.server.nonce
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert (
        page.count(f'nonce="{nonce}"') == 2
        and f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'" in headers["Content-Security-Policy"]
    )
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    assert "<b>" not in page and "&lt;b&gt;it&#39;s &amp; co" in page
    (data,) = re.findall(r'id="data">(.*?)</script>', page)
    assert json.loads(data)[0]["path"] == str(odd)
    assert "http://" not in page and "https://" not in page and "innerHTML" not in page


def test_a_busy_port_is_told_before_anything_is_loaded(rag_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, ROOT / "demo_rag.py", "--model_name_or_path", tmp_path / "none", "--port", str(port)]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 2 and shown.stdout == ""
    expected = f"demo_rag.py: error: --port {port} is in use on 127.0.0.1; give another one, or 0 for a free one\n"
    assert shown.stderr == expected
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.7 cannot be listened on"):
        open_server("192.0.2.7", 0)


def test_the_command_serves_until_it_is_interrupted(rag_folder):
    words = [
        word
        for name, value in ({"model_name_or_path": rag_folder} | FLAGS).items()
        for word in (f"--{name}", str(value))
    ]
    command = [sys.executable, str(ROOT / "demo_rag.py"), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            port = int(re.fullmatch(rf"http://127.0.0.1:(\d+)/ shows {rag_folder}; Ctrl-C ends it\n", line)[1])
            client = Client(type("Server", (), {"server_port": port}))
            assert client.ask(QUESTION)["answer"]
        finally:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "ended\n") and "Traceback" not in err
