"""Chromium without a window, for the tests of pages: it reaches this machine alone."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
ALONE = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def browse(address: str, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """What the browser prints, and what the page's console says.

    Args:
        profile: a folder for what the browser keeps.
        flags: `--dump-dom`, `--screenshot=PATH`, ...
    """
    command = [CHROMIUM, *ALONE, f"--user-data-dir={profile}", "--enable-logging=stderr", *flags]
    command += ["--virtual-time-budget=3000", address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return shown.stdout, [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
