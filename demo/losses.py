"""What training minimises, and how it counts right answers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from autoglm.kernels.reference.attention import gather_angles, rotate
from autoglm.llm.model import LanguageModel, rotary
from autoglm.vision.vit import VisionTransformer
from demo.records import IGNORED, NOTHING, ROLES

Batch = dict[str, torch.Tensor]

POINTER_LAYER = 3  # whose first two heads learn from the start to look at the place that an answer is about
POINTER_HEADS = 2
CELLS = 32  # labelled visual tokens of a screen whose centres are learnt in one step
SIGMA = 8.0  # of a coordinate's soft target, in thousandths


def patchify(image: torch.Tensor, grid: tuple[int, int], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3], already of the model's size -> normalised patches [B * rows * columns, 1176]."""
    count, (rows, columns) = image.shape[0], grid
    x = (image.float() * (1 / 255) - mean) / std
    x = x.view(count, rows // 2, 2, 14, columns // 2, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(count * rows * columns, -1)


class Targets(nn.Module):
    """Constants of the losses: codes of numbers, soft targets, the image's normalisation."""

    mean: torch.Tensor
    std: torch.Tensor
    numbers: torch.Tensor
    soft: torch.Tensor
    spoken: torch.Tensor
    spoken_weight: torch.Tensor

    def __init__(
        self, numbers: list[int], spoken: list[list[int]], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        """numbers: ids of 0..999; spoken: ids of all names of each label."""
        super().__init__()
        distance = torch.arange(1000)[:, None] - torch.arange(1000)[None]
        longest = max(len(ids) for ids in spoken)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.register_buffer("numbers", torch.tensor(numbers))
        self.register_buffer("soft", torch.softmax(-(distance.float() ** 2) / (2 * SIGMA**2), dim=1))
        self.register_buffer("spoken", torch.tensor([ids + [0] * (longest - len(ids)) for ids in spoken]))
        weights = [[1 / len(ids)] * len(ids) + [0.0] * (longest - len(ids)) for ids in spoken]
        self.register_buffer("spoken_weight", torch.tensor(weights))

    def labels(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The mean embedding of each label's tokens: [labels, hidden]."""
        return (embeddings[self.spoken] * self.spoken_weight.unsqueeze(-1)).sum(1)


class Heads(nn.Module):
    """Throw-away readings of a visual token: which element is drawn there, where its centre is, what role it has.

    The element is read in the language model's own input embeddings, so that looking up a word among visual tokens is
    the same for every word.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.to_label = nn.Linear(hidden, hidden, bias=False)
        self.to_center = nn.Linear(hidden, 2 * hidden, bias=False)
        self.to_role = nn.Linear(hidden, len(ROLES))
        self.nothing = nn.Parameter(torch.randn(1, hidden))
        self.sharpness = nn.Parameter(torch.tensor(2.3))
        nn.init.eye_(self.to_label.weight)

    def forward(
        self, visual: torch.Tensor, batch: Batch, embeddings: torch.Tensor, targets: Targets
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """visual [B, V, hidden] -> loss, and measures (tensors)."""
        codes = torch.cat((targets.labels(embeddings), self.nothing.to(embeddings.dtype)))
        label, role = batch["cell_label"].long(), batch["cell_role"].long()
        likeness = F.normalize(self.to_label(visual).float(), dim=-1) @ F.normalize(codes.float(), dim=-1).T
        weight = torch.ones(NOTHING + 1, device=visual.device)
        weight[NOTHING] = 0.25
        scores = likeness * self.sharpness.exp()
        label_loss = F.cross_entropy(scores.flatten(0, 1), label.flatten(), weight, ignore_index=IGNORED)
        role_loss = F.cross_entropy(self.to_role(visual).float().flatten(0, 1), role.flatten(), ignore_index=IGNORED)

        marked = (label >= 0) & (label < NOTHING)
        order = (torch.rand_like(marked, dtype=torch.float32) + marked).topk(CELLS, dim=1).indices
        chosen = marked.gather(1, order)
        seen = visual.gather(1, order.unsqueeze(-1).expand(-1, -1, visual.shape[-1]))
        center = batch["cell_center"].long().gather(1, order.unsqueeze(-1).expand(-1, -1, 2)).clamp(min=0)
        wanted = self.to_center(seen).view(*seen.shape[:2], 2, -1)
        logits = (wanted @ embeddings[targets.numbers].to(wanted.dtype).T).float() / math.sqrt(visual.shape[-1])
        center_loss = -(targets.soft[center] * logits.log_softmax(-1)).sum(-1).sum(-1)
        center_loss = (center_loss * chosen).sum() / chosen.sum().clamp(min=1)
        scale_loss = (visual.float().square().mean(-1).sqrt() - 1).square().mean()

        with torch.no_grad():
            found = (scores.argmax(-1) == label) & marked
            off = (logits.argmax(-1) - center).abs().float().sum(-1) / 2
            measures = {
                "labels": found.sum() / marked.sum().clamp(min=1),
                "center_off": (off * chosen).sum() / chosen.sum().clamp(min=1),
                "label_loss": label_loss.detach(),
                "center_loss": center_loss.detach(),
                "role_loss": role_loss.detach(),
                "visual_rms": visual.float().square().mean().sqrt(),
            }
        return label_loss + 0.15 * center_loss + 0.3 * role_loss + scale_loss, measures


def see(visual: VisionTransformer, batch: Batch, grid: tuple[int, int], targets: Targets) -> torch.Tensor:
    """Visual tokens of a batch of screens, [B, V, hidden]."""
    count = batch["image"].shape[0]
    patches = patchify(batch["image"], grid, targets.mean, targets.std)
    return visual(patches, [(1, *grid)] * count).view(count, grid[0] * grid[1] // 4, -1)  # type: ignore[no-any-return]


class BranchAttention:
    """Attention of one pass over [B, L] tokens: what is common to all questions, and one's own question before.

    The queries and keys of POINTER_LAYER are `kept`.
    """

    kept: tuple[torch.Tensor, torch.Tensor]

    def __init__(self, language: LanguageModel, bias: torch.Tensor, positions: torch.Tensor) -> None:
        """bias [B, 1, L, L]: 0 where a token sees another, else minus infinity; positions [3, B * L]."""
        config = language.config
        self.bias = bias
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.angles = gather_angles(rotary(config, int(positions.max()) + 1, positions.device), positions)

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        count, length = self.bias.shape[0], self.bias.shape[-1]
        heads = qkv.sum(0).view(count * length, sum(self.heads), -1)
        q, k, v = torch.split(heads, self.heads, dim=1)
        q, k = rotate(q, self.angles), rotate(k, self.angles)
        if layer == POINTER_LAYER:
            self.kept = q.view(count, length, *q.shape[1:]), k.view(count, length, *k.shape[1:])
        query, key, value = (t.view(count, length, *t.shape[1:]).transpose(1, 2).to(self.bias.dtype) for t in (q, k, v))
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, self.bias)
        return mixed.transpose(1, 2).flatten(0, 1).flatten(1)


def visible(branch: torch.Tensor) -> torch.Tensor:
    """branch [B, L] -> bool [B, L, L], whether a token (second axis) sees another (third)."""
    length = branch.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    common = branch.unsqueeze(1) == 0
    own = branch.unsqueeze(2) == branch.unsqueeze(1)
    return earlier & (common | own)


def read(language: LanguageModel, visual: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the language model over all questions: hidden [B, L, hidden] after the norm, and the pointer loss."""
    count, length = batch["ids"].shape
    places = batch["image_start"].long().unsqueeze(1) + torch.arange(visual.shape[1], device=visual.device)
    hidden = language.embed(batch["ids"].long())
    hidden = hidden.scatter(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]), visual.to(hidden.dtype))
    positions = batch["positions"].permute(1, 0, 2).reshape(3, -1)
    seen = visible(batch["branch"])
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf).unsqueeze(1)
    attention = BranchAttention(language, bias, positions)
    x = language(hidden.flatten(0, 1), attention)
    return x.view(count, length, -1), _pointer_loss(*attention.kept, batch, places, seen)


