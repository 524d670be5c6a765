"""The running tritonserver as an object."""

from __future__ import annotations

import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from autoglm_launcher import ROOT
from autoglm_launcher.console import LauncherError, complain
from autoglm_launcher.gpus import visible_gpu_count
from autoglm_launcher.managed_process import Supervised
from autoglm_launcher.ports import Ports, reachable
from autoglm_launcher.processes import remove_stale
from autoglm_launcher.tritonserver import Installation, check_numpy

SHM_STEP_BYTES = 16 << 20  # a stub's shared memory begins with this and grows by it, for good: a few screenshots
GPU_POOL_BYTES = 512 << 20
POLL_S = 0.1
NO_GPU = re.compile("CUDA driver version is insufficient|CudaDriverHelper|NVML|DCGM")  # said at every start without one

# What reads or changes the server itself is closed to callers: shared memory regions would let one read another's.
CLOSED_APIS = "model-repository,shared-memory,logging,trace"

# On a machine that is very busy, Triton 2.51 may abort while its models register their metrics.
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
MOST_STARTS = 3


class TritonServer(Supervised):
    """One tritonserver with its stubs, on ports of its own. Use it as a context manager, or start() and stop().

    repository: the model repository. checkpoint, config, preset, speech, bridge: what the models read
    (AUTOGLM_CHECKPOINT and so on); left out, the models' defaults hold. ports: left out, three free ones.
    gpus: indices for CUDA_VISIBLE_DEVICES; left out, all. log_path: the server's output; left out, this process's own.
    environment: further variables for the server and the stubs. grace_s: what a stop gives running requests.
    """

    def __init__(
        self,
        repository: Path = ROOT / "model_repository",
        checkpoint: Path | None = None,
        config: Path | None = None,
        preset: Path | None = None,
        *,
        speech: Path | None = None,
        bridge: Path | None = None,
        installation: Installation | None = None,
        host: str = "127.0.0.1",
        ports: Ports | None = None,
        gpus: Sequence[int] | None = None,
        log_path: Path | None = None,
        environment: Mapping[str, str] | None = None,
        grace_s: float = 10.0,
    ) -> None:
        super().__init__({}, log_path, grace_s)
        self.repository = repository.resolve()
        self.host = host
        self.ports = ports or Ports.free()
        self._installation = installation or Installation.from_wheel()
        given = {"CHECKPOINT": checkpoint, "CONFIG": config, "PRESET": preset, "SPEECH": speech, "BRIDGE": bridge}
        for name, value in given.items():
            if value is not None:
                self._environment[f"AUTOGLM_{name}"] = str(value.resolve())
        if gpus is not None:
            # So that the numbers mean the cards that nvidia-smi shows under them.
            self._environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        # Several processes compute on the same cores: threads that spin while they wait take them from others.
        self._environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Decoded images go back to the system: left alone, glibc learns from a huge one to keep what smaller ones took.
        self._environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 20))
        self._environment.update(environment or {})
        self._gpu_count = visible_gpu_count(self._environment)
        # A stub takes its packages from the environment of the first python3 in PATH.
        self._prepend("PATH", (str(Path(sys.executable).parent),))
        self._prepend("LD_LIBRARY_PATH", self._installation.library_path)

    @property
    def http_address(self) -> str:
        """host:port, as tritonclient.http takes it."""
        return f"{reachable(self.host)}:{self.ports.http}"

    @property
    def http_url(self) -> str:
        return f"http://{self.http_address}"

    @property
    def grpc_url(self) -> str:
        """host:port, as tritonclient.grpc takes it."""
        return f"{reachable(self.host)}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"http://{reachable(self.host)}:{self.ports.metrics}/metrics"

    def __enter__(self) -> TritonServer:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the processes; wait_ready() says when they serve. Raises LauncherError on a port that is taken."""
        if self.is_alive():
            raise LauncherError(f"the server already runs on {self.http_url}")
        check_numpy()
        self.ports.check(self.host)
        remove_stale()
        super().start()

    def command(self) -> list[str]:
        """The tritonserver's command line; "{regions}" stands for the prefix that its supervisor gives."""
        key = os.environ.get("AUTOGLM_ADMIN_KEY") or secrets.token_hex(16)
        command = [
            str(self._installation.executable),
            f"--model-repository={self.repository}",
            f"--backend-directory={self._installation.backends}",
            "--model-control-mode=none",
            "--disable-auto-complete-config",
            f"--http-address={self.host}",
            f"--http-port={self.ports.http}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self.ports.metrics}",
            f"--http-restricted-api={CLOSED_APIS}:autoglm-admin-key={key}",
            f"--grpc-restricted-protocol={CLOSED_APIS}:autoglm-admin-key={key}",
            f"--backend-config=python,shm-default-byte-size={SHM_STEP_BYTES}",
            f"--backend-config=python,shm-growth-byte-size={SHM_STEP_BYTES}",
            "--backend-config=python,shm-region-prefix-name={regions}",
            f"--exit-timeout-secs={max(1, int(self._grace_s) - 2)}",
        ]
        # Without a pool, tensors between models go through the CPU: 19 ms instead of 2 for a screenshot's embeddings.
        return command + [f"--cuda-memory-pool-byte-size={i}:{GPU_POOL_BYTES}" for i in range(self._gpu_count)]

    def wait_ready(
        self, timeout_s: float = 600.0, on_progress: Callable[[float, list[str]], None] | None = None
    ) -> None:
        """Wait until every model is loaded. on_progress gets the seconds so far and the models that are loaded.

        A server that crashes meanwhile is started again. Raises LauncherError when it ends otherwise, crashes time and
        again, or is not ready in time.
        """
        begin = time.monotonic()
        starts = 1
        while not self.is_ready():
            elapsed = time.monotonic() - begin
            if not self.is_alive():
                if self.ended_by not in CRASHES or starts == MOST_STARTS:
                    raise LauncherError(f"the server did not start: {self.explain()}")
                complain(f"the server crashed while it started: {self.explain()}; starting it again")
                starts += 1
                self.stop()
                self.start()
            if elapsed > timeout_s:
                raise LauncherError(f"the server is not ready after {timeout_s:.0f} s: {self.explain()}")
            if on_progress:
                on_progress(elapsed, self.loaded_models())
            time.sleep(POLL_S)

    def is_ready(self) -> bool:
        """Triton's own word, which stays true when a stub dies: probe.py asks for proof."""
        connection = HTTPConnection(self.http_address, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def loaded_models(self) -> list[str]:
        return re.findall(r"successfully loaded '([^']+)'", self.log_text())

    def telling_line(self, log: str) -> str:
        """A model's failure when there is one, else the last error, else the last line."""
        failure = re.search(r"failed to load '([^']+)' version \d+: (.*)", log)
        if failure:
            # The log writes a line's end as \\n; a traceback begins with "At:", what went wrong stands before it.
            reason = failure[2].split("At:")[0].replace("\\n", " ")
            return f"model {failure[1]}: {reason.strip()[:400]}"
        lines = [line for line in log.splitlines() if line.strip() and not NO_GPU.search(line)]
        errors = [line for line in lines if re.match(r"E\d{4} |error: ", line)]
        telling = (errors or lines or ["it wrote nothing"])[-1]
        return re.sub(r"^E\d{4} \S+ +\d+ \S+\] ", "", telling).strip('" ')[:400]

    def _prepend(self, variable: str, directories: Sequence[str]) -> None:
        rest = [self._environment[variable]] if self._environment.get(variable) else []
        self._environment[variable] = os.pathsep.join([*directories, *rest])
