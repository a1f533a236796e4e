"""Run by `test_verdicts.py` in lmms-eval's environment: `judge.py ANSWERS.json OUT.json`.

Lets the tasks of lmms-eval, and ours, judge answers made by hand. ANSWERS.json has for each task its YAML file and
pairs of a question and an answer.
"prior" has questions, of which the prior of the bias probe is made. "see" has folders of models and a video, and what a
model may see of it.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "gasp_fast" / "downstream" / "lmms"))
os.environ.setdefault("HF_HOME", str(Path.cwd()))
import run

run.refuse_network()
run.install_torchvision_shim()
import lmms_eval.tasks  # noqa: E402
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.utils import load_yaml_config  # noqa: E402
from PIL import Image  # noqa: E402

UPSTREAM = Path(lmms_eval.tasks.__file__).parent


def judge(file: str, pairs: list) -> dict:
    """The verdicts, and lmms-eval's scores of them."""
    ours = run.HERE / "tasks" / file
    config = load_yaml_config(str(ours if ours.is_file() else UPSTREAM / file))
    verdicts = [config["process_results"](dict(question), [answer]) for question, answer in pairs]
    scores = {}
    for metric in config["metric_list"]:
        values = [one[metric["metric"]] for one in verdicts if metric["metric"] in one]
        try:
            aggregate = metric["aggregation"] if callable(metric["aggregation"]) else (lambda v: sum(v) / len(v))
            scores[metric["metric"]] = aggregate(values)
        except (KeyError, TypeError, ZeroDivisionError):  # it wants kinds of questions that are not here
            continue
    return {"verdicts": verdicts, "scores": scores}


def see(kind: str, arguments: dict, visual: list) -> dict:
    """The shapes of what a model is given for a question about videos or images."""
    given = {}
    model = run.load_model(kind, arguments)
    generate = model.model.generate

    def record(**inputs: object) -> object:
        given.update({name: list(one.shape) for name, one in inputs.items() if hasattr(one, "shape")})
        given.update({name: one.tolist() for name, one in inputs.items() if name.endswith("_thw")})
        return generate(**inputs)

    model.model.generate = record
    content = [{"type": kind, "url": Image.open(path) if kind == "image" else path} for kind, path in visual]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "Which?"}]}]
    model.task_dict = {"task": {"test": [None]}}
    details = ("", lambda _: messages, {"max_new_tokens": 1}, 0, "task", "test")
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    model.generate_until([Instance("generate_until", details, 0, metadata, task_name="task", doc_id=0)])
    return given


tasks = json.loads(Path(sys.argv[1]).read_text())
questions, seen = tasks.pop("prior"), tasks.pop("see")
sys.path.insert(0, str(run.HERE / "tasks" / "vsibench"))
import utils  # noqa: E402

judged = {name: judge(*task) for name, task in tasks.items()}
content = {**judged, "prior": utils.prior_of(questions), "seen": [see(*one) for one in seen]}
Path(sys.argv[2]).write_text(json.dumps(content, default=run.plain))
