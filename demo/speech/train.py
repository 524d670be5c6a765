"""Training the demo's speech encoder and bridge: `python -m demo.speech.train --out demo/speech` on one GPU.

Synthetic voices go on speaking new commands beside the training, which draws from all that there are; each time one is
drawn it is heard in another room, through another microphone, with other noise and at another tempo. Encoder, CTC head
and bridge are trained together (demo.speech.losses).
"""

from __future__ import annotations

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
from demo.speech.dataset import Clips, Corpus
from demo.speech.graphs import Graphs
from demo.speech.losses import Codebook, bridge_path, collapse, ctc, saying, spell
from demo.speech.measures import error_rates
from demo.speech.model import SpeechModel, export, labels, resume

LABELS = labels()
CHECKPOINT = Path("demo/checkpoint")
DISTANCE = 2.0  # weight of the distances beside the entropies
WARM_UP = 0.04  # of the training


class Trainer:
    """Model, optimiser and schedule."""

    def __init__(self, checkpoint: Path, device: torch.device, rate: float) -> None:
        """checkpoint: the demo's language model, of which only the embeddings are read."""
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

    def step(self, clips: Clips, index: list[int], generator: torch.Generator, done: float) -> dict[str, torch.Tensor]:
        """One step; `done` is how much of the training lies behind it, 0..1."""
        self.model.train()
        for group in self.adam.param_groups:
            group["lr"] = self.rate * min(1.0, done / WARM_UP + 1e-3) * 0.5 * (1 + math.cos(math.pi * done))
        heard = self.model.listen(clips.batch(index, generator), self.graphs)
        said = [clips.jobs[i][0] for i in index]
        words = ctc(heard.labels.float().log_softmax(-1), heard.frames, [spell(command) for command in said])
        told = torch.tensor([row for row, command in enumerate(said) if command.intent], dtype=torch.long)
        plain = [self.codebook.encode(said[row]) for row in told.tolist()]
        embeddings = heard.embeddings[told.to(self.device, non_blocking=True)]
        tokens, off = saying(embeddings, heard.slots[told], plain, self.codebook)
        self.adam.zero_grad(set_to_none=True)
        (words + tokens + DISTANCE * off).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()
        return {"words": words.detach(), "tokens": tokens.detach(), "off": off.detach()}

    @torch.no_grad()
    def evaluate(self, clips: Clips, batch: int) -> dict[str, float]:
        """Error rates of transcripts, and the share of clips whose bridge says the plain wording."""
        self.model.eval()
        generator = torch.Generator().manual_seed(1)
        said, right = [], 0
        order = sorted(range(len(clips.jobs)), key=clips.seconds.__getitem__)
        for start in range(0, len(order), batch):
            index = order[start : start + batch]
            heard = self.model.listen(clips.batch(index, generator))
            best, near = heard.labels.argmax(-1).tolist(), self.codebook.nearness(heard.embeddings).argmax(-1).tolist()
            for row, i in enumerate(index):
                command = clips.jobs[i][0]
                text = "".join(LABELS[k] for k in collapse(best[row][: heard.frames[row]]))
                said.append((command, text.replace("|", " ")))
                slots = int(heard.slots[row])
                right += near[row][:slots] == bridge_path(self.codebook.encode(command), slots)
        rates = {f"errors_{language}": rate for language, rate in error_rates(said).items()}
        return rates | {"bridge_right": right / len(order)}


def train(arguments: argparse.Namespace) -> None:
    begun = time.monotonic()
    corpus = Corpus(arguments.held_out, arguments.clips, arguments.workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(arguments.checkpoint, device, arguments.rate)
    if arguments.start is not None:
        resume(trainer.model, arguments.start)
    held_out = corpus.begin(device)
    generator = torch.Generator().manual_seed(0)
    chooser = random.Random(0)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    with arguments.log.open("w", encoding="utf-8") as log:

        def note(**values: Any) -> None:
            line = {"step": step, "seconds": round(time.monotonic() - begun, 1)} | values
            text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
            print(text, flush=True)
            log.write(text + "\n")
            log.flush()

        step, trained = 0, time.monotonic()
        size = sum(p.numel() for p in trainer.model.parameters())
        note(event="start", parameters=size, device=str(device), clips=corpus.size)
        done = 0.0
        while done < 1:
            for clips, index in corpus.epoch(arguments.batch, chooser):
                measures = trainer.step(clips, index, generator, done)
                step += 1
                done = max(step / arguments.steps, (time.monotonic() - trained) / (60 * arguments.minutes))
                if step % arguments.log_every == 0:
                    note(clips=corpus.size, **{name: float(value) for name, value in measures.items()})
                if step % arguments.evaluate_every == 0:
                    note(event="held out", **trainer.evaluate(held_out, arguments.batch))
                if done >= 1:
                    break
        note(event="held out", **trainer.evaluate(held_out, arguments.batch))
    corpus.close()
    export(trainer.model, arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/speech"), help="where to write encoder/ and bridge/")
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from encoder/ and bridge/ there")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="of the language model")
    parser.add_argument("--log", type=Path, default=Path("demo/training/speech.jsonl"))
    parser.add_argument("--clips", type=int, default=250_000, help="commands that are spoken")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out commands to measure on")
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="the training proper takes at most so long, the schedule along with it")  # fmt: skip
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2),
                        help="processes that render")  # fmt: skip
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=1000)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
