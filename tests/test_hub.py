import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from samed_peft.errors import InputError
from samed_peft.hub import ADAPTER_FILES, push_to_hub


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push of small files needs; it keeps what it was sent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, body))
        if self.path == "/api/repos/create":
            answer = {"url": f"{constants.ENDPOINT}/someone/liver"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        else:
            answer = {"commitUrl": f"{constants.ENDPOINT}/someone/liver/commit/abc", "commitOid": "abc"}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server on this machine in the Hub's place."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def adapter(tmp_path):
    for name in ADAPTER_FILES:
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


def _committed(server):
    (body,) = [body for path, body in server.requests if "/commit/" in path]
    lines = [json.loads(line) for line in body.splitlines()]
    files = [line["value"] for line in lines if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]).decode() for file in files}


def test_the_four_files_are_sent_and_nothing_else(hub, adapter):
    (adapter / "optimizer.safetensors").write_text("not for strangers")
    (adapter / "checkpoint").mkdir()
    (adapter / "checkpoint" / "adapter_config.json").write_text("nor this")
    url = push_to_hub(adapter, "someone/liver", private=True, token="hf_test")
    assert url == f"{constants.ENDPOINT}/someone/liver"
    path, body = hub.requests[0]
    assert path == "/api/repos/create"
    assert json.loads(body)["visibility"] == "private"
    assert _committed(hub) == {name: f"content of {name}" for name in ADAPTER_FILES}


@pytest.mark.parametrize("name", ADAPTER_FILES)
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_an_incomplete_adapter_is_not_sent(hub, adapter, name, damage):
    (adapter / name).unlink()
    if damage == "empty":
        (adapter / name).touch()
    with pytest.raises(InputError, match=f"missing or empty: {name}"):
        push_to_hub(adapter, "someone/liver", token="hf_test")
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["a/b/c", "someone/", "", "someone/liver tumour", "someone/liver.git"])
def test_a_malformed_repository_is_refused(hub, adapter, repo_id):
    with pytest.raises(InputError, match="expected owner/name"):
        push_to_hub(adapter, repo_id, token="hf_test")
    assert hub.requests == []


def test_a_folder_that_is_not_there_is_refused(hub, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        push_to_hub(tmp_path / "nowhere", "someone/liver", token="hf_test")
    assert hub.requests == []
