"`make lab` opens JupyterLab on the notebooks, and the first page runs there."
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from pathlib import Path

import pytest

websocket = pytest.importorskip("websocket", reason="websocket-client comes with JupyterLab, which is not installed")
ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-this-test"


@pytest.fixture
def lab(tmp_path):
    "Asks the server: `lab(path, **data)` is what it answers; with data it is a POST."
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("make has not built its environment")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --allow-root --port={port} --IdentityProvider.token={TOKEN} --ServerApp.open_browser=False"
    server = subprocess.Popen(["make", "lab", f"ARGS={options}"], cwd=ROOT, start_new_session=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env=os.environ | {f"JUPYTER_{name}_DIR": str(tmp_path) for name in ("CONFIG", "RUNTIME")})

    def ask(path, /, **data):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", json.dumps(data).encode() if data else None,
                                         {"Authorization": f"token {TOKEN}", "Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    ask.channel = f"ws://127.0.0.1:{port}/api/kernels/{{}}/channels"
    try:
        for _ in range(120):
            try:
                ask("api/status")
                break
            except OSError:
                time.sleep(0.5)
        yield ask
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def run(connection, source):
    "Run a cell; what it raised, if anything."
    message = uuid.uuid4().hex
    header = dict(msg_id=message, msg_type="execute_request", session="test", username="test", version="5.3")
    connection.send(json.dumps(dict(header=header, parent_header={}, metadata={}, channel="shell", content=dict(
        code=source, silent=False, store_history=True, user_expressions={}, allow_stdin=False))))
    while True:
        said = json.loads(connection.recv())
        if said.get("parent_header", {}).get("msg_id") == message and said["msg_type"] == "execute_reply":
            return None if said["content"]["status"] == "ok" else said["content"]["evalue"]


def test_the_method_on_one_page_runs_in_jupyterlab(lab):
    assert "JupyterLab" in lab("lab")
    page = json.loads(lab("api/contents/00_method.ipynb"))["content"]
    wanted = dict(path="00_method.ipynb", type="notebook", name="", kernel=dict(name="python3"))
    session = json.loads(lab("api/sessions", **wanted))
    connection = websocket.create_connection(lab.channel.format(session["kernel"]["id"]), timeout=240,
                                             header=[f"Authorization: token {TOKEN}"])
    cells = [cell["source"] for cell in page["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 10 and [run(connection, cell) for cell in cells] == [None] * len(cells)
    connection.close()
