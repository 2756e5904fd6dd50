"""The training loop: staged growth, moving-average weights, exact resume, time-boxed schedule.

What a run writes is in `run_folder`, what it minimises in `objective`, when it does what in `schedule`.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asr_exit.augment import Augment
from asr_exit.data import Batch, BatchStream, FeatureStore, Position
from asr_exit.encoder import Encoder
from asr_exit.errors import CheckpointError, ConfigError, EngineError
from asr_exit.joint_gates import JointGates, without_gates
from asr_exit.objective import Draw, draw, objective
from asr_exit.optimizer import Optimizers
from asr_exit.parallel import Group
from asr_exit.phones import PhoneExit, read_lexicon
from asr_exit.processor import computes_in_bf16
from asr_exit.reporting import Reporter
from asr_exit.run_folder import RunFolder
from asr_exit.schedule import Stage, TrainConfig
from asr_exit.tokenizer import Tokenizer
from asr_exit.validation import validate
from asr_exit.warm_start import renew_idle, warm_start

# settings of how long and by how many processes a run is trained; two processes equal one that accumulates two batches
MAY_CHANGE = (
    "minutes",
    "hours",
    "accumulate",
    "bf16",  # as the processor has it
    "checkpoint_seconds",
    "evaluate_seconds",
    "evaluate_utterances",
)


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

        `config.bf16` becomes False on a processor that has no bf16 products.

        Raises:
            ConfigError: the data is not finished, or does not fit the model.
        """
        if not (data / "data.json").is_file():
            raise ConfigError(f"{data} holds no finished data (no data.json); run the recipe's prepare step")
        config = replace(config, bf16=config.bf16 and computes_in_bf16(device))
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
        self.augment = Augment(
            config.augment,
            self.mean,
            FeatureStore(noise) if any(noise.glob("*.json")) else None,
            config.model.features,
            self.description.get("room_envelopes", ()),
        )
        torch.manual_seed(config.seed)
        self.model = Encoder(config.model)
        self.model.set_feature_stats(
            torch.tensor(self.description["feature_mean"]), torch.tensor(self.description["feature_std"])
        )
        self.model.to(self.device).train()
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.gates = JointGates(self.model).to(self.device) if config.gate_weight > 0 else None
        self.phones = None
        if config.phone_weight > 0:
            self.phones = PhoneExit(config.model.d_model, read_lexicon(data)).to(self.device)
        aside = [parameter for part in self._aside().values() for parameter in part.parameters()]
        self._parameters = [*self.model.parameters(), *aside]
        self.optimizer = Optimizers(self.model, config.optimizer, config.weight_decay, self.group, aside)
        self.progress = Progress()
        self._measured_at = 0.0  # when wall-clock time was booked last
        first = self.group.rank == 0
        self.folder, self.report = RunFolder(out, first), Reporter(out, first)
        self.folder.write("config.json", json.dumps(config.to_dict(), indent=1))
        self.folder.write("data.json", json.dumps(self.description, indent=1))
        self.folder.write("tokenizer.model", self.tokenizer.proto)
        self.provenance = provenance or {}

    def _aside(self) -> dict[str, nn.Module]:
        """What is trained along with the model and is no part of it, by its name in a checkpoint."""
        parts = {"gates": self.gates, "phones": self.phones}
        return {name: part for name, part in parts.items() if part is not None}

    # ---- files

    def _write_provenance(self) -> None:
        seen = {"hours_seen": round(self.progress.seconds_seen / 3600, 2), "updates": self.progress.updates}
        minutes = {"wall_minutes": round(self.progress.wall_seconds / 60, 1)}
        self.folder.write("provenance.json", json.dumps({**self.provenance, **seen, **minutes}, indent=1))

    def save(self) -> None:
        """Write state.pt."""
        self.folder.save_state(
            {
                "config": self.config.to_dict(),
                "model": self.model.state_dict(),
                "ema": self._averaged(),
                "optimizer": self.optimizer.state_dict(),
                "progress": asdict(self.progress),
                **{name: part.state_dict() for name, part in self._aside().items()},
            }
        )

    def _averaged(self) -> dict[str, Tensor]:
        return self.ema | (self.gates.exported() if self.gates else {})

    def export(self) -> None:
        """Write ema.safetensors and what made it."""
        self._write_provenance()
        self.folder.export(self._averaged())

    def start_from(self, source: Encoder, front: Encoder | None = None) -> None:
        """Take the weights of the segments that the first stage runs from another model (`warm_start`), renewed.

        `front`: a shallower model whose subsampling and segments replace the first ones of `source`.

        Raises ConfigError where the architectures differ.
        """
        segments = self.config.stages[0].segments
        warm_start(self.model, source, segments)
        if front is not None:
            warm_start(self.model, front, min(segments, front.config.num_exits))
        if renewed := renew_idle(self.model, self.config.renew_below):
            self.report.line(event="renewed", feed_forward_units=renewed)
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def resume(self) -> None:
        """Continue from state.pt; a fresh start where there is none.

        Raises:
            CheckpointError: the state is damaged, or of another configuration (`MAY_CHANGE` may differ).
        """
        state = self.folder.load_state(self.device)
        if state is None:
            return
        ours, theirs = (
            json.loads(json.dumps(c.to_dict())) for c in (self.config, TrainConfig.from_dict(state["config"]))
        )
        changed = [key for key in ours if key not in MAY_CHANGE and ours[key] != theirs[key]]
        if changed:
            raise CheckpointError(
                f"{self.out / 'state.pt'} was made with other settings ({', '.join(changed)}); use another run folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema, _ = without_gates(state["ema"])
        for name, part in self._aside().items():
            part.load_state_dict(state[name])
        values = state["progress"]
        self.progress = Progress(**{**values, "position": Position(**values["position"])})

    # ---- one update

    def _share(self) -> float:
        """How much of the run is over, 0..1."""
        if self.config.minutes is not None:
            return self.progress.wall_seconds / 60 / self.config.minutes
        assert self.config.hours is not None
        return self.progress.seconds_seen / 3600 / self.config.hours

    def _loss(self, batch: Batch, drawn: Draw) -> tuple[Tensor, Tensor]:
        """Scalar to minimise, and what to log: a loss per exit, or the single one of a mixed-depth batch."""
        return objective(self.model, batch, self.config, drawn, self.device, self.group.rank, self.gates, self.phones)

    def _update(self, batches: list[Batch], stage: Stage) -> tuple[list[float], float] | None:
        """One step over one or more batches. Returns the losses and the gradient norm, or None when they were not
        finite (skipped)."""
        progress = self.progress
        rate = self.config.learning_rate(stage, self._share(), progress.updates, progress.stage_updates)
        self.optimizer.learning_rate = rate
        self.optimizer.zero_grad(self._parameters)
        drawn = draw(self.config, stage, progress.updates)
        total: Tensor | None = None
        for batch in batches:
            loss, losses = self._loss(batch, drawn)
            (loss / len(batches)).backward()
            total = losses if total is None else total + losses
        assert total is not None
        now = time.monotonic()
        wall = now - self._measured_at if self.group.rank == 0 else 0.0
        self._measured_at = now  # everything between two of these points counts, whatever it was
        *mean_losses, seconds, wall = self.group.reduce_gradients(
            self._parameters, [*(total / len(batches)).tolist(), sum(batch.seconds for batch in batches), wall]
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
        if self.gates:
            self.gates.average(decay)
        return mean_losses, norm

    def _grow(self, before: int, after: int) -> None:
        """New segments start from their random initialisation with the exit head of the last one trained so far.

        Their branches are small against the normalised state at first, so the copied head works at once. Copies of
        whole segments (progressive stacking) and branches that start near zero both ended as near-identities.
        """
        source = self.model.segments[before - 1].head.state_dict()
        for segment in self.model.segments[before:after]:
            own = segment.head.state_dict()
            fitting = {name: value for name, value in source.items() if name in own and own[name].shape == value.shape}
            segment.head.load_state_dict({**own, **fitting})
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
        with self.report:
            while self._share() < 1.0 and not self._stopped():
                stage_index = self.config.stage_index(self._share())
                if stage_index != progress.stage:
                    stages = self.config.stages
                    before, after = stages[progress.stage].segments, stages[stage_index].segments
                    if after > before:
                        self._grow(before, after)
                    progress.stage, progress.stage_updates, progress.position = stage_index, 0, Position()
                last_evaluation = self._run_stage(self.config.stages[stage_index]) or last_evaluation
            last_evaluation = self.evaluate()
            self.report.line(event="done", updates=progress.updates, **last_evaluation)
        self.save()
        self.export()
        return last_evaluation

    def _stopped(self) -> bool:
        return self.max_updates is not None and self.progress.updates >= self.max_updates

    def _freeze(self, stage: Stage) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.config.learns(stage, name))

    def _run_stage(self, stage: Stage) -> dict[str, Any]:
        progress, config = self.progress, self.config
        evaluation: dict[str, Any] = {}
        saved = evaluated = logged = progress.wall_seconds
        seen_at_log, losses_at_log = progress.seconds_seen, []
        self._freeze(stage)
        stream = BatchStream(
            self.store,
            config.plan(stage),
            self.mean,
            features_per_label=config.model.features_per_label,
            seed=config.seed + 1000 * progress.stage,
            start=progress.position,
            augment=self.augment if stage.augment else None,
            rank=self.group.rank,
            world=self.group.size,
        )
        waiting: list[Batch] = []
        with stream as batches:
            for batch, position in batches:
                waiting.append(batch)
                if len(waiting) < config.accumulate:
                    continue
                result = self._update(waiting, stage)
                waiting = []
                now = progress.wall_seconds
                progress.updates += 1
                progress.stage_updates += 1
                progress.position = position
                if result is None:
                    self.report.line(event="skipped", updates=progress.updates, bad_updates=progress.bad_updates)
                elif len(result[0]) == stage.segments:
                    losses_at_log.append(result[0])
                ended = config.stage_index(self._share()) != progress.stage or self._share() >= 1 or self._stopped()
                if (now - logged > 20 or ended) and losses_at_log:
                    losses = [round(float(x), 3) for x in np.mean(losses_at_log, axis=0)]
                    rate = (progress.seconds_seen - seen_at_log) / max(1e-9, now - logged)
                    share, hours = self._share(), progress.seconds_seen / 3600
                    self.report.line(
                        updates=progress.updates,
                        stage=progress.stage,
                        share=share,
                        hours_seen=hours,
                        audio_seconds_per_second=rate,
                        losses=losses,
                        norm=result[1] if result else float("nan"),
                        learning_rate=self.optimizer.learning_rate * 1000,
                        minutes=progress.wall_seconds / 60,
                        **({"gates_spend": float(self.gates.spent)} if self.gates else {}),
                        **({"phone_loss": self.phones.last} if self.phones else {}),
                    )
                    self.report.advance(share, hours, rate, losses)
                    logged, seen_at_log, losses_at_log = now, progress.seconds_seen, []
                if now - saved > config.checkpoint_seconds:
                    self.save()
                    saved = now
                if now - evaluated > config.evaluate_seconds or (ended and stage.until < 1):
                    evaluation = self.evaluate(stage.segments)
                    minutes = progress.wall_seconds / 60
                    self.report.line(event="evaluation", updates=progress.updates, minutes=minutes, **evaluation)
                    self.export()
                    evaluated = now
                if ended:
                    return evaluation
        return evaluation

    def evaluate(self, segments: int | None = None) -> dict[str, Any]:
        """`validate` on the held-out clips with the moving-average weights; empty without such clips."""
        if self.dev is None:
            return {}
        trained = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        try:
            return validate(
                self.model,
                self.dev,
                self.tokenizer,
                self.mean,
                segments=segments,
                limit=self.config.evaluate_utterances,
                bf16=self.config.bf16,
                device=self.device,
                group=self.group,
            )
        finally:
            self.model.load_state_dict(trained)
