"""Trains the demo checkpoint: `python -m demo.train --out demo/checkpoint` on one GPU.

Trained end to end from scratch, such a model learns to write answers but ignores the screen. Therefore:
1. The ViT is trained alone. Auxiliary heads predict from each visual token the label (in the language model's input
   embeddings), the centre and the role of the element drawn there.
2. The language model joins. Each screen has several questions, which do not attend to each other; two heads of one
   layer are trained to attend to the target. All tasks are taps until most are right. The losses of 1. remain with
   a smaller weight.
"""

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
from demo.records import GRIDS, RecordWriter
from demo.stream import FIRST_GRID_SHARE, Stream, records
from demo.trainer import Schedule, Trainer


def train(arguments: argparse.Namespace) -> None:
    require_fonts()
    begin = time.monotonic()
    schedule = Schedule(arguments.vision_steps, arguments.joint_steps, arguments.batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer = RecordWriter(demo_model.tokenizer(), demo_model.IMAGE_LIMITS)
    status = arguments.state / "state.json"
    done = json.loads(status.read_text())["step"] if arguments.resume and status.exists() else 0
    # Both fork, so they come before the device is used.
    stream = Stream(writer, arguments.workers, arguments.seed * 10**12 + done * 10**5, arguments.pool)
    held_out = {k: records(writer, k, "test", arguments.held_out, arguments.workers) for k in range(len(GRIDS))}
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(schedule, device)
    if done:
        trainer.load(arguments.state)
    evaluation_batch = min(schedule.batch, arguments.held_out)  # training's size needs no new compilation
    stream.open(device)
    generator = torch.Generator(device).manual_seed(done)
    chooser = torch.Generator().manual_seed(done)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    with arguments.log.open("a" if done else "w", encoding="utf-8") as log:

        def note(**values: Any) -> None:
            line = {"step": trainer.step_number, "seconds": round(time.monotonic() - begin, 1)} | values
            text = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()})
            print(text, flush=True)
            log.write(text + "\n")
            log.flush()

        note(event="start", parameters=sum(p.numel() for p in trainer.model.parameters()), device=str(device))
        while not stream.ready_for(min(2 * schedule.batch, stream.capacity)):
            time.sleep(0.05)
        note(event="pool is ready")
        while trainer.step_number < schedule.steps and time.monotonic() - begin < 60 * arguments.minutes:
            step = trainer.step_number
            stream.only_taps.value = trainer.only_taps
            grid_index = 0 if float(torch.rand((), generator=chooser)) < FIRST_GRID_SHARE else 1
            batch = stream.sample(grid_index, schedule.batch, generator)
            measures = trainer.step(batch, GRIDS[grid_index])
            if step % arguments.log_every == 0:
                _follow(trainer, batch, measures, note, sum(stream.written))
            if (step + 1) % arguments.evaluate_every == 0:
                note(event="held out", **trainer.evaluate(held_out, evaluation_batch))
            if (step + 1) % arguments.save_every == 0:
                trainer.save(arguments.state)
        note(event="held out", **trainer.evaluate(held_out, evaluation_batch))
        trainer.save(arguments.state)
        finished = trainer.step_number >= schedule.steps
        note(event="finished" if finished else "stopped: continue with --resume")
    stream.close()
    demo_model.export(trainer.model, trainer.tokenizer, arguments.out)


def _follow(trainer: Trainer, batch: Batch, measures: dict[str, torch.Tensor], note: Any, screens: int) -> None:
    """Log a training step, and advance the curriculum when most taps are right."""
    values: dict[str, Any] = {k: float(v) for k, v in measures.items() if v.ndim == 0}
    if "right" in measures:
        taps = batch["tap_label"] >= 0
        taps_right = float(measures["right"][taps].float().mean())
        all_right = float(measures["right"][batch["action"] >= 0].float().mean())
        values |= {"taps_right": taps_right, "all_right": all_right}
        trainer.tap_accuracy = 0.5 * trainer.tap_accuracy + 0.5 * taps_right
        trainer.only_taps = trainer.only_taps and trainer.tap_accuracy < 0.8
    note(screens_drawn=screens, only_taps=trainer.only_taps, rate=trainer.schedule.rate(trainer.step_number), **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/checkpoint"), help="directory of the checkpoint")
    parser.add_argument("--state", type=Path, default=Path("build/demo-state"), help="directory of the training state")
    parser.add_argument("--log", type=Path, default=Path("demo/training/log.jsonl"))
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time even if steps remain")
    parser.add_argument("--vision-steps", type=int, default=1600)
    parser.add_argument("--joint-steps", type=int, default=4700)
    parser.add_argument("--batch", type=int, default=128, help="screens per step")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw screens")
    parser.add_argument("--pool", type=int, default=16384, help="recent screens per grid to sample from")
    parser.add_argument("--held-out", type=int, default=512, help="held-out screens per grid")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--save-every", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
