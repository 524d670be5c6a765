"""Training the demo checkpoint: `python -m demo.train --out demo/checkpoint` on one GPU.

Trained as a whole from scratch, such a model learns to write answers and never to look at the screen. So:
1. The ViT alone learns to say, in each visual token, which element is drawn there (in the language model's own input
   embeddings), where its centre is and what role it has, through throw-away heads.
2. The language model joins: several questions on each screen, which do not see each other; two heads of one layer are
   shown where to look; taps only, until most land; then all tasks. The heads of 1. stay, with less weight.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from demo import model as demo_model
from demo.fonts import require_fonts
from demo.losses import Batch
from demo.records import GRIDS, Writer
from demo.stream import Stream, records
from demo.trainer import Plan, Trainer


def train(arguments: argparse.Namespace) -> None:
    require_fonts()
    begun = time.monotonic()
    plan = Plan(arguments.seeing_steps, arguments.reading_steps, arguments.batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer = Writer(demo_model.tokenizer(), demo_model.IMAGE_LIMITS)
    status = arguments.state / "state.json"
    done = json.loads(status.read_text())["step"] if arguments.resume and status.exists() else 0
    # Workers and the held-out screens are made by fork, hence before the device is touched.
    stream = Stream(writer, arguments.workers, arguments.seed * 10**12 + done * 10**5, arguments.pool)
    held_out = {k: records(writer, k, "test", arguments.held_out, arguments.workers) for k in range(len(GRIDS))}
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(plan, device)
    if done:
        trainer.load(arguments.state)
    evaluated = min(plan.batch, arguments.held_out)  # together: at training's size the compiled code is used again
    stream.open(device)
    generator = torch.Generator(device).manual_seed(done)
    chooser = torch.Generator().manual_seed(done)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    with arguments.log.open("a" if done else "w", encoding="utf-8") as log:

        def note(**values: Any) -> None:
            line = {"step": trainer.step_number, "seconds": round(time.monotonic() - begun, 1)} | values
            text = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()})
            print(text, flush=True)
            log.write(text + "\n")
            log.flush()

        note(event="start", parameters=sum(p.numel() for p in trainer.model.parameters()), device=str(device))
        while not stream.ready_for(min(2 * plan.batch, stream.capacity)):
            time.sleep(0.05)
        note(event="pool is ready")
        while trainer.step_number < plan.steps and time.monotonic() - begun < 60 * arguments.minutes:
            step = trainer.step_number
            stream.only_taps.value = trainer.only_taps
            which = 0 if float(torch.rand((), generator=chooser)) < 0.72 else 1
            batch = stream.sample(which, plan.batch, generator)
            measures = trainer.step(batch, GRIDS[which])
            if step % arguments.log_every == 0:
                _follow(trainer, batch, measures, note, sum(stream.written))
            if (step + 1) % arguments.evaluate_every == 0:
                note(event="held out", **trainer.evaluate(held_out, evaluated))
            if (step + 1) % arguments.save_every == 0:
                trainer.save(arguments.state)
        note(event="held out", **trainer.evaluate(held_out, evaluated))
        trainer.save(arguments.state)
        finished = trainer.step_number >= plan.steps
        note(event="finished" if finished else "stopped: go on with --resume")
    stream.close()
    demo_model.export(trainer.model, trainer.tokenizer, arguments.out)


def _follow(trainer: Trainer, batch: Batch, measures: dict[str, torch.Tensor], note: Any, screens: int) -> None:
    """Log a training step, and advance the curriculum when most taps land."""
    values: dict[str, Any] = {k: float(v) for k, v in measures.items() if v.ndim == 0}
    if "right" in measures:
        taps = batch["tap_label"] >= 0
        landed = float(measures["right"][taps].float().mean())
        values |= {"taps_right": landed, "all_right": float(measures["right"][batch["kind"] >= 0].float().mean())}
        trainer.landed = 0.5 * trainer.landed + 0.5 * landed
        trainer.only_taps = trainer.only_taps and trainer.landed < 0.8
    note(screens_drawn=screens, only_taps=trainer.only_taps, rate=trainer.plan.rate(trainer.step_number), **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/checkpoint"), help="where to write the checkpoint")
    parser.add_argument("--state", type=Path, default=Path("build/demo-state"), help="what --resume needs")
    parser.add_argument("--log", type=Path, default=Path("demo/training/log.jsonl"))
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, whatever is left to do")
    parser.add_argument("--seeing-steps", type=int, default=1600)
    parser.add_argument("--reading-steps", type=int, default=4700)
    parser.add_argument("--batch", type=int, default=128, help="screens in a step")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw screens")
    parser.add_argument("--pool", type=int, default=16384, help="recent screens kept on the device for each grid")
    parser.add_argument("--held-out", type=int, default=512, help="held-out screens of each grid to measure on")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--save-every", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
