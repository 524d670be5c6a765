// Records from the microphone, and turns any sound file into what every server takes: WAV, 16 kHz, mono, 16 bits.

const RATE = 16000;
const LONGEST_MS = 60_000; // what a server takes unless it is configured otherwise

export class Recorder {
  /** Asks for the microphone; `ended` gets the recorded Blob after stop(), or when it gets too long. */
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
    const limit = setTimeout(() => this.stop(), LONGEST_MS);
    this.media.start();
  }

  /** Ends the recording; done when `ended` is. */
  stop() {
    if (this.media.state !== "inactive") this.media.stop();
    return this.stopped;
  }
}

/** {wav: Blob, seconds} of a recording or a file; rejects what the browser cannot decode. */
export async function toWav(blob) {
  const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
  const channels = Array.from({ length: sound.numberOfChannels }, (_, n) => sound.getChannelData(n));
  const mixed = (n) => channels.reduce((sum, channel) => sum + channel[n], 0) / channels.length;
  const level = (_, n) => Math.max(-1, Math.min(1, mixed(n))) * 32767;
  const samples = Int16Array.from({ length: sound.length }, level);
  const wav = new Blob([header(samples.byteLength), samples], { type: "audio/wav" });
  return { wav, seconds: sound.duration };
}

/** What stands before the samples, in little-endian words: "RIFF", size, "WAVE", "fmt ", ..., "data", size. */
function header(size) {
  const format = [0x20746d66, 16, 0x00010001, RATE, 2 * RATE, 0x00100002];
  return new Uint32Array([0x46464952, 36 + size, 0x45564157, ...format, 0x61746164, size]);
}
