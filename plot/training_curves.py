"""Training runs as pictures: every figure in their log.jsonl over steps, epochs or minutes, several runs overlaid."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure

from minibert.plot.page import COLOURS, INK, Picture, markup, plain

LOG = "log.jsonl"
# What the horizontal axis may count, and the key of a line that holds it.
AXES = {"step": "step", "epoch": "epoch", "minutes": "seconds"}
# Panels come in this order, after them what else a log holds, by name; the figures of evaluation follow the loss.
_ORDER = ("loss", "learning_rate", "tokens_per_second", "grad_norm")
_EVAL = "eval_"
_DASHES, _STYLES = ("solid", "dash", "dot"), ("-", "--", ":")


@dataclass(frozen=True)
class Run:
    """The log of one stage: its name, and for each line its figures by name."""

    name: str
    lines: list[dict[str, float]]

    def curve(self, key: str, axis: str) -> tuple[list[float], list[float]]:
        """Where ``key`` was measured, counted in ``axis``, and its values."""
        found = [line for line in self.lines if key in line]
        places = [line[AXES[axis]] / (60 if axis == "minutes" else 1) for line in found]
        return places, [line[key] for line in found]


@dataclass(frozen=True, eq=False, kw_only=True)
class Training(Picture):
    """Curves of one or more runs."""

    runs: list[Run]

    @property
    def panels(self) -> list[tuple[str, list[str]]]:
        """Title and keys of every panel: the loss shares its own with that of evaluation."""
        keys = {key for run in self.runs for line in run.lines for key in line} - set(AXES.values())
        evaluated = sorted(key for key in keys if key.startswith(_EVAL) and key != f"{_EVAL}loss")
        rest = sorted(keys - set(_ORDER) - set(evaluated) - {f"{_EVAL}loss"})
        order = [key for key in ("loss", *evaluated, *_ORDER[1:], *rest) if key in keys or key == "loss"]
        panels = [(_title(key), [key]) for key in order]
        panels[0] = ("loss", [key for key in ("loss", f"{_EVAL}loss") if key in keys])
        return [panel for panel in panels if panel[1]]

    def interactive(self) -> go.Figure:
        figure, sources = go.Figure(), []
        for at, (_, keys) in enumerate(self.panels):
            for number, run in enumerate(self.runs):
                for key in keys:
                    sources.append((run, key))
                    x, y = run.curve(key, "step")
                    figure.add_scatter(
                        x=x,
                        y=y,
                        xaxis=f"x{at + 1 if at else ''}",
                        yaxis=f"y{at + 1 if at else ''}",
                        mode="lines+markers" if key.startswith(_EVAL) or len(x) < 3 else "lines",
                        line={"color": _colour(number), "dash": _dash(number, key)},
                        name=markup(run.name, 60),
                        legendgroup=str(number),
                        showlegend=at == 0 and key == keys[0],
                        hovertemplate=f"{_title(key)} %{{y:.5g}} at %{{x:.5g}}<extra>%{{fullData.name}}</extra>",
                    )
        buttons = [
            {"label": axis, "method": "restyle", "args": [{"x": [run.curve(key, axis)[0] for run, key in sources]}]}
            for axis in self._axes()
        ]
        figure.update_layout(
            template="plotly_white",
            font={"color": INK},
            margin={"l": 50, "r": 15, "t": 70, "b": 20},
            updatemenus=[
                {
                    "name": "axis",
                    "buttons": buttons,
                    "x": 0,
                    "xanchor": "left",
                    "y": 1,
                    "yanchor": "bottom",
                    "pad": {"b": 32, "l": -40},
                    "bgcolor": "white",
                }
            ],
            legend={"orientation": "h", "y": 0, "yanchor": "top", "yref": "paper", "x": 0, "font": {"size": 11}},
        )
        self._arrange(figure)
        return figure

    def _axes(self) -> list[str]:
        """What every line of every run can be counted in."""
        return [axis for axis, key in AXES.items() if all(key in line for run in self.runs for line in run.lines)]

    def _arrange(self, figure: go.Figure) -> None:
        """Panels in one column or two; the lowest part of the figure is the legend's."""
        axis = {"automargin": False, "tickfont": {"size": 10}, "zeroline": False}
        arranged: dict[str, Any] = {"numbers": []}
        for name, columns in (("wide", 2), ("narrow", 1)):
            rows, each, gap = -(-len(self.panels) // columns), 190, 62
            height = rows * (each + gap)
            layout: dict[str, Any] = {"height": height + 90 + 22 * len(self.runs)}
            for at in range(len(self.panels)):
                row, column = divmod(at, columns)
                top = 1 - row * (each + gap) / height
                left = column * (1 / columns + 0.03)
                layout[f"xaxis{at + 1 if at else ''}.domain"] = [left, min(1.0, left + 1 / columns - 0.03 * (columns > 1))]
                layout[f"yaxis{at + 1 if at else ''}.domain"] = [top - each / height, top]
            arranged[name] = {"traces": {}, "layout": layout}
        for at, (title, keys) in enumerate(self.panels):
            number = at + 1 if at else ""  # plotly's first axes have none
            also = " (dotted: evaluation)" if len(keys) > 1 else ""
            figure.add_annotation(
                text=f"<b>{markup(title)}</b>{also}",
                xref=f"x{number} domain",
                yref=f"y{number} domain",
                x=0,
                y=1,
                yanchor="bottom",
                showarrow=False,
                font={"size": 12},
            )
            figure.update_layout(
                {
                    f"xaxis{number}": {**axis, "anchor": f"y{number}", **({"matches": "x"} if at else {})},
                    f"yaxis{number}": {**axis, "anchor": f"x{number}"},
                }
            )
        figure.update_layout(meta=arranged)
        for path, value in arranged["wide"]["layout"].items():
            figure.layout[path] = value

    def draw(self) -> Figure:
        columns = 2 if len(self.panels) > 1 else 1
        rows = -(-len(self.panels) // columns)
        figure = Figure(figsize=(5.2 * columns, 2.3 * rows + 0.9), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
        for axes, (title, keys) in zip(grid, self.panels):
            for number, run in enumerate(self.runs):
                for key in keys:
                    style = ":" if key == f"{_EVAL}loss" else _STYLES[number // len(COLOURS) % len(_STYLES)]
                    x, y = run.curve(key, "step")
                    marker = "." if key.startswith(_EVAL) or len(x) < 3 else ""
                    label = plain(run.name, 60) if key == keys[0] else None
                    axes.plot(x, y, color=_colour(number), linestyle=style, marker=marker, label=label, linewidth=1.2)
            axes.set_title(title + (" (dotted: evaluation)" if len(keys) > 1 else ""), fontsize=9, loc="left")
            axes.tick_params(labelsize=7)
            axes.grid(color="#E5E5E5", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in grid[len(self.panels) :]:
            axes.axis("off")
        for axes in grid[max(0, len(self.panels) - columns) : len(self.panels)]:
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelbottom=True)
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(labels) > 1 else 1, fontsize=8, frameon=False)
        return figure


def _title(key: str) -> str:
    return key.removeprefix(_EVAL).replace("_", " ")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _dash(number: int, key: str) -> str:
    return "dot" if key == f"{_EVAL}loss" else _DASHES[number // len(COLOURS) % len(_DASHES)]


def training(runs: str | Path | Sequence[str | Path]) -> Training:
    """Curves of runs: folders of a run, of one of its stages, or log files. Runs that go on can be looked at too.

    Example::

        plot.training(["runs/quickstart", "runs/mine"]).save("training.html", force=True)

    Raises:
        FileNotFoundError: a run is not there, or holds no log.jsonl.
        ValueError: no run, or a log without lines or with a damaged one.
    """
    paths = [runs] if isinstance(runs, str | Path) else list(runs)
    if not paths:
        raise ValueError("There is no run to draw; give the folder of one.")
    logs = list(dict.fromkeys(log for path in paths for log in find_logs(Path(path).expanduser())))
    names = _names(logs)
    read = [Run(name, read_log(log)) for name, log in zip(names, logs)]
    return Training(title="Training of " + (names[0] if len(names) == 1 else f"{len(names)} stages"), runs=read)


def find_logs(path: Path) -> list[Path]:
    """The log that ``path`` is or holds, or those of the stages in it.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"There is no run {path} (looked from {Path.cwd()}).")
    if (path / LOG).exists():
        return [path / LOG]
    if logs := sorted(path.glob(f"*/{LOG}")):
        return logs
    raise FileNotFoundError(
        f"{path} holds no {LOG}, nor does a stage in it; give the folder of a run that trained, or of one of its stages."
    )


def read_log(log: Path) -> list[dict[str, float]]:
    """The lines of a log, whose numbers are kept; the last line of a process that was killed, or still writes, may be torn.

    Lines of evaluation get the seconds of the line before them.

    Raises:
        ValueError: a line before the last is no JSON object with a step, or there is none.
    """
    lines: list[dict[str, float]] = []
    texts = [text for text in log.read_text(encoding="utf-8", errors="replace").split("\n") if text.strip()]
    for number, text in enumerate(texts, start=1):
        try:
            values = {
                key: float(value)
                for key, value in json.loads(text).items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            _ = values["step"]
        except (ValueError, AttributeError, KeyError) as error:
            if number == len(texts) and lines and not text.endswith("}"):
                break
            raise ValueError(
                f"Line {number} of {log} is no line of a training log (a JSON object with a step); repair or remove it."
            ) from error
        if lines and "seconds" not in values and "seconds" in lines[-1]:
            values["seconds"] = lines[-1]["seconds"]
        lines.append({key: value if np.isfinite(value) else float("nan") for key, value in values.items()})
    if not lines:
        raise ValueError(f"{log} has no lines yet; look again when the run has logged some steps.")
    return lines


def _names(logs: list[Path]) -> list[str]:
    """As many of the last folders of each log as tell all of them apart, at least run and stage."""
    parts = [(log.parent if log.name == LOG else log.with_suffix("")).resolve().parts for log in logs]
    for count in range(2, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
