"""One training run's model, optimisers and schedule."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from demo import model as demo_model
from demo import phrases
from demo.losses import Batch, Heads, Targets, answer, read, see
from demo.optimizer import Muon, split_parameters
from demo.records import GRIDS, LABELS
from demo.tokenizer import number_ids

SHARD_BYTES = 15_000_000


@dataclass(frozen=True)
class Plan:
    """Steps and rates. Muon's rates are spectral, AdamW's per element."""

    seeing_steps: int
    reading_steps: int
    batch: int
    muon: float = 0.02
    adam: float = 1.5e-3
    decay: float = 0.05

    @property
    def steps(self) -> int:
        return self.seeing_steps + self.reading_steps

    def rate(self, step: int) -> float:
        """Warm-up at the start of each phase, cosine to nothing over the last 40 % of the second."""
        begun = step if step < self.seeing_steps else step - self.seeing_steps
        warm = min(1.0, (begun + 1) / 150)
        cooling = max(0.0, (step - self.seeing_steps) / max(1, self.reading_steps) - 0.6) / 0.4
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, cooling)))


class Trainer:
    """Model, heads and optimisers, one step at a time."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.tokenizer = demo_model.tokenizer()
        text, vision = demo_model.text_config(self.tokenizer), demo_model.vision_config()
        torch.manual_seed(0)
        self.model = demo_model.DemoModel(text, vision)
        demo_model.initialize(self.model, self.tokenizer)
        self.heads = Heads(text.hidden_size)
        spoken = [
            [token for name in demo_model.spoken_forms(label) for token in self.tokenizer.encode(name).ids]
            for label in LABELS
        ]
        limits = demo_model.IMAGE_LIMITS
        self.targets = Targets(number_ids(self.tokenizer), spoken, limits.mean, limits.std)
        for module in (self.model, self.heads, self.targets):
            module.to(device)
        matrices, rest = split_parameters(self.model)
        rest += [(f"heads.{name}", parameter) for name, parameter in self.heads.named_parameters()]
        self.muon = Muon(matrices, plan.decay)
        self.adam_parameters = dict(rest)
        seeing = [parameter for name, parameter in rest if name.startswith("visual.")]
        others = [parameter for name, parameter in rest if not name.startswith("visual.")]
        self.adam = torch.optim.AdamW(
            [{"params": seeing}, {"params": others}], betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
        )
        self.step_number = 0
        self.only_taps = True
        self.landed = 0.0
        if device.type == "cuda":
            for block in [*self.model.visual.blocks, *self.model.language.layers]:
                block.compile(dynamic=False)

    def losses(
        self, batch: Batch, grid: tuple[int, int], reading: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and measures of one batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            visual = see(self.model.visual, batch, grid, self.targets)
            embeddings = self.model.language.embed_tokens.weight.detach()
            loss, measures = self.heads(visual, batch, embeddings, self.targets)
            if not reading:
                return loss, measures
            hidden, pointer = read(self.model.language, visual, batch)
            said, more = answer(self.model.language, hidden, batch, self.targets)
        measures |= more | {"pointer_loss": pointer.detach()}
        return 0.4 * loss + said + 0.3 * pointer, measures

    def step(self, batch: Batch, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
        """One step of training."""
        reading = self.step_number >= self.plan.seeing_steps
        loss, measures = self.losses(batch, grid, reading)
        loss.backward()  # type: ignore[no-untyped-call]
        scale = self.plan.rate(self.step_number)
        visual = 0.5 if reading else 1.0
        for group, factor in zip(self.adam.param_groups, (visual, 1.0), strict=True):
            group["lr"] = self.plan.adam * scale * factor
        torch.nn.utils.clip_grad_norm_(self.adam_parameters.values(), 1.0)
        rates = {"visual": self.plan.muon * scale * visual}
        if reading:
            rates["language"] = self.plan.muon * scale
        self.adam.step()
        self.muon.step(rates)
        self.adam.zero_grad(set_to_none=True)
        for members in self.muon.groups.values():
            for parameter in members:
                parameter.grad = None
        self.step_number += 1
        return measures | {"loss": loss.detach()}

    def evaluate(self, held_out: dict[int, Batch], count: int) -> dict[str, float]:
        """Teacher-forced on held-out screens: shares of labels seen and of questions answered right, by action."""
        reading = self.step_number > self.plan.seeing_steps
        labels: list[float] = []
        right: dict[str, list[torch.Tensor]] = {}
        for which, batch in held_out.items():
            for start in range(0, len(batch["ids"]) - count + 1, count):
                part = {name: tensor[start : start + count].to(self.device) for name, tensor in batch.items()}
                _, measures = self.losses(part, GRIDS[which], reading)  # with gradients: as compiled for training
                labels.append(float(measures["labels"]))
                if not reading:
                    continue
                for index, name in enumerate(phrases.ACTIONS):
                    right.setdefault(name, []).append(measures["right"][part["kind"] == index])
                taps = part["tap_label"] >= 0
                right.setdefault("inside", []).append(measures["inside"][taps])
                right.setdefault("unseen_pairs", []).append(measures["right"][taps & (part["unseen"] == 1)])
        result = {"held_out_labels": sum(labels) / len(labels)}
        for name, parts in right.items():
            if len(whole := torch.cat(parts)):
                result[f"held_out_{name}"] = float(whole.float().mean())
        return result

    def save(self, directory: Path) -> None:
        """Write everything that resuming needs, in files of at most 15 MB."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        tensors |= {f"muon.{k}": v.bfloat16() for k, v in self.muon.state().items()}
        for name, parameter in self.adam_parameters.items():
            for key, value in self.adam.state[parameter].items():
                tensors[f"adam.{key}/{name}"] = value.bfloat16() if key != "step" else value
        shards: list[dict[str, torch.Tensor]] = [{}]
        size = 0
        for name, tensor in tensors.items():
            piece = tensor.detach().cpu().contiguous()
            size += piece.nbytes
            if size > SHARD_BYTES:
                shards.append({})
                size = piece.nbytes
            shards[-1][name] = piece
        for index, shard in enumerate(shards):
            save_file(shard, directory / f"state-{index:02}.safetensors")
        status = {"step": self.step_number, "only_taps": self.only_taps, "landed": self.landed, "shards": len(shards)}
        (directory / "state.json").write_text(json.dumps(status) + "\n")

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""
        status = json.loads((directory / "state.json").read_text())
        tensors: dict[str, torch.Tensor] = {}
        for index in range(status["shards"]):
            tensors |= load_file(directory / f"state-{index:02}.safetensors")

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.heads.load_state_dict(part("heads."))
        self.muon.load(part("muon."))
        for name, parameter in self.adam_parameters.items():
            kept = {key: tensors.get(f"adam.{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            state = {key: value.to(self.device, torch.float32) for key, value in kept.items() if value is not None}
            if state:
                self.adam.state[parameter] = state
        self.step_number, self.only_taps, self.landed = status["step"], status["only_taps"], status["landed"]
