"""Commands, voices, augmentation and losses of the demo's speech."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer

from demo.screens import render
from demo.speech import voices
from demo.speech.commands import FORMS, HELD_OUT, KINDS, Command, commands, draw_command, wordings
from demo.speech.dataset import Clips, jobs
from demo.speech.losses import Codebook, bridge_loss, bridge_path, collapse, ctc_loss, ctc_targets
from demo.speech.measures import edit_distance, error_rates
from demo.speech.model import CTC_LABELS
from demo.speech.rooms import PAD_TO, augment
from demo.speech.voices import RATE, VARIANTS, Voice

SAMPLES = Path(__file__).parents[2] / "demo" / "speech" / "samples"


@pytest.fixture(scope="module")
def codebook(checkpoint_directory: Path) -> Codebook:
    tokenizer = Tokenizer.from_file(str(checkpoint_directory / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    return Codebook(tokenizer, torch.randn(tokenizer.get_vocab_size(), 256, generator=generator))


@pytest.fixture(scope="module")
def clips() -> Clips:
    """Tones of different lengths."""
    lengths = torch.tensor([9000 + 1500 * k for k in range(12)])
    time = torch.arange(int(lengths.sum())) / RATE
    samples = (8000 * torch.sin(2 * np.pi * 440 * time)).to(torch.int16)
    return Clips(jobs(12, "train"), samples, lengths.cumsum(0) - lengths, lengths)


def test_held_out_wordings_and_speakers_are_never_trained_on() -> None:
    for language, forms in FORMS.items():
        held_out = [wording for held in HELD_OUT[language].values() for wording in held]
        for intent in forms:
            assert wordings(language, intent, "test") == HELD_OUT[language][intent]
            for wording in wordings(language, intent, "train"):
                assert not any(other in wording for other in held_out)
    patterns = [re.escape(w).replace(r"\{\}", ".+") for held in HELD_OUT.values() for ws in held.values() for w in ws]
    for command in commands(3000, "train", 0):
        assert not any(re.search(pattern, command.text) for pattern in patterns)
    speakers = {split: {voice.speaker for _, voice in jobs(3000, split)} for split in ("train", "test")}
    assert len(speakers["train"]) > 100 and len(speakers["test"]) > 20
    assert not speakers["train"] & speakers["test"]
    assert not set(VARIANTS["train"]) & set(VARIANTS["test"])


def test_all_commands_have_ctc_labels_and_bridge_tokens(codebook: Codebook) -> None:
    for split in ("train", "test"):
        for command in commands(2000, split, 0):
            assert "{" not in command.text and "the the" not in command.text
            labels = [CTC_LABELS[label] for label in ctc_targets(command)]
            assert "".join(labels).replace("|", " ") == command.text
            assert 0 not in codebook.encode(command)


def test_commands_are_deterministic() -> None:
    assert list(commands(50, "train", 3)) == list(commands(50, "train", 3))
    assert list(commands(50, "train", 3)) != list(commands(50, "train", 4))


@pytest.mark.usefixtures("fonts")
def test_a_command_names_the_target_of_its_task() -> None:
    count = 0
    for seed in range(12):
        for kind in KINDS:
            drawn = draw_command(render(seed, size=(360, 800)), kind, random.Random(seed), "test")
            if drawn is None:
                continue
            command, task = drawn
            count += 1
            assert command.name in command.text and command.name in task.thought
            if task.action_type == "Launch":
                assert task.action == f'do(action="Launch", app="{command.name}")'
    assert count > 60


def test_collapse_merges_repetitions_and_removes_blanks() -> None:
    assert collapse([0, 3, 3, 0, 3, 5, 5, 0]) == [3, 3, 5]
    assert collapse([]) == []


def test_bridge_loss_is_zero_for_the_embeddings_of_the_tokens(codebook: Codebook) -> None:
    tokens = codebook.encode(Command("tap", "en", "Wi-Fi", "tap {}"))
    path = bridge_path(tokens, len(tokens) + 4)
    assert path == [0, 0, 0, 0, *tokens]
    right = codebook.table[path][None]
    padding = 100 * torch.ones(1, 3, 256)
    counts = torch.tensor([len(path)])
    entropy, distance = bridge_loss(torch.cat((right, padding), dim=1), counts, [tokens], codebook)
    assert entropy < 1e-3 and distance < 1e-6
    entropy, distance = bridge_loss(right, counts, [tokens[::-1]], codebook)
    assert entropy > 1 and distance > 1
    entropy, distance = bridge_loss(1.5 * right, counts, [tokens], codebook)
    assert entropy < 1e-3 and distance > 0.1
    one_wrong = right.clone()
    one_wrong[0, -1] = codebook.table[0]
    entropy, distance = bridge_loss(one_wrong, counts, [tokens], codebook)
    assert distance > 1.5 / len(tokens), "a token weighs more than a blank"


def test_a_clip_that_is_too_short_for_its_labels_has_no_loss(codebook: Codebook) -> None:
    command = Command("page", "en", "Bluetooth", "go to the {} page")
    tokens = codebook.encode(command)
    assert bridge_path(tokens, 2) == tokens[-2:]
    logits = torch.randn(1, 2, len(CTC_LABELS), requires_grad=True)
    loss = ctc_loss(logits.log_softmax(-1), torch.tensor([2]), [ctc_targets(command)])
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0 and logits.grad is not None and logits.grad.isfinite().all()


def test_augmented_clips_are_normalised_and_padded_with_zeros(clips: Clips) -> None:
    indices = [0, 5, 11]
    batch = clips.batch(indices, torch.Generator().manual_seed(0))
    assert batch.samples.shape[1] % PAD_TO == 0 and batch.samples.isfinite().all()
    for row, length, before in zip(batch.samples, batch.lengths.tolist(), clips.lengths[indices].tolist(), strict=True):
        assert length > before / 1.26
        assert not row[length:].any()
        assert abs(float(row[:length].mean())) < 1e-3 and abs(float(row[:length].var()) - 1) < 1e-2
    again = clips.batch(indices, torch.Generator().manual_seed(0))
    other = clips.batch(indices, torch.Generator().manual_seed(1))
    assert torch.equal(batch.samples, again.samples) and batch.samples.shape[0] == other.samples.shape[0]
    assert batch.samples.shape != other.samples.shape or not torch.equal(batch.samples, other.samples)


def test_silence_stays_silent() -> None:
    batch = augment(torch.zeros(1, 8000), torch.tensor([8000]), torch.Generator().manual_seed(0), 1.0)
    assert batch.samples.isfinite().all() and batch.samples.abs().max() < 1


def test_an_epoch_has_every_clip_once(clips: Clips) -> None:
    batches = clips.batches(4, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(12))


def test_resampling_keeps_a_tone() -> None:
    time = np.arange(22050) / 22050
    tone = (10_000 * np.sin(2 * np.pi * 1000 * time)).astype(np.int16)
    resampled = voices.resample(tone, 22050)
    expected = 10_000 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    assert len(resampled) == RATE and np.abs(resampled - expected).max() < 60
    assert len(voices.resample(tone[:8000], 8000)) == RATE


def test_silence_around_a_clip_is_cut_off() -> None:
    clip = np.concatenate([np.zeros(500, np.int16), np.full(300, -9000, np.int16), np.zeros(200, np.int16)])
    assert len(voices.trim(clip)) == 300
    assert len(voices.trim(np.zeros(100, np.int16))) == 0


@pytest.mark.parametrize(
    ("text", "voice"),
    [
        ("open Settings", Voice("espeak-ng", "en-gb+f4", 1.0, 0.5)),
        ("打开设置", Voice("espeak-ng", "cmn-latn-pinyin", 1.0, 0.5)),
        ("open Settings", Voice("flite", "rms", 1.0, 0.5)),
    ],
)
def test_voices_synthesize_speech(text: str, voice: Voice) -> None:
    if voices.program(voice.program) is None:
        pytest.skip(f"needs a synthesizer: apt-get install --no-install-recommends {voice.program}")
    samples = voices.speak(text, voice)
    assert 0.3 < len(samples) / RATE < 2 and np.abs(samples.astype(np.int32)).max() > 2000


def test_missing_synthesizers_are_reported_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voices, "program", lambda name: None)
    with pytest.raises(voices.SynthesizerMissing, match="apt-get install --no-install-recommends espeak-ng flite"):
        voices.require_synthesizers()


def test_errors_are_counted_in_words_and_in_characters() -> None:
    assert edit_distance("abcd", "abd") == 1 and edit_distance([], ["a"]) == 1 and edit_distance("ab", "ba") == 2
    english, chinese = Command("tap", "en", "Wi-Fi", "tap {}"), Command("tap", "zh", "设置", "点击{}")
    rates = error_rates([(english, "tap wi-fi"), (english, "tap why"), (chinese, "点击设")])
    assert rates == {"en": 1 / 4, "zh": 1 / 4}


def test_sample_clips_are_valid(samples_directory: Path) -> None:
    entries = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    assert {entry["audio"] for entry in entries} == {f.name for f in SAMPLES.iterdir()} - {"samples.json"}
    for entry in entries:
        info = soundfile.info(SAMPLES / entry["audio"])
        assert info.samplerate == RATE and info.channels == 1 and 0.5 < info.duration < 4
        assert (samples_directory / entry["image"]).is_file()
        assert ("box" in entry) != ("action" in entry)
