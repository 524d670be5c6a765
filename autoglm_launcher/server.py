"""A running tritonserver."""

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
from autoglm_launcher.managed_process import ManagedProcess
from autoglm_launcher.ports import Ports, reachable
from autoglm_launcher.processes import remove_stale
from autoglm_launcher.tritonserver import Installation, check_numpy

SHM_STEP_BYTES = 16 << 20  # initial size and growth step of a stub's shared memory, which never shrinks
GPU_POOL_BYTES = 512 << 20
NO_GPU = re.compile("CUDA driver version is insufficient|CudaDriverHelper|NVML|DCGM")  # logged at every start without

# APIs that read or change the server's state need a key: shared memory regions would expose other callers' data.
CLOSED_APIS = "model-repository,shared-memory,logging,trace"

# On a busy machine, Triton 2.51 may abort while its models register their metrics.
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
MAX_STARTS = 3


class TritonServer(ManagedProcess):
    """One tritonserver with its stubs. Use it as a context manager, or call start(), wait_ready() and stop().

    repository: the model repository. checkpoint, config, preset, speech, bridge: paths that the models read
    (AUTOGLM_CHECKPOINT and so on); None: the models' defaults. ports: None: three free ones.
    gpus: indices for CUDA_VISIBLE_DEVICES; None: all. log_path: the file for its output; None: this process's output.
    environment: further variables for the server and the stubs. grace_s: seconds that stop() gives running requests.
    """

    name = "the server"

    def __init__(
        self,
        *,
        repository: Path = ROOT / "model_repository",
        checkpoint: Path | None = None,
        config: Path | None = None,
        preset: Path | None = None,
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
                self.environment[f"AUTOGLM_{name}"] = str(value.resolve())
        if gpus is not None:
            # Number the GPUs as nvidia-smi does.
            self.environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            self.environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        # Several processes share the cores: threads that spin while they wait would take them from the others.
        self.environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Return the memory of decoded images to the system: after freeing a huge one, glibc would keep smaller ones'.
        self.environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 20))
        self.environment.update(environment or {})
        self._gpu_count = visible_gpu_count(self.environment)
        # A stub imports from the environment of the first python3 in PATH.
        self._prepend("PATH", (str(Path(sys.executable).parent),))
        self._prepend("LD_LIBRARY_PATH", self._installation.library_path)

    @property
    def http_address(self) -> str:
        """host:port, as tritonclient.http expects it."""
        return f"{reachable(self.host)}:{self.ports.http}"

    @property
    def http_url(self) -> str:
        return f"http://{self.http_address}"

    @property
    def grpc_url(self) -> str:
        """host:port, as tritonclient.grpc expects it."""
        return f"{reachable(self.host)}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"http://{reachable(self.host)}:{self.ports.metrics}/metrics"

    def __enter__(self) -> "TritonServer":
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
        """Start the processes, which serve after wait_ready(). Raises LauncherError when a port is taken."""
        if self.is_alive():
            raise LauncherError(f"the server is already running on {self.http_url}")
        check_numpy()
        self.ports.check(self.host)
        remove_stale()
        super().start()

    def command(self) -> list[str]:
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
        # Without a pool, tensors between models go through the CPU: a screenshot's embeddings take 19 ms, not 2.
        return command + [f"--cuda-memory-pool-byte-size={i}:{GPU_POOL_BYTES}" for i in range(self._gpu_count)]

    def wait_ready(
        self, timeout_s: float = 600.0, on_progress: Callable[[float, list[str]], None] | None = None
    ) -> None:
        """Wait until every model is loaded. on_progress gets the seconds so far and the names of the loaded models.

        A server that crashes while loading is restarted. Raises LauncherError when it ends otherwise, has crashed
        MAX_STARTS times, or is not ready within timeout_s of its last start.
        """
        begin = time.monotonic()

        def pending() -> str | None:
            if self.is_ready():
                return None
            if on_progress:
                on_progress(time.monotonic() - begin, self.loaded_models())
            return ""

        for start in range(1, MAX_STARTS + 1):
            try:
                return self.wait_until("ready", pending, timeout_s)
            except LauncherError:
                if self.ended_by not in CRASHES or start == MAX_STARTS:
                    raise
            complain(f"the server crashed while loading: {self.explain()}; restarting it")
            self.stop()
            self.start()

    def is_ready(self) -> bool:
        """Triton's own readiness, which stays true when a stub dies; probe.py sends a real request."""
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
        """A model's failure if there is one, else the last error, else the last line."""
        failure = re.search(r"failed to load '([^']+)' version \d+: (.*)", log)
        if failure:
            # The log escapes line ends as \\n; the message precedes the traceback, which begins with "At:".
            reason = failure[2].split("At:")[0].replace("\\n", " ")
            return f"model {failure[1]}: {reason.strip()[:400]}"
        lines = [line for line in log.splitlines() if line.strip() and not NO_GPU.search(line)]
        errors = [line for line in lines if re.match(r"E\d{4} |error: ", line)]
        telling = (errors or lines or ["no output"])[-1]
        return re.sub(r"^E\d{4} \S+ +\d+ \S+\] ", "", telling).strip('" ')[:400]

    def _prepend(self, variable: str, directories: Sequence[str]) -> None:
        rest = [self.environment[variable]] if self.environment.get(variable) else []
        self.environment[variable] = os.pathsep.join([*directories, *rest])
