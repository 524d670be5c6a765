"""Known lower bounds for the 9B shape."""

import pytest
import torch
import transformers

from autoglm.checkpoint import Checkpoint
from autoglm.llm.model import LanguageModel
from autoglm.vision.vit import VisionTransformer
from benchmarks import limits, random_checkpoint, speech


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The 9B shape without weights."""
    directory = tmp_path_factory.mktemp("9b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_checkpoint, "random_weights", lambda *_: iter(()))
        random_checkpoint.write(directory, torch.device("cpu"))
    return Checkpoint.open(directory)


def milliseconds(work: limits.Work, setting: str) -> float:
    return limits.milliseconds(work, "h200", setting)


def test_decode(published: Checkpoint) -> None:
    text = published.text
    weights = limits.linear_parameters(text) + limits.head_parameters(text)
    assert weights == pytest.approx(8.78e9, rel=1e-3)
    assert milliseconds(limits.decode_step(text, "int8", 1, 0), "int8") == pytest.approx(1.95, abs=0.005)
    assert milliseconds(limits.decode_step(text, "bf16", 1, 0), "bf16") == pytest.approx(3.90, abs=0.005)
    # 40 KiB of KV cache per token
    kv_cache = limits.decode_step(text, "int8", 64, 3600).bytes - weights
    assert kv_cache == 64 * 3600 * 40 * 1024


def test_prefill_is_compute_bound(published: Checkpoint) -> None:
    text = published.text
    assert milliseconds(limits.prefill(text, "int8", [3422]), "int8") == pytest.approx(64, abs=0.1)
    assert limits.prefill(text, "int8", [3500]).operations == pytest.approx(61e12, rel=0.02)
    one, eight = (limits.prefill(text, "int8", prompts) for prompts in ([1024], [128] * 8))
    assert one.bytes == eight.bytes
    assert one.bf16 == pytest.approx(8 * eight.bf16, rel=0.01)


def test_vision(published: Checkpoint) -> None:
    work = limits.encode(published.vision, 13416)
    assert work.operations == pytest.approx(46e12, rel=0.01)
    assert milliseconds(work, "bf16") == pytest.approx(62.5, abs=0.1)
    quantized = limits.encode(published.vision, 13416, "int8")
    assert quantized.operations == work.operations
    assert milliseconds(quantized, "int8") == pytest.approx(57.0, abs=0.1)


def test_speech() -> None:
    """wav2vec2-base has 94 million weights; for ten seconds a third of the operations are convolutions."""
    config = transformers.Wav2Vec2Config().to_dict()
    work = speech.encoder_work(config, 160_000, 1)
    assert work.bytes == pytest.approx(2 * 94.4e6, rel=0.01)
    assert work.operations == pytest.approx(151e9, rel=0.02)
    assert speech.encoder_work(config, 160_000, 16).operations == 16 * work.operations


@pytest.mark.parametrize(("setting", "size"), [("int8", 1), ("bf16", 2)])
def test_weights(published: Checkpoint, setting: str, size: int) -> None:
    """Compared with all parameters of the modules: those not counted are less than 0.2%."""
    with torch.device("meta"):
        language, vit = LanguageModel(published.text), VisionTransformer(published.vision)
    matrices = sum(p.numel() for name, p in language.named_parameters() if p.dim() == 2 and "embed" not in name)
    total = size * matrices + 2 * sum(p.numel() for p in vit.parameters())
    assert limits.resident_gib(published.text, published.vision, setting) == pytest.approx(total / 2**30, rel=2e-3)


def test_unmeasured_machines_have_no_limit(published: Checkpoint) -> None:
    work = limits.decode_step(published.text, "int8", 1, 0)
    assert str(limits.milliseconds(work, "another", "int8")) == "nan"
