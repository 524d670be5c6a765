"""Losses and measures of training."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from autoglm.checkpoint import ImageLimits
from autoglm.kernels.reference.attention import gather_angles, rotate
from autoglm.llm.model import LanguageModel, attention_config
from autoglm.vision.vit import VisionTransformer
from demo.records import IGNORE_INDEX, NO_ELEMENT, ROLES

Batch = dict[str, torch.Tensor]
LossAndMeasures = tuple[torch.Tensor, dict[str, torch.Tensor]]

POINTER_LAYER = 3  # whose first heads are trained to attend to the target
POINTER_HEADS = 2
NUM_CENTERS = 32  # visual tokens per screen in the loss of the centres
SIGMA = 8.0  # of the soft targets of coordinates, in thousandths of the screen


def patchify(image: torch.Tensor, grid: tuple[int, int], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Resized images, uint8 [B, H, W, 3] -> normalised patches [B * rows * columns, 1176]."""
    count, (rows, columns) = image.shape[0], grid
    x = (image.float() * (1 / 255) - mean) / std
    x = x.view(count, rows // 2, 2, 14, columns // 2, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(count * rows * columns, -1)


class LossTables(nn.Module):
    """Constants: the token ids of the numbers 0..999 and of all names of each label, and the image normalisation."""

    mean: torch.Tensor
    std: torch.Tensor
    number_ids: torch.Tensor
    soft_targets: torch.Tensor
    label_ids: torch.Tensor
    label_weights: torch.Tensor

    def __init__(self, number_ids: list[int], label_ids: list[list[int]], limits: ImageLimits) -> None:
        super().__init__()
        distance = torch.arange(1000)[:, None] - torch.arange(1000)[None]
        longest = max(len(ids) for ids in label_ids)
        self.register_buffer("mean", torch.tensor(limits.mean))
        self.register_buffer("std", torch.tensor(limits.std))
        self.register_buffer("number_ids", torch.tensor(number_ids))
        self.register_buffer("soft_targets", torch.softmax(-(distance.float() ** 2) / (2 * SIGMA**2), dim=1))
        self.register_buffer("label_ids", torch.tensor([ids + [0] * (longest - len(ids)) for ids in label_ids]))
        weights = [[1 / len(ids)] * len(ids) + [0.0] * (longest - len(ids)) for ids in label_ids]
        self.register_buffer("label_weights", torch.tensor(weights))

    def label_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The mean embedding of each label's tokens, [labels, hidden]."""
        return (embeddings[self.label_ids] * self.label_weights.unsqueeze(-1)).sum(1)


class AuxiliaryHeads(nn.Module):
    """Predict from a visual token the label, centre and role of the element drawn there; used in training only.

    Labels are predicted in the space of the language model's input embeddings, so that finding a word among the visual
    tokens is the same operation for every word.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.to_label = nn.Linear(hidden, hidden, bias=False)
        self.to_center = nn.Linear(hidden, 2 * hidden, bias=False)
        self.to_role = nn.Linear(hidden, len(ROLES))
        self.no_element = nn.Parameter(torch.randn(1, hidden))
        self.sharpness = nn.Parameter(torch.tensor(2.3))
        nn.init.eye_(self.to_label.weight)

    def forward(
        self, visual: torch.Tensor, batch: Batch, embeddings: torch.Tensor, tables: LossTables
    ) -> LossAndMeasures:
        """The loss of visual tokens [B, V, hidden], and measures."""
        codes = torch.cat((tables.label_embeddings(embeddings), self.no_element.to(embeddings.dtype)))
        label, role = batch["cell_label"].long(), batch["cell_role"].long()
        similarity = F.normalize(self.to_label(visual).float(), dim=-1) @ F.normalize(codes.float(), dim=-1).T
        weight = torch.ones(NO_ELEMENT + 1, device=visual.device)
        weight[NO_ELEMENT] = 0.25
        scores = similarity * self.sharpness.exp()
        label_loss = F.cross_entropy(scores.flatten(0, 1), label.flatten(), weight, ignore_index=IGNORE_INDEX)
        role_logits = self.to_role(visual).float()
        role_loss = F.cross_entropy(role_logits.flatten(0, 1), role.flatten(), ignore_index=IGNORE_INDEX)

        labelled = (label >= 0) & (label < NO_ELEMENT)
        cells = (torch.rand_like(labelled, dtype=torch.float32) + labelled).topk(NUM_CENTERS, dim=1).indices
        chosen = labelled.gather(1, cells)
        features = visual.gather(1, cells.unsqueeze(-1).expand(-1, -1, visual.shape[-1]))
        center = batch["cell_center"].long().gather(1, cells.unsqueeze(-1).expand(-1, -1, 2)).clamp(min=0)
        predicted = self.to_center(features).view(*features.shape[:2], 2, -1)
        logits = (predicted @ embeddings[tables.number_ids].to(predicted.dtype).T).float() / math.sqrt(visual.shape[-1])
        center_loss = -(tables.soft_targets[center] * logits.log_softmax(-1)).sum(-1).sum(-1)
        center_loss = (center_loss * chosen).sum() / chosen.sum().clamp(min=1)
        scale_loss = (visual.float().square().mean(-1).sqrt() - 1).square().mean()

        with torch.no_grad():
            right = (scores.argmax(-1) == label) & labelled
            off = (logits.argmax(-1) - center).abs().float().sum(-1) / 2
            measures = {
                "labels": right.sum() / labelled.sum().clamp(min=1),
                "center_off": (off * chosen).sum() / chosen.sum().clamp(min=1),
                "label_loss": label_loss.detach(),
                "center_loss": center_loss.detach(),
                "role_loss": role_loss.detach(),
                "visual_rms": visual.float().square().mean().sqrt(),
            }
        return label_loss + 0.15 * center_loss + 0.3 * role_loss + scale_loss, measures


def encode_images(vit: VisionTransformer, batch: Batch, grid: tuple[int, int], tables: LossTables) -> torch.Tensor:
    """Visual tokens of a batch of screens, [B, V, hidden]."""
    count = batch["image"].shape[0]
    patches = patchify(batch["image"], grid, tables.mean, tables.std)
    return vit(patches, [(1, *grid)] * count).view(count, grid[0] * grid[1] // 4, -1)  # type: ignore[no-any-return]


class SegmentAttention:
    """The attention of one pass over [B, L] tokens."""

    pointer_qk: tuple[torch.Tensor, torch.Tensor]  # queries and keys of POINTER_LAYER, [B, L, heads, head_dim]

    def __init__(self, language: LanguageModel, bias: torch.Tensor, positions: torch.Tensor) -> None:
        """bias [B, 1, L, L]: 0 where a token attends to another, else minus infinity; positions [3, B * L]."""
        config = language.config
        self.bias = bias
        self.num_heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        constants = attention_config(config, int(positions.max()) + 1, positions.device, torch.float32)
        self.angles = gather_angles(constants, positions)

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        count, length = self.bias.shape[0], self.bias.shape[-1]
        heads = qkv.sum(0).view(count * length, sum(self.num_heads), -1)
        q, k, v = torch.split(heads, self.num_heads, dim=1)
        q, k = rotate(q, self.angles), rotate(k, self.angles)
        if layer == POINTER_LAYER:
            self.pointer_qk = q.view(count, length, *q.shape[1:]), k.view(count, length, *k.shape[1:])
        query, key, value = (t.view(count, length, *t.shape[1:]).transpose(1, 2).to(self.bias.dtype) for t in (q, k, v))
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, self.bias)
        return mixed.transpose(1, 2).flatten(0, 1).flatten(1)


def attention_mask(segment: torch.Tensor) -> torch.Tensor:
    """Segments [B, L] -> bool [B, L, L]: tokens (axis 1) attend to earlier ones of segment 0 and of their own."""
    length = segment.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    common = segment.unsqueeze(1) == 0
    own = segment.unsqueeze(2) == segment.unsqueeze(1)
    return earlier & (common | own)


def run_questions(language: LanguageModel, visual: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the language model over all questions: hidden [B, L, hidden] after the final norm, and the pointer loss."""
    count, length = batch["ids"].shape
    image_indices = batch["image_start"].long().unsqueeze(1) + torch.arange(visual.shape[1], device=visual.device)
    hidden = language.embed(batch["ids"].long())
    hidden = hidden.scatter(1, image_indices.unsqueeze(-1).expand_as(visual), visual.to(hidden.dtype))
    positions = batch["positions"].permute(1, 0, 2).reshape(3, -1)
    mask = attention_mask(batch["segment"])
    device = hidden.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    bias = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, -torch.inf).unsqueeze(1)
    attention = SegmentAttention(language, bias, positions)
    x = language(hidden.flatten(0, 1), attention)
    return x.view(count, length, -1), _pointer_loss(*attention.pointer_qk, batch, image_indices, mask)


