"""The reference of configuration keys is complete, and the page in docs/ is the one that the code gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gasp_fast import cli
from gasp_fast.config.loader import keys_of
from gasp_fast.config.reference import as_markdown, field_comments, groups_of
from gasp_fast.g2vlm.config import G2TrainConfig
from gasp_fast.training.config import TrainConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@dataclass
class Base:
    first: int = 1  # of the base


@dataclass
class Sample(Base):
    """A sample. Of comments.

    More.
    """

    # Heads two fields:
    # both of these.
    second: str | None = None
    third: Literal["a", "b"] = "a"
    fourth: float = 1e-6  # its own; and it
    # continues here
    # Begins another.
    fifth: tuple[int, ...] = (1, 2)
    sixth: bool = False  # plain

    def method(self) -> None:
        x = 1  # no field  # noqa: F841


def test_comments_belong_to_their_fields():
    assert field_comments(Sample) == {
        "first": "of the base", "second": "Heads two fields: both of these.",
        "third": "Heads two fields: both of these.", "fourth": "its own; and it continues here",
        "fifth": "Begins another.", "sixth": "plain",
    }  # fmt: skip
    [group] = groups_of(Sample)
    assert group.meaning == "A sample. Of comments."
    shown = [(key.kind, key.default) for key in group.keys]
    assert shown == [
        ("whole number", "1"), ("text or null", "null"), ("a, b", "a"), ("number", "1.0e-06"),
        ("list of whole number", "[1, 2]"), ("true or false", "false"),
    ]  # fmt: skip


def test_every_key_of_a_run_has_a_meaning():
    keys = [key for group in groups_of(TrainConfig) for key in group.keys]
    paths = {key.path for key in keys}
    assert paths == {path for path in keys_of(TrainConfig) if not any(p.startswith(f"{path}.") for p in paths)}
    assert [key.path for key in keys if not key.meaning] == []


def test_the_page_is_what_the_code_says():
    """Write it anew with `gasp-fast recipes --keys markdown > docs/configuration.md`."""
    assert PAGE.read_text() == as_markdown({"": groups_of(TrainConfig), "G²VLM": groups_of(G2TrainConfig)})


def test_the_keys_are_printed_for_a_terminal(capsys):
    assert cli.main(["recipes", "--keys"]) == 0
    printed = capsys.readouterr().out
    assert "train.learning_rate: 0.0001\n    number\n    peak, after the warmup\n" in printed
    assert max(map(len, printed.splitlines())) <= 80
