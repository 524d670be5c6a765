// Records from the microphone, and converts audio files to WAV, 16 kHz, mono, 16 bits.

const RATE = 16000;
const MAX_MS = 60_000; // the server's default limit

export class Recorder {
  /** Asks for the microphone. `ended` is called with the recorded Blob after stop() or at the limit. */
  static async start(ended) {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    return new Recorder(stream, ended);
  }

  constructor(stream, ended) {
    const parts = [];
    this.media = new MediaRecorder(stream);
    this.media.ondataavailable = (event) => parts.push(event.data);
    this.stopped = new Promise((done) => (this.media.onstop = done)).then(() => {
      clearTimeout(limit);
      stream.getTracks().forEach((track) => track.stop());
      return ended(new Blob(parts, { type: this.media.mimeType }));
    });
    const limit = setTimeout(() => this.stop(), MAX_MS);
    this.media.start();
  }

  /** Ends the recording; resolves after `ended`. */
  stop() {
    if (this.media.state !== "inactive") this.media.stop();
    return this.stopped;
  }
}

/** Converts a recording or a file to {wav: Blob, seconds}; rejects if the browser cannot decode it. */
export async function toWav(blob) {
  const audio = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
  const channels = Array.from({ length: audio.numberOfChannels }, (_, n) => audio.getChannelData(n));
  const mixed = (n) => channels.reduce((sum, channel) => sum + channel[n], 0) / channels.length;
  const level = (_, n) => Math.max(-1, Math.min(1, mixed(n))) * 32767;
  const samples = Int16Array.from({ length: audio.length }, level);
  const wav = new Blob([header(samples.byteLength), samples], { type: "audio/wav" });
  return { wav, seconds: audio.duration };
}

/** The header of a WAV file in little-endian words: "RIFF", size, "WAVE", "fmt ", ..., "data", size. */
function header(size) {
  const format = [0x20746d66, 16, 0x00010001, RATE, 2 * RATE, 0x00100002];
  return new Uint32Array([0x46464952, 36 + size, 0x45564157, ...format, 0x61746164, size]);
}