def _pointer_loss(
    q: torch.Tensor, k: torch.Tensor, batch: Batch, image_indices: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean negative log of the pointer heads' attention to the target where its visibility, x and y are predicted."""
    rows = torch.arange(q.shape[0], device=q.device).unsqueeze(1)
    indices = batch["tap_index"].long().flatten(1)  # [B, 3 * questions]
    query = q[rows, indices, :POINTER_HEADS].float()
    scores = torch.einsum("bthd,bld->bthl", query, k[:, :, 0].float()) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask[rows, indices].unsqueeze(2), -torch.inf)
    labels = torch.full(batch["ids"].shape, -2, device=q.device)
    labels = labels.scatter(1, image_indices, batch["cell_label"].long())
    target = batch["tap_label"].long().repeat_interleave(3, dim=1).unsqueeze(-1)
    on_target = labels.unsqueeze(1) == target  # [B, 3 * questions, L]
    exists = on_target.any(-1) & (target.squeeze(-1) >= 0)
    score = scores.masked_fill(~on_target.unsqueeze(2), -1e4).logsumexp(-1) - scores.logsumexp(-1)
    weight = exists.unsqueeze(-1)
    return -(score.clamp(min=-20) * weight).sum() / (weight.sum() * POINTER_HEADS).clamp(min=1)


