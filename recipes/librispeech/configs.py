"""Training configurations: functions that return a frozen `TrainConfig`. Costs are marked measured or projected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from asr_exit.augment import AugmentConfig
from asr_exit.config import ModelConfig
from asr_exit.schedule import Stage, TrainConfig

LIBRISPEECH_MODEL = ModelConfig()
CORPUS_SHARES = (("speechocean762", 0.6), ("synthetic", 0.4), ("an4", 0.5), ("spliced", 0.4), ("diphones", 0.15))


def tiny() -> TrainConfig:
    """Two exits, 4 layers of 64, for tests: overfits a handful of clips within a minute on one core."""
    model = ModelConfig(
        vocab_size=40, d_model=64, ff_dim=128, num_heads=2, num_layers=4, subsampling=4, subsampling_channels=8
    )
    return TrainConfig(
        name="tiny",
        model=model,
        hours=1.0,
        stages=(Stage(0.3, 1, 20.0, 10.0, False, 4e-3), Stage(1.0, 2, 20.0, 10.0, False, 3e-3)),
        warmup_updates=20,
        weight_decay=0.0,
        ema_decay=0.95,
        random_depth_probability=0.0,
        bf16=False,
    )


def mini5() -> TrainConfig:
    """train-clean-5 on a laptop: 150 h of audio seen, about 45 minutes on two cores (projected)."""
    return TrainConfig(name="mini5", model=LIBRISPEECH_MODEL, optimizer="muon", hours=150.0, stages=_grown(0.15, 0.35))


def local() -> TrainConfig:
    """All corpora given to `prepare` (here 14 h), boxed to wall-clock minutes."""
    return TrainConfig(
        name="local",
        model=LIBRISPEECH_MODEL,
        minutes=300.0,
        stages=(
            Stage(0.015, 2, 37.5, 5.0, False, 2e-3),
            Stage(0.035, 2, 60.0, 12.0, True, 2e-3),
            Stage(1.0, 6, 70.0, 17.0, True, 1.8e-3),
        ),
        optimizer="muon",
        decay_from=0.6,
        shallow_probability=0.3,
        random_depth_probability=0.2,
        corpus_shares=CORPUS_SHARES,
        augment=AugmentConfig(freq_warp=0.12, time_warp=0.15, noise_probability=0.1),
    )


def continued() -> TrainConfig:
    """More of `local` with `--start-from MODEL`: its first 4 layers go on, 8 fresh ones grow; two views with CR-CTC."""
    return TrainConfig(
        name="continued",
        model=LIBRISPEECH_MODEL,
        minutes=95.0,
        stages=(
            Stage(0.03, 2, 80.0, 17.0, True, 1.5e-3),
            Stage(0.33, 3, 80.0, 17.0, True, 1.8e-3),
            Stage(1.0, 6, 80.0, 17.0, True, 1.8e-3),
        ),
        decay_from=0.5,
        shallow_probability=0.25,
        random_depth_probability=0.2,
        consistency_weight=0.2,
        corpus_shares=CORPUS_SHARES,
        augment=AugmentConfig(
            freq_warp=0.12,
            time_warp=0.15,
            noise_probability=0.15,
            time_masks_per_second=0.8,
            time_mask_frames=30,
            time_masked_share=0.35,
        ),
    )


def deepened() -> TrainConfig:
    """More of `continued` with `--start-from MODEL`: all 12 layers from the start, Muon, more weight on deep exits."""
    return dataclasses.replace(
        continued(),
        name="deepened",
        stages=(Stage(1.0, 6, 90.0, 17.0, True, 1.5e-3),),
        optimizer="muon",
        decay_from=0.3,
        shallow_probability=0.2,
        exit_weights=(1.0, 1.0, 1.0, 1.2, 1.4, 2.0),
    )


def spliced() -> TrainConfig:
    """More of `deepened` with `--start-from MODEL`, with pseudo-labels and 30 h of what `splice` adds to the data."""
    return dataclasses.replace(
        deepened(),
        name="spliced",
        minutes=60.0,
        stages=(Stage(1.0, 6, 110.0, 17.0, True, 1.5e-3),),
    )


def hardened() -> TrainConfig:
    """More of `spliced` with `--start-from MODEL`: more noise, down to 0 dB, and a learning rate that falls sooner."""
    return dataclasses.replace(
        spliced(),
        name="hardened",
        minutes=70.0,
        seed=2,
        stages=(Stage(1.0, 6, 110.0, 17.0, True, 1.2e-3),),
        decay_from=0.15,
        augment=dataclasses.replace(spliced().augment, noise_probability=0.25, noise_snr_db=(0.0, 25.0)),
    )


def diphones() -> TrainConfig:
    """More of `hardened` with `--start-from MODEL`: two thirds is what `diphones` says; one view; more for exit 2."""
    shares = {"speechocean762": 0.3, "synthetic": 0.2, "an4": 0.3, "spliced": 0.0, "diphones": 0.15}
    return dataclasses.replace(
        hardened(),
        name="diphones",
        minutes=64.0,
        seed=3,
        stages=(Stage(1.0, 6, 130.0, 17.0, True, 1.5e-3),),
        decay_from=0.4,
        exit_weights=(2.0, 1.0, 1.0, 1.2, 1.4, 2.0),
        consistency_weight=0.0,
        corpus_shares=tuple(shares.items()),
    )


def settled() -> TrainConfig:
    """More of `diphones` with `--start-from MODEL`: a rate that falls from the start, milder masks, more recordings."""
    shares = {**dict(diphones().corpus_shares), "diphones": 0.1}
    return dataclasses.replace(
        diphones(),
        name="settled",
        minutes=28.0,
        seed=4,
        stages=(Stage(1.0, 6, 130.0, 17.0, True, 1.1e-3),),
        warmup_updates=40,
        decay_from=0.1,
        corpus_shares=tuple(shares.items()),
        augment=dataclasses.replace(
            diphones().augment, time_masks_per_second=0.6, time_mask_frames=25, time_masked_share=0.25
        ),
    )


def longer() -> TrainConfig:
    """More of `settled` with `--start-from MODEL`: phones at exit 4, mostly diphone speech, less noise."""
    shares = {**dict(diphones().corpus_shares), "synthetic": 0.1, "diphones": 0.25}
    return dataclasses.replace(
        settled(),
        name="longer",
        minutes=68.0,
        seed=6,
        stages=(Stage(1.0, 6, 130.0, 17.0, True, 1.2e-3),),
        decay_from=0.4,
        phone_weight=0.5,
        corpus_shares=tuple(shares.items()),
        augment=dataclasses.replace(
            settled().augment,
            freq_warp=0.1,
            time_warp=0.12,
            noise_probability=0.15,
            time_masks_per_second=0.5,
            time_masked_share=0.2,
        ),
    )


def revived() -> TrainConfig:
    """More of `longer` with `--start-from MODEL`: idle feed-forward units begin anew; more for exit 2; no phones."""
    return dataclasses.replace(
        longer(),
        name="revived",
        minutes=94.0,
        seed=7,
        stages=(Stage(1.0, 6, 130.0, 17.0, True, 1.1e-3),),
        decay_from=0.35,
        exit_weights=(4.0, 1.0, 1.0, 1.2, 1.4, 2.0),
        phone_weight=0.0,
        renew_below=0.03,
        chunk_weights=((2, 0.5), (4, 2.0), (8, 6.0), (16, 2.0), (0, 0.5)),
    )


def retold() -> TrainConfig:
    """More of `revived` with `--start-from MODEL`: 200 h of `diphones` not heard before; exit 2 has a hidden layer."""
    shares = {**dict(revived().corpus_shares), "diphones": 0.2}
    return dataclasses.replace(
        revived(),
        name="retold",
        model=dataclasses.replace(LIBRISPEECH_MODEL, head_hidden=(384, 0, 0, 0, 0, 0)),
        minutes=82.0,
        seed=8,
        decay_from=0.25,
        renew_below=0.0,
        corpus_shares=tuple(shares.items()),
    )


def founded() -> TrainConfig:
    """More of `retold` on a first exit trained alone (`--front-from`) and held fixed; exit 6 weighs more."""
    return dataclasses.replace(
        retold(),
        name="founded",
        minutes=36.0,
        seed=9,
        stages=(Stage(1.0, 6, 130.0, 17.0, True, 1.0e-3),),
        decay_from=0.1,
        exit_weights=(1.0, 1.0, 1.6, 1.0, 1.2, 2.0),  # of the frozen exit it does not count
        frozen_segments=1,
    )


def clean100() -> TrainConfig:
    """train-clean-100: 3,000 h of audio seen, about 7 hours on two cores (projected)."""
    return TrainConfig(
        name="clean100", model=LIBRISPEECH_MODEL, optimizer="muon", hours=3000.0, stages=_grown(0.05, 0.15)
    )


def full960() -> TrainConfig:
    """All 960 hours: 40,000 h of audio seen; meant for an accelerator (projected, not run)."""
    return TrainConfig(
        name="full960", model=LIBRISPEECH_MODEL, optimizer="muon", hours=40_000.0, stages=_grown(0.01, 0.03, 400.0)
    )


def _grown(to_four: float, to_six: float, batch_seconds: float = 75.0) -> tuple[Stage, ...]:
    """2 segments on short utterances, then 4, then all 6; masking from the second on. Batches are per process."""
    return (
        Stage(to_four / 3, 2, batch_seconds / 2, 5.0, False, 2e-3),
        Stage(to_four, 2, 0.75 * batch_seconds, 10.0, False, 2e-3),
        Stage(to_six, 4, batch_seconds, 13.0, True, 1.8e-3),
        Stage(1.0, 6, batch_seconds, 17.0, True, 1.5e-3),
    )


CONFIGS: Mapping[str, Callable[[], TrainConfig]] = {
    f.__name__: f
    for f in (
        tiny,
        mini5,
        local,
        continued,
        deepened,
        spliced,
        hardened,
        diphones,
        settled,
        longer,
        revived,
        retold,
        founded,
        clean100,
        full960,
    )
}
