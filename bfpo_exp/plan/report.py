"""A run's plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bfpo_exp.config.data import Source
from bfpo_exp.config.schema import Config
from bfpo_exp.distributed import group
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.paths import chosen_path
from bfpo_exp.models.numerics import chosen_attention, this_hardware
from bfpo_exp.plan.memory import Setting, training_memory
from bfpo_exp.plan.parameters import Shape, known_shape, trained_parameters
from bfpo_exp.plan.published import beside_published
from bfpo_exp.plan.stages import StagePlan, stage_plans
from bfpo_exp.plan.timing import seconds_a_step, why_not_timed
from bfpo_exp.rewards.scorer import REWARDS
from bfpo_exp.rewards.use import trains_reward_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIMED_TOKENS = 1_000_000  # tokens of the passes that are timed, beyond which a plan takes too long


def plan(config: Config) -> str:
    """What a run will do and cost; ``WORLD_SIZE`` in the environment is the number of its GPUs.

    Raises `UserError` for what can be known to be wrong without data and weights.
    """
    parts = _parts(config, brief=False)
    return "\n".join([_heading(config), *(_text(title, lines) for title, lines in parts)])


def plans(configs: Sequence[Config]) -> str:
    """The plans of all jobs: first what is the same in all of them, then what is each one's own.

    Jobs that differ in nothing but the seed are told as one; no steps are timed.
    """
    if len(configs) == 1:
        return plan(configs[0])
    alike: dict[str, list[Config]] = {}
    for config in configs:
        alike.setdefault(config.model_dump_json(exclude={"seed"}), []).append(config)
    several = [(jobs, _parts(jobs[0], brief=True)) for jobs in alike.values()]
    told = [{(title, line) for title, lines in parts for line in lines} for _, parts in several]
    same = set.intersection(*told)
    shared = [(title, [line for line in lines if (title, line) in same]) for title, lines in several[0][1]]
    texts = [f"{len(configs)} jobs, {len(several)} distinct", ""]
    if any(lines for _, lines in shared):
        texts += ["the same for all", *(_text(title, lines) for title, lines in shared if lines), ""]
    for jobs, parts in several:
        own = [(title, [line for line in lines if (title, line) not in same]) for title, lines in parts]
        seeds = f"; {len(jobs)} jobs, seeds {', '.join(str(job.seed) for job in jobs)}" if jobs[1:] else ""
        texts += [_heading(jobs[0]) + seeds, *(_text(title, lines) for title, lines in own if lines), ""]
    return "\n".join(texts[:-1])


def _heading(config: Config) -> str:
    return f"{config.label}, seed {config.seed}: {', '.join(config.stages)}"


def _text(title: str, lines: Sequence[str]) -> str:
    return "\n  ".join([title, *lines])


def _parts(config: Config, *, brief: bool) -> list[tuple[str, list[str]]]:
    """The plan in parts: titles with their lines."""
    if not config.pipeline:
        return []
    known = known_shape(config.model)
    stages = stage_plans(config, group().size)
    for stage in stages:
        _check(stage, known, config)
    parts = [(f"model {config.model.name}", list(_model(config, known)))]
    parts.append((f"data {config.data.name}", list(_data(config))))
    if config.soup.runs:
        pairs = zip(config.soup.weights, config.soup.runs, strict=True)
        parts.append(("soup", [f"{weight:g} of the model of {run}" for weight, run in pairs]))
    parts += [
        (f"stage {stage.name}", list(_stage(config, stage, known, timed=not brief))) for stage in stages
    ]
    if stages and not brief:
        parts.append(("published hyper-parameters (arXiv 2408.15313)", list(_published(config))))
    return parts


def _model(config: Config, known: tuple[Shape, PreTrainedModel] | None) -> Iterator[str]:
    model = config.model
    origin = model.path or "random weights"
    if model.path is not None and model.shape is not None:
        origin += f", revision {model.revision or 'not pinned'}"
    try:
        attention, why = chosen_attention(model, this_hardware())
        attending = f"attention {attention} on this machine"
        if model.attention == "auto":
            attending += f" ({why})"
    except UserError:
        attending = f"attention {model.attention}, which this machine does not have"
    yield f"{origin}; {model.dtype}; {attending}"
    if known is None:
        yield "parameters: not known without its config.json; set model.shape to plan them"
    else:
        yield f"{known[0].parameters:,} parameters"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    rows: list[tuple[str, str, Source]] = []
    if "sft" in config.stages:
        rows += [("demonstrations", name, source) for name, source in data.sft.items()]
    if {"reference", "preference"} & set(config.stages) or trains_reward_model(config):
        pairs = {name: source for name, source in data.pairs.items() if source.stream in data.streams}
        rows += [(f"pairs, {source.stream}", name, source) for name, source in pairs.items()]
    for what, name, source in rows:
        yield f"{what}: {name}, {_size(source)} of {_origin(source)}"


def _size(source: Source) -> str:
    if source.size is None:
        return "all rows"
    return f"{source.size:,} rows" if isinstance(source.size, int) else f"a share of {source.size:g}"


def _origin(source: Source) -> str:
    if source.files is not None:
        return ", ".join(source.files)
    if source.hub is not None:
        return f"{source.hub}@{source.revision} ({source.split})"
    return "the generated world"


def _check(stage: StagePlan, known: tuple[Shape, PreTrainedModel] | None, config: Config) -> None:
    """What would stop the run at its start, as far as it shows here."""
    if known:
        trained_parameters(known[1], stage.optimisation.trainable, lora=None)  # refuses names it lacks
    if stage.optimisation.batch % stage.processes:
        raise UserError(
            f"a batch of {stage.optimisation.batch} ({stage.name}) cannot be shared out evenly over "
            f"{stage.processes} processes; give a multiple of {stage.processes}, or another WORLD_SIZE"
        )
    positions = known[0].positions if known else None
    if positions is not None and stage.length > positions:
        raise UserError(
            f"sequences of {stage.name} have up to {stage.length} tokens, but the model "
            f"{config.model.name} has {positions} positions"
        )


def _stage(
    config: Config, stage: StagePlan, known: tuple[Shape, PreTrainedModel] | None, timed: bool
) -> Iterator[str]:
    settings, unit = stage.optimisation, stage.unit
    if stage.loss is not None:
        numbers = _numbers(stage.loss.hyperparameters)
        order = f"order {stage.loss.order}, batches {config.data.batches}"
        yield f"{stage.loss.name} ({numbers}), {order if stage.loss.order else 'no pairs compared'}"
    gpus = _counted(stage.processes, "GPU", "GPUs")
    passes = _counted(stage.accumulation, "pass", "passes") + (" at most, packed" if stage.packed else "")
    yield f"{settings.batch} {unit} a step = {gpus} x {stage.microbatch} x {passes}; {_length(stage)}"
    total = "" if stage.tokens is None else f", {stage.tokens:,} in all"
    yield f"tokens at most: {stage.step_tokens:,} a step{total}"
    decay = f", weight decay {settings.weight_decay:g}" if settings.weight_decay else ""
    yield (
        f"{settings.optimizer}, lr {settings.lr:g}, {settings.schedule} after a warm-up of "
        f"{settings.warmup:g}, clip {settings.clip}{decay}"
    )
    if known is None:
        return
    shape, model = known
    compares = stage.loss is not None
    lora = config.train.lora if compares else None
    trained = trained_parameters(model, settings.trainable, lora)
    which = (
        "adapters"
        if lora
        else settings.trainable
        if settings.trainable == "all"
        else ", ".join(settings.trainable)
    )
    yield f"trained: {trained:,} parameters ({which}), {100 * trained / shape.parameters:.1f} % of all"
    live = compares and config.train.reference == "live"
    setting = Setting.of(config.model.dtype, config.deepspeed, stage.processes)
    shared = compares and chosen_path(config.model, stage.length).name == "shared"
    outputs = replace(shape, vocabulary=len(REWARDS)) if stage.name == "reward" else shape
    yield from _memory(outputs, trained, stage, setting, adapters=lora is not None, live=live, shared=shared)
    yield f"time: {_time(config, stage, shape, timed)}"


def _memory(
    shape: Shape,
    trained: int,
    stage: StagePlan,
    setting: Setting,
    *,
    adapters: bool,
    live: bool,
    shared: bool,
) -> Iterator[str]:
    def totals(checkpointing: bool) -> Mapping[str, int]:
        optimisation = stage.optimisation.model_copy(update={"gradient_checkpointing": checkpointing})
        return training_memory(
            shape, trained, stage.micro_tokens, optimisation, setting, adapters=adapters, live_reference=live,
            shared=shared,
        )  # fmt: skip

    own = stage.optimisation.gradient_checkpointing
    chosen, other = totals(own), totals(not own)
    how = f"ZeRO {setting.zero}" if setting.zero else "plain PyTorch"
    yield (
        f"memory a GPU, estimated ({how}, gradient checkpointing {'on' if own else 'off'}): "
        f"{_gigabytes(sum(chosen.values()))}"
    )
    yield "  " + ", ".join(f"{name} {_gigabytes(size)}" for name, size in chosen.items())
    yield f"  with gradient checkpointing {'off' if own else 'on'}: {_gigabytes(sum(other.values()))}"


def _gigabytes(size: int) -> str:
    """In GB of 10^9 bytes, or MB where it is little.

    >>> _gigabytes(14_483_464_192), _gigabytes(2_500_000)
    ('14.5 GB', '2.5 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _length(stage: StagePlan) -> str:
    """Steps, rows and passes over them, as far as they are known."""
    if stage.rows is None:
        known = "" if stage.steps is None else f"{stage.steps:,} steps; "
        passes = "" if stage.optimisation.epochs is None else f", {stage.optimisation.epochs:g} times over"
        return f"{known}how many rows is known once the data are read{passes}"
    return f"{stage.steps:,} steps on {stage.rows:,} rows at most, {stage.epochs:.3g} times over"


def _time(config: Config, stage: StagePlan, shape: Shape, timed: bool) -> str:
    reason = why_not_timed(config.model, shape)
    if reason is None and stage.micro_tokens > TIMED_TOKENS:
        reason = f"a forward pass has over {TIMED_TOKENS:,} tokens"
    if reason is None and not timed:
        reason = "in a sweep no steps are tried"
    if reason is not None:
        return f"no estimate was measured: {reason}"
    seconds = seconds_a_step(config, shape, stage)
    total = "" if stage.steps is None else f", {seconds * stage.steps:.0f} s in all"
    return (
        f"{seconds:.2g} s a step{total}, on this machine and at full length (measured over a few steps; "
        "log-probs of the reference, evaluation and start are not in it)"
    )


def _published(config: Config) -> Iterator[str]:
    rows = beside_published(config)
    same = [f"{key} {_value(own)}" for key, own, published in rows if own == published]
    other = [f"{key} {_value(own)} ({_value(published)})" for key, own, published in rows if own != published]
    if same:
        yield f"the same here: {', '.join(same)}"
    if other:
        yield f"another here (published): {', '.join(other)}"


def _numbers(values: Mapping[str, Any]) -> str:
    """Settings in words, those of a part in brackets."""
    return ", ".join(
        f"{name} ({_numbers(value)})" if isinstance(value, Mapping) else f"{name} {_value(value)}"
        for name, value in values.items()
    )


def _value(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
