"""An export is a plain model with the logits of the trained one; it is complete or absent."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.families import EVERY_SHIPPED
from transformers import AutoModelForImageTextToText, AutoProcessor

from gasp_fast import cli
from gasp_fast.backbones import Conversation, load_backbone
from gasp_fast.cli import export as command
from gasp_fast.export import REPORT, export, find_checkpoint, probe
from gasp_fast.export import exporter as export_module
from gasp_fast.export.card import model_card
from gasp_fast.supervision.head_files import write_heads
from gasp_fast.supervision.heads import CorrespondenceHeads


def heads_of(backbone: Any, model: Any) -> CorrespondenceHeads:
    return CorrespondenceHeads.from_query_projections({0: backbone.query_projection(model, 0)})


class Runs(dict[str, Path]):
    """A finished run of each model family, made when it is first used."""

    def __init__(self, families: Any, root: Path) -> None:
        super().__init__()
        self.families, self.root = families, root

    def __missing__(self, name: str) -> Path:
        """Adapters that change the logits, heads, a configuration."""
        backbone, run = self.families[name].backbone, self.root / name
        model = backbone.load_model(torch.float32)
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=backbone.lora_targets, init_lora_weights=False)
        adapted = get_peft_model(model, config)
        for step in (5, 10):
            adapted.save_pretrained(run / f"checkpoint-{step}")
            write_heads(
                run / f"checkpoint-{step}" / "heads.safetensors", heads_of(backbone, adapted).state_dict(), "fp32"
            )
            with torch.no_grad():  # the later checkpoint is another model
                for parameter in (p for key, p in adapted.named_parameters() if "lora_B" in key):
                    parameter.mul_(0.5)
        (run / "config.yaml").write_text(f"model:\n  source: {self.families[name].folder}\n")
        self[name] = run
        return run


@pytest.fixture(scope="session")
def lora_runs(families: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(families, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def qwen_run(lora_runs: dict[str, Path]) -> Path:
    return lora_runs["qwen2_5_vl"]


def logits(model: Any, backbone: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**probe(backbone)).logits


def adapter_logits(backbone: Any, checkpoint: Path) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(backbone.load_model(torch.float32), str(checkpoint)), backbone)


def command_line(*words: Any) -> int:
    return cli.main([str(word) for word in words])


def plain(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(str(folder), dtype=torch.float32)


@EVERY_SHIPPED
def test_transformers_alone_gives_the_logits_of_the_newest_adapters(
    shipped: Any, lora_runs: dict[str, Path], tmp_path: Path
) -> None:
    run = lora_runs[shipped.backbone.model_type]
    report = export(run, tmp_path / "plain")
    trained = adapter_logits(shipped.backbone, run / "checkpoint-10")
    ours = logits(plain(tmp_path / "plain"), shipped.backbone)
    assert (ours - trained).abs().max() <= 1e-4
    assert report.checkpoint == "checkpoint-10" and report.mode == "lora" and report.dtype == "fp32"
    assert report.merge_difference <= 1e-4 and report.file_difference <= 1e-4
    # The tolerance is meaningful only if the effect of the adapters is far larger.
    assert report.trained_difference is not None and report.trained_difference > 1e-2
    assert json.loads((tmp_path / "plain" / REPORT).read_text())["merge_difference"] == report.merge_difference


@EVERY_SHIPPED
def test_an_export_generates_with_its_own_processor(
    shipped: Any, lora_runs: dict[str, Path], tmp_path: Path, noise: Any
) -> None:
    export(lora_runs[shipped.backbone.model_type], tmp_path / "plain")
    processor = AutoProcessor.from_pretrained(str(tmp_path / "plain"))
    assert type(processor) is type(shipped.backbone.processor)
    backbone = load_backbone(tmp_path / "plain")
    question = [{"role": "user", "content": "What is shown?"}]
    encoded = backbone.encode([Conversation(noise(2), question)], add_generation_prompt=True).inputs
    encoded.pop("labels")
    made = plain(tmp_path / "plain").generate(**encoded, max_new_tokens=4, do_sample=False)
    assert made.shape[1] > encoded["input_ids"].shape[1]
    assert isinstance(processor.decode(made[0]), str)


@EVERY_SHIPPED
def test_the_files_hold_the_tensors_of_the_base_model_and_no_others(
    shipped: Any, lora_runs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "plain"
    report = export(lora_runs[shipped.backbone.model_type], out)
    ours, theirs = load_file(out / "model.safetensors"), load_file(shipped.folder / "model.safetensors")
    assert set(ours) == set(theirs) and report.tensors == len(theirs)
    changed = {key for key in ours if not torch.equal(ours[key], theirs[key])}
    assert changed and all(key.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj") for key in changed)
    assert not any("vision" in key or "visual" in key for key in changed)
    assert not list(out.glob("adapter*")) and not list(out.glob("heads*")) and not list(out.glob("*.bin"))


def test_an_older_checkpoint_can_be_exported(qwen: Any, qwen_run: Path, tmp_path: Path) -> None:
    report = export(qwen_run / "checkpoint-5", tmp_path / "plain")
    assert report.checkpoint == "checkpoint-5"
    trained = adapter_logits(qwen.backbone, qwen_run / "checkpoint-5")
    assert (logits(plain(tmp_path / "plain"), qwen.backbone) - trained).abs().max() <= 1e-4


def test_bf16_files_are_rounded_only_after_merging(qwen: Any, qwen_run: Path, tmp_path: Path) -> None:
    report = export(qwen_run, tmp_path / "half", dtype="bf16")
    export(qwen_run, tmp_path / "plain", dtype="fp32")
    half, single = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "plain"))
    assert all(torch.equal(half[key], single[key].bfloat16()) for key in single)
    assert report.merge_difference <= 1e-4 < report.file_difference


@pytest.fixture
def full_run(qwen: Any, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    model = qwen.backbone.load_model(torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(run / "checkpoint-7")
    write_heads(run / "checkpoint-7" / "heads.safetensors", heads_of(qwen.backbone, model).state_dict(), "fp32")
    (run / "config.yaml").write_text(f"model:\n  source: {qwen.folder}\n")
    return run


def test_a_full_run_exports_all_its_weights(qwen: Any, full_run: Path, tmp_path: Path) -> None:
    report = export(full_run, tmp_path / "plain")
    assert report.mode == "full" and report.trained_difference is None
    ours = logits(plain(tmp_path / "plain"), qwen.backbone)
    assert torch.equal(ours, logits(plain(full_run / "checkpoint-7"), qwen.backbone))
    AutoProcessor.from_pretrained(str(tmp_path / "plain"))


def test_a_full_run_needs_no_base_model_once_it_has_saved_its_processor(
    qwen: Any, full_run: Path, tmp_path: Path
) -> None:
    qwen.backbone.processor.save_pretrained(full_run / "checkpoint-7")
    (full_run / "config.yaml").write_text("model: {source: ./moved/away}")
    report = export(full_run, tmp_path / "plain")
    assert report.base == "./moved/away"
    AutoProcessor.from_pretrained(str(tmp_path / "plain"))


@pytest.mark.parametrize("name", ["by_layer.0.first.weight", "model.layers.0.self_attn.q_proj.lora_A.weight"])
def test_weights_of_heads_or_adapters_in_the_model_stop_the_export(full_run: Path, tmp_path: Path, name: str) -> None:
    file = full_run / "checkpoint-7" / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(2, 2)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="unexpected"):
        export(full_run, tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_merge_that_changes_the_logits_exports_nothing(
    qwen_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: torch.zeros_like(self.get_base_layer().weight))
    with pytest.raises(ValueError, match=r"merged weights .* more than tolerance = 0.0001; nothing was exported"):
        export(qwen_run, tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_files_with_other_logits_are_not_exported(
    qwen: Any, qwen_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = export_module.load_plain_model

    def damaged(folder: Path) -> Any:
        model = load(folder)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return model

    monkeypatch.setattr(export_module, "load_plain_model", damaged)
    with pytest.raises(ValueError, match="exported files"):
        export(qwen_run, tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_export_are_removed_by_the_next_one(qwen_run: Path, tmp_path: Path) -> None:
    left = tmp_path / ".plain.123.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    export(qwen_run, tmp_path / "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_an_existing_folder_is_not_written_into(qwen_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="exists already"):
        export(qwen_run, tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        export(qwen_run, tmp_path / "mine")


# ---- finding the checkpoint -----------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere"}')
        (folder / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint-best").mkdir()
    checkpoint = find_checkpoint(tmp_path)
    assert (checkpoint.folder.name, checkpoint.mode, checkpoint.base) == ("checkpoint-100", "lora", "somewhere")
    (tmp_path / "config.yaml").write_text("model: {source: elsewhere}")
    assert find_checkpoint(tmp_path).base == "elsewhere"
    assert find_checkpoint(tmp_path, base="given").base == "given"


def test_sharded_weights_are_a_checkpoint(tmp_path: Path) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    assert find_checkpoint(tmp_path).mode == "full"


def test_missing_and_empty_sources_have_different_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_checkpoint(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="neither"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoint-3" / "global_step3").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="zero_to_fp32"):
        find_checkpoint(tmp_path)


def test_a_base_model_that_moved_is_a_clear_error(qwen_run: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen_run / "checkpoint-10", tmp_path / "checkpoint-10")
    (tmp_path / "config.yaml").write_text("model: {source: ./moved/away}")
    with pytest.raises(OSError, match="moved/away"):
        export(tmp_path, tmp_path / "plain")


def test_a_hub_model_that_only_the_run_names_is_not_looked_up(
    qwen_run: Path, tmp_path: Path, connections: list[str]
) -> None:
    shutil.copytree(qwen_run / "checkpoint-10", tmp_path / "checkpoint-10")
    (tmp_path / "config.yaml").write_text("model: {source: someone/else}")
    with pytest.raises(OSError, match=r"'someone/else' of the run is neither a folder here nor .*--base"):
        export(tmp_path, tmp_path / "plain")
    assert not connections
    with pytest.raises(OSError, match="someone/else"):
        export(tmp_path, tmp_path / "plain", base="someone/else")
    assert connections  # the name was given here


def test_an_export_into_a_linked_folder_arrives_there(qwen_run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for link, folder in (("link", "elsewhere"), ("dangling", "new")):
        export(qwen_run, tmp_path / link)
        assert (tmp_path / link).is_symlink() and (tmp_path / folder / "model.safetensors").is_file()


def test_exported_files_have_the_usual_permissions(qwen_run: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(qwen_run, tmp_path / "plain")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "plain").iterdir()} == {0o640}


@pytest.mark.parametrize("device", ["bogus", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(qwen_run: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device = '{device}' cannot be used here") as caught:
        export(qwen_run, tmp_path / "plain", device=device)
    assert "\n" not in str(caught.value)


def test_the_command_reports_both_differences(qwen_run: Path, tmp_path: Path, capsys: Any) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(qwen_run), "--out", str(tmp_path / "plain")])) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-10 in fp32" in shown and "after merging" in shown and "read back" in shown


def test_the_card_names_base_and_settings_but_no_path(qwen: Any, qwen_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(qwen_run, tmp_path / "run")
    (run / "config.yaml").write_text(f"model:\n  source: {qwen.folder}\ntrain:\n  learning_rate: 0.0003\n")
    export(run, tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert card.startswith(f'---\nbase_model: "{qwen.folder.name}"\nlibrary_name: transformers\n')
    assert "| `train.learning_rate` | 0.0003 |" in card and str(tmp_path) not in card
    assert str(qwen.folder.parent) not in card


def test_the_card_names_data_measurements_and_licence(tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    for folder in (run / "report", run / "benchmarks", base):
        folder.mkdir(parents=True)
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Base\nlicense: none\n")
    pck = {"pck": {"peak": 0.6123, "peak_layer": 7}}
    (run / "report" / "report.json").write_text(json.dumps({"features": "head", "by_features": {"head": pck}}))
    rows = [{"title": "BLINK", "model": {"score": 0.5}, "difference": {"mean": 0.021}}]
    rows.append({"title": "VSI-Bench", "model": {"score": 0.3}})
    (run / "benchmarks" / "results.json").write_text(json.dumps({"benchmarks": rows}))
    config = {"data": {"scenes": {"root": "/home/me/dl3dv"}, "qa": {"root": ""}}}
    card = model_card(str(base), run / "checkpoint-1", config, ["pass"], heads=False)
    assert "\nlicense: apache-2.0\n" in card.split("---")[1] and "/home/me" not in card
    assert "| `data.scenes.root` | dl3dv |" in card and "data.qa" not in card
    assert "| PCK, head, layer 7 | 0.612 |\n| BLINK | 50.0 %, +2.1 against the base |\n| VSI-Bench | 30.0 % |" in card
    assert "The base model's licence, apache-2.0, applies to it" in card
    (base / "README.md").unlink()
    assert "licen" not in model_card(str(base), tmp_path / "other" / "checkpoint-1", {}, ["pass"], heads=False)


def test_adapters_and_heads_alone_are_attached_as_the_card_says(qwen: Any, qwen_run: Path, tmp_path: Path) -> None:
    assert command_line("export", qwen_run, "--adapters", "--out", tmp_path / "small") == 0
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "heads.safetensors"
    ]  # fmt: skip
    card = (tmp_path / "small" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace(repr(qwen.folder.name), repr(str(qwen.folder))).replace(
        "'small'", repr(str(tmp_path / "small"))
    )
    names: dict[str, Any] = {}
    exec(code, names)
    trained = adapter_logits(qwen.backbone, qwen_run / "checkpoint-10")
    assert (logits(names["model"], qwen.backbone) - trained).abs().max() < 1e-4
    assert names["gasp"].layers == [0]


def test_an_upload_creates_a_private_repository(
    qwen_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **how: calls.append((name, how)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **how: calls.append(how))
    assert command_line("export", qwen_run, "--adapters", "--out", tmp_path / "small", "--push-to-hub", "me/small") == 0
    assert calls[0] == ("me/small", {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/small" and calls[1]["folder_path"] == str(tmp_path / "small")
    assert command_line("export", qwen_run, "--adapters", "--out", tmp_path / "two", "--push-to-hub", "small") == 1
    assert len(calls) == 2 and not (tmp_path / "two").exists()  # refused before anything is written
