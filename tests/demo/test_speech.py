"""Commands, voices, rooms and losses of the demo's speech; nothing here needs a synthesizer but what says so."""

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
from demo.speech.commands import FORMS, HELD_OUT, KINDS, Command, ask, commands, wordings
from demo.speech.dataset import Clips, jobs
from demo.speech.losses import LABELS, Codebook, bridge_path, collapse, ctc, saying, spell
from demo.speech.measures import distance, error_rates
from demo.speech.rooms import PAD_TO, listen
from demo.speech.voices import RATE, VARIANTS, Voice

SAMPLES = Path(__file__).parents[2] / "demo" / "speech" / "samples"


@pytest.fixture(scope="module")
def codebook(checkpoint_directory: Path) -> Codebook:
    tokenizer = Tokenizer.from_file(str(checkpoint_directory / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    return Codebook(tokenizer, torch.randn(tokenizer.get_vocab_size(), 256, generator=generator))


@pytest.fixture(scope="module")
def clips() -> Clips:
    """Beeps of different length in place of speech."""
    lengths = torch.tensor([9000 + 1500 * k for k in range(12)])
    time = torch.arange(int(lengths.sum())) / RATE
    samples = (8000 * torch.sin(2 * np.pi * 440 * time)).to(torch.int16)
    return Clips(jobs(12, "train"), samples, lengths.cumsum(0) - lengths, lengths)


def test_held_out_wordings_and_speakers_are_never_trained_on() -> None:
    for language, forms in FORMS.items():
        held_out = [wording for of_intent in HELD_OUT[language].values() for wording in of_intent]
        for intent in forms:
            assert wordings(language, intent, "test") == HELD_OUT[language][intent]
            for wording in wordings(language, intent, "train"):
                assert not any(other in wording for other in held_out)
    patterns = [re.escape(w).replace(r"\{\}", ".+") for forms in HELD_OUT.values() for of in forms.values() for w in of]
    for command in commands(3000, "train", 0):
        assert not any(re.search(pattern, command.text) for pattern in patterns)
    speakers = {split: {voice.speaker for _, voice in jobs(3000, split)} for split in ("train", "test")}
    assert len(speakers["train"]) > 100 and len(speakers["test"]) > 20
    assert not speakers["train"] & speakers["test"]
    assert not set(VARIANTS["train"]) & set(VARIANTS["test"])


def test_everything_that_can_be_said_can_be_spelt_and_bridged(codebook: Codebook) -> None:
    for split in ("train", "test"):
        for command in commands(2000, split, 0):
            assert "{" not in command.text and "the the" not in command.text
            labels = [list(LABELS)[k] for k in spell(command)]
            assert "".join(labels).replace("|", " ") == command.text
            assert 0 not in codebook.encode(command)


def test_commands_are_the_same_every_time() -> None:
    assert list(commands(50, "train", 3)) == list(commands(50, "train", 3))
    assert list(commands(50, "train", 3)) != list(commands(50, "train", 4))


@pytest.mark.usefixtures("fonts")
def test_a_command_on_a_screen_names_what_its_task_is_about() -> None:
    found = 0
    for seed in range(12):
        for kind in KINDS:
            asked = ask(render(seed, size=(360, 800)), kind, random.Random(seed), "test")
            if asked is None:
                continue
            command, task = asked
            found += 1
            assert command.name in command.text and command.name in task.thought
            if task.kind == "Launch":
                assert task.action == f'do(action="Launch", app="{command.name}")'
    assert found > 60


def test_labels_of_a_path_are_collapsed_as_ctc_does() -> None:
    assert collapse([0, 3, 3, 0, 3, 5, 5, 0]) == [3, 3, 5]
    assert collapse([]) == []


def test_outputs_that_are_the_tokens_embeddings_at_the_end_cost_nothing(codebook: Codebook) -> None:
    places = codebook.encode(Command("tap", "en", "Wi-Fi", "tap {}"))
    path = bridge_path(places, len(places) + 4)
    assert path == [0, 0, 0, 0, *places]
    right = codebook.table[path][None]
    behind = 100 * torch.ones(1, 3, 256)  # what lies behind a clip's end counts nothing
    counts = torch.tensor([len(path)])
    entropy, off = saying(torch.cat((right, behind), dim=1), counts, [places], codebook)
    assert entropy < 1e-3 and off < 1e-6
    entropy, off = saying(right, counts, [places[::-1]], codebook)
    assert entropy > 1 and off > 1
    entropy, off = saying(1.5 * right, counts, [places], codebook)
    assert entropy < 1e-3 and off > 0.1
    one_wrong = right.clone()
    one_wrong[0, -1] = codebook.table[0]
    entropy, off = saying(one_wrong, counts, [places], codebook)
    assert off > 1.5 / len(places), "a token weighs more than a blank"


def test_a_clip_too_short_for_its_words(codebook: Codebook) -> None:
    command = Command("page", "en", "Bluetooth", "go to the {} page")
    places = codebook.encode(command)
    assert bridge_path(places, 2) == places[-2:]
    logits = torch.randn(1, 2, len(LABELS), requires_grad=True)
    loss = ctc(logits.log_softmax(-1), torch.tensor([2]), [spell(command)])
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0 and logits.grad is not None and logits.grad.isfinite().all()


def test_rooms_leave_clips_normalised_and_padded_with_zeros(clips: Clips) -> None:
    index = [0, 5, 11]
    heard = clips.batch(index, torch.Generator().manual_seed(0))
    assert heard.clips.shape[1] % PAD_TO == 0 and heard.clips.isfinite().all()
    for row, length, spoken in zip(heard.clips, heard.lengths.tolist(), clips.lengths[index].tolist(), strict=True):
        assert length > spoken / 1.26
        assert not row[length:].any()
        assert abs(float(row[:length].mean())) < 1e-3 and abs(float(row[:length].var()) - 1) < 1e-2
    again = clips.batch(index, torch.Generator().manual_seed(0))
    other = clips.batch(index, torch.Generator().manual_seed(1))
    assert torch.equal(heard.clips, again.clips) and heard.clips.shape[0] == other.clips.shape[0]
    assert heard.clips.shape != other.clips.shape or not torch.equal(heard.clips, other.clips)


def test_silence_is_heard_as_silence() -> None:
    heard = listen(torch.zeros(1, 8000), torch.tensor([8000]), torch.Generator().manual_seed(0), 1.0)
    assert heard.clips.isfinite().all() and heard.clips.abs().max() < 1


def test_an_epoch_holds_every_clip_once(clips: Clips) -> None:
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
def test_voices_speak(text: str, voice: Voice) -> None:
    if voices.program(voice.program) is None:
        pytest.skip(f"speaking needs it: apt-get install --no-install-recommends {voice.program}")
    spoken = voices.speak(text, voice)
    assert 0.3 < len(spoken) / RATE < 2 and np.abs(spoken.astype(np.int32)).max() > 2000


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voices, "program", lambda name: None)
    with pytest.raises(voices.SynthesizerMissing, match="apt-get install --no-install-recommends espeak-ng flite"):
        voices.require_synthesizers()


def test_errors_are_counted_in_words_and_in_characters() -> None:
    assert distance("abcd", "abd") == 1 and distance([], ["a"]) == 1 and distance("ab", "ba") == 2
    english, chinese = Command("tap", "en", "Wi-Fi", "tap {}"), Command("tap", "zh", "设置", "点击{}")
    rates = error_rates([(english, "tap wi-fi"), (english, "tap why"), (chinese, "点击设")])
    assert rates == {"en": 1 / 4, "zh": 1 / 4}


def test_sample_clips_fit_their_screens(samples_directory: Path) -> None:
    entries = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    assert {entry["sound"] for entry in entries} == {f.name for f in SAMPLES.iterdir()} - {"samples.json"}
    for entry in entries:
        info = soundfile.info(SAMPLES / entry["sound"])
        assert info.samplerate == RATE and info.channels == 1 and 0.5 < info.duration < 4
        assert (samples_directory / entry["image"]).is_file()
        assert ("box" in entry) != ("action" in entry)
