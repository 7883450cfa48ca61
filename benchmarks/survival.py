"""Kill every command that writes files, start it again, and compare what it leaves with what an undisturbed command leaves."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from boundaries import Survival, Workflow, add_hub_files, compare, make_inputs, read_tree, workflows

from hub_server import HubServer


def run(out: Path, work: Path, *, names: list[str], every_boundary: bool, kills: int, scale: int, seed: int) -> None:
    """Kill the workflows ``names``, or all of them; continue the results in ``out``, and print them."""
    work = work.absolute() / ("boundaries" if every_boundary else f"random-{scale}")
    part = "every_boundary" if every_boundary else "random"
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"benchmark": "survival"}
    results["machine"] = describe()
    found = results.setdefault(part, {})
    scale = 1 if every_boundary else scale
    if not (work / "inputs" / "complete").exists():
        shutil.rmtree(work, ignore_errors=True)
        (work / "inputs").mkdir(parents=True)
        # A process that has computed nothing forks without the threads of its libraries.
        child = multiprocessing.get_context("fork").Process(target=make_inputs, args=(work / "inputs", scale))
        child.start()
        child.join()
        (work / "inputs" / "complete").touch()

    for name, workflow in workflows(work / "inputs", scale).items():
        if (names and name not in names) or (workflow.victim and not every_boundary):  # random kills hit all processes
            continue
        with HubServer() if workflow.hub else nullcontext() as server:
            begin = _boundaries if every_boundary else _random
            options = {} if every_boundary else {"kills": kills, "seed": seed}
            folder = work / name.replace(", ", "-").replace(" ", "-")
            for result in begin(workflow, folder, found.get(name, {}), server, **options):
                found[name] = result
                out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        shown = {key: value for key, value in found[name].items() if key != "findings"}
        print(f"{name}: {shown}", *found[name]["findings"], sep="\n  ", flush=True)
    print(table(results))
    if any(result["findings"] for result in found.values()):
        raise SystemExit(1)


def table(results: dict[str, Any]) -> str:
    """Return the results as a table in Markdown."""
    lines = [
        "| workflow | boundaries | identical | without leftovers | random kills | identical, without leftovers |",
        "|" + " --- |" * 6,
    ]
    every, moments = results.get("every_boundary", {}), results.get("random", {})
    for name in {**every, **moments}:
        cells = ["–"] * 5
        if name in every:
            killed, findings = every[name]["killed"], every[name]["findings"]
            bad = [sum(bool(finding[kind]) for finding in findings) for kind in ("different", "left_over")]
            cells[:3] = [f"{killed} of {every[name]['boundaries']}", *(str(killed - number) for number in bad)]
        if name in moments:
            cells[3:] = [str(moments[name]["kills"]), "no" if moments[name]["findings"] else "yes"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _boundaries(workflow: Workflow, folder: Path, result: dict[str, Any], server: HubServer | None) -> Any:
    """Yield the result after each boundary."""
    if result.get("killed") and result["killed"] == result["boundaries"]:
        return
    shutil.rmtree(folder, ignore_errors=True)
    survival = Survival(workflow, folder, server)
    result = {"killed": 0, "findings": [], **result, "boundaries": len(survival.boundaries)}
    for number in range(result["killed"] + 1, result["boundaries"] + 1):
        different, left = survival.stopped_at(number)
        if different or left:
            at = survival.boundaries[number - 1]
            result["findings"].append({"boundary": number, "at": at, "different": different, "left_over": left})
            print(result["findings"][-1], flush=True)
        result["killed"] = number
        yield result


def _random(workflow: Workflow, folder: Path, result: dict[str, Any], server: HubServer | None, kills: int, seed: int) -> Any:
    """Yield the result of all kills: a workflow is begun again from nothing if it was not finished."""
    if result.get("kills") == kills:
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    begun, now = time.perf_counter(), time.time()
    child = _start(workflow, folder, server)
    while not _written(folder / "run", now) and child.poll() is None:
        time.sleep(0.05)
    start_up = time.perf_counter() - begun
    whole = _finished(child, folder, server)
    seconds = time.perf_counter() - begun

    generator, moments, findings = random.Random(seed), [], []
    # The kills come after the first write, and all together should leave some of the work to be done.
    latest = max(start_up + 1.5 * (seconds - start_up) / kills, 1.2 * start_up)
    while len(moments) < kills:
        child, moment = _start(workflow, folder, server), generator.uniform(0.9 * start_up, latest)
        try:
            child.wait(moment)  # it is done: the other kills hit a run from the beginning
            findings += _compared(child, folder, server, whole)
        except subprocess.TimeoutExpired:
            _kill(child)
            moments.append(round(moment, 2))
    findings += _compared(_start(workflow, folder, server), folder, server, whole)
    times = {"seconds_uninterrupted": round(seconds, 1), "seconds_of_kills": moments}
    yield {"kills": kills, "findings": findings, **times}


def _start(workflow: Workflow, folder: Path, server: HubServer | None) -> subprocess.Popen:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    for path in workflow.copied:
        if not (run / path.name).exists():
            shutil.copytree(path, run / path.name)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(workflow.processes), "-m"]
    environment = server.environment(folder / "home") if server else {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(run / "cache"), "TMPDIR": str(folder / "tmp")}
    (command,) = workflow.commands
    command = [sys.executable, "-m", *(launcher if workflow.processes > 1 else []), "minibert", *command]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=run, env=environment)


def _written(run: Path, since: float) -> bool:
    """Return True if the command has written a file of its result since the time ``since``."""
    places = (place for place in run.glob("*") if place.name != "cache")
    with suppress(FileNotFoundError):  # a temporary file may be gone already
        return any(path.stat().st_mtime > since for place in places for path in place.rglob("*") if path.is_file())
    return True


def _kill(child: subprocess.Popen) -> None:
    """SIGKILL for all processes of a run: torchrun's would outlive it, and train on."""
    parent = psutil.Process(child.pid)
    parent.suspend()  # so that it starts no more of them
    everyone = [parent, *parent.children(recursive=True)]
    for process in everyone:
        process.kill()
    child.wait()
    psutil.wait_procs(everyone)


def _finished(child: subprocess.Popen, folder: Path, server: HubServer | None) -> dict[str, Any]:
    """Wait for the end of a command; return the files that it has left, and delete them."""
    if child.wait():
        raise SystemExit(f"{child.args} ended with status {child.returncode}; see {folder / 'log'}.")
    if server:
        add_hub_files(server, folder / "run")
        server.repos.clear()
    found = read_tree(folder / "run")
    shutil.rmtree(folder / "run")
    return found


def _compared(child: subprocess.Popen, folder: Path, server: HubServer | None, whole: dict[str, Any]) -> list[Any]:
    different, left = compare(whole, _finished(child, folder, server))
    return [{"different": different, "left_over": left}] if different or left else []
