"""The requests of the API. Unknown fields are rejected by name; null is the same as absent.

The options that the server reads are declared in its own table (`autoglm.preprocess.options`). Fields that OpenAI's
clients send but that have no meaning here are accepted only with values that have no effect.
"""

import json
import operator
from collections.abc import Iterable
from functools import reduce
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model, model_validator
from pydantic_core.core_schema import ValidationInfo

from autoglm.errors import RequestError
from autoglm.preprocess.messages import ROLES
from autoglm.preprocess.options import Integer, Kind, Number, Option, options
from autoglm.preprocess.response_format import MAX_CHARACTERS, SCHEMA_NAME
from autoglm.preprocess.sampling_params import MAX_LOGPROBS, MediaOptions, SamplingParams

MAX_CHOICES = 4
MAX_COMPLETION_LOGPROBS = 5  # OpenAI's limit for plain completions
TIMEOUT = Number(0, 86400, above=True)
UNKNOWN_FIELD = " is not a known field"

# The server's options, but for those that have another form in OpenAI's API and are converted here.
CONVERTED = ("stream", "timeout", "response_format", "logprobs")
OPTIONS = {
    each.name: each
    for table in (SamplingParams, MediaOptions)
    for each in options(table).values()
    if each.name not in CONVERTED
}
PARAMETERS = tuple(OPTIONS)
TYPES = {"boolean": bool, "integer": int, "number": float, "object": dict, "string": str}


class RequestModel(BaseModel):
    """Base of all models. Messages of validators begin with a field of the model."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, value: Any) -> Any:
        """Instead of pydantic, whose error does not list the accepted fields."""
        known = {field.alias or name: None for name, field in cls.model_fields.items()}
        for name in value if isinstance(value, dict) else ():
            if name not in known:
                raise RequestError(f"{name[:80]}{UNKNOWN_FIELD} (accepted: {', '.join(known)})")
        return value


def _documented(**keywords: Any) -> Any:
    """Keywords of JSON Schema for /openapi.json only: the server checks the values."""
    return Field(json_schema_extra=keywords)


class ContentTextPart(RequestModel):
    type: Literal["text"]
    text: str


class ImageUrl(RequestModel):
    """A data URL, an http(s) URL of an allowed host, or a file:// URL below the configured folder.

    There is no `detail` low: `max_pixels` limits the size of images.
    """

    url: Annotated[str, _documented(pattern="^(data:image/[a-z0-9.+-]+;base64,|https?://|file:///)")]
    detail: Literal["auto", "high"] | None = None


class ContentImagePart(RequestModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(RequestModel):
    """An audio file in base64. Its format is detected from the file; `format` is ignored."""

    data: Annotated[str, _documented(minLength=1, contentEncoding="base64")]
    format: str | None = None


class ContentAudioPart(RequestModel):
    type: Literal["input_audio"]
    input_audio: InputAudio


ContentPart = Annotated[ContentTextPart | ContentImagePart | ContentAudioPart, Field(discriminator="type")]


class ChatMessage(RequestModel):
    """One turn. The fields that must be null are those of OpenAI's answers, which clients send back as history."""

    role: Annotated[str, _documented(enum=ROLES)]  # not checked: a checkpoint's template may accept further roles
    content: str | Annotated[list[ContentPart], Field(min_length=1)]
    name: None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]


class JsonSchema(RequestModel):
    """The answer always matches the schema, whatever `strict` is; `name` and `description` have no effect."""

    name: Annotated[str, _documented(pattern=SCHEMA_NAME)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema", description=f"at most {MAX_CHARACTERS} characters")]
    strict: bool | None = None


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class PhoneActionFormat(RequestModel):
    """An extension of OpenAI's API: an optional thought and exactly one action of a phone agent."""

    type: Literal["phone_action"]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | PhoneActionFormat, Field(discriminator="type")
]


def _to_json(response_format: ResponseFormat) -> str:
    """The request parameter. Not by pydantic, which writes NaN as null; the server refuses NaN."""
    plain: dict[str, Any] = {"type": response_format.type}
    if isinstance(response_format, JsonSchemaFormat):
        json_schema = response_format.json_schema
        plain["json_schema"] = {"name": json_schema.name, "schema": json_schema.schema_}
    return json.dumps(plain)


