"""Turns requests into sequences, and rejects those that cannot be served."""

from dataclasses import replace

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import EngineConfig, SparseAttentionConfig
from autoglm.device import run_on_side_stream
from autoglm.errors import RequestError, Verbatim, invalid
from autoglm.llm.model import LanguageModel
from autoglm.llm.prompt import build_prompt, insert_transcripts
from autoglm.llm.sequence import Prompt, Request, Sequence
from autoglm.llm.sparse.divprune import prune
from autoglm.llm.sparse.policy import resolve, salt_media
from autoglm.llm.stop import stop_token_ids
from autoglm.llm.structured_output.grammar import Grammars
from autoglm.preprocess.tokenizer import Detokenizer, Vocabulary


class InputProcessor:
    """Runs in the threads that submit requests."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        sparse_attention: SparseAttentionConfig,
        vocabulary: Vocabulary,
        model: LanguageModel,
        *,
        max_context: int,
    ) -> None:
        self.checkpoint = checkpoint
        self.default_max_tokens = config.default_max_tokens
        self.sparse_attention = sparse_attention
        self.vocabulary = vocabulary
        self.model = model
        self.device = model.device
        self.max_context = max_context
        self.grammars = Grammars(checkpoint.path, checkpoint.text.vocab_size, checkpoint.eos_token_ids)

    def process(self, request: Request) -> Sequence:
        """The sequence of a request. Tokens that the grammar forces at its beginning are computed with the prompt.

        Raises:
            RequestError: the request is not valid.
        """
        request = insert_transcripts(request, self.checkpoint.audio_token_id, self.vocabulary.encode)
        length, vocab_size = len(request.token_ids), self.checkpoint.text.vocab_size
        if not 0 < length < self.max_context:
            accepted = f"at most {self.max_context - 1} tokens, one less than the context of {self.max_context}"
            raise invalid("prompt", Verbatim(f"{length} tokens"), accepted if length else "at least one token")
        for token in (min(request.token_ids), max(request.token_ids)):
            if not 0 <= token < vocab_size:
                raise RequestError(f"prompt must have token ids between 0 and {vocab_size - 1} (got {token})")
        params = request.sampling_params
        max_tokens = min(params.max_tokens or self.default_max_tokens, self.max_context - length)
        response_format = params.response_format
        matcher = None if response_format is None else self.grammars.matcher(response_format, max_tokens)
        sparse = resolve(self.sparse_attention, params) if request.image_grids else None
        if request.image_embeddings is None and request.audio_embeddings is None:
            prompt = self._prompt(request, sparse)
        else:
            prompt = run_on_side_stream(self.device, lambda: self._prompt(request, sparse))
        if prompt.embeddings is not None and prompt.embeddings.is_cuda:
            prompt.embeddings.record_stream(torch.cuda.default_stream(self.device))  # the stream of the passes
        sequence = Sequence(
            replace(request, image_embeddings=None, audio_embeddings=None),  # the prompt has its own
            prompt,
            max_tokens=max_tokens,
            detokenizer=Detokenizer(self.vocabulary),
            stop_token_ids=stop_token_ids(self.checkpoint.eos_token_ids, params.stop_token_ids, params.ignore_eos),
            sparse=sparse,
            matcher=matcher,
        )
        sequence.append_forced(1)
        return sequence

    def _prompt(self, request: Request, sparse: SparseAttentionConfig | None) -> Prompt:
        prompt = build_prompt(request, self.checkpoint)
        if sparse is None or prompt.embeddings is None:
            return prompt
        embeddings = prompt.embeddings.to(self.device)
        prompt = replace(prompt, media=salt_media(sparse, prompt.media), embeddings=embeddings)
        return prune(prompt, sparse.ratio, self.model.kernels) if sparse.mode == "prune" else prompt