def _pointer_loss(
    q: torch.Tensor, k: torch.Tensor, batch: Batch, places: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """How little of the pointer heads' attention lies on the target, where an answer is decided."""
    rows = torch.arange(q.shape[0], device=q.device).unsqueeze(1)
    at = batch["tap_at"].long().flatten(1)  # [B, 3 * questions]
    query = q[rows, at, :POINTER_HEADS].float()
    scores = torch.einsum("bthd,bld->bthl", query, k[:, :, 0].float()) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen[rows, at].unsqueeze(2), -torch.inf)
    drawn = torch.full(batch["ids"].shape, -2, device=q.device).scatter(1, places, batch["cell_label"].long())
    wanted = batch["tap_label"].long().repeat_interleave(3, dim=1).unsqueeze(-1)
    on_target = drawn.unsqueeze(1) == wanted  # [B, 3 * questions, L]
    exists = on_target.any(-1) & (wanted.squeeze(-1) >= 0)
    score = scores.masked_fill(~on_target.unsqueeze(2), -1e4).logsumexp(-1) - scores.logsumexp(-1)
    weight = exists.unsqueeze(-1)
    return -(score.clamp(min=-20) * weight).sum() / (weight.sum() * POINTER_HEADS).clamp(min=1)


def answer(
    language: LanguageModel, hidden: torch.Tensor, batch: Batch, targets: Targets
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of the answers, and per-question results: `right` [B, questions] bool, and `off` of taps."""
    rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
    wanted = batch["answer_id"].long()
    logits = language.logits(hidden[rows, batch["answer_at"].long()]).float()
    text_loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)

    tap = batch["tap_center"][..., 0] >= 0  # [B, questions]
    center = batch["tap_center"].long().clamp(min=0)
    at = batch["tap_at"].long()[..., 1:]
    spots = language.logits(hidden[rows.unsqueeze(-1), at]).float()  # [B, questions, 2, vocab]
    logp = spots.log_softmax(-1)[..., targets.numbers]
    number_loss = -(targets.soft[center] * logp).sum(-1).sum(-1)
    number_loss = (number_loss * tap).sum() / tap.sum().clamp(min=1)
    with torch.no_grad():
        wrong = ((logits.argmax(-1) != wanted) & (wanted != IGNORED)).float()
        mistakes = torch.zeros(tap.shape, device=hidden.device)
        mistakes.scatter_add_(1, batch["answer_question"].long(), wrong)
        best = logp.argmax(-1)  # [B, questions, 2]
        numeric = spots.argmax(-1) == targets.numbers[best]
        box = batch["tap_box"].long()
        inside = (best >= box[..., :2]).all(-1) & (best < box[..., 2:]).all(-1) & numeric.all(-1)
        measures = {
            "right": (mistakes == 0) & (inside | ~tap) & (batch["kind"] != IGNORED),
            "off": ((best - center).abs().float().mean(-1) * tap),
            "inside": inside,
            "text_loss": text_loss.detach(),
            "number_loss": number_loss.detach(),
        }
    return text_loss + 0.25 * number_loss, measures
