"""Test the command: instant help, one sentence and exit status 2 for wrong input, 130 with advice after Ctrl-C."""

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from minibert.cli import app
from minibert.train.stages import tokenizer

GOOD = "name: toy\nstages:\n- {kind: tokenizer, data: texts.csv}\n"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run ``minibert train`` on a one-stage recipe in an empty folder; the stage calls ``command.stage``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(GOOD, encoding="utf-8")
    (tmp_path / "texts.csv").write_text("text\nred apples and green pears\n", encoding="utf-8")

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["minibert", "train", *arguments])
        return CliRunner().invoke(app, ["train", *arguments])

    def fail_with(error):
        def stage(args, context):
            raise error

        monkeypatch.setattr(tokenizer, "train_tokenizer", stage)

    command.fail_with = fail_with
    return command


def test_help_does_not_import_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "minibert", "--help"], capture_output=True, text=True, check=True
    )
    assert "train" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "sentence_transformers", "numpy"}


def test_module_form_and_version():
    done = subprocess.run([sys.executable, "-m", "minibert", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("minibert 0.")


def test_every_command_has_an_example():
    runner = CliRunner()
    names = [
        line.split()[0] for line in runner.invoke(app, ["--help"]).stdout.split("Commands:")[1].splitlines() if line.strip()
    ]
    commands = [name for name in names if name in {info.name or info.callback.__name__ for info in app.registered_commands}]
    assert "train" in commands
    for name in commands:
        shown = runner.invoke(app, [name, "--help"]).stdout
        assert re.search(rf"Examples?:  minibert {name} ", shown), name
        assert "--debug" in shown, name


def test_train_prints_metrics(command, tmp_path):
    done = command("recipe.yaml", "tokenizer.method=word_level", "tokenizer.vocab_size=10")
    assert done.exit_code == 0, done.output
    assert "tokenizer: rows 1, vocab_size 10" in done.stdout
    assert "runs/toy" in done.stdout.replace("\\", "/")
    again = command("recipe.yaml", "tokenizer.method=word_level", "tokenizer.vocab_size=10", "--json")
    printed = json.loads(again.stdout)
    used = {"path": "texts.csv", "rows": 1, "columns": {"text": "text"}, "first_row": {"text": "red apples and green pears"}}
    assert printed["stages"] == {"tokenizer": {"rows": 1, "vocab_size": 10, "data": [used]}}
    assert "tokenizer reads 1 rows of texts.csv. First row: text (text): red apples and green pears" in done.stderr
    assert "already finished, skipped" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "Error: There is no recipe nothing.yaml"),
        (["recipe.yaml", "tokenizer.vocab=3"], "there is no field vocab; did you mean vocab_size?"),
        (["recipe.yaml", "tokenizer.data=absent.csv"], "Error: There is no file or folder absent.csv"),
        (["recipe.yaml", "tokenizer.text_columns=[body]"], "no column 'body'; it has text"),
        (["recipe.yaml", "--output-dir", "recipe.yaml"], "choose another --output-dir"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2(command, arguments, message):
    done = command(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""


def test_debug_shows_the_error_itself(command):
    done = command("nothing.yaml", "--debug")
    assert isinstance(done.exception, FileNotFoundError)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "\nInterrupted. To resume: minibert train recipe.yaml\n"),
        (
            KeyboardInterrupt("Stopped at step 3 of 9."),
            130,
            "\nStopped at step 3 of 9. To resume: minibert train recipe.yaml\n",
        ),
        (OSError(28, "No space left on device"), 2, "Error: [Errno 28] No space left on device"),
        (FloatingPointError("The loss is nan."), 1, "Error: The loss is nan."),
    ],
)
def test_what_stops_a_run_is_reported_in_one_sentence(command, error, status, message):
    command.fail_with(error)
    done = command("recipe.yaml")
    assert done.exit_code == status
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_a_bug_keeps_its_traceback(command):
    command.fail_with(RuntimeError("a bug"))
    assert isinstance(command("recipe.yaml").exception, RuntimeError)


def test_one_of_several_processes_prints_the_result(command, start, tmp_path):
    def train():
        done = command("recipe.yaml", "tokenizer.method=word_level", "tokenizer.vocab_size=10")
        (tmp_path / f"printed-{os.environ['RANK']}").write_text(done.stdout, encoding="utf-8")
        assert done.exit_code == 0

    assert start.finish(start(2, train)) == [0, 0]
    assert "tokenizer: rows 1" in (tmp_path / "printed-0").read_text(encoding="utf-8")
    assert (tmp_path / "printed-1").read_text(encoding="utf-8") == ""
