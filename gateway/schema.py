"""The requests that are understood. A field that is not here is refused by its name; null is the same as absent.

What OpenAI's clients send and what means nothing here is accepted only where its value changes nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from autoglm.preprocess.messages import ROLES
from autoglm.preprocess.response_format import MAX_CHARACTERS, SCHEMA_NAME
from autoglm.preprocess.sampling_params import LEAST_SPARSE_RATIO, LOWEST_PRIORITY, MAX_LOGPROBS, MAX_STOPS, SparseMode

MAX_CHOICES = 4
MAX_COMPLETION_LOGPROBS = 5  # OpenAI's for plain completions

# What the ensemble takes as request parameters under the same names. It knows their ranges, and says what it refuses.
PARAMETERS = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "stop_token_ids", "ignore_eos", "priority", "max_pixels", "min_pixels", "sparse_mode", "sparse_ratio", "audio_mode",
)  # fmt: skip


def _told(**keywords: Any) -> Any:
    """Keywords of JSON Schema for /openapi.json only: the server behind checks the values, and says what it refuses.
    A test holds the two together."""
    return Field(json_schema_extra=keywords)


Count = Annotated[int, _told(minimum=1, maximum=2**31 - 1)]
Penalty = Annotated[float, _told(minimum=-2, maximum=2)]
Share = Annotated[float, _told(exclusiveMinimum=0, maximum=1)]
Stop = Annotated[str, _told(minLength=1)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(Model):
    type: Literal["text"]
    text: str


class ImageLink(Model):
    """A data URL, an http(s) URL of an allowed host, or a file:// URL below the configured folder.

    `detail` low would mean a smaller image, which `max_pixels` asks for in numbers.
    """

    url: Annotated[str, _told(pattern="^(data:image/[a-z0-9.+-]+;base64,|https?://|file:///)")]
    detail: Literal["auto", "high"] | None = None


class ImagePart(Model):
    type: Literal["image_url"]
    image_url: ImageLink


class Sound(Model):
    """A file in base64; it says its format itself, whatever `format` says."""

    data: Annotated[str, _told(minLength=1, contentEncoding="base64")]
    format: str | None = None


class AudioPart(Model):
    type: Literal["input_audio"]
    input_audio: Sound


Part = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]


def _kind_of_content(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


class Message(Model):
    """One turn. The fields that are null come back with an answer that is sent again as history."""

    role: Annotated[str, _told(enum=ROLES)]  # a checkpoint's template may know more, which are taken too
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Part], Field(min_length=1), Tag("parts")],
        Discriminator(_kind_of_content),
    ]
    name: None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(Model):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Model):
    type: Literal["text"]


class JsonObjectFormat(Model):
    type: Literal["json_object"]


class JsonSchema(Model):
    """The answer always fits the schema, whatever `strict` says; `name` and `description` change nothing."""

    name: Annotated[str, _told(pattern=SCHEMA_NAME)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema", description=f"{MAX_CHARACTERS} characters at most")]
    strict: bool | None = None


class JsonSchemaFormat(Model):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class PhoneActionFormat(Model):
    """Beyond OpenAI's: a thought, if any, and exactly one action of a phone agent, its coordinates on the screen."""

    type: Literal["phone_action"]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | PhoneActionFormat, Field(discriminator="type")
]


def _as_text(wanted: ResponseFormat) -> str:
    """As a request parameter. Not by pydantic, which makes null of what is no number; the server refuses that."""
    plain: dict[str, Any] = {"type": wanted.type}
    if isinstance(wanted, JsonSchemaFormat):
        plain["json_schema"] = {"name": wanted.json_schema.name, "schema": wanted.json_schema.schema_}
    return json.dumps(plain)


class Sampling(Model):
    """What both kinds of request have in common. Left out, the checkpoint's and the server's defaults hold."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, _told(minimum=0, maximum=10)] | None = None
    top_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[int, _told(minimum=0, maximum=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], _told(maxItems=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Beyond OpenAI's.
    top_k: Annotated[int, _told(minimum=0, maximum=2**31 - 1)] | None = None
    min_p: Annotated[float, _told(minimum=0, maximum=1)] | None = None
    repetition_penalty: Annotated[float, _told(exclusiveMinimum=0, maximum=10)] | None = None
    stop_token_ids: list[Annotated[int, _told(minimum=0)]] | None = None
    ignore_eos: bool | None = None
    priority: (
        Annotated[int, _told(minimum=0, maximum=LOWEST_PRIORITY, description="1 first; 0: the default")] | None
    ) = None
    timeout: Annotated[float, Field(gt=0, le=86400, description="seconds for the whole answer")] | None = None
    max_pixels: Annotated[int, _told(minimum=1)] | None = None
    min_pixels: Annotated[int, _told(minimum=1)] | None = None
    sparse_mode: Annotated[str, _told(enum=get_args(SparseMode))] | None = None
    sparse_ratio: Annotated[float, _told(minimum=LEAST_SPARSE_RATIO, maximum=1)] | None = None
    audio_mode: Annotated[str, _told(enum=("transcript", "bridge"))] | None = None

    # Not honoured yet: only what asks for nothing.
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    # Means nothing here whatever it is: nothing is stored, billed or told apart by user.
    user: str | None = None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def longest(self) -> int | None:
        """The tokens that the answer may have; None takes the server's default."""
        return self.max_tokens

    @property
    def names(self) -> dict[str, str]:
        """What this request calls the server's parameters, where it has another name for one."""
        return {}

    def parameters(self, choice: int) -> dict[str, Any]:
        """The request parameters for one of the `n` answers; their seeds differ."""
        values = {name: getattr(self, name) for name in PARAMETERS}
        values["max_tokens"] = self.longest
        values["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        values["seed"] = None if self.seed is None else self.seed + choice
        return {name: value for name, value in values.items() if value is not None and value != []}

    @model_validator(mode="after")
    def _streams_if_it_has_options(self) -> Sampling:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options only together with stream")
        return self


class ChatRequest(Sampling):
    """/v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None

    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    # There are no tools and one modality, and what an identifier or a label says changes no answer.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def names(self) -> dict[str, str]:
        given = self.max_tokens is None and self.max_completion_tokens is not None
        return {"max_tokens": "max_completion_tokens"} if given else {}

    def parameters(self, choice: int) -> dict[str, Any]:
        values = super().parameters(choice)
        if self.response_format is not None:
            values["response_format"] = _as_text(self.response_format)
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        return values

    @field_validator("top_logprobs")
    @classmethod
    def _belongs_to_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("more than 0 only together with logprobs")
        return value

    @model_validator(mode="after")
    def _says_once_how_long(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens only if they are equal")
        return self


class CompletionRequest(Sampling):
    """/v1/completions. The prompt is a user's turn: it goes through the checkpoint's chat template."""

    prompt: str
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None

    # Not honoured yet: only what asks for nothing.
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def parameters(self, choice: int) -> dict[str, Any]:
        values = super().parameters(choice)
        return values if self.logprobs is None else values | {"logprobs": self.logprobs}


class TokenizeRequest(Model):
    """/tokenize: exactly one of the two."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    prompt: str | None = None

    @model_validator(mode="after")
    def _has_one(self) -> TokenizeRequest:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("exactly one of messages and prompt")
        return self