def answer_loss(language: LanguageModel, hidden: torch.Tensor, batch: Batch, tables: LossTables) -> LossAndMeasures:
    """The loss of the answers, and measures; `right` and (of taps) `inside` are bool [B, questions]."""
    rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
    target = batch["answer_token"].long()
    logits = language.logits(hidden[rows, batch["answer_index"].long()]).float()
    text_loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX)

    tap = batch["tap_center"][..., 0] >= 0  # [B, questions]
    center = batch["tap_center"].long().clamp(min=0)
    indices = batch["tap_index"].long()[..., 1:]
    number_logits = language.logits(hidden[rows.unsqueeze(-1), indices]).float()  # [B, questions, 2, vocab]
    logp = number_logits.log_softmax(-1)[..., tables.number_ids]
    number_loss = -(tables.soft_targets[center] * logp).sum(-1).sum(-1)
    number_loss = (number_loss * tap).sum() / tap.sum().clamp(min=1)
    with torch.no_grad():
        wrong = ((logits.argmax(-1) != target) & (target != IGNORE_INDEX)).float()
        mistakes = torch.zeros(tap.shape, device=hidden.device)
        mistakes.scatter_add_(1, batch["answer_question"].long(), wrong)
        best = logp.argmax(-1)  # [B, questions, 2]
        numeric = number_logits.argmax(-1) == tables.number_ids[best]
        box = batch["tap_box"].long()
        inside = (best >= box[..., :2]).all(-1) & (best < box[..., 2:]).all(-1) & numeric.all(-1)
        measures = {
            "right": (mistakes == 0) & (inside | ~tap) & (batch["action"] != IGNORE_INDEX),
            "inside": inside,
            "text_loss": text_loss.detach(),
            "number_loss": number_loss.detach(),
        }
    return text_loss + 0.25 * number_loss, measures
