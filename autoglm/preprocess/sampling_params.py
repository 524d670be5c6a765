"""The options of a request, declared once each; see `autoglm.preprocess.options`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from autoglm.config import AudioMode, SparseMode
from autoglm.kernels.sampling_metadata import Column
from autoglm.preprocess.options import (
    Boolean,
    Choice,
    Integer,
    JsonText,
    Number,
    Strings,
    TokenIds,
    check_names,
    option,
    read_options,
)
from autoglm.preprocess.response_format import read_response_format

DEFAULT_PRIORITY = 5
LOWEST_PRIORITY = 10
MAX_LOGPROBS = 20
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The checked options of one request that the language model uses."""

    max_tokens: int | None = option(
        None, Integer(1, INT32_MAX), "Tokens of the answer at most. Default: engine.default_max_tokens"
    )
    temperature: float = option(0.0, Number(0, 10), "0 is greedy", column=Column.TEMPERATURE)
    top_p: float = option(1.0, Number(0, 1, above=True), "Nucleus sampling", column=Column.TOP_P)
    top_k: int = option(0, Integer(0, INT32_MAX), "Sample from the k most likely tokens; 0 is all", column=Column.TOP_K)
    min_p: float = option(
        0.0, Number(0, 1), "Drop tokens whose probability is below this share of the highest", column=Column.MIN_P
    )
    frequency_penalty: float = option(
        0.0, Number(-2, 2), "Penalty for each occurrence in the answer", column=Column.FREQUENCY
    )
    presence_penalty: float = option(0.0, Number(-2, 2), "Penalty for occurring in the answer", column=Column.PRESENCE)
    repetition_penalty: float = option(
        1.0,
        Number(0, 10, above=True),
        "Factor for tokens of the prompt and the answer; 1 is none",
        column=Column.REPETITION,
    )
    seed: int | None = option(None, Integer(0, INT64_MAX), "Default: random")
    stop: tuple[str, ...] = option((), Strings(16), "Strings that end the answer; they are not part of it")
    stop_token_ids: tuple[int, ...] = option((), TokenIds(), "Token ids that end the answer")
    ignore_eos: bool = option(False, Boolean(), "Continue after end-of-turn tokens")
    stream: bool = option(True, Boolean(), "Send tokens as they are generated; false: the whole answer at the end")
    # The alias is for gRPC, where Triton uses a parameter named `priority` for its own scheduler. 0 means "not set".
    priority: int = option(
        DEFAULT_PRIORITY,
        Integer(0, LOWEST_PRIORITY),
        "1 is the most urgent, 10 the least urgent; 0 is the default",
        aliases=("request_priority",),
    )
    timeout_us: int | None = option(
        None, Integer(1, INT64_MAX), "Microseconds for the whole answer, from its arrival", name="timeout"
    )
    sparse_mode: SparseMode | None = option(
        None, Choice(get_args(SparseMode)), "See docs/sparse-attention.md. Default: sparse_attention.mode"
    )
    sparse_ratio: float | None = option(
        None, Number(0.01, 1), "Share of the visual keys to keep. Default: sparse_attention.ratio"
    )
    response_format: str | None = option(
        None, JsonText(read_response_format), "JSON object as text; see structured output"
    )
    logprobs: int | None = option(
        None, Integer(0, MAX_LOGPROBS), "Return the log probability of each token and of this many alternatives"
    )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], defaults: Mapping[str, Any]) -> "SamplingParams":
        """Check a request's parameters.

        Args:
            parameters: by name; None counts as absent. Those of `MediaOptions` are ignored.
            defaults: the checkpoint's generation_config.json; its sampling values apply if it enables sampling.

        Raises:
            RequestError: a name is unknown, or a value has the wrong type or is out of range.
        """
        check_names(parameters, cls, MediaOptions)
        values: dict[str, Any] = {}
        if defaults.get("do_sample"):
            values = {key: defaults[key] for key in ("temperature", "top_p", "top_k") if defaults.get(key) is not None}
        if defaults.get("repetition_penalty") is not None:
            values["repetition_penalty"] = defaults["repetition_penalty"]
        values |= dict(read_options(cls, parameters))
        values["priority"] = values.get("priority") or DEFAULT_PRIORITY
        return cls(**values)


@dataclass(frozen=True)
class MediaOptions:
    """The options of one request that preprocessing uses: the size of images and the mode of audio."""

    max_pixels: int | None = option(
        None, Integer(1, INT64_MAX), "Largest image after resizing, as 2 x height x width; at most the server's"
    )
    min_pixels: int | None = option(None, Integer(1, INT64_MAX), "Smallest image after resizing, as 2 x height x width")
    audio_mode: AudioMode | None = option(
        None, Choice(get_args(AudioMode)), "transcript: audio becomes text; bridge: embeddings. Default: audio.mode"
    )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> "MediaOptions":
        """Check a request's parameters; those of `SamplingParams` are ignored.

        Raises:
            RequestError: a value has the wrong type or is out of range.
        """
        return cls(**dict(read_options(cls, parameters)))
