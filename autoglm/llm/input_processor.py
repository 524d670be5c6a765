"""From a request to a sequence: the prompt is read, and what cannot be served is refused."""

from dataclasses import replace

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import SparseAttentionConfig
from autoglm.device import beside
from autoglm.errors import RequestError
from autoglm.llm.model import LanguageModel
from autoglm.llm.prompt import Prompt, read_prompt, with_transcripts
from autoglm.llm.sequence import Request, Sequence
from autoglm.llm.sparse.divprune import prune
from autoglm.llm.sparse.policy import Sparsity
from autoglm.llm.stop import stop_ids
from autoglm.llm.structured_output.grammar import Grammars
from autoglm.preprocess.tokenizer import Detokenizer, Vocabulary


class Intake:
    """Reads requests, in the threads that submit them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        vocabulary: Vocabulary,
        model: LanguageModel,
        device: torch.device,
        max_context: int,
        default_max_tokens: int,
        sparse_attention: SparseAttentionConfig,
    ) -> None:
        self.checkpoint = checkpoint
        self.vocabulary = vocabulary
        self.model = model
        self.device = device
        self.max_context = max_context
        self.default_max_tokens = default_max_tokens
        self.sparse_attention = sparse_attention
        self.grammars = Grammars(checkpoint.path, checkpoint.text.vocab_size, checkpoint.eos_token_ids)

    def sequence(self, request: Request) -> Sequence:
        """Read a request. The answer begins with what its grammar forces there: it is computed with the prompt.

        Raises:
            RequestError: the request asks for what cannot be.
        """
        request = with_transcripts(request, self.checkpoint.audio_token_id, self.vocabulary.encode)
        length = len(request.token_ids)
        if not 0 < length < self.max_context:
            raise RequestError(f"prompt: {length} tokens; allowed: 1 to {self.max_context - 1} (engine.max_context)")
        highest = max(request.token_ids)
        if highest >= self.checkpoint.text.vocab_size or min(request.token_ids) < 0:
            raise RequestError(f"prompt: token id {highest}; allowed: 0 to {self.checkpoint.text.vocab_size - 1}")
        sampling = request.sampling
        max_tokens = min(sampling.max_tokens or self.default_max_tokens, self.max_context - length)
        answer_format = sampling.response_format
        matcher = None if answer_format is None else self.grammars.matcher(answer_format, max_tokens)
        sparsity = Sparsity.choose(self.sparse_attention, sampling) if request.grids else None
        if request.embeddings is None and request.audio_embeddings is None:
            prompt = self._prompt(request, sparsity)
        else:
            prompt = beside(self.device, lambda: self._prompt(request, sparsity))
        if prompt.embeddings is not None and prompt.embeddings.is_cuda:
            prompt.embeddings.record_stream(torch.cuda.default_stream(self.device))  # where passes read them
        request = replace(request, token_ids=prompt.token_ids, embeddings=prompt.embeddings, audio_embeddings=None)
        sequence = Sequence(
            request,
            prompt.positions,
            prompt.next_position,
            prompt.media,
            Detokenizer(self.vocabulary),
            stop_ids(self.checkpoint.eos_token_ids, sampling.stop_token_ids, sampling.ignore_eos),
            max_tokens,
            sparsity,
            matcher,
        )
        sequence.take_forced(1)
        return sequence

    def _prompt(self, request: Request, sparsity: Sparsity | None) -> Prompt:
        prompt = read_prompt(request, self.checkpoint)
        if sparsity is None or prompt.embeddings is None:
            return prompt
        on_device = prompt.embeddings.to(self.device)
        prompt = replace(prompt, media=sparsity.name(prompt.media), embeddings=on_device)
        return prune(prompt, sparsity, self.model.kernels) if sparsity.mode == "prune" else prompt
