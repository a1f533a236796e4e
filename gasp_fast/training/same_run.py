"""What may change between a run and its continuation.

A checkpoint holds the configuration it was written with (config.yaml) and what that led to (in about.json): the number
of steps, the number of samples and the fingerprint of each source, the fingerprint of the base model. A run that
resumes from it is compared with these, key by key:

    free       no result depends on it: where, when and how often to write, loader workers, limits of time
    rounding   the same mathematics by other kernels or on other processes; a line says so
    fixed      a change would have no effect any more, or the saved state would not fit it; refused
    all other  makes another run; refused unless run.allow_changes names it, and then in effect from that step on

More train.steps are allowed unasked, unless the learning rate has come down to zero: it then falls more slowly, from
where it is. With run.allow_changes it is that of a run which had so many steps from the beginning.

A key that the objective's `Rules` do not name is of the last kind, also one of a later version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from gasp_fast.backbones.fingerprint import fingerprint
from gasp_fast.config.loader import to_yaml
from gasp_fast.files import write_atomically
from gasp_fast.run_folder import CONFIG, config_files, configuration_of

from .checkpoints import read_about
from .optim import Schedule

if TYPE_CHECKING:
    from .objective import Objective, Stream

AT_BEGINNING = "it acts at the beginning of a run only"
SHAPES = "the saved weights have other shapes"
WEIGHTS = "other weights are trained"


@dataclass(frozen=True)
class Rules:
    """The keys of the first three kinds, or groups of keys."""

    free: tuple[str, ...]
    rounding: tuple[str, ...]
    fixed: Mapping[str, str]  # with the reason


EVERY_RUN = Rules(
    free=("run", "evaluate", "data.workers"),
    rounding=("deepspeed", "train.tokens_at_once", "loss.backend"),
    fixed={
        "train.mode": WEIGHTS,
        "train.batch_size": "positions in the data are counted in it",
        "train.seed": AT_BEGINNING,
    },
)


@dataclass(frozen=True)
class Change:
    """A key whose value is another one than in the checkpoint."""

    key: str
    before: str
    now: str
    fixed: str | None = None  # why it cannot change
    unasked: bool = False  # it is allowed without run.allow_changes
    effect: str = ""

    def __str__(self) -> str:
        remark = self.fixed or self.effect
        return f"{self.key} = {self.before}, now {self.now}{f' ({remark})' if remark else ''}"


def run_facts(source: str, stream: Stream, steps: int) -> dict[str, Any]:
    """What a configuration led to, for about.json; `source`: of the base model."""
    samples = {name: len(one) for name, one in stream.sources.items()}
    return {"steps": steps, "samples": samples, "data": stream.fingerprints, "base": fingerprint(source)}


def check_same_run(objective: Objective, world_size: int, checkpoint: Path) -> None:
    """Raise if `checkpoint` was written by another run than this one. Prints what changes from now on."""
    about, allowed = read_about(checkpoint), objective.config.run.allow_changes
    changes, rules = list(_changes(objective, objective.facts(), about, checkpoint)), objective.rules
    harmless = (*rules.rounding, *(change.key for change in changes if change.unasked))
    refused = [change for change in changes if change.fixed is not None or not _covered(change.key, allowed)]
    refused = [change for change in refused if not _covered(change.key, harmless)]
    if refused:
        cures = "restore what it was, or give another run.out to begin anew"
        if allowable := ", ".join(change.key for change in refused if change.fixed is None):
            cures += f"; run.allow_changes=[{allowable}] lets that change from step {about['step']} on"
        raise ValueError(f"{checkpoint} was written by another run: {'; '.join(map(str, refused))}: {cures}")
    rounding = [str(change) for change in changes if _covered(change.key, rules.rounding)]
    if about["ranks"] != world_size:
        rounding.append(f"processes = {about['ranks']}, now {world_size}")
    meant = [str(change) for change in changes if not _covered(change.key, rules.rounding)]
    if meant:
        _print(f"from step {about['step']} on: {'; '.join(meant)}")
    if rounding:
        _print(f"{'; '.join(rounding)}: the same sums in another order, so that results agree to rounding")


def continued_schedule(objective: Objective, steps: int, checkpoint: Path) -> Schedule:
    """The learning rates of a run that resumes: what it had, made longer if the run is, or those of another run."""
    about = read_about(checkpoint)
    saved, anew = _saved_schedule(objective, about, checkpoint), objective.schedule(steps)
    if saved is None or steps == saved.steps:
        return saved or anew
    longer = steps > saved.steps and not _covered("train.steps", objective.config.run.allow_changes)
    return saved.longer(about.get("schedule", about["step"]), steps) if longer else anew


def write_configuration(config: Any, out: Path, resume: Path | None) -> None:
    """Write config.yaml at the beginning of a run; when it resumes with another one, the next config-N.yaml."""
    content, files = to_yaml(config).encode(), config_files(out)
    if resume is None:
        for leftover in files:  # of a run that ended before its first checkpoint
            leftover.unlink()
        files = []
    if not files:
        write_atomically(out / CONFIG, content)
    elif files[-1].read_bytes() != content:
        number = 1 if files[-1].name == CONFIG else int(files[-1].stem.rpartition("-")[2])
        write_atomically(out / f"config-{number + 1}.yaml", content)


# ---- comparing ------------------------------------------------------------------------------------------------------


def _changes(objective: Objective, facts: dict[str, Any], about: dict[str, Any], checkpoint: Path) -> Iterator[Change]:
    """What differs, but for the free keys."""
    # Both have been through YAML, which has no tuples. A key that the checkpoint's version had not has its default.
    config, rules = objective.config, objective.rules
    now = dict(leaves(yaml.safe_load(to_yaml(config))))
    written = dict(leaves(configuration_of(checkpoint)))
    before = {"train.mode": about["mode"], "train.batch_size": about["batch_size"], **written}
    if written:
        before = {**dict(_defaults(type(config))), **before}
    by_result = dict(_changed_results(objective, facts, about, checkpoint))  # what they lead to, where that is known
    for key in sorted(now.keys() & before.keys()):
        if key not in by_result and not _covered(key, rules.free) and before[key] != now[key]:
            yield Change(key, _short(before[key]), _short(now[key]), rules.fixed.get(key))
    yield from (change for change in by_result.values() if change is not None)
    for name, count in facts["samples"].items():
        if any(before.get(key) != now[key] for key in now if _covered(key, (f"data.{name}",))):
            continue  # reported by its keys
        counted = about.get("samples", {}).get(name, count)
        content = about.get("data", {}).get(name)  # earlier versions counted only
        if counted != count:
            yield Change(f"data.{name}", f"{_short(counted)} samples", f"{count} samples")
        elif content is not None and content != facts["data"][name]:
            yield Change(f"data.{name}", f"{count} samples", "as many, but other ones")


def _changed_results(
    objective: Objective, facts: dict[str, Any], about: dict[str, Any], checkpoint: Path
) -> Iterator[tuple[str, Change | None]]:
    """The keys that are compared by what they led to, each with the change, if there is one."""
    if "steps" in about:  # the schedule is a function of it
        changed = about["steps"] != facts["steps"]
        yield "train.steps", _change_of_steps(objective, facts["steps"], about, checkpoint) if changed else None
        yield "train.epochs", None
    if isinstance(before := about.get("base"), dict) and (now := facts["base"]) is not None:
        parts = [part for part in now if before.get(part) != now[part]]
        fixed = None if parts == ["processor"] else "the weights were trained on the base model that it was"
        source = repr(objective.config.model.source)
        change = Change("model.source", f"a model of other {' and '.join(parts)}", source, fixed)
        yield "model.source", change if parts else None


def _change_of_steps(objective: Objective, steps: int, about: dict[str, Any], checkpoint: Path) -> Change:
    change = Change("train.steps", str(about["steps"]), str(steps))
    config, saved = objective.config, _saved_schedule(objective, about, checkpoint)
    if saved is None or steps < saved.steps or _covered("train.steps", config.run.allow_changes):
        return change
    schedule = continued_schedule(objective, steps, checkpoint)
    if not schedule.cosine_share:
        return replace(change, effect=f"the learning rate has come down to 0 in step {saved.steps}")
    rate = schedule.cosine_share * config.train.learning_rate
    effect = (
        f"the learning rate comes down from {rate:.3g} in step {schedule.cosine_begins} to 0 in step {steps}; "
        f"run.allow_changes=[train.steps] would take that of a run of {steps} steps"
    )
    return replace(change, unasked=True, effect=effect)


def _saved_schedule(objective: Objective, about: dict[str, Any], checkpoint: Path) -> Schedule | None:
    """That of the run so far; None if it is unknown, or the warm-up is now another one."""
    before = configuration_of(checkpoint).get("train")
    warmup = before.get("warmup") if isinstance(before, dict) else None
    if "steps" not in about or warmup != objective.config.train.warmup:
        return None
    began = asdict(objective.schedule(about["steps"]))
    return Schedule(**{name: about.get(name, value) for name, value in began.items()})


def _covered(key: str, names: tuple[str, ...]) -> bool:
    """Whether `names` has the key, or a group that it is in."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each value in a tree of mappings."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _defaults(cls: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a configuration that have a default, with it, as YAML gives it."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(kind := hints[field.name]):
            yield from _defaults(kind, f"{above}{field.name}.")
        elif field.default is not MISSING:
            default = field.default
            yield f"{above}{field.name}", list(default) if isinstance(default, tuple) else default


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _print(line: str) -> None:
    print(f"gasp_fast.train: {line}", file=sys.stderr, flush=True)
