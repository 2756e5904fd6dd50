"""Ablations: the plain baseline, every method alone on top of it, all together, and dedicated single-exit models; for
runs that go on from a trained model, all methods but one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from asr_exit.augment import AugmentConfig
from asr_exit.errors import ConfigError
from asr_exit.schedule import Stage, TrainConfig
from recipes.librispeech.configs import diphones, local, longer

# what `prepare`, `splice` and `diphones` add to the recordings
SYNTHETIC, SPLICED, DIPHONES = "synthetic", "spliced", "diphones"
NO_MADE_SPEECH = {SYNTHETIC: 0.0, SPLICED: 0.0, DIPHONES: 0.0}


def _model(config: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))  # type: ignore[arg-type]


def _augment(config: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, augment=dataclasses.replace(config.augment, **changes))  # type: ignore[arg-type]


def _set(**changes: object) -> Callable[[TrainConfig], TrainConfig]:
    return lambda config: dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def _ones(config: TrainConfig) -> tuple[float, ...]:
    return (1.0,) * config.model.num_exits


def plain(hours: float, layers: int = 12) -> TrainConfig:
    """The sum of exit CTC losses and nothing else: real recordings at their own speed, no masks, fixed chunks.

    With the recipe's optimiser: with AdamW a short run does not leave CTC's blank plateau, and all rows would be alike.
    """
    base = short(local(), layers, hours)
    nothing = AugmentConfig(freq_masks=0, time_masks_per_second=0.0, gain_nepers=0.0)
    return dataclasses.replace(
        base,
        name="plain",
        model=dataclasses.replace(base.model, self_conditioning=False, conv_lookahead=False),
        augment=nothing,
        corpus_shares=tuple(NO_MADE_SPEECH.items()),
        speeds=(1.0,),
        chunk_weights=((8, 1.0),),
        shallow_probability=0.0,
        random_depth_probability=0.0,
    )


METHODS: Mapping[str, Callable[[TrainConfig], TrainConfig]] = {
    "AdamW": _set(optimizer="adamw"),
    "self-conditioning": lambda c: _model(c, self_conditioning=True),
    "convolution to the chunk's end": lambda c: _model(c, conv_lookahead=True),
    "dynamic chunk": _set(chunk_weights=TrainConfig(name="", hours=1.0).chunk_weights),
    "dynamic left context": _set(left_weights=((16, 1.0), (32, 1.0), (64, 2.0))),
    "SpecAugment": lambda c: _augment(c, freq_masks=2, time_masks_per_second=0.5),
    "level": lambda c: _augment(c, gain_nepers=1.5),
    "speed perturbation": _set(speeds=()),
    "frequency warp": lambda c: _augment(c, freq_warp=0.12),
    "time warp": lambda c: _augment(c, time_warp=0.15),
    "random filter": lambda c: _augment(c, filter_db=6.0),
    "noise": lambda c: _augment(c, noise_probability=0.2),
    "reverberation": lambda c: _augment(c, room_probability=0.2),
    "synthetic speech": lambda c: _shares(c, synthetic=1.0),
    "spliced speech": lambda c: _shares(c, spliced=0.4),
    "diphone speech": lambda c: _shares(c, diphones=0.15),
    "exit weights (deep)": lambda c: dataclasses.replace(c, exit_weights=(*_ones(c)[:-1], 3.0)),
    "exit weights (shallow)": lambda c: dataclasses.replace(c, exit_weights=(3.0, *_ones(c)[1:])),
    "CR-CTC": lambda c: _augment(
        dataclasses.replace(c, consistency_weight=0.2), freq_masks=2, time_masks_per_second=1.0, time_masked_share=0.4
    ),
    "distillation": _set(distillation_weight=0.3),
    "distillation into heads at the end": lambda c: dataclasses.replace(
        c,
        distillation_weight=1.0,
        stages=(*c.stages[:-1], _until(c.stages[-1], 0.9), dataclasses.replace(c.stages[-1], heads_only=True)),
    ),
    "joint gates": _set(gate_weight=0.3),
    "phones at exit 4": _set(phone_weight=0.3),
    "deeper heads at shallow exits": lambda c: _model(c, head_hidden=(384, 256, *[0] * 98)[: c.model.num_exits]),
    "two labels a frame": lambda c: _model(c, labels_per_frame=2),
    "sorted training": _set(shallow_probability=0.5),
    "random depth (propagate)": _set(random_depth_probability=0.25),
    "random depth (hole)": _set(random_depth_probability=0.25, random_depth_fill="hole"),
    "random depth (catch_up)": _set(random_depth_probability=0.25, random_depth_fill="catch_up"),
    "4x subsampling": lambda c: _model(
        dataclasses.replace(c, chunk_weights=((16, 1.0),)), subsampling=4, left_context_frames=128, max_chunk_frames=32
    ),
}

# What the bundled model was trained with, each taken away
WITHOUT: Mapping[str, Callable[[TrainConfig], TrainConfig]] = {
    "Muon (AdamW)": METHODS["AdamW"],
    "self-conditioning": lambda c: _model(c, self_conditioning=False),
    "convolution to the chunk's end": lambda c: _model(c, conv_lookahead=False),
    "dynamic chunk": _set(chunk_weights=((8, 1.0),)),
    "masks": lambda c: _augment(c, freq_masks=0, time_masks_per_second=0.0),
    "level": lambda c: _augment(c, gain_nepers=0.0),
    "speed perturbation": _set(speeds=(1.0,)),
    "frequency warp": lambda c: _augment(c, freq_warp=0.0),
    "time warp": lambda c: _augment(c, time_warp=0.0),
    "noise": lambda c: _augment(c, noise_probability=0.0),
    "synthetic speech": lambda c: _shares(c, synthetic=0.0),
    "diphone speech": lambda c: _shares(c, diphones=0.0),
    "sorted training": _set(shallow_probability=0.0),
    "random depth": _set(random_depth_probability=0.0),
}
# What it was not trained with, each added; the rest of METHODS changes the shape of the weights
ADDED = (
    "spliced speech",
    "dynamic left context",
    "random filter",
    "reverberation",
    "exit weights (deep)",
    "exit weights (shallow)",
    "distillation",
    "distillation into heads at the end",
    "joint gates",
    "phones at exit 4",
    "deeper heads at shallow exits",
    "two labels a frame",
)


def _shares(config: TrainConfig, **shares: float) -> TrainConfig:
    return dataclasses.replace(config, corpus_shares=tuple({**dict(config.corpus_shares), **shares}.items()))


def short(config: TrainConfig, layers: int, hours: float) -> TrainConfig:
    """`config` as a model of `layers` layers for a run of tens of hours: utterances grow longer within the first ten.

    The batches are smaller, too: so early, more updates are worth more than less noise in each.
    """
    model = dataclasses.replace(config.model, num_layers=layers)
    first = min(2, model.num_exits)
    stages = (
        Stage(min(0.12, 4.0 / hours), first, 30.0, 5.0, False, 2e-3),
        Stage(min(0.35, 10.0 / hours), first, 40.0, 9.0, True, 2e-3),
        Stage(1.0, model.num_exits, 48.0, 15.0, True, 1.8e-3),
    )
    return dataclasses.replace(config, model=model, stages=stages, decay_from=0.5, minutes=None, hours=hours)


def going_on(hours: float, layers: int = 12, head_hidden: Sequence[int] = ()) -> dict[str, TrainConfig]:
    """Rows that go on from a trained model: with all of its methods, with each left out or one added, and plain.

    Then models of 2, half and all layers of which only the last exit counts: the seed paper's comparison.

    The learning rate is high enough to unlearn for the first third of the run, then falls. All have the exit heads of
    the trained model, `head_hidden`, dedicated ones too.
    """
    trained = diphones()
    model = dataclasses.replace(trained.model, head_hidden=tuple(head_hidden)).with_layers(layers)
    stages = (Stage(1.0, model.num_exits, 80.0, 17.0, True, 1.2e-3),)
    run = {"stages": stages, "minutes": None, "hours": hours, "decay_from": 0.3, "exit_weights": (), "ema_decay": 0.99}
    everything = dataclasses.replace(trained, model=model, warmup_updates=50, **run)  # type: ignore[arg-type]
    nothing = everything
    for name in WITHOUT.keys() - {"Muon (AdamW)"}:
        nothing = WITHOUT[name](nothing)
    fill = {f"random depth ({fill})": _set(random_depth_fill=fill)(everything) for fill in ("hole", "catch_up")}
    rows = {
        "everything": everything,
        **{f"without {name}": change(everything) for name, change in WITHOUT.items()},
        **{f"with {name}": METHODS[name](everything) for name in ADDED},
        "with CR-CTC": _set(consistency_weight=0.2)(everything),  # the masks are those of METHODS already
        **{f"with {name}": config for name, config in fill.items()},
        "plain": nothing,
        **{f"dedicated {n} layers": last_exit_only(everything, n) for n in sorted({2, layers // 2, layers})},
    }
    return {name: dataclasses.replace(config, name=name) for name, config in rows.items()}


def last_exit_only(config: TrainConfig, layers: int) -> TrainConfig:
    """`config` for the first `layers` layers; the exits before their last one feed deeper layers and learn nothing.

    Raises:
        ConfigError: `layers` is no depth at which the model of `config` has an exit.
    """
    if layers not in config.model.exit_layers:
        raise ConfigError(f"a dedicated model ends after one of the layers {config.model.exit_layers}, not {layers}")
    model = config.model.with_layers(layers)
    weights = (*(1e-6,) * (model.num_exits - 1), 1.0)
    stages = tuple(dataclasses.replace(stage, segments=model.num_exits) for stage in config.stages)
    return dataclasses.replace(
        config,
        model=model,
        stages=stages,
        exit_weights=weights,
        shallow_probability=0.0,
        random_depth_probability=0.0,
        frozen_segments=0,
    )


def _until(stage: Stage, until: float) -> Stage:
    return dataclasses.replace(stage, until=until)


def dedicated(base: TrainConfig, layers: int) -> TrainConfig:
    """A model of `layers` layers whose only exit is its last: what the exits of a joint model are measured against."""
    model = dataclasses.replace(base.model, num_layers=layers, exit_every=layers, head_hidden=())
    stages = tuple(dataclasses.replace(stage, segments=1) for stage in base.stages)
    return dataclasses.replace(
        base,
        model=model,
        stages=stages,
        shallow_probability=0.0,
        random_depth_probability=0.0,
        exit_weights=(),
        gate_weight=0.0,
    )


def variants(hours: float, layers: int = 12) -> dict[str, TrainConfig]:
    """Every row of the table, in order, at equal hours of audio seen; dedicated models of 2, half and all layers."""
    baseline = plain(hours, layers)
    everything = _shares(short(local(), layers, hours), spliced=0.0, diphones=0.0)
    rows = {"plain": baseline, **{name: change(baseline) for name, change in METHODS.items()}, "local": everything}
    rows["local with CR-CTC"] = METHODS["CR-CTC"](everything)
    rows["local with CR-CTC and spliced speech"] = METHODS["spliced speech"](rows["local with CR-CTC"])
    rows["local with diphone speech"] = METHODS["diphone speech"](everything)
    # masks and warps as mild as in the bundled model's last runs, mostly diphone speech, the first exit weighs more
    mild = dataclasses.replace(longer().augment, noise_probability=0.1)
    together = dataclasses.replace(_shares(everything, synthetic=0.2, diphones=0.25), augment=mild)
    rows["best together"] = METHODS["exit weights (shallow)"](together)
    rows |= {f"dedicated {n} layers": dedicated(everything, n) for n in sorted({2, layers // 2, layers})}
    return {name: dataclasses.replace(config, name=name) for name, config in rows.items()}
