"""Reading configurations: every value is taken as written, or one line names the file, the key and the value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gasp_fast.config.loader import load_config, to_yaml


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-4  # peak
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["adamw", "no", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr = {self.lr} must be positive")


@dataclass(frozen=True, kw_only=True)
class Data:
    root: str
    weight: float = 1.0
    grids: tuple[int, ...] | None = (8, 24)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str = "tiny"
    steps: int = 100
    layers: str | None = None
    resume: bool = False
    save: int | Literal["epoch"] = 10
    optimizer: Optimizer = field(default_factory=Optimizer)
    tags: tuple[str, ...] = ()
    warm: Optimizer | None = None
    data: Data | None = None


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str, name: str = "recipe.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refusal(path: Path, overrides: list[str] | tuple[str, ...] = (), kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        load_config(Recipe, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_an_empty_file_is_all_defaults(write: Any) -> None:
    assert load_config(Recipe, write("")) == Recipe()


def test_nested_values_take_their_declared_types(write: Any) -> None:
    config = load_config(
        Recipe,
        write(
            "layers: 18-25\nsave: epoch\noptimizer: {lr: 1, betas: [0.8, 1]}\n"
            "data: {root: scenes, grids: [8]}\nwarm: {}\ntags: [a]\n"
        ),
    )
    assert config == Recipe(
        layers="18-25",
        save="epoch",
        optimizer=Optimizer(lr=1.0, betas=(0.8, 1.0)),
        data=Data(root="scenes", grids=(8,)),
        warm=Optimizer(),
        tags=("a",),
    )
    assert type(config.optimizer.lr) is float and type(config.optimizer.betas) is tuple


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "0.0001", "1.0e-4", ".1e-3"])
def test_every_way_to_write_a_small_number_is_that_number(write: Any, text: str) -> None:
    assert load_config(Recipe, write(f"optimizer: {{lr: {text}}}")).optimizer.lr == 1e-4
    assert load_config(Recipe, write(""), [f"optimizer.lr={text}"]).optimizer.lr == 1e-4


def test_overrides_come_last_and_in_order(write: Any) -> None:
    path = write("steps: 1\noptimizer: {kind: sgd}")
    config = load_config(Recipe, path, ["steps=2", "optimizer.lr=0.5", "steps=3", "tags=[a, b]", "name=a=b"])
    assert (config.steps, config.tags, config.name) == (3, ("a", "b"), "a=b")
    assert config.optimizer == Optimizer(lr=0.5, kind="sgd")


def test_an_override_of_text_is_text_whatever_it_looks_like(write: Any) -> None:
    config = load_config(Recipe, write(""), ["layers=7", "name=010", "data.root=2026", "optimizer.kind=no"])
    assert config.data is not None
    assert (config.layers, config.name, config.data.root, config.optimizer.kind) == ("7", "010", "2026", "no")


def test_null_switches_an_optional_part_off_and_a_mapping_switches_it_on(write: Any) -> None:
    path = write("warm: {lr: 2.0}\nlayers: all")
    off = load_config(Recipe, path, ["warm=null", "layers=null"])
    assert off.warm is None and off.layers is None
    assert load_config(Recipe, write(""), ["warm.lr=3"]).warm == Optimizer(lr=3.0)
    assert load_config(Recipe, write("warm: null"), ["warm.lr=3"]).warm == Optimizer(lr=3.0)
    replaced = load_config(Recipe, write("warm: {lr: slow}"), ["warm=null", "warm.kind=sgd"])
    assert replaced.warm == Optimizer(kind="sgd")  # nothing is left of what null has replaced


def test_a_file_builds_on_another_one_relative_to_itself(tmp_path: Path, write: Any) -> None:
    (tmp_path / "ablations").mkdir()
    write("steps: 5\noptimizer: {lr: 2.0, kind: sgd}\ntags: [x]\ndata: {root: one, weight: 2.0}", "root.yaml")
    write("base: root.yaml\noptimizer: {lr: 3.0}", "middle.yaml")
    top = write("base: ../middle.yaml\ntags: [y, z]\ndata: {root: two}\noptimizer: {}", "ablations/top.yaml")
    config = load_config(Recipe, top)
    assert config.steps == 5 and config.optimizer == Optimizer(lr=3.0, kind="sgd")
    assert config.tags == ("y", "z") and config.data == Data(root="two", weight=2.0)


def test_a_path_is_taken_as_written(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert load_config(Recipe, write("name: ~/run")).name == "~/run"


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stepz: 3", "stepz = 3 is no key of Recipe; the nearest is steps"),
        ("optimizer: {learning_rate: 3}", "optimizer.learning_rate = 3 is no key of Recipe; the nearest is optimizer."),
        ("lr: 3", "lr = 3 is no key of Recipe; the nearest is optimizer.lr"),
        ("optimzer: {lr: 3}", "optimzer = {'lr': 3} is no key of Recipe; the nearest is optimizer"),
        ("steps: {min: 3}", "steps = {'min': 3} must be a whole number"),
        ("steps: many", "steps = 'many' must be a whole number"),
        ("steps: '5'", "steps = '5' must be a whole number"),
        ("steps: 1.5", "steps = 1.5 must be a whole number"),
        ("steps: true", "steps = True must be a whole number"),
        ("steps: null", "steps = None must be a whole number"),
        ("resume: 1", "resume = 1 must be true or false"),
        ("resume: 'true'", "resume = 'true' must be true or false"),
        ("name: 5", "name = 5 must be text (quote it)"),
        ("optimizer: {lr: fast}", "optimizer.lr = 'fast' must be a number"),
        ("optimizer: {lr: true}", "optimizer.lr = True must be a number"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas = [0.9] must be a list: a number, a number"),
        ("optimizer: {betas: 0.9}", "optimizer.betas = 0.9 must be a list"),
        ("optimizer: {betas: [0.9, x]}", "optimizer.betas = [0.9, 'x'] must be a list: a number, a number"),
        ("optimizer: {kind: adam}", "optimizer.kind = 'adam' must be one of 'adamw', 'no', 'sgd'"),
        ("optimizer: {kind: no}", "optimizer.kind = False must be one of 'adamw', 'no', 'sgd'; quote it"),
        ("optimizer: {lr: -1}", "optimizer: lr = -1.0 must be positive"),
        ("optimizer: 3", "optimizer = 3 must be a mapping with keys of Optimizer"),
        ("optimizer: null", "optimizer = None must be a mapping with keys of Optimizer"),
        ("save: often", "save = 'often' must be a whole number or one of 'epoch'"),
        ("data: {weight: 2}", "data.root is missing; it has no default"),
        ("data: {root: x, grids: [8, y]}", "data.grids = [8, 'y'] must be a list: a whole number, ... or null"),
        ("1: x", "1 = 'x' is no key of Recipe"),
        ("tags: {a: b}", "tags = {'a': 'b'} must be a list"),
        ("tags: a", "tags = 'a' must be a list"),
        ("tags: [1]", "tags = [1] must be a list: text (quote it), ..."),
        ("[1, 2]", "holds a list; a configuration is a mapping"),
        ("x: " + "[" * 5000 + "]" * 5000, "line 1: exceeded maximum nesting depth"),
        ("steps: 1\nname: x\nsteps: 2", "line 3: found duplicate key steps"),
        ("steps: [1", "line 2: did not find expected ',' or ']'"),
        ("name: !!python/object/apply:os.getcwd []", "line 1: could not determine a constructor for the tag"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_value(write: Any, text: str, expected: str) -> None:
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and expected in message


def test_a_mistake_in_a_base_names_the_base_and_one_in_an_override_the_command_line(write: Any) -> None:
    base = write("optimizer: {lr: slow}", "root.yaml")
    top = write("base: root.yaml\noptimizer: {kind: sgd}")
    assert refusal(top).startswith(f"{base}: optimizer.lr")
    assert load_config(Recipe, top, ["optimizer.lr=1"]).optimizer.lr == 1  # a replaced value is not checked
    assert refusal(write(""), ["optimizer.lr=slow"]).startswith("command line: optimizer.lr = 'slow' must be a number")
    assert "the nearest is steps" in refusal(write(""), ["step=3"])


@pytest.mark.parametrize("override", ["steps", "=3", "optimizer..lr=3", "steps=[1"])
def test_a_malformed_override_is_refused(write: Any, override: str) -> None:
    assert refusal(write(""), [override]).startswith("command line: ")


def test_files_that_build_on_each_other_are_refused_and_so_is_a_missing_one(write: Any) -> None:
    write("base: b.yaml", "a.yaml")
    assert "leads back" in refusal(write("base: a.yaml", "b.yaml"))
    assert "'gone.yaml'" in refusal(write("base: gone.yaml"), kind=OSError)
    assert "must be the name of a file" in refusal(write("base: 3"))
    assert "gone.yaml" in refusal(Path("gone.yaml"), kind=OSError)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("shadow", "root:secret:0", "must be a .yaml or .yml file"),
        ("shadow.conf", "root: secret", "must be a .yaml or .yml file"),
        ("text.yaml", "root:secret:0", "holds a str; a configuration is a mapping"),
        ("wifi.yml", "network: {password: secret}", "network is no key of Recipe"),
    ],
)
def test_the_content_of_a_base_that_is_no_recipe_is_not_printed(tmp_path, write, name, content, expected) -> None:
    (tmp_path / "elsewhere").mkdir()
    foreign = write(content, f"elsewhere/{name}")
    for base in (foreign, f"elsewhere/{name}"):
        message = refusal(write(f"base: {base}"))
        assert expected in message and name in message and "secret" not in message


def test_a_dataclass_may_not_use_the_reserved_key(write: Any) -> None:
    @dataclass(kw_only=True)
    class Clash:
        base: str = ""

    with pytest.raises(TypeError, match="base"):
        load_config(Clash, write(""))


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${steps}", "runs/${name}", "[a, '${name}']", "'???'", "${"])
def test_a_placeholder_is_refused_and_not_filled_in(write: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """OmegaConf would read an environment variable, another key, or a value that has still to be given."""
    monkeypatch.setenv("HOME", "a secret")
    for key in ("layers", "name", "tags", "unknown"):
        in_file, in_override = refusal(write(f"{key}: {value}")), refusal(write(""), [f"{key}={value}"])
        assert "a secret" not in in_file + in_override
        if key == "name" and value != "${":
            assert "name = " in in_file and "write the value itself" in in_file
            assert in_override.startswith("command line: name = ")


def test_a_value_that_only_looks_like_a_placeholder_is_text(write: Any) -> None:
    config = load_config(Recipe, write("name: Where is it???\nlayers: $HOME"))
    assert (config.name, config.layers) == ("Where is it???", "$HOME")


# ---- there and back -------------------------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda text: "${" not in text and text != "???")
numbers = st.floats(allow_nan=False)
whole = st.integers(1 - 2**63, 2**63 - 1)
optimizers = st.builds(
    Optimizer,
    lr=st.floats(min_value=0, exclude_min=True, allow_nan=False),
    betas=st.tuples(numbers, numbers),
    kind=st.sampled_from(["adamw", "no", "sgd"]),
)
grids = st.lists(whole, max_size=3).map(tuple)
recipes = st.builds(
    Recipe,
    name=text,
    steps=whole,
    layers=st.none() | text,
    resume=st.booleans(),
    save=whole | st.just("epoch"),
    optimizer=optimizers,
    tags=st.lists(text, max_size=3).map(tuple),
    warm=st.none() | optimizers,
    data=st.none() | st.builds(Data, root=text, weight=numbers, grids=st.none() | grids),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=recipes)
def test_every_configuration_survives_the_way_to_yaml_and_back(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    again = load_config(Recipe, path)
    assert again == recipe
    assert to_yaml(again) == to_yaml(recipe)


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]
    return [(path, tree)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=recipes)
@example(recipe=Recipe(name="0E0"))  # a text here, a number to OmegaConf
def test_every_configuration_can_be_given_by_overrides_alone(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    overrides = []
    for key, value in leaves(yaml.safe_load(to_yaml(recipe))):
        quotes = '"' if isinstance(value, list) else None  # [1e5] is a list of numbers, ["1e5"] one of texts
        typed = yaml.safe_dump(value, default_flow_style=True, default_style=quotes)
        overrides.append(f"{key}={typed.removesuffix(chr(10)).removesuffix(chr(10) + '...')}")
    assert load_config(Recipe, path, overrides) == recipe
