"""The bar of a training as a terminal shows it, which is told by the terminal alone."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from tests.conftest import ROOT

LAST = r"Epoch 2: 100%\|\S* *\| 6/6 \[ *[\d.]+it/s, loss=[\d.]+, val_em=[-\d.]+, left=00:00\]"


def on_a_terminal(columns: int, *command: str) -> str:
    """What a command prints on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            shown += chunk
    except OSError:  # how Linux says that nobody holds the other end any more
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode()


def test_a_terminal_of_80_columns_shows_loss_em_and_time_left(tmp_path):
    shown = on_a_terminal(80, sys.executable, "-m", "tests.training.lightning_toy", str(tmp_path))
    bars = [line.strip("\n") for line in re.split(r"\r|\x1b\[A", shown) if line.startswith("Epoch ")]
    assert re.fullmatch(LAST, bars[-1]), bars[-1]
    assert max(map(len, bars)) <= 80
    assert "step 1 of" not in shown  # the lines of a log file
