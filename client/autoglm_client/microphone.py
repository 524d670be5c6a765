"""Recording from the microphone."""

import io
import wave

SAMPLE_RATE = 16000  # Hz: the rate of speech encoders


def record(seconds: float) -> bytes:
    """Record a mono WAV file. Raises OSError without a microphone, sounddevice or PortAudio."""
    try:
        import sounddevice
    except ImportError as error:
        raise OSError("recording needs the package sounddevice: pip install 'autoglm-client[record]'") from error
    except OSError as error:
        raise OSError("recording needs the system's library PortAudio") from error
    try:
        samples = sounddevice.rec(round(seconds * SAMPLE_RATE), samplerate=SAMPLE_RATE, channels=1, dtype="int16")
        sounddevice.wait()
    except sounddevice.PortAudioError as error:
        raise OSError("no microphone can be opened") from error
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SAMPLE_RATE)
        out.writeframes(samples.tobytes())
    return file.getvalue()
