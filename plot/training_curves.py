"""Draw the metrics in the log.jsonl files of one or more training runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

from minibert.files.disk import expand_home
from minibert.plot import page

LOG = "log.jsonl"
# The units of the x axis, and the key of each unit in a line of the log.
AXES = {"step": "step", "epoch": "epoch", "minutes": "seconds"}
# The order of panels: loss, metrics of evaluation, these metrics, and others by name.
_ORDER = ("loss", "learning_rate", "tokens_per_second", "grad_norm")
_EVAL = "eval_"


@dataclass(frozen=True)
class Run:
    """Store the log of one stage. Each line maps the names of metrics to values."""

    name: str
    lines: list[dict[str, float]]

    def curve(self, key: str, axis: str) -> tuple[list[float], list[float]]:
        """Return the x values in the unit ``axis``, and the values of the metric ``key``."""
        found = [line for line in self.lines if key in line]
        places = [line[AXES[axis]] / (60 if axis == "minutes" else 1) for line in found]
        return places, [line[key] for line in found]


@dataclass(frozen=True, eq=False, kw_only=True)
class Training(page.Picture):
    """Show the curves of one or more training runs."""

    runs: list[Run]
    cell = (5.2, 2.3)

    @property
    def metrics(self) -> dict[str, list[str]]:
        """Return a dictionary from the title of each diagram to the names of its metrics."""
        keys = {key for run in self.runs for line in run.lines for key in line} - set(AXES.values())
        evaluated = sorted(key for key in keys if key.startswith(_EVAL))
        order = [key for key in dict.fromkeys(["loss", *evaluated, *_ORDER, *sorted(keys)]) if key in keys]
        panels: dict[str, list[str]] = {}
        for key in order:
            panels.setdefault(key.removeprefix(_EVAL).replace("_", " "), []).append(key)
        return panels

    def panels(self, axis: str = "step") -> list[page.Panel]:
        """Return a diagram for each metric, with a curve for each run."""
        panels = []
        for title, keys in self.metrics.items():
            traces = []
            for number, run in enumerate(self.runs):
                for key in keys:
                    x, y = run.curve(key, axis)
                    evaluated = key.startswith(_EVAL)
                    style = "dot" if evaluated and len(keys) > 1 else ("solid", "dash")[number // len(page.COLOURS) % 2]
                    trace = go.Scatter(x=x, y=y, name=page.markup(run.name, 60), hovertemplate="%{y:.5g} at %{x:.5g}")
                    trace.mode = "lines+markers" if evaluated or len(x) < 3 else "lines"
                    trace.line = {"color": page.COLOURS[number % len(page.COLOURS)], "dash": style, "width": 1.5}
                    trace.marker.size = 5
                    traces.append(trace)
            title += " (dotted: evaluation)" if len(keys) > 1 else ""
            panels.append(page.Panel(title=title, axes=(axis, ""), traces=traces))
        return panels

    def interactive(self) -> go.Figure:
        """Return a plotly figure with a menu to choose the unit of the x axis."""
        lines = [line for run in self.runs for line in run.lines]
        axes = [axis for axis, key in AXES.items() if all(key in line for line in lines)]
        choices = {axis: {"x": [trace.x for panel in self.panels(axis) for trace in panel.traces]} for axis in axes}
        return page.page_figure(self.panels(), {"axis": choices})


def training(runs: str | Path | Sequence[str | Path]) -> Training:
    """Show training runs. ``runs`` are folders of runs, folders of stages, or log files.

    Example::

        plot.training(["runs/quickstart", "runs/mine"]).save("training.html", force=True)

    Raises:
        FileNotFoundError: if a run does not exist or contains no log.jsonl.
        ValueError: if no run is given, or if a log is empty or has a damaged line.
    """
    paths = [runs] if isinstance(runs, str | Path) else list(runs)
    if not paths:
        raise ValueError("No run is given; give the folder of a run.")
    logs = list(dict.fromkeys(log for path in paths for log in find_logs(expand_home(path))))
    names = _names(logs)
    read = [Run(name, read_log(log)) for name, log in zip(names, logs)]
    return Training(title="Training of " + (names[0] if len(names) == 1 else f"{len(names)} stages"), runs=read)


def find_logs(path: Path) -> list[Path]:
    """Return ``path`` if it is a log file. Otherwise, return the logs in the folder."""
    if not path.exists():
        raise FileNotFoundError(f"The run {path} does not exist (looked from {Path.cwd()}); give the folder of a run.")
    if logs := [path] if path.is_file() else sorted(path.glob(LOG)) or sorted(path.glob(f"*/{LOG}")):
        return logs
    raise FileNotFoundError(f"Neither {path} nor a stage in it holds {LOG}; give the folder of a run.")


def read_log(log: Path) -> list[dict[str, float]]:
    """Return the numbers in each line of a log. Leave out a last line that is incomplete.

    A line without ``seconds`` gets the seconds of the line before it. An empty log, or a
    damaged line before the last line, raises a ValueError.
    """
    lines: list[dict[str, float]] = []
    texts = [text for text in log.read_text(encoding="utf-8", errors="replace").split("\n") if text.strip()]
    for number, text in enumerate(texts, start=1):
        try:
            found = json.loads(text).items()
            values = {key: float(value) for key, value in found if type(value) in (int, float)}
            _ = values["step"]
        except (ValueError, AttributeError, KeyError) as error:
            if number == len(texts) and lines and not text.endswith("}"):
                break
            raise ValueError(f"Line {number} of {log} is not a JSON object with a step; remove it.") from error
        if lines and "seconds" not in values and "seconds" in lines[-1]:
            values["seconds"] = lines[-1]["seconds"]
        lines.append(values)
    if not lines:
        raise ValueError(f"{log} has no lines yet; try again when the run has logged some steps.")
    return lines


def _names(logs: list[Path]) -> list[str]:
    """Return a short, unique name for each log, made of the last folders of its path."""
    parts = [(log.parent if log.name == LOG else log.with_suffix("")).resolve().parts for log in logs]
    for count in range(2, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
