"""Losses of the speech model: CTC on the transcript, and distances of the bridge's outputs to token embeddings.

The language model is frozen and was trained on text only. The bridge's targets are therefore its input embeddings of
the plain wording's tokens (`Command.plain`), consecutive and at the end of the clip, after those of line breaks, which
the language model ignores.
"""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from demo.speech.commands import PLAIN, Command, names
from demo.speech.model import CTC_LABELS, SPACE

DISTANCE_SCALE = 0.05  # of squared distances, which are about 512 between the embeddings of two tokens
BLANK = 0  # index of the line break in the codebook
CTC_IDS = {label: index for index, label in enumerate(CTC_LABELS)}


class Codebook(nn.Module):
    """The embeddings of the line break, first, and of the tokens of all plain wordings."""

    table: torch.Tensor

    def __init__(self, tokenizer: Tokenizer, embeddings: torch.Tensor) -> None:
        """embeddings: the language model's, [vocab, hidden]."""
        super().__init__()
        self.tokenizer = tokenizer
        used = {
            token
            for language, forms in PLAIN.items()
            for form in forms.values()
            for name in names(language)
            for token in tokenizer.encode(form.format(name)).ids
        }
        self.ids = [*tokenizer.encode("\n").ids, *sorted(used)]
        self.indices = {token: index for index, token in enumerate(self.ids)}
        self._encoded: dict[str, list[int]] = {}
        self.register_buffer("table", embeddings[self.ids].float())

    def encode(self, command: Command) -> list[int]:
        """Indices of the tokens of a command's plain wording; empty without an intent."""
        plain = command.plain
        if plain not in self._encoded:
            self._encoded[plain] = [self.indices[token] for token in self.tokenizer.encode(plain).ids]
        return self._encoded[plain]

    def log_probabilities(self, outputs: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, S, hidden] -> log probabilities of the indices [B, S, indices], by squared distance."""
        outputs = outputs.float()
        cross = outputs @ self.table.T
        return (DISTANCE_SCALE * (2 * cross - self.table.square().sum(1))).log_softmax(-1)


def collapse(path: list[int]) -> list[int]:
    """The labels of a CTC path: repetitions are merged, then blanks (0) are removed."""
    return [b for a, b in zip([-1, *path], path, strict=False) if a != b and b]


def ctc_targets(command: Command) -> list[int]:
    """The labels of a transcript: words separated by SPACE, or characters."""
    if command.language == "zh":
        return [CTC_IDS[character] for character in command.text]
    first, *others = (CTC_IDS[word] for word in command.text.split())
    return [first, *(label for word in others for label in (CTC_IDS[SPACE], word))]


def ctc_loss(logp: torch.Tensor, num_frames: torch.Tensor, targets: list[list[int]]) -> torch.Tensor:
    """Mean over clips of the loss per target label; 0 for a clip that is too short for its labels.

    Args:
        logp: [B, T, labels].
        num_frames: of each clip, [B] on the CPU.
    """
    flat = torch.tensor([label for target in targets for label in target]).to(logp.device, non_blocking=True)
    sizes = torch.tensor([len(target) for target in targets])
    loss = F.ctc_loss(logp.transpose(0, 1), flat, num_frames, sizes, reduction="none", zero_infinity=True)
    return (loss / sizes.to(loss.device, non_blocking=True)).mean()


def bridge_path(tokens: list[int], num_embeddings: int) -> list[int]:
    """The target of each embedding of a clip: blanks, then the tokens."""
    return [BLANK] * (num_embeddings - len(tokens)) + tokens[-num_embeddings:]


def bridge_loss(
    outputs: torch.Tensor, num_embeddings: torch.Tensor, targets: list[list[int]], codebook: Codebook
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the cross entropy and of the squared distance per dimension. Tokens and the more numerous blanks have
    the same total weight.

    Args:
        outputs: [B, S, hidden].
        num_embeddings: of each clip, [B] on the CPU.
        targets: codebook indices of each clip's tokens.
    """
    padding = -1
    length = outputs.shape[1]
    rows = [bridge_path(tokens, n) for tokens, n in zip(targets, num_embeddings.tolist(), strict=True)]
    path = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    path = path.to(outputs.device, non_blocking=True)
    indices = path.clamp(min=0)
    entropy = -codebook.log_probabilities(outputs).gather(-1, indices[..., None])[..., 0]
    distance = (outputs.float() - codebook.table[indices]).square().mean(-1)
    token, blank = (path > BLANK).float(), (path == BLANK).float()
    weight = token / token.sum() + blank / blank.sum().clamp(min=1)
    return (entropy * weight).sum(), (distance * weight).sum()