def _python_type(schema: dict[str, Any]) -> Any:
    """The type of the values that a JSON schema describes."""
    if "anyOf" in schema:
        return reduce(operator.or_, map(_python_type, schema["anyOf"]))
    return list[_python_type(schema["items"])] if schema["type"] == "array" else TYPES[schema["type"]]  # type: ignore[misc]


def _checked(kind: Kind) -> Any:
    """The annotation of an option's type. Numbers are checked by the server's code, other kinds only by type."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if isinstance(kind, Number):
            kind.check(str(info.field_name), value)
        return value

    return BeforeValidator(check, json_schema_input_type=Annotated[Any, WithJsonSchema(kind.schema)])


def option_fields(table: Iterable[Option]) -> dict[str, Any]:
    """Fields for `create_model`."""
    return {
        each.name: (
            Annotated[_python_type(each.kind.schema), _checked(each.kind)] | None,
            Field(None, description=each.description),
        )
        for each in table
    }


ServerOptions: Any = create_model("ServerOptions", __base__=RequestModel, **option_fields(OPTIONS.values()))


class GenerationRequest(ServerOptions):  # type: ignore[misc]
    """The fields of both kinds of completion. The checkpoint's and the server's defaults apply to absent ones."""

    model: str | None = None
    n: Annotated[int, _checked(Integer(1, MAX_CHOICES))] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[float, _checked(TIMEOUT), Field(description="Seconds for the whole answer")] | None = None

    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None  # not supported
    user: str | None = None  # ignored

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def names(self) -> dict[str, str]:
        """The caller's names of request parameters that the server names differently."""
        return {}

    def parameters(self, choice: int) -> dict[str, Any]:
        """The request parameters of one of the `n` choices, which differ in their seeds."""
        values = {name: getattr(self, name) for name in PARAMETERS}
        values["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        values["seed"] = None if self.seed is None else self.seed + choice
        return {name: value for name, value in values.items() if value is not None and value != []}

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options and not self.stream:
            raise RequestError("stream_options must be absent unless stream is true")
        return self


class ChatRequest(GenerationRequest):
    """/v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, _checked(OPTIONS["max_tokens"].kind)] | None = None

    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, _checked(Integer(0, MAX_LOGPROBS))] | None = None

    # Not supported.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    # Ignored.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def names(self) -> dict[str, str]:
        renamed = self.max_tokens is None and self.max_completion_tokens is not None
        return {"max_tokens": "max_completion_tokens"} if renamed else {}

    def parameters(self, choice: int) -> dict[str, Any]:
        values = super().parameters(choice)
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        if self.response_format is not None:
            values["response_format"] = _to_json(self.response_format)
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        return values

    @model_validator(mode="after")
    def _check_combinations(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs must be 0 or absent unless logprobs is true (got {self.top_logprobs})")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError(
                "max_completion_tokens must be equal to max_tokens where both are present "
                f"(got {self.max_completion_tokens} and {self.max_tokens})"
            )
        return self


class CompletionRequest(GenerationRequest):
    """/v1/completions. The prompt is a user's turn: it goes through the checkpoint's chat template."""

    prompt: str
    logprobs: Annotated[int, _checked(Integer(0, MAX_COMPLETION_LOGPROBS))] | None = None

    # Not supported.
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def parameters(self, choice: int) -> dict[str, Any]:
        values = super().parameters(choice)
        return values if self.logprobs is None else values | {"logprobs": self.logprobs}


class TokenizeRequest(RequestModel):
    """/tokenize. Exactly one of `messages` and `prompt` is required."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    prompt: str | None = None

    @model_validator(mode="after")
    def _check_alternatives(self) -> "TokenizeRequest":
        if (self.messages is None) == (self.prompt is None):
            raise RequestError("exactly one of messages and prompt must be present")
        return self


FIELDS = frozenset().union(*(model.model_fields for model in (ChatRequest, CompletionRequest, TokenizeRequest)))
