"""The model, optimizers and schedule of a training run."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from demo import model as demo_model
from demo import phrases, vocabulary
from demo.losses import AuxiliaryHeads, Batch, LossAndMeasures, LossTables, answer_loss, encode_images, run_questions
from demo.optimizer import Muon, split_parameters
from demo.records import GRIDS, LABELS
from demo.tokenizer import number_ids

SHARD_BYTES = 15_000_000


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rates."""

    vision_steps: int  # of the ViT alone
    joint_steps: int
    batch: int
    muon: float = 0.02  # spectral norm of an update
    adam: float = 1.5e-3
    decay: float = 0.05

    @property
    def steps(self) -> int:
        return self.vision_steps + self.joint_steps

    def rate(self, step: int) -> float:
        """Factor of the rates: warm-up in each phase, then cosine decay to 0 over the last 40% of the second."""
        phase_step = step if step < self.vision_steps else step - self.vision_steps
        warm = min(1.0, (phase_step + 1) / 150)
        cooling = max(0.0, (step - self.vision_steps) / max(1, self.joint_steps) - 0.6) / 0.4
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, cooling)))


class Trainer:
    """Model, auxiliary heads and optimizers."""

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self.schedule, self.device = schedule, device
        self.tokenizer = demo_model.tokenizer()
        text, vision = demo_model.text_config(self.tokenizer), demo_model.vision_config()
        torch.manual_seed(0)
        self.model = demo_model.DemoModel(text, vision)
        demo_model.initialize(self.model, self.tokenizer)
        self.heads = AuxiliaryHeads(text.hidden_size)
        label_ids = [
            [token for name in vocabulary.names_of(label) for token in self.tokenizer.encode(name).ids]
            for label in LABELS
        ]
        self.tables = LossTables(number_ids(self.tokenizer), label_ids, demo_model.IMAGE_LIMITS)
        for module in (self.model, self.heads, self.tables):
            module.to(device)
        matrices, rest = split_parameters(self.model)
        rest += [(f"heads.{name}", parameter) for name, parameter in self.heads.named_parameters()]
        self.muon = Muon(matrices, schedule.decay)
        self.adam_parameters = dict(rest)
        visual = [parameter for name, parameter in rest if name.startswith("visual.")]
        others = [parameter for name, parameter in rest if not name.startswith("visual.")]
        self.adam = torch.optim.AdamW(
            [{"params": visual}, {"params": others}], betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
        )
        self.step_number = 0
        self.only_taps = True
        self.tap_accuracy = 0.0  # moving average
        if device.type == "cuda":
            for block in [*self.model.visual.blocks, *self.model.language.layers]:
                block.compile(dynamic=False)

    def losses(self, batch: Batch, grid: tuple[int, int], joint: bool) -> LossAndMeasures:
        """The loss of a batch and its measures."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            visual = encode_images(self.model.visual, batch, grid, self.tables)
            embeddings = self.model.language.embed_tokens.weight.detach()
            loss, measures = self.heads(visual, batch, embeddings, self.tables)
            if not joint:
                return loss, measures
            hidden, pointer = run_questions(self.model.language, visual, batch)
            answer, answer_measures = answer_loss(self.model.language, hidden, batch, self.tables)
        measures |= answer_measures | {"pointer_loss": pointer.detach()}
        return 0.4 * loss + answer + 0.3 * pointer, measures

    def step(self, batch: Batch, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
        """One training step."""
        joint = self.step_number >= self.schedule.vision_steps
        loss, measures = self.losses(batch, grid, joint)
        loss.backward()  # type: ignore[no-untyped-call]
        scale = self.schedule.rate(self.step_number)
        visual_factor = 0.5 if joint else 1.0
        for group, factor in zip(self.adam.param_groups, (visual_factor, 1.0), strict=True):
            group["lr"] = self.schedule.adam * scale * factor
        torch.nn.utils.clip_grad_norm_(self.adam_parameters.values(), 1.0)
        rates = {"visual": self.schedule.muon * scale * visual_factor}
        if joint:
            rates["language"] = self.schedule.muon * scale
        self.adam.step()
        self.muon.step(rates)
        self.adam.zero_grad(set_to_none=True)
        for members in self.muon.groups.values():
            for parameter in members:
                parameter.grad = None
        self.step_number += 1
        return measures | {"loss": loss.detach()}

    def evaluate(self, held_out: dict[int, Batch], count: int) -> dict[str, float]:
        """Accuracy of labels and, teacher-forced, of answers by action on held-out screens, in batches of `count`."""
        joint = self.step_number > self.schedule.vision_steps
        labels: list[float] = []
        right: dict[str, list[torch.Tensor]] = {}
        for grid_index, batch in held_out.items():
            for start in range(0, len(batch["ids"]) - count + 1, count):
                part = {name: tensor[start : start + count].to(self.device) for name, tensor in batch.items()}
                _, measures = self.losses(part, GRIDS[grid_index], joint)  # with gradients: as compiled for training
                labels.append(float(measures["labels"]))
                if not joint:
                    continue
                for index, name in enumerate(phrases.ACTIONS):
                    right.setdefault(name, []).append(measures["right"][part["action"] == index])
                taps = part["tap_label"] >= 0
                right.setdefault("inside", []).append(measures["inside"][taps])
                right.setdefault("unseen_pairs", []).append(measures["right"][taps & (part["unseen"] == 1)])
        result = {"held_out_labels": sum(labels) / len(labels)}
        for name, parts in right.items():
            if len(whole := torch.cat(parts)):
                result[f"held_out_{name}"] = float(whole.float().mean())
        return result

    def save(self, directory: Path) -> None:
        """Write the state that `load` reads, in files of at most 15 MB."""
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
        status = {"step": self.step_number, "only_taps": self.only_taps, "tap_accuracy": self.tap_accuracy}
        (directory / "state.json").write_text(json.dumps(status | {"shards": len(shards)}) + "\n")

    def load(self, directory: Path) -> None:
        """Restore the state that `save` wrote."""
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
            saved = {key: tensors.get(f"adam.{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            state = {key: value.to(self.device, torch.float32) for key, value in saved.items() if value is not None}
            if state:
                self.adam.state[parameter] = state
        self.step_number, self.only_taps = status["step"], status["only_taps"]
        self.tap_accuracy = status["tap_accuracy"]
