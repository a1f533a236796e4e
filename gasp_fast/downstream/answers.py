"""Lets a model answer the tasks of benchmarks, in lmms-eval's environment.

OUT/answers/model/TASK.json, base/TASK.json   lmms-eval's scores and its verdict on each answer
OUT/answers/lmms-eval.log                     what lmms-eval printed

A task whose file is there, with the same model and settings, is not answered again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gasp_fast.export.exporter import REPORT as EXPORT_REPORT
from gasp_fast.files import read_json, write_atomically
from gasp_fast.progress import Steps

from .data import link_as_hub_cache
from .environment import VERSION
from .lmms.run import MARK
from .suites import FRAMES, Benchmark

_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception): ")
_BAR = re.compile(r"\d+%\|")
RUNNER = Path(__file__).parent / "lmms" / "run.py"
LEAST_PIXELS = 200_704  # of an image or frame for Qwen: lmms-eval's default
LOG, HUB = "lmms-eval.log", ".hub"
KINDS = ("qwen2_5_vl", "llava_next_video")  # model types, and names of models in lmms-eval
FIXED_SIZE = ("llava_next_video",)  # frames and images have the size that the processor says


@dataclass(frozen=True)
class Settings:
    """What a run may change. None: as the benchmark says."""

    frames: int | None = None
    pixels: int | None = None
    limit: int | None = None  # questions of each task
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("frames", 2), ("pixels", 784), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise ValueError(f"--{name} {value}: at least {least}, and below 2**31")

    def of(self, benchmark: Benchmark, kind: str) -> dict[str, int | None]:
        """The most frames of a video, and the most pixels of a frame or image, that a model of this kind sees."""
        frames = (self.frames or benchmark.frames) if benchmark.videos else None
        return {"frames": frames, "pixels": None if kind in FIXED_SIZE else self.pixels or benchmark.pixels}


@dataclass(frozen=True)
class Subject:
    """A model that answers: `model` or `base`, with the name and arguments of its class in lmms-eval."""

    role: str
    folder: Path
    kind: str

    def arguments(self, seen: Mapping[str, int | None], device: str) -> dict[str, Any]:
        shared = {"pretrained": str(self.folder), "device": device, "max_num_frames": seen["frames"] or FRAMES}
        if seen["pixels"] is None:
            return shared
        limits = {"max_pixels": seen["pixels"], "min_pixels": min(LEAST_PIXELS, seen["pixels"] // 2)}
        return {**shared, **limits, "device_map": device}

    def identity(self) -> dict[str, Any]:
        """Changes when another model is written to the folder."""
        files = [self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))]
        return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def subject(role: str, folder: Path) -> Subject:
    config = folder / "config.json"
    if not config.is_file() or not any(folder.glob("*.safetensors")):
        raise OSError(f"--{role} {folder}: no model (config.json, *.safetensors); make one with gasp-fast export")
    kind = str(read_json(config).get("model_type"))
    if kind not in KINDS:
        raise ValueError(f"--{role} {folder}: model_type {kind}; benchmarks run for {', '.join(KINDS)}")
    return Subject(role, folder.absolute(), kind)


def subjects(model: Path, base: Path | None) -> dict[str, Subject]:
    """The model, and its base, if it is given or the export names a folder that is here."""
    roles = {"model": subject("model", model)}
    report = model / EXPORT_REPORT
    named = read_json(report).get("base") if base is None and report.is_file() else None
    if named and Path(named).is_dir():
        base = Path(named)
    if base is not None:
        roles["base"] = subject("base", base)
        if roles["base"].kind != roles["model"].kind:
            raise ValueError(f"--base {base}: a {roles['base'].kind}, but the model is a {roles['model'].kind}")
    elif named:
        print(f"the base {named} is not a folder here, so there is nothing to compare with; give --base DIR")
    return roles


def answer_file(out: Path, role: str, task: str) -> Path:
    return out / "answers" / role / f"{task}.json"


def run_answers(
    subjects: Sequence[Subject],
    benchmarks: Sequence[Benchmark],
    settings: Settings,
    python: Path,
    data: Path,
    out: Path,
) -> None:
    """Answers all tasks that have no file yet, in one process."""
    pending: dict[Path, dict[str, Any]] = {}  # by file: benchmarks may share a task
    for who in subjects:
        for benchmark in sorted(benchmarks, key=lambda one: one.videos):  # a model is loaded once for all images
            seen = settings.of(benchmark, who.kind)
            for task in benchmark.tasks:
                request = {"lmms_eval": VERSION, "task": task, "limit": settings.limit, **seen, "files": who.identity()}
                file = answer_file(out, who.role, task).absolute()
                if not _answered(file, request):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    one = {"name": task, "label": f"{who.role}: {task}", "file": str(file), "request": request}
                    one["keep"] = [benchmark.metric, *benchmark.extra]
                    pending[file] = {**one, "arguments": who.arguments(seen, settings.device)}
    cache = out.absolute() / HUB
    link_as_hub_cache(cache, data, [one.data for one in benchmarks])
    if pending:
        job = {"model": subjects[0].kind, "limit": settings.limit, "tasks": list(pending.values())}
        file = out / "answers" / "job.json"
        write_atomically(file, json.dumps(job).encode())
        _show(run_in_environment(python, "answer", file, data, out / "answers" / LOG, cache), len(pending))


def _answered(file: Path, request: Mapping[str, Any]) -> bool:
    return file.is_file() and read_json(file).get("request") == request


def _show(events: Iterator[dict[str, Any]], tasks: int) -> None:
    """A line for each task, and the number of its questions that are answered."""
    done = 0
    for event in events:
        if "task" in event:
            done, name = done + 1, f"{event['task']} ({done + 1} of {tasks})"
        elif "questions" in event:
            with Steps(name, event["questions"]) as bar:
                for answer in events:
                    if "answered" not in answer:
                        break
                    bar.to(answer["answered"])
            print(f"{name}: {event['questions']:,} questions answered", flush=True)


def run_in_environment(
    python: Path, mode: str, file: Path, data: Path, log: Path, cache: Path
) -> Iterator[dict[str, Any]]:
    """Runs `lmms/run.py` with `data` as the working folder; yields what it tells. Its other output goes to `log`."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "HF_HOME": str(data.absolute()),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [str(python), str(RUNNER.absolute()), mode, str(file.absolute())]
    with open(log, "w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            command, cwd=data, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
                else:
                    printed.write(line)
                    printed.flush()
            process.wait()
        finally:
            process.kill()  # where this process is interrupted
            process.wait()
    if process.returncode:
        raise OSError(f"lmms-eval stopped: {reason(log)}; all of its output is in {log}")


def reason(log: Path) -> str:
    """The last line that names an error, or else the last line, without progress bars."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _BAR.search(line)]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or ["it printed nothing"])[-1]
