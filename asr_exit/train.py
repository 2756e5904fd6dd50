"""The training loop: staged growth, CTC at every exit, moving-average weights, exact resume, time-boxed schedule.

A run folder holds: config.json, tokenizer.model, data.json, provenance.json, log.jsonl, state.pt (resume) and
ema.safetensors (the model).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from asr_exit.augment import Augment
from asr_exit.data import Batch, BatchStream, Clip, FeatureStore, Position, collate
from asr_exit.encoder import Encoder, Segment
from asr_exit.errors import CheckpointError, ConfigError, EngineError
from asr_exit.loss import ctc_loss, exit_losses, random_depth
from asr_exit.metrics import wer
from asr_exit.parallel import Group
from asr_exit.schedule import Stage, TrainConfig
from asr_exit.tokenizer import BLANK_ID, Tokenizer


@dataclass
class Progress:
    """Where a run stands; part of its checkpoint."""

    updates: int = 0
    stage: int = 0
    stage_updates: int = 0
    position: Position = field(default_factory=Position)
    seconds_seen: float = 0.0
    wall_seconds: float = 0.0
    bad_updates: int = 0  # in a row


def greedy_texts(logits: Tensor, lengths: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Best path of (B, T, V), repeats and blanks removed."""
    texts = []
    for row, length in zip(logits.argmax(dim=-1), lengths.tolist(), strict=True):
        ids = torch.unique_consecutive(row[:length]).tolist()
        texts.append(tokenizer.decode([index for index in ids if index != BLANK_ID]))
    return texts


