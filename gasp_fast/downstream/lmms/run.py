"""Runs in lmms-eval's environment, as a program: `run.py answer JOB.json`, or `run.py compare SCORES.json`.

`answer` lets one model answer tasks, one after the other, and writes a file for each. Lines on the standard output that
begin with `MARK` are JSON for the parent process: a task began, a question was answered, a task ended. `compare` prints
lmms-eval's paired t-test for pairs of lists of scores.

The parent sets the working folder to the folder of data: `datasets` then reads `OWNER/NAME` from disk.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

MARK = "gasp-fast: "
HERE = Path(__file__).parent


def tell(**event: Any) -> None:
    print(f"\n{MARK}{json.dumps(event)}", flush=True)


def end_with_parent(parent: int) -> None:
    """A killed parent cannot stop its child, which would go on for hours."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def refuse_network() -> None:
    """Some tasks look for files or judges on the network. Here they find none, at once."""

    def refuse(host: Any, *_: Any, **__: Any) -> Any:
        print(f"no network: {host}", file=sys.stderr)
        raise OSError(f"{host}: benchmarks run without a network")

    socket.getaddrinfo = refuse


def install_torchvision_shim() -> None:
    """Beside a CPU build of torch, torchvision cannot be imported without it."""
    spec = importlib.util.spec_from_file_location(
        "torchvision_shim", HERE.parents[1] / "backbones" / "torchvision_shim.py"
    )
    assert spec is not None and spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    sys.modules[spec.name] = shim  # what it declares lives as long as the module
    shim.install()


class Counter:
    """lmms-eval gives each answer to its model's `cache_hook`. This one only counts them."""

    def __init__(self, model: Any) -> None:
        self.answered, self._generate = 0, model.generate_until
        model.cache_hook, model.generate_until = self, self.generate_until

    def generate_until(self, requests: Any) -> Any:
        self.answered = 0
        tell(questions=len(requests))
        return self._generate(requests)

    def add_partial(self, *_: Any) -> None:
        self.answered += 1
        tell(answered=self.answered)


def load_model(name: str, arguments: dict[str, Any]) -> Any:
    import manifests
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model

    for manifest in manifests.MANIFESTS:
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    model = get_model(name)(**arguments)
    Counter(model)
    model.clean = lambda: None  # lmms-eval would delete the weights after the first task
    return model


def answer(job: dict[str, Any]) -> None:
    """`job` has `model`, the name of a model of lmms-eval; `device`; and `tasks`, each with its model's `arguments`."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("WARNING", include_path=str(HERE / "tasks"), model_name=job["model"])
    model, loaded = None, None
    for task in job["tasks"]:
        if task["name"] not in manager.all_subtasks:
            raise SystemExit(f"lmms-eval has no task {task['name']}")
        if model is None or loaded != task["arguments"]:
            model = None  # free the memory before the next one is loaded
            tell(loading=task["arguments"]["pretrained"])
            model, loaded = load_model(job["model"], task["arguments"]), task["arguments"]
        tell(task=task["label"])
        found = simple_evaluate(
            model,
            tasks=[task["name"]],
            task_manager=manager,
            limit=job["limit"],
            bootstrap_iters=0,
            process_docs_parallel=1,  # some tasks draw an answer at random: in the order of the questions
        )
        write(Path(task["file"]), {"request": task["request"], **summary(found, task)})
        tell(done=task["name"])


def summary(found: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """What is kept of lmms-eval's results: its scores, the number of questions, and the verdict on each answer."""
    name = task["name"]
    scores = {
        metric.partition(",")[0]: value
        for metric, value in found["results"][name].items()
        if isinstance(value, int | float) and "_stderr" not in metric
    }
    samples = [
        {
            "question": one["doc_id"],
            "target": str(one["target"]),
            "answer": str(one["filtered_resps"][0]),
            **{metric: one[metric] for metric in task["keep"] if metric in one},
        }
        for one in found["samples"][name]
    ]
    return {"scores": scores, "of": found["n-samples"][name]["original"], "samples": samples}


def write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, default=plain), encoding="utf-8")
    os.replace(partial, file)


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's; any other object as text."""
    return value.item() if hasattr(value, "item") else str(value)


def compare(pairs: dict[str, list[list[float]]]) -> dict[str, dict[str, float | None]]:
    from lmms_eval.api.metrics import paired_ttest

    tests = {name: paired_ttest(ours, base) for name, (ours, base) in pairs.items()}
    return {
        name: {key: float(value) if math.isfinite(value) else None for key, value in test.items()}
        for name, test in tests.items()
    }


def main(mode: str, file: str) -> None:
    end_with_parent(os.getppid())
    refuse_network()
    install_torchvision_shim()
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    if mode == "answer":
        answer(content)
    else:
        tell(compared=compare(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
