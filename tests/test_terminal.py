"What a user sees in a terminal: commands run in a pseudo-terminal, where progress bars are drawn again and again."
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import torch
from torch import nn

from advdpnp.attacks import PGD, robust_to
from advdpnp.core import progress_bar
from advdpnp.data import Loader, load_dataset

SLOW = '''
import time

import torch


class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x):
        time.sleep(0.05)
        return self.linear(x.flatten(1))


def slow():
    torch.manual_seed(0)
    return Slow()
'''


def in_a_terminal(*words, cwd):
    "What a command writes to a terminal, and its exit code."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # rows and columns
    process = subprocess.Popen([sys.executable, "-m", "advdpnp", *map(str, words)], cwd=cwd, stdin=theirs,
                               stdout=theirs, stderr=theirs, env=os.environ | dict(TERM="xterm"))
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 65536)
        except OSError:  # the terminal is closed
            break
    os.close(ours)
    return said.decode(errors="replace"), process.wait()


def test_an_evaluation_whose_bars_are_drawn(tmp_path):
    "A bar that is drawn while the model is called must not change what the model gets."
    (tmp_path / "slow.py").write_text(SLOW)
    said, code = in_a_terminal("evaluate", "slow:slow", "--dataset", "digits", "--eps", 0.1, "--attacks", "fgsm,pgd20",
                               "--images", 50, "--output", "record.json", cwd=tmp_path)
    assert code == 0, said[-2000:]
    assert len(re.findall(r"pgd20 +\d+%", said)) > 3  # it was drawn while the attack went on
    assert (tmp_path / "record.json").exists()


def test_a_run_whose_bars_are_drawn(tmp_path):
    said, code = in_a_terminal("train", "PGD-AT", "--preset", "quick", "--set", "epochs=1", "--set", "train_images=300",
                               "--set", "val_size=20", "--set", "autoattack_images=4", "--set", "test_images=20",
                               "--set", "check_images=4", "--data-dir", "data", cwd=tmp_path)
    assert code == 0, said[-2000:]
    assert "epoch 1/1" in said


def test_a_bar_that_is_drawn_at_every_image_changes_no_verdict(monkeypatch):
    digits = load_dataset("digits")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    loader, drawn = Loader(digits.x_test[:60], digits.y_test[:60], 20), []

    def at_every_image(*given, **named):
        bar = progress_bar(*given, **named)
        bar.mininterval = bar.miniters = bar.delay = 0
        monkeypatch.setattr(bar, "refresh", lambda **_: drawn.append(bar.n))
        return bar

    monkeypatch.setattr("advdpnp.attacks.progress_bar", at_every_image)
    silent, said = (robust_to(model, loader, PGD(0.05, steps=3), torch.ones(60, dtype=torch.bool), quiet=quiet)
                    for quiet in (True, False))
    assert torch.equal(silent, said) and len(drawn) > 1
