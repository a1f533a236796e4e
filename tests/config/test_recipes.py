"""The files in configs/ and examples/cluster/: every recipe loads, every preset is valid for DeepSpeed."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gasp_fast import cli
from gasp_fast.config.loader import load_config, to_yaml
from gasp_fast.config.recipes import SHARDINGS, recipe_file, recipe_names, sharding_file
from gasp_fast.data.mixture import Mixture, Source
from gasp_fast.supervision.heads import parse_layers
from gasp_fast.train import read_recipe
from gasp_fast.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
EVERY = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
RECIPES = [name for name in EVERY if not name.startswith("g2vlm/")]  # of GASP
PRESETS = sorted((CONFIGS / "deepspeed").glob("*.json"))
SCRIPTS = sorted((ROOT / "examples" / "cluster").glob("*.s*"))


def recipe(name: str, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, CONFIGS / name, overrides)


# ---- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_loads_and_survives_being_resolved(name: str, tmp_path: Path) -> None:
    config = read_recipe(name, [])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_recipe(str(tmp_path / "config.yaml"), []) == config
    assert isinstance(config, TrainConfig) == (name in RECIPES)


def test_no_two_recipes_write_into_one_folder() -> None:
    folders = [read_recipe(name, []).run.out for name in EVERY]
    assert len(set(folders)) == len(folders) >= 16


@pytest.mark.parametrize("name", EVERY)
def test_every_file_that_a_recipe_builds_on_ships(name: str) -> None:
    preset = read_recipe(name, []).deepspeed
    assert preset is None or sharding_file(preset).parent == SHARDINGS


def test_a_recipe_is_found_by_path_or_by_name(tmp_path, monkeypatch) -> None:
    """The names are the same in a checkout, where they may begin with configs/, and in an installation."""
    assert set(recipe_names()) == {name.removesuffix(".yaml") for name in EVERY}
    monkeypatch.chdir(tmp_path)
    for name in ("qwen2_5_vl_7b", "qwen2_5_vl_7b.yaml", "configs/qwen2_5_vl_7b.yaml"):
        assert recipe_file(name).samefile(ROOT / "configs/qwen2_5_vl_7b.yaml")
    assert recipe_file("ablations/qwen_rank_64").is_file() and sharding_file("zero2").is_file()
    (tmp_path / "qwen2_5_vl_7b").write_text("")
    assert recipe_file("qwen2_5_vl_7b") == Path("qwen2_5_vl_7b")  # a file comes first
    with pytest.raises(FileNotFoundError, match=r"qwen2_5_7b: .*the nearest recipe is qwen2_5_vl_7b \("):
        recipe_file("qwen2_5_7b")
    for name in ("../qwen2_5_vl_7b", "mine.yaml"):  # nothing is like the second one
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file, and no recipe of this name; .*lists all"):
            recipe_file(name)
    with pytest.raises(FileNotFoundError, match="of this name; gasp-fast recipes"):
        recipe_file("mine.yaml")
    assert sharding_file("../zero1") == Path("../zero1")  # no path leads out of the package's folder


def test_recipes_are_listed_with_what_they_are_for_and_printed(capsys) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in recipe_names():
        [line] = [line for line in listed.splitlines() if line.split(" ")[0] == name]
        assert len(line.removeprefix(name).strip()) > 20
    assert cli.main(["recipes", "qwen2_5_vl_7b"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/qwen2_5_vl_7b.yaml").read_text()


def test_settings_of_trackers_must_be_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"run.name is empty"):
        load_config(TrainConfig, ROOT / "configs/tiny_cpu.yaml", ["run.name=' '"])


def test_both_7b_recipes_are_the_papers() -> None:
    for name, rank in (("qwen2_5_vl_7b.yaml", 128), ("llava_next_video_7b.yaml", 512)):
        config = recipe(name)
        train, loss = config.train, config.loss
        assert (train.mode, train.epochs, train.steps) == ("lora", 3.0, None)
        assert (train.learning_rate, train.head_lr_scale, train.warmup, train.clip) == (1e-4, 4.0, 0.1, 1.0)
        assert train.checkpointing != "off" and config.model.dtype == "bf16"
        assert config.lora.rank == rank and config.heads.layers == "all" and config.heads.init == "svd"
        assert (loss.lm_weight, loss.corr_weight, loss.depth_weight) == (1.0, 0.3, 1.0)
        data = config.data
        assert data.scenes.root and data.scenes.weight == 1 and data.scenes.held_out == 0.05
        # Each of 100 K questions about once an epoch of 1.75 M sequences.
        stream = Mixture({"scenes": Source(1_750_000), "qa": Source(data.qa.limit or 0, data.qa.weight)})
        epoch = stream.positions_of_epoch("scenes") // 1000 * stream.quota["qa"]
        assert data.qa.root and data.qa.limit == 100_000 and epoch == pytest.approx(data.qa.limit, rel=0.002)


def differing(ours: Any, theirs: Any, path: str = "") -> set[str]:
    """Key paths at which two configurations differ."""
    if not hasattr(ours, "__dataclass_fields__"):
        return {path} if ours != theirs else set()
    return {
        at
        for name in ours.__dataclass_fields__
        for at in differing(getattr(ours, name), getattr(theirs, name), f"{path}.{name}".lstrip("."))
    }


BACKBONES = (("", "qwen2_5_vl_7b.yaml"), ("llava_", "llava_next_video_7b.yaml"))


@pytest.mark.parametrize(("prefix", "base"), BACKBONES)
def test_a_baseline_differs_from_the_recipe_only_in_what_it_is_about(prefix: str, base: str) -> None:
    gasp = recipe(base)
    corr, sft, vqa = (
        recipe(f"{prefix}{name}.yaml") for name in ("correspondence_only", "sft_baseline", "vqa_baseline")
    )  # fmt: skip
    assert differing(gasp, corr) == {"loss.depth_weight", "run.out"} and corr.loss.geometric
    no_geometry = {"loss.depth_weight", "loss.corr_weight", "data.scenes.only_counted", "run.out"}
    assert differing(gasp, sft) == {*no_geometry, "data.qa.limit"}
    assert differing(gasp, vqa) == {*no_geometry, "data.vqa.root", "data.vqa.frames"}
    assert vqa.data.vqa.frames is None  # all frames of a sequence
    assert not sft.loss.geometric and not vqa.loss.geometric
    assert list(sft.data.used) == ["qa"] and list(vqa.data.used) == ["qa", "vqa"]


@pytest.mark.parametrize("sequences", [1_750_000, 500_000])
@pytest.mark.parametrize(("prefix", "base"), BACKBONES)
def test_baselines_take_the_steps_of_the_recipe_with_the_same_overrides(prefix: str, base: str, sequences: int) -> None:
    def steps(name: str, *overrides: str) -> int:
        config = recipe(name, "train.batch_size=96", *overrides)
        lengths = {"scenes": sequences, "qa": 100_000, "vqa": 7}
        return config.train.steps_of(config.data.epoch(lengths))

    for overrides in ([], ["train.epochs=1", "data.qa.weight=0.5"]):
        expected = steps(base, *overrides)
        assert expected > sequences * (1 if overrides else 3) // 96
        for name in ("correspondence_only", "sft_baseline", "vqa_baseline"):
            assert steps(f"{prefix}{name}.yaml", *overrides) == expected


# Table 4.
RANKS = {64, 128, 256, 512, 1024}
RANGES = {"llava": (32, {"10-18", "18-25", "25-32"}), "qwen": (28, {"10-16", "16-22", "22-28"})}


@pytest.mark.parametrize(("family", "base"), [("qwen", "qwen2_5_vl_7b.yaml"), ("llava", "llava_next_video_7b.yaml")])
def test_ablations_are_the_papers_and_differ_from_their_recipe_in_one_key(family: str, base: str) -> None:
    own, (layers, ranges) = recipe(base), RANGES[family]
    names = [name for name in RECIPES if name.startswith(f"ablations/{family}_")]
    for key, expected in (("rank", RANKS - {own.lora.rank}), ("layers", ranges)):
        group = {name: recipe(name) for name in names if f"_{key}_" in name}
        values = [config.lora.rank if key == "rank" else config.heads.layers for config in group.values()]
        assert len(values) == len(expected) and set(values) == expected
        for (name, config), value in zip(group.items(), values, strict=True):
            assert differing(own, config) == {"lora.rank" if key == "rank" else "heads.layers", "run.out"}
            assert config.run.out == f"runs/ablations/{Path(name).stem}"
            assert Path(name).stem == f"{family}_{key}_{str(value).replace('-', '_')}"
    # Both ends count: neighbouring ranges share a layer, and the last one ends at the model's last layer.
    supervised = [parse_layers(spec, layers) for spec in sorted(ranges)]
    assert supervised[0][0] == 9 and supervised[-1][-1] == layers - 1
    assert all(one[-1] == other[0] for one, other in itertools.pairwise(supervised))


def test_every_ablation_belongs_to_one_of_the_two_groups() -> None:
    ablations = [name for name in RECIPES if name.startswith("ablations/")]
    assert len(ablations) == 2 * (len(RANKS) - 1 + 3)


def test_the_tiny_recipes_need_no_gpu_and_differ_in_one_idea() -> None:
    full, lora = recipe("tiny_cpu.yaml"), recipe("tiny_cpu_lora.yaml")
    assert (full.model.dtype, full.train.mode, full.train.learning_rate) == ("fp32", "full", 1e-3)
    assert full.deepspeed is None and full.heads.precisions(full.model.dtype) == ("fp32", "fp32")
    assert lora.train.mode == "lora" and lora.heads == full.heads and lora.loss == full.loss


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_shows_how_it_is_used_with_keys_that_exist(name: str) -> None:
    text = (CONFIGS / name).read_text()
    assert text.startswith("# ")
    overrides = [word for line in text.splitlines() if line.startswith("#   ") for word in line.split() if "=" in word]
    if overrides:
        recipe(name, *(word for word in overrides if re.fullmatch(r"[\w.]+=\S+", word)))


# ---- DeepSpeed presets ----------------------------------------------------------------------------------------------


def test_every_stage_and_both_offloads_ship() -> None:
    assert [path.stem for path in PRESETS] == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_filled_in_by_the_trainer_and_understood_by_deepspeed(path: Path) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    loaded = HfDeepSpeedConfig(str(path))
    stage = int(path.stem[4])
    assert loaded.is_zero3() == (stage == 3) and loaded.is_offload() == ("offload" in path.stem)

    filled = HfTrainerDeepSpeedConfig(json.loads(path.read_text()))
    arguments = SimpleNamespace(
        world_size=1, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_grad_norm=0.5,
        learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.0,
        save_on_each_node=False, fp16=False, fp16_full_eval=False, bf16=False, bf16_full_eval=False,
        get_warmup_steps=lambda steps: steps // 10,
    )  # fmt: skip
    filled.trainer_config_process(arguments)
    filled.trainer_config_finalize(arguments, SimpleNamespace(config=SimpleNamespace(hidden_size=128)), 100)
    assert "auto" not in json.dumps(filled.config)
    understood = DeepSpeedConfig(filled.config)
    assert understood.zero_config.stage == stage and understood.gradient_clipping == 0.5
    # Heads and adapters are fp32; DeepSpeed's own mixed precision would round them.
    assert not understood.bfloat16_config.enabled and not understood.float16_config.enabled
    # The trainer brings torch's AdamW, whose parameter groups give heads a rate of their own.
    if "offload" in path.stem:
        assert understood.zero_force_ds_cpu_optimizer is False


# ---- the cluster ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_cluster_script_is_sound_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert text.startswith("#!") and "set -euo pipefail" in text
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)


def test_the_slurm_script_requests_what_it_starts() -> None:
    """One launcher a node, eight processes under it, four nodes: the 32 GPUs of the paper."""
    text = (ROOT / "examples" / "cluster" / "gasp.slurm").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("4", "1", "8")
    assert "-m gasp_fast.training.launch" in text and "-m gasp_fast.train" in text


@pytest.mark.parametrize(("code", "signalled", "requeued"), [(75, True, True), (1, True, False), (75, False, False)])
def test_the_slurm_script_queues_again_what_the_time_limit_interrupted(
    tmp_path: Path, code: int, signalled: bool, requeued: bool
) -> None:
    """A job that was cancelled, or that failed, must not come back."""
    scripts = {
        "scontrol": '[ "$1" = show ] && echo gpu-7 || echo "$@"',
        "srun": f"trap 'exit {code}' USR1\necho started\n[ {int(signalled)} = 1 ] || exit {code}\n"
        "while true; do sleep 0.05; done",
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "gpu-7", "SLURM_JOB_ID": "70001", "SLURM_NNODES": "1"}
    process = subprocess.Popen(
        ["bash", str(ROOT / "examples" / "cluster" / "gasp.slurm"), "configs/qwen2_5_vl_7b.yaml"],
        env={**job, "PATH": f"{tmp_path}:/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(0.2)  # until the script waits
    if signalled:
        process.send_signal(signal.SIGUSR1)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == code and rest == ("requeue 70001\n" if requeued else "")


def test_the_hostfile_is_one_that_deepspeed_reads() -> None:
    launcher = pytest.importorskip("deepspeed.launcher.runner")
    hosts = launcher.fetch_hostfile(str(ROOT / "examples" / "cluster" / "hostfile"))
    assert len(hosts) == 4 and set(hosts.values()) == {8}


def test_the_slurm_script_gives_every_node_the_same_rendezvous_endpoint(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\nprintf "%s\\n" gpu-7 gpu-8 gpu-9 gpu-10\n')
    scontrol.chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "gpu-[7-10]", "SLURM_JOB_ID": "70001", "SLURM_NNODES": "4", "GASP_DRY": "1"}
    script = str(ROOT / "examples" / "cluster" / "gasp.slurm")
    done = subprocess.run(
        ["bash", script, "configs/qwen2_5_vl_7b.yaml", "run.out=my runs"],
        env={**given, "PATH": f"{tmp_path}:/usr/bin:/bin", "GASP_PYTHON": "python"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--nnodes 4 --nproc-per-node 8" in done.stdout and "--rdzv-endpoint gpu-7:30001" in done.stdout
    assert done.stdout.rstrip().endswith("-m gasp_fast.train configs/qwen2_5_vl_7b.yaml run.out=my runs")
    without = subprocess.run(["bash", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert without.returncode == 2 and "usage" in without.stderr


def data_job(tmp_path: Path, *words: str, **job: str) -> subprocess.CompletedProcess[str]:
    """Runs the script of a data job with what Slurm gives job 7 of an array of 100."""
    given = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "100", "SLURM_ARRAY_TASK_MIN": "0"}
    given |= {"SLURM_ARRAY_TASK_MAX": "99", "SLURM_CPUS_PER_TASK": "16", "GASP_FAST": "gasp-fast", "GASP_DRY": "1"}
    script = str(ROOT / "examples" / "cluster" / "data.slurm")
    environment = {**given, **job, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    return subprocess.run(["bash", script, *words], env=environment, capture_output=True, text=True)


def test_each_job_of_a_data_array_takes_its_own_shard(tmp_path: Path) -> None:
    from gasp_fast import cli
    from gasp_fast.data.annotations.parts import parse_part

    for words, workers in ((("depth", "my scenes"), ""), (("tracks", "scenes", "--out", "out"), " --workers 16")):
        done = data_job(tmp_path, *words)
        assert done.stdout == f"gasp-fast {' '.join(words)} --shard 7/100{workers}\n" and done.returncode == 0
        options = ["--shard", "7/100", *workers.split()]
        arguments = cli.parser_of(words[0], cli.load(words[0])).parse_args([*words[1:], *options])
        assert parse_part(arguments.shard) == (7, 100)


def test_a_data_array_with_gaps_must_say_how_many_jobs_there_are(tmp_path: Path) -> None:
    """Otherwise the two jobs that are submitted again would compute a half each, of another division."""
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_MAX": "17"}
    refused = data_job(tmp_path, "depth", "scenes", **array)
    assert refused.returncode == 2 and "not numbered from 0 to 1" in refused.stderr and not refused.stdout
    assert data_job(tmp_path, "depth", "scenes", GASP_JOBS="100", **array).stdout.endswith("--shard 7/100\n")
    assert data_job(tmp_path, "depth").returncode == 2


def test_the_script_of_a_data_array_ends_with_the_code_of_its_command(tmp_path: Path) -> None:
    (tmp_path / "gasp-fast").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "gasp-fast").chmod(0o755)
    assert data_job(tmp_path, "depth", "scenes", GASP_DRY="").returncode == 3
