"""Trains the demo's speech encoder and bridge: `python -m demo.speech.train --out demo/speech` on one GPU.

New commands are synthesized in parallel with the training, which draws from all clips so far and augments a clip anew
each time (demo.speech.rooms). Encoder, CTC head and bridge are trained together (demo.speech.losses).
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from autoglm.checkpoint import Checkpoint
from autoglm.llm.loader import load_language_model
from demo.speech.dataset import Batch, Clips, SpeechCorpus
from demo.speech.graphs import Graphs
from demo.speech.losses import Codebook, bridge_loss, bridge_path, collapse, ctc_loss, ctc_targets
from demo.speech.measures import error_rates
from demo.speech.model import CTC_LABELS, SPACE, SpeechModel, export, resume

CHECKPOINT = Path("demo/checkpoint")
DISTANCE_WEIGHT = 2.0  # relative to the cross entropies
WARM_UP = 0.04  # share of the training


class Trainer:
    """Model, optimizer and schedule."""

    def __init__(self, checkpoint: Path, device: torch.device, rate: float) -> None:
        """checkpoint: the demo's, whose token embeddings are the bridge's targets."""
        torch.manual_seed(0)
        language = load_language_model(Checkpoint.open(checkpoint), torch.device("cpu"), torch.float32)
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self.codebook = Codebook(tokenizer, language.embed_tokens.weight).to(device)
        self.model = SpeechModel(language.config.hidden_size).to(device)
        self.graphs = Graphs(self.model.train()) if device.type == "cuda" else None
        self.device, self.rate = device, rate
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), fused=device.type == "cuda")

    def step(self, batch: Batch, generator: torch.Generator, progress: float) -> dict[str, torch.Tensor]:
        """One training step; `progress` is the share of the training that is done, 0..1."""
        clips, indices = batch
        self.model.train()
        for group in self.adam.param_groups:
            group["lr"] = self.rate * min(1.0, progress / WARM_UP + 1e-3) * 0.5 * (1 + math.cos(math.pi * progress))
        output = self.model.encode(clips.batch(indices, generator), self.graphs)
        commands = [clips.jobs[i][0] for i in indices]
        logp = output.logits.float().log_softmax(-1)
        words = ctc_loss(logp, output.num_frames, [ctc_targets(command) for command in commands])
        rows = torch.tensor([row for row, command in enumerate(commands) if command.intent], dtype=torch.long)
        targets = [self.codebook.encode(commands[row]) for row in rows.tolist()]
        embeddings = output.embeddings[rows.to(self.device, non_blocking=True)]
        tokens, distance = bridge_loss(embeddings, output.num_embeddings[rows], targets, self.codebook)
        self.adam.zero_grad(set_to_none=True)
        (words + tokens + DISTANCE_WEIGHT * distance).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()
        return {"words": words.detach(), "tokens": tokens.detach(), "off": distance.detach()}

    @torch.no_grad()
    def evaluate(self, clips: Clips, batch_size: int) -> dict[str, float]:
        """Error rates of transcripts, and the share of clips whose bridge outputs are nearest to the plain wording."""
        self.model.eval()
        generator = torch.Generator().manual_seed(1)
        transcripts, right = [], 0
        order = sorted(range(len(clips.jobs)), key=clips.seconds.__getitem__)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            output = self.model.encode(clips.batch(indices, generator))
            labels = output.logits.argmax(-1).tolist()
            tokens = self.codebook.log_probabilities(output.embeddings).argmax(-1).tolist()
            for row, i in enumerate(indices):
                command = clips.jobs[i][0]
                text = "".join(CTC_LABELS[label] for label in collapse(labels[row][: output.num_frames[row]]))
                transcripts.append((command, text.replace(SPACE, " ")))
                count = int(output.num_embeddings[row])
                right += tokens[row][:count] == bridge_path(self.codebook.encode(command), count)
        rates = {f"errors_{language}": rate for language, rate in error_rates(transcripts).items()}
        return rates | {"bridge_right": right / len(order)}


def train(arguments: argparse.Namespace) -> None:
    begin = time.monotonic()
    corpus = SpeechCorpus(num_held_out=arguments.held_out, num_clips=arguments.clips, workers=arguments.workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(arguments.checkpoint, device, arguments.rate)
    if arguments.start is not None:
        resume(trainer.model, arguments.start)
    held_out = corpus.wait(device)
    generator = torch.Generator().manual_seed(0)
    chooser = random.Random(0)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    with arguments.log.open("w", encoding="utf-8") as log:

        def note(**values: Any) -> None:
            line = {"step": step, "seconds": round(time.monotonic() - begin, 1)} | values
            text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
            print(text, flush=True)
            log.write(text + "\n")
            log.flush()

        step, training_begin = 0, time.monotonic()
        size = sum(p.numel() for p in trainer.model.parameters())
        note(event="start", parameters=size, device=str(device), clips=corpus.size)
        progress = 0.0
        while progress < 1:
            for batch in corpus.epoch(arguments.batch, chooser):
                measures = trainer.step(batch, generator, progress)
                step += 1
                minutes = (time.monotonic() - training_begin) / 60
                progress = max(step / arguments.steps, minutes / arguments.minutes)
                if step % arguments.log_every == 0:
                    note(clips=corpus.size, **{name: float(value) for name, value in measures.items()})
                if step % arguments.evaluate_every == 0:
                    note(event="held out", **trainer.evaluate(held_out, arguments.batch))
                if progress >= 1:
                    break
        note(event="held out", **trainer.evaluate(held_out, arguments.batch))
    corpus.close()
    export(trainer.model, arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/speech"), help="directory of encoder/ and bridge/")
    parser.add_argument("--start", type=Path, metavar="DIR", help="continue from the encoder/ and bridge/ in DIR")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="demo checkpoint")
    parser.add_argument("--log", type=Path, default=Path("demo/training/speech.jsonl"))
    parser.add_argument("--clips", type=int, default=250_000, help="clips to synthesize for training")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out clips")
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="limit of the training proper; shortens the schedule")  # fmt: skip
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2),
                        help="processes that synthesize")  # fmt: skip
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=1000)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
