"""vLLM's own server, holding the embedded policy on the CPU, for as long as a block lasts."""
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from emo_r3.policy import EMBEDDED_POLICY

CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def vllm_server(*options: str, environment: dict[str, str] | None = None, wait_s: float = 400.0) -> Iterator[str]:
    "Yields the address of a server that answers; ends it, and its workers, at the end."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(EMBEDDED_POLICY), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--skip-mm-profiling", "--generation-config", "vllm", *options]
    with tempfile.TemporaryFile() as said:
        running = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, env=os.environ | CPU | (environment or {}), start_new_session=True)
        try:
            end = time.monotonic() + wait_s
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2): break
                except OSError:
                    if running.poll() is not None or time.monotonic() > end:
                        said.seek(0)
                        raise RuntimeError(f"the server {'ended' if running.poll() is not None else 'did not answer'}: {said.read().decode(errors='replace')[-3000:]}") from None
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(running.pid, signal.SIGTERM)  # its own session: the server and its workers
            try: running.wait(30)
            except subprocess.TimeoutExpired: os.killpg(running.pid, signal.SIGKILL)
