"""Recognition of whole recordings, in streaming chunks or in one offline pass."""

from __future__ import annotations

import numpy as np
import torch

from asr_exit.checkpoint import Model
from asr_exit.ctc import FrameScores
from asr_exit.decoders import make_decoder
from asr_exit.engine import Engine
from asr_exit.errors import AudioError
from asr_exit.features import log_mel
from asr_exit.stream import StreamOptions
from asr_exit.transcript import Transcript, transcribe
from asr_exit.words import text_from_words, words_from_tokens


class Recognizer:
    """Transcribes recordings one at a time; use `Engine` for many streams at once."""

    def __init__(self, model: Model, options: StreamOptions | None = None, device: str | torch.device = "cpu") -> None:
        self.model, self.options = model, options or StreamOptions()
        self._engine = Engine(model, slots=1, device=device)

    def transcribe(self, samples: np.ndarray) -> Transcript:
        """Stream (N,) float32 samples at the model's rate through the engine, chunk by chunk.

        Raises:
            AudioError: samples of the wrong type or not finite. EngineError: computation failed.
        """
        return transcribe(self._engine, samples, self.options)

    @torch.inference_mode()
    def log_posteriors(self, samples: np.ndarray, chunk_ms: float | None) -> list[np.ndarray]:
        """Log-posteriors of every exit in one pass over the whole recording.

        Args:
            chunk_ms: chunk grid of the mask (equals streaming in chunks of that length); None = full context.
        Returns:
            Per exit (L, V) float32, `labels_per_frame` for each encoder frame.
        """
        if samples.dtype != np.float32 or samples.ndim != 1 or not np.isfinite(samples).all():
            raise AudioError("samples must be a 1-D float32 array of finite values")
        config, encoder = self.model.config, self.model.encoder
        features = torch.from_numpy(log_mel(samples, config.features))[None].to(encoder.feature_mean.device)
        if features.shape[1] == 0:
            return [np.zeros((0, config.vocab_size), np.float32)] * config.num_exits
        lengths = torch.tensor([features.shape[1]], device=features.device)
        chunk_frames = None if chunk_ms is None else config.chunk_frames(chunk_ms)
        output = encoder(features, lengths, chunk_frames=chunk_frames)
        return [logits[0].float().log_softmax(dim=-1).cpu().numpy() for logits in output.logits]

    def transcribe_offline(self, samples: np.ndarray, chunk_ms: float | None = None) -> Transcript:
        """One pass over the whole recording, read at the policy's deepest exit; `chunk_ms` as in `log_posteriors`."""
        config, options = self.model.config, self.options
        exit_index = options.policy.deepest(config.num_exits)
        log_probs = self.log_posteriors(samples, chunk_ms)[exit_index]
        num_frames = len(log_probs) // config.labels_per_frame
        decoder = make_decoder(options, self.model.pieces, self.model.tokenizer)
        frames = FrameScores(log_probs.argmax(axis=-1), log_probs.max(axis=-1, initial=-np.inf), log_probs)
        state = decoder.advance(decoder.initial(), frames).settle()
        words = words_from_tokens(state.tokens(), self.model.tokenizer.pieces, config.label_ms)
        return Transcript(
            text=text_from_words(words),
            words=words,
            chunks=(),
            encoder_macs=self._engine.macs.to_exit(exit_index, num_frames),
            full_macs=self._engine.macs.full(num_frames),
            audio_seconds=len(samples) / config.features.sample_rate_hertz,
        )