class Trainer:
    """One run, in one process or several (see `Group`)."""

    def __init__(
        self,
        config: TrainConfig,
        data: Path,
        out: Path,
        *,
        provenance: dict[str, Any] | None = None,
        device: str = "cpu",
        group: Group | None = None,
        max_updates: int | None = None,
    ) -> None:
        """`data`: what the recipe's prepare step wrote. `max_updates` stops early (tests).

        Raises:
            ConfigError: the data is not finished, or does not fit the model.
        """
        if not (data / "data.json").is_file():
            raise ConfigError(f"{data} holds no finished data (no data.json); run the recipe's prepare step")
        self.config, self.out, self.device, self.max_updates = config, out, torch.device(device), max_updates
        self.group = group or Group()
        self.description = json.loads((data / "data.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer((data / "tokenizer.model").read_bytes())
        if self.tokenizer.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"the data's tokenizer has {self.tokenizer.vocab_size} pieces, the model {config.model.vocab_size}"
            )
        self.store = FeatureStore(data / "train", self.tokenizer)
        self.dev = FeatureStore(data / "dev", self.tokenizer) if any((data / "dev").glob("*.json")) else None
        self.mean = np.array(self.description["feature_mean"], np.float32)
        noise = data / "noise"
        self.augment = Augment(config.augment, self.mean, FeatureStore(noise) if any(noise.glob("*.json")) else None)
        torch.manual_seed(config.seed)
        self.model = Encoder(config.model)
        self.model.set_feature_stats(
            torch.tensor(self.description["feature_mean"]), torch.tensor(self.description["feature_std"])
        )
        self.model.to(self.device).train()
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self._parameters = list(self.model.parameters())
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.progress = Progress()
        self._measured_at = 0.0  # when wall-clock time was booked last
        out.mkdir(parents=True, exist_ok=True)
        self._write("config.json", json.dumps(config.to_dict(), indent=1))
        self._write("data.json", json.dumps(self.description, indent=1))
        self._write("tokenizer.model", self.tokenizer.proto)
        self.provenance = provenance or {}

    # ---- files

    def _write(self, name: str, content: str | bytes) -> None:
        if self.group.rank:
            return
        temporary = self.out / f".{name}.tmp"
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(self.out / name)

    def _write_provenance(self) -> None:
        seen = {"hours_seen": round(self.progress.seconds_seen / 3600, 2), "updates": self.progress.updates}
        minutes = {"wall_minutes": round(self.progress.wall_seconds / 60, 1)}
        self._write("provenance.json", json.dumps({**self.provenance, **seen, **minutes}, indent=1))

    def _log(self, **values: Any) -> None:
        if self.group.rank:
            return
        line = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()})
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        print(line, flush=True)

    def save(self) -> None:
        """Write state.pt by rename: a kill at any moment leaves the one before."""
        if self.group.rank:
            return
        state = {
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        temporary = self.out / ".state.pt.tmp"
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.out / "state.pt")

    def export(self) -> None:
        """Write ema.safetensors and what made it."""
        if self.group.rank:
            return
        self._write_provenance()
        temporary = self.out / ".ema.safetensors.tmp"
        save_file({name: value.cpu().contiguous() for name, value in self.ema.items()}, temporary)
        temporary.replace(self.out / "ema.safetensors")

    def resume(self) -> None:
        """Continue from state.pt; a fresh start where there is none.

        Raises:
            CheckpointError: the state is of another configuration (the run's length may differ).
        """
        path = self.out / "state.pt"
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        ours, theirs = json.loads(json.dumps(self.config.to_dict())), json.loads(json.dumps(state["config"]))
        changed = [key for key in ours if key not in ("minutes", "hours") and ours[key] != theirs.get(key)]
        if changed:
            raise CheckpointError(f"{path} was made with other settings ({', '.join(changed)}); use another run folder")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = state["ema"]
        values = state["progress"]
        self.progress = Progress(**{**values, "position": Position(**values["position"])})

    # ---- one update

    def _share(self) -> float:
        """How much of the run is over, 0..1."""
        if self.config.minutes is not None:
            return self.progress.wall_seconds / 60 / self.config.minutes
        assert self.config.hours is not None
        return self.progress.seconds_seen / 3600 / self.config.hours

    def _loss(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        """Scalar to minimise, and what to log: a loss per exit, or the single one of a random-depth batch."""
        rng = np.random.default_rng((self.config.seed, self.progress.updates))  # alike in all processes
        weights = np.array([weight for _, weight in self.config.chunk_weights])
        chunk = self.config.chunk_weights[int(rng.choice(len(weights), p=weights / weights.sum()))][0]
        features, lengths = batch.features.to(self.device), batch.feature_lengths.to(self.device)
        targets, target_lengths = batch.targets.to(self.device), batch.target_lengths.to(self.device)
        segments = stage.segments
        if rng.random() < self.config.shallow_probability:
            segments = int(rng.integers(1, max(2, segments)))
        mixed = segments == self.config.model.num_exits and chunk > 0
        mixed = mixed and rng.random() < self.config.random_depth_probability
        depth = None
        if mixed:
            frames = -(-features.shape[1] // self.config.model.subsampling)
            generator = torch.Generator().manual_seed(int(rng.integers(2**40)) + self.group.rank)
            depth = random_depth(len(features), -(-frames // chunk), segments, generator).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            output = self.model(features, lengths, chunk_frames=chunk or None, num_segments=segments, chunk_depth=depth)
        if output.mixed_logits is not None:
            loss = ctc_loss(output.mixed_logits, output.lengths, targets, target_lengths)
            return loss, loss.detach()[None]
        losses = exit_losses(output.logits, output.lengths, targets, target_lengths)
        return losses.mean(), losses.detach()

    def _update(self, batch: Batch, stage: Stage) -> tuple[list[float], float] | None:
        """One step. Returns the losses and the gradient norm, or None when they were not finite (skipped)."""
        progress = self.progress
        rate = self.config.learning_rate(stage, self._share(), progress.updates, progress.stage_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss, losses = self._loss(batch, stage)
        loss.backward()
        now = time.monotonic()
        wall = now - self._measured_at if self.group.rank == 0 else 0.0
        self._measured_at = now  # everything between two of these points counts, whatever it was
        *mean_losses, seconds, wall = self.group.reduce_gradients(
            self._parameters, [*losses.tolist(), batch.seconds, wall]
        )
        mean_losses = [value / self.group.size for value in mean_losses]
        progress.seconds_seen += seconds
        progress.wall_seconds += wall
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm, foreach=True))
        if not math.isfinite(norm) or not all(map(math.isfinite, mean_losses)):
            progress.bad_updates += 1
            if progress.bad_updates > self.config.max_bad_updates:
                raise EngineError(
                    f"{progress.bad_updates} updates in a row gave no finite gradient (update {progress.updates}); "
                    "lower the learning rate and resume from state.pt"
                )
            return None
        progress.bad_updates = 0
        self.optimizer.step()
        decay = min(self.config.ema_decay, (1 + progress.updates) / (10 + progress.updates))
        current = self.model.state_dict()
        torch._foreach_lerp_(list(self.ema.values()), [current[name] for name in self.ema], 1.0 - decay)
        return mean_losses, norm

    def _grow(self, before: int, after: int) -> None:
        """New segments start as copies of the last one trained so far, their residual branches at half strength.

        Progressive stacking (Gong et al., ICML 2019). Branches that start near zero stay there for long: the residual
        stream has outgrown them by then, and deep exits stay as good as the one they were copied from.
        """
        segments = [segment for segment in self.model.segments if isinstance(segment, Segment)]
        source = segments[before - 1].state_dict()
        for segment in segments[before:after]:
            segment.load_state_dict({name: value for name, value in source.items() if name in segment.state_dict()})
            for layer in segment.layers:
                for projection in (layer.ff_in.down, layer.attention.out, layer.conv.out, layer.ff_out.down):
                    for parameter in projection.parameters():
                        parameter.data.mul_(0.5)
        current = self.model.state_dict()
        for index in range(before, after):
            for name in self.ema:
                if name.startswith(f"segments.{index}."):
                    self.ema[name].copy_(current[name])

    # ---- the run

    def run(self) -> dict[str, Any]:
        """Train until the run's length is reached. Returns the last evaluation."""
        self._write_provenance()  # not earlier: a resumed run has seen hours already
        progress = self.progress
        self._measured_at = time.monotonic()
        last_evaluation: dict[str, Any] = {}
        while self._share() < 1.0 and not self._stopped():
            stage_index = self.config.stage_index(self._share())
            if stage_index != progress.stage:
                before, after = self.config.stages[progress.stage].segments, self.config.stages[stage_index].segments
                if after > before:
                    self._grow(before, after)
                progress.stage, progress.stage_updates, progress.position = stage_index, 0, Position()
            last_evaluation = self._run_stage(self.config.stages[stage_index]) or last_evaluation
        last_evaluation = self.evaluate()
        self._log(event="done", **last_evaluation)
        self.save()
        self.export()
        return last_evaluation

    def _stopped(self) -> bool:
        return self.max_updates is not None and self.progress.updates >= self.max_updates

    def _run_stage(self, stage: Stage) -> dict[str, Any]:
        progress, config = self.progress, self.config
        evaluation: dict[str, Any] = {}
        saved = evaluated = logged = progress.wall_seconds
        seen_at_log, losses_at_log = progress.seconds_seen, []
        stream = BatchStream(
            self.store,
            config.plan(stage),
            self.mean,
            subsampling=config.model.subsampling,
            seed=config.seed + 1000 * progress.stage,
            start=progress.position,
            augment=self.augment if stage.augment else None,
            rank=self.group.rank,
            world=self.group.size,
        )
        with stream as batches:
            for batch, position in batches:
                result = self._update(batch, stage)
                now = progress.wall_seconds
                progress.updates += 1
                progress.stage_updates += 1
                progress.position = position
                if result is None:
                    self._log(event="skipped", updates=progress.updates, bad_updates=progress.bad_updates)
                elif len(result[0]) == stage.segments:
                    losses_at_log.append(result[0])
                ended = config.stage_index(self._share()) != progress.stage or self._share() >= 1 or self._stopped()
                if (now - logged > 20 or ended) and losses_at_log:
                    self._log(
                        updates=progress.updates,
                        stage=progress.stage,
                        share=self._share(),
                        hours_seen=progress.seconds_seen / 3600,
                        audio_seconds_per_second=(progress.seconds_seen - seen_at_log) / max(1e-9, now - logged),
                        losses=[round(float(x), 3) for x in np.mean(losses_at_log, axis=0)],
                        norm=result[1] if result else float("nan"),
                        learning_rate=self.optimizer.param_groups[0]["lr"] * 1000,
                        minutes=progress.wall_seconds / 60,
                    )
                    logged, seen_at_log, losses_at_log = now, progress.seconds_seen, []
                if now - saved > config.checkpoint_seconds:
                    self.save()
                    saved = now
                if now - evaluated > config.evaluate_seconds or (ended and stage.until < 1):
                    evaluation = self.evaluate(stage.segments)
                    self._log(event="evaluation", minutes=progress.wall_seconds / 60, **evaluation)
                    self.export()
                    evaluated = now
                if ended:
                    return evaluation
        return evaluation

    def dev_batches(self, limit: int | None) -> Iterator[Batch]:
        """Held-out clips in batches of similar length; `limit` spreads over the whole set."""
        if self.dev is None:
            return
        clips = sorted(self.dev.clips, key=lambda clip: clip.utterance_id)
        if limit is not None and len(clips) > limit:
            clips = [clips[i] for i in np.linspace(0, len(clips) - 1, limit).astype(int)]
        group: list[Clip] = []
        for clip in sorted(clips, key=lambda clip: clip.frames):
            if group and clip.frames * (len(group) + 1) > 12_000:
                yield collate(self.dev, group, self.mean)
                group = []
            group.append(clip)
        if group:
            yield collate(self.dev, group, self.mean)

    def evaluate(self, segments: int | None = None, limit: int | None = None) -> dict[str, Any]:
        """Greedy word error rate of every exit on held-out clips, moving-average weights, 8-frame chunks."""
        trained = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        mine: list[tuple[str, list[str]]] = []  # reference, hypothesis per exit
        with torch.inference_mode():
            for number, batch in enumerate(self.dev_batches(limit or self.config.evaluate_utterances)):
                if number % self.group.size != self.group.rank:
                    continue
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
                    output = self.model(
                        batch.features.to(self.device),
                        batch.feature_lengths.to(self.device),
                        chunk_frames=min(8, self.config.model.max_chunk_frames),
                        num_segments=segments,
                    )
                by_exit = [greedy_texts(logits, output.lengths, self.tokenizer) for logits in output.logits]
                mine += zip(batch.texts, map(list, zip(*by_exit, strict=True)), strict=True)
        self.model.load_state_dict(trained)
        pairs = [pair for part in self.group.gather(mine) for pair in part]
        if not pairs:
            return {}
        references = [reference for reference, _ in pairs]
        rates = [wer(references, texts).rate for texts in zip(*(texts for _, texts in pairs), strict=True)]
        return {
            "wer": [round(rate, 4) for rate in rates],
            "utterances": len(references),
            "example": [references[-1], pairs[-1][1][-1]],
        }
