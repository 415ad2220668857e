"Progress where people look: in JupyterLab, and in the log of papermill."
import logging

import nbformat
import papermill
from jupyter_client.manager import start_new_kernel

BAR = """
import time
import advdpnp.core
advdpnp.core.EVERY = 0.0
bar = advdpnp.core.progress_bar(4, "training")
for _ in range(4):
    time.sleep(0.25)
    bar.update()
advdpnp.core.close_bar(bar, " loss 1.5")
"""


def on_standard_error(allow_stdin):
    "What the bar writes in a kernel, when somebody could type something there and when nobody could."
    manager, client = start_new_kernel()
    said = []
    note = lambda message: said.append(message["content"]["text"]) if message["content"].get("name") == "stderr" else 0
    try:
        reply = client.execute_interactive(BAR, allow_stdin=allow_stdin, timeout=60, output_hook=note)
        assert reply["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return "".join(said)


def test_in_a_notebook_that_somebody_looks_at_a_bar_is_one_line_that_changes():
    said = on_standard_error(allow_stdin=True)
    assert said.count("\n") == 1 and said.endswith("\n") and said.count("\r") >= 4
    assert "00:00 left" not in said.rpartition("\r")[2] and " left" in said


def test_in_the_log_of_papermill_progress_is_plain_lines_that_say_the_time_left(tmp_path, caplog):
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BAR)])
    page.metadata["kernelspec"] = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(page, tmp_path / "page.ipynb")
    with caplog.at_level(logging.INFO, logger="papermill"):
        papermill.execute_notebook(tmp_path / "page.ipynb", tmp_path / "out.ipynb", log_output=True, progress_bar=False)
    outputs = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs
    said = "".join(output["text"] for output in outputs if output.get("name") == "stderr")
    lines = said.splitlines()
    assert "\r" not in said and "\x1b" not in said and len(lines) >= 4
    assert all(line.startswith("training ") for line in lines)
    assert all(line.endswith(" left") for line in lines[:-1]) and lines[-1].endswith("loss 1.5")
    assert "training 2/4" in caplog.text
