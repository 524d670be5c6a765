"""Start the server, verify it with a request, print its addresses, and keep it serving until a signal."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from autoglm.config import ConfigError, load_config
from autoglm_launcher import ROOT, arguments
from autoglm_launcher.arguments import Options
from autoglm_launcher.console import Interrupted, LauncherError, Progress, complain, raise_on_signals, say
from autoglm_launcher.gateway import GatewayProcess
from autoglm_launcher.probe import ProbeError, ProbeResult, Sample, ask
from autoglm_launcher.restart import Restarter
from autoglm_launcher.server import TritonServer
from autoglm_launcher.tritonserver import Installation
from autoglm_launcher.watchdog import Watchdog

CHECK_INTERVAL_S = 1.0
FIRST_ANSWER_TIMEOUT_S = 600.0  # on a GPU the first request may still compile kernels
READY_TIMEOUT_S = 1800.0
SAMPLE_TOKENS = 256


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 after --once, 1 on failure, 128 + N after signal N."""
    raise_on_signals()
    server = gateway = None
    try:
        options = arguments.parse(argv)
        options.check()
        _check_config(options)
        server = _make_server(options)
        gateway = _make_gateway(options, server.grpc_url)
        sample = Sample.spoken() if options.spoken else Sample.first()
        result = _start(server, sample, gateway)
        if options.once:
            _print_answer(sample, result)
            return 0
        _print_endpoints(server, gateway, options)
        _keep_serving(server, gateway)
    except LauncherError as error:
        complain(str(error))
        return 1
    except Interrupted as interrupted:
        say(f"received {interrupted}, shutting down (press Ctrl-C again to force)")
        return interrupted.exit_code
    finally:
        _stop(server, gateway)
    return 0


def _check_config(options: Options) -> None:
    """Report a mistake in a YAML file in one line here, rather than in a model's traceback."""
    try:
        load_config(options.config, options.preset, options.overrides)
    except ConfigError as error:
        raise LauncherError(str(error)) from None


def _make_server(options: Options) -> TritonServer:
    _empty(options.log)
    executable = options.tritonserver
    return TritonServer(
        checkpoint=options.checkpoint,
        config=options.config,
        preset=options.preset,
        speech=options.speech,
        bridge=options.bridge,
        installation=Installation.from_executable(executable) if executable else Installation.from_wheel(),
        host=options.host,
        ports=options.ports,
        gpus=options.gpus,
        log_path=options.log,
        environment={"AUTOGLM_OVERRIDES": options.overrides},
    )


def _make_gateway(options: Options, triton: str) -> GatewayProcess | None:
    if options.gateway_port is None:
        return None
    log = options.log and options.log.with_name(f"gateway-{options.gateway_port}.log")
    _empty(log)
    paths = {"CONFIG": options.config, "PRESET": options.preset, "API_KEYS": options.keys}
    environment = {f"AUTOGLM_{name}": str(path) for name, path in paths.items() if path}
    environment["AUTOGLM_OVERRIDES"] = options.overrides
    return GatewayProcess(
        triton=triton, host=options.host, port=options.gateway_port, log_path=log, environment=environment
    )


def _empty(log: Path | None) -> None:
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")


def _start(server: TritonServer, sample: Sample, gateway: GatewayProcess | None = None) -> ProbeResult:
    """Start both and return the server's answer to the sample."""
    progress = Progress("starting the server")
    server.start()
    if gateway:
        # Before the models are loaded, so that a mistake in its settings is reported at once.
        gateway.start()
        gateway.wait_listening()
    server.wait_ready(
        READY_TIMEOUT_S, lambda seconds, loaded: progress.show(f"loaded {', '.join(loaded) or 'nothing yet'}")
    )
    progress.done("models loaded")
    progress = Progress(f"asking {'by voice ' if sample.clip else ''}for an action on a sample screenshot")
    try:
        result = ask(server.http_address, sample, max_tokens=SAMPLE_TOKENS, timeout_s=FIRST_ANSWER_TIMEOUT_S)
    except ProbeError as error:
        raise ProbeError(f"{error}; {server.explain()}") from None
    progress.done(
        f"answered, first token after {result.first_token_s:.2f} s, {result.usage['completion_tokens']} tokens"
    )
    if gateway:
        gateway.wait_ready()
    return result


def _print_answer(sample: Sample, result: ProbeResult) -> None:
    from autoglm_client import ActionError, parse

    try:
        answer = parse(result.text)
    except ActionError as error:
        raise LauncherError(f"the answer has no action ({error}): {result.text[:200]!r}") from None
    rows = {"task": sample.task, "transcript": result.transcript, "thought": answer.thought, "action": answer.action}
    if not result.transcript:
        del rows["transcript"]
    width = max(map(len, rows)) + 1
    print("\n".join(f"{label + ':':{width}} {value}" for label, value in rows.items()), flush=True)


def _print_endpoints(server: TritonServer, gateway: GatewayProcess | None, options: Options) -> None:
    sample = Sample.first()
    image = sample.image.relative_to(ROOT)
    say(f"serving {options.checkpoint}")
    print(f"  HTTP     {server.http_url}\n  gRPC     {server.grpc_url}\n  metrics  {server.metrics_url}")
    if gateway:
        print(f"  OpenAI   {gateway.url}/v1\n  browser  {gateway.url}/")
    print(f'try:  .venv/bin/autoglm ask --server {server.grpc_url} --image {image} "{sample.task}"')
    print(f"log:  {options.log or 'standard output'}\nCtrl-C stops it", flush=True)


def _keep_serving(server: TritonServer, gateway: GatewayProcess | None) -> None:
    """Restart the server or the gateway whenever it fails. Never returns."""
    sample = Sample.first()
    watchdog = Watchdog(server, sample)

    def start_server() -> None:
        _start(server, sample)
        watchdog.reset()

    restarters = [Restarter(server, start_server, watchdog.check)]
    if gateway:
        restarters.insert(0, Restarter(gateway, gateway.start, gateway.failure))
    while True:
        time.sleep(CHECK_INTERVAL_S)
        for restarter in restarters:
            restarter.check()


def _stop(server: TritonServer | None, gateway: GatewayProcess | None) -> None:
    now = False
    with suppress(Interrupted):
        if gateway:
            gateway.terminate()  # so that both drain their requests at the same time
    for process in (server, gateway):
        try:
            if process:
                process.stop(now=now)
        except Interrupted:
            now = True  # the second signal: stop() has killed the process


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
