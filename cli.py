"""The ``minibert`` command. Thin: every command imports what it needs when it runs, so that ``--help`` stays instant."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Train, use and share a compact BERT-like text encoder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object on standard output.")]


def main() -> None:
    """Entry point of the console script. Exit status: 0 done, 1 a check failed, 2 wrong input, 130 interrupted."""
    app(prog_name="minibert")


def _user_errors() -> tuple[type[BaseException], ...]:
    from huggingface_hub.errors import StrictDataclassError

    return (ValueError, OSError, StrictDataclassError)


@contextmanager
def plain_errors(debug: bool, interrupted: str = "") -> Iterator[None]:
    """Turn errors of the input into one sentence and exit status 2, and Ctrl-C into exit status 130.

    Args:
        debug: let the error through, with its traceback.
        interrupted: what Ctrl-C leaves the user to do, such as how to resume.
    """
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        typer.echo(f"\nInterrupted. {interrupted}".rstrip(), err=True)
        raise typer.Exit(130) from None
    # The classes are looked up only when something was raised: naming them at import time would slow every --help.
    except _user_errors() as error:
        if debug:
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def print_json(value: Any) -> None:
    """Print ``value`` on standard output as one JSON object."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"minibert {version('minibert')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example:  minibert train recipes/tinybert.yaml embed.batch_size=128 --output-dir runs/larger-batch")
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a bundled recipe such as tinybert.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE.FIELD=VALUE]...", help="Fields to change; values are YAML.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the run; the default is runs/<recipe name>.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run changed stages, and those after them, again.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a recipe, or resume it: finished stages are skipped, an interrupted one continues at its last checkpoint.

    With many processes: torchrun --nproc_per_node N -m minibert train RECIPE.
    """
    with plain_errors(debug, f"To resume: minibert {' '.join(sys.argv[1:])}"):
        from minibert.train.recipe import load_recipe, read_metrics, run_recipe

        run_dir = run_recipe(load_recipe(recipe, overrides or []), output_dir=output_dir, force=force)
        figures = read_metrics(run_dir)
        if as_json:
            print_json({"output_dir": str(run_dir), "stages": figures})
        else:
            for stage, metrics in figures.items():
                shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float | int))
                typer.echo(f"{stage}: {shown or 'done'}")
            typer.echo(f"The run is in {run_dir}.")
