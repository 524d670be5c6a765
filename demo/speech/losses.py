"""What training minimises: CTC on the words of the transcript, and distances to the language model's own embeddings.

The demo's language model stays as it is; it has only ever read text. So the bridge writes text: each of its embeddings
should be that of a token of the plain wording (`Command.plain`), or of a line break. It says nothing until the clip has
been heard: its last embeddings are the tokens, one after another, and all before are line breaks, which the language
model reads over.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from demo.speech.commands import PLAIN, Command, names
from demo.speech.model import SPACE, labels

NEARNESS = 0.05  # of squared distances, which are about 512 between two tokens' embeddings
BLANK = 0  # the place of the line break


class Codebook(nn.Module):
    """The tokens that plain wordings are made of; the first is the line break."""

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
        self.places = {token: place for place, token in enumerate(self.ids)}
        self._known: dict[str, list[int]] = {}
        self.register_buffer("table", embeddings[self.ids].float())

    def encode(self, command: Command) -> list[int]:
        """Places of the tokens of a command's plain wording; none of words that are no command."""
        plain = command.plain
        if plain not in self._known:
            self._known[plain] = [self.places[token] for token in self.tokenizer.encode(plain).ids]
        return self._known[plain]

    def nearness(self, outputs: torch.Tensor) -> torch.Tensor:
        """[B, S, hidden] -> log-probabilities [B, S, tokens]."""
        outputs = outputs.float()
        cross = outputs @ self.table.T
        return (NEARNESS * (2 * cross - self.table.square().sum(1))).log_softmax(-1)


def collapse(places: list[int]) -> list[int]:
    """What a path says: without repetitions, then without blanks, which are 0."""
    return [b for a, b in zip([-1, *places], places, strict=False) if a != b and b]


LABELS = {label: index for index, label in enumerate(labels())}


def spell(command: Command) -> list[int]:
    """The labels of a transcript: words with spaces between them, or characters."""
    if command.language == "zh":
        return [LABELS[character] for character in command.text]
    first, *others = (LABELS[word] for word in command.text.split())
    return [first, *(label for word in others for label in (LABELS[SPACE], word))]


def ctc(logp: torch.Tensor, counts: torch.Tensor, targets: list[list[int]]) -> torch.Tensor:
    """Mean over clips of the loss per target; a clip too short for its target counts nothing.

    Args:
        logp: [B, T, targets], of which `counts` [B], on the CPU, exist.
    """
    flat = torch.tensor([place for target in targets for place in target]).to(logp.device, non_blocking=True)
    sizes = torch.tensor([len(target) for target in targets])
    loss = F.ctc_loss(logp.transpose(0, 1), flat, counts, sizes, reduction="none", zero_infinity=True)
    return (loss / sizes.to(loss.device, non_blocking=True)).mean()


def bridge_path(places: list[int], slots: int) -> list[int]:
    """What each of a clip's embeddings should be: blanks, then the tokens."""
    return [BLANK] * (slots - len(places)) + places[-slots:]


def saying(
    outputs: torch.Tensor, counts: torch.Tensor, targets: list[list[int]], codebook: Codebook
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the cross entropy and of the squared distance per dimension; tokens weigh as much as blanks, which are
    many more.

    Args:
        outputs: [B, S, hidden], of which `counts` [B], on the CPU, exist.
        targets: places of the tokens that each clip should say.
    """
    behind = -1
    length = outputs.shape[1]
    rows = [bridge_path(places, n) for places, n in zip(targets, counts.tolist(), strict=True)]
    path = torch.tensor([row + [behind] * (length - len(row)) for row in rows])
    path = path.to(outputs.device, non_blocking=True)
    place = path.clamp(min=0)
    entropy = -codebook.nearness(outputs).gather(-1, place[..., None])[..., 0]
    off = (outputs.float() - codebook.table[place]).square().mean(-1)
    token, blank = (path > BLANK).float(), (path == BLANK).float()
    weight = token / token.sum() + blank / blank.sum().clamp(min=1)
    return (entropy * weight).sum(), (off * weight).sum()
