"""What training minimises: CTC twice, on letters and on the language model's own embeddings.

The demo's language model stays as it is; it has only ever read text. So the bridge writes text: each of its embeddings
should be that of a token of the plain wording (`Command.plain`), or of a line break, which the model reads over, as it
reads over repetitions. Which of them comes where is nobody's business: with the line break as its blank, that is
CTC, where the "logit" of a token is how near an embedding is to the token's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from demo.speech.commands import PLAIN, Command, names
from demo.speech.model import letters

NEARNESS = 0.05  # of squared distances, which are about 512 between two tokens' embeddings


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


LETTERS = {letter: index for index, letter in enumerate(letters())}


def spell(command: Command) -> list[int]:
    """The letters of a transcript as indices."""
    return [LETTERS["|" if letter == " " else letter] for letter in command.text]


def ctc(logp: torch.Tensor, counts: torch.Tensor, targets: list[list[int]]) -> torch.Tensor:
    """Mean over clips of the loss per target; a clip too short for its target counts nothing.

    Args:
        logp: [B, T, targets], of which `counts` [B], on the CPU, exist.
    """
    flat = torch.tensor([place for target in targets for place in target], device=logp.device)
    sizes = torch.tensor([len(target) for target in targets])
    loss = F.ctc_loss(logp.transpose(0, 1), flat, counts, sizes, reduction="none", zero_infinity=True)
    return (loss / sizes.to(loss.device)).mean()


def commitment(outputs: torch.Tensor, counts: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Mean squared distance from each embedding to the nearest token's, which CTC alone would let it overshoot."""
    nearest = codebook.table[codebook.nearness(outputs).argmax(-1)]
    inside = torch.arange(outputs.shape[1])[None] < counts[:, None]
    return (outputs.float() - nearest).square().mean(-1)[inside.to(outputs.device)].mean()
