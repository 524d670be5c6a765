"""Start the server, prove that it answers, say where, and keep it serving until told to stop."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from autoglm.config import ConfigError, load_config
from autoglm_launcher import ROOT, arguments
from autoglm_launcher.arguments import Options
from autoglm_launcher.console import Interrupted, LauncherError, Progress, complain, raise_on_signals, say
from autoglm_launcher.gateway import Gateway
from autoglm_launcher.probe import Answer, ProbeError, Sample, ask
from autoglm_launcher.server import TritonServer
from autoglm_launcher.tritonserver import Installation
from autoglm_launcher.watchdog import Watchdog

CHECK_S = 1.0
FIRST_ANSWER_S = 600.0  # on a GPU the first request may still compile kernels
READY_S = 1800.0
LONGEST_BACK_OFF_S = 60.0
PROVEN_AFTER_S = 300.0
SAMPLE_TOKENS = 256


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 after --once, 1 on failure, 128 + N when signal N ended it."""
    raise_on_signals()
    server = gateway = None
    try:
        options = arguments.parse(argv)
        options.check()
        _check_config(options)
        server = _make_server(options)
        gateway = _make_gateway(options, server.grpc_url)
        sample = Sample.spoken() if options.spoken else Sample.first()
        answer = _start(server, sample, gateway)
        if options.once:
            _print_answer(sample, answer)
            return 0
        _print_endpoints(server, gateway, options)
        _keep_serving(server, gateway)
    except (LauncherError, ProbeError) as error:
        complain(str(error))
        return 1
    except Interrupted as interrupted:
        say(f"{interrupted}: stopping; once more stops at once")
        return interrupted.exit_code
    finally:
        _stop(server, gateway)
    return 0


def _check_config(options: Options) -> None:
    """A mistake in a YAML file is told here in one line, not by a model's traceback."""
    try:
        load_config(options.config, options.preset, options.overrides)
    except ConfigError as error:
        raise LauncherError(str(error)) from None


def _make_server(options: Options) -> TritonServer:
    _empty(options.log)
    given = options.tritonserver
    return TritonServer(
        checkpoint=options.checkpoint,
        config=options.config,
        preset=options.preset,
        speech=options.speech,
        bridge=options.bridge,
        installation=Installation.from_executable(given) if given else Installation.from_wheel(),
        host=options.host,
        ports=options.ports,
        gpus=options.gpus,
        log_path=options.log,
        environment={"AUTOGLM_OVERRIDES": options.overrides},
    )


def _make_gateway(options: Options, triton: str) -> Gateway | None:
    if options.gateway_port is None:
        return None
    log = options.log and options.log.with_name(f"gateway-{options.gateway_port}.log")
    _empty(log)
    paths = {"CONFIG": options.config, "PRESET": options.preset, "API_KEYS": options.keys}
    environment = {f"AUTOGLM_{name}": str(path) for name, path in paths.items() if path}
    environment["AUTOGLM_OVERRIDES"] = options.overrides
    return Gateway(triton, options.host, options.gateway_port, log, environment)


def _empty(log: Path | None) -> None:
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")


def _start(server: TritonServer, sample: Sample, gateway: Gateway | None = None) -> Answer:
    """Start and prove; returns the answer that proves it."""
    progress = Progress("starting the server")
    server.start()
    if gateway:
        # Beside the server, so that what is wrong with it is known before the models are loaded.
        gateway.start()
        gateway.wait_listening()
    server.wait_ready(READY_S, lambda seconds, loaded: progress.show(f"loaded {', '.join(loaded) or 'nothing yet'}"))
    progress.done("models loaded")
    progress = Progress(f"asking {'by voice ' if sample.sound else ''}for an action on a sample screenshot")
    try:
        answer = ask(server.http_address, sample, max_tokens=SAMPLE_TOKENS, timeout_s=FIRST_ANSWER_S)
    except ProbeError as error:
        raise ProbeError(f"{error}; {server.explain()}") from None
    progress.done(
        f"answered, first token after {answer.first_token_s:.2f} s, {answer.usage['completion_tokens']} tokens"
    )
    if gateway:
        gateway.wait_ready()
    return answer


def _print_answer(sample: Sample, answer: Answer) -> None:
    from autoglm_client import ActionError, parse

    try:
        parsed = parse(answer.text)
    except ActionError as error:
        raise LauncherError(f"the answer holds no action ({error}): {answer.text[:200]!r}") from None
    heard = f"\nheard:   {answer.heard}" if answer.heard else ""
    print(f"task:    {sample.task}{heard}\nthought: {parsed.thought}\naction:  {parsed.action}", flush=True)


def _print_endpoints(server: TritonServer, gateway: Gateway | None, options: Options) -> None:
    sample = Sample.first()
    image = sample.image.relative_to(ROOT)
    say(f"serving {options.checkpoint}")
    print(f"  HTTP     {server.http_url}\n  gRPC     {server.grpc_url}\n  metrics  {server.metrics_url}")
    if gateway:
        print(f"  OpenAI   {gateway.url}/v1\n  browser  {gateway.url}/")
    print(f'try:  .venv/bin/autoglm ask --server {server.grpc_url} --image {image} "{sample.task}"')
    print(f"log:  {options.log or 'here'}\nCtrl-C stops it", flush=True)


def _keep_serving(server: TritonServer, gateway: Gateway | None) -> None:
    """Watch, and restart the server's whole group of processes when it no longer serves. Returns never."""
    back_off_s = 1.0
    watchdog, started = Watchdog(server, Sample.first()), time.monotonic()
    while True:
        time.sleep(CHECK_S)
        if gateway:
            gateway.revive()
        reason = watchdog.check()
        if reason is None:
            continue
        if time.monotonic() - started > PROVEN_AFTER_S:
            back_off_s = 1.0
        while reason:
            complain(f"{reason}; restarting in {back_off_s:.0f} s")
            server.stop(now=True)
            time.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)
            try:
                _start(server, Sample.first())
                reason = None
            except (LauncherError, ProbeError) as error:
                reason = str(error)
        watchdog, started = Watchdog(server, Sample.first()), time.monotonic()
        say("serving again")


def _stop(server: TritonServer | None, gateway: Gateway | None) -> None:
    now = False
    with suppress(Interrupted):
        if gateway:
            gateway.terminate()  # so that both wait for running requests at the same time
    for part in (server, gateway):
        try:
            if part:
                part.stop(now=now)
        except Interrupted:
            now = True  # a second signal ends the wait; stop() has killed what was left


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
