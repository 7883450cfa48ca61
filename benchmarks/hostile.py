"""Open mutated folders of models and vectors with every command, and count what happens.

Folder ``n`` of a command is the same in every run, so a run that was stopped goes on, and two checkouts meet the same folders.
Each command has a process, which forks for each folder; see ``tests/mutations.py`` for mutations, limits and outcomes.
"""

import importlib
import json
import os
import pkgutil
import random
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import mutations  # noqa: E402

from hub_server import HubServer  # noqa: E402


def run(out: Path, *, folders: int, commands: list[str], package: Path | None, processes: int) -> None:
    """Run each command on ``folders`` folders, print the counts, and write them and the findings to ``out``."""
    from benchmarks.before import _environment  # of this checkout, which a worker may not import
    from benchmarks.machine import commit, describe

    checkout = package or ROOT
    results: dict[str, Any] = {"benchmark": "hostile", "machine": describe(), "commit": commit(checkout), "commands": {}}
    if out.exists():
        results |= {key: value for key, value in json.loads(out.read_text()).items() if key in ("commands", "findings")}
    results.setdefault("findings", [])
    lock, started = threading.Lock(), []
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(processes) as pool:
        work = Path(scratch)
        mutations.build(work)
        environment = {**_environment(work, checkout), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if package:  # an earlier checkout asks for the version of its distribution
            metadata = work / "path" / "minibert-0.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text("Metadata-Version: 2.1\nName: minibert\nVersion: 0\n")
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home")}
        total = sum(max(0, folders - sum(results["commands"].get(name, {}).values())) for name in commands)
        bar = tqdm(total=total, unit=" folders")

        def fill(command: str) -> None:
            first = sum(results["commands"].get(command, {}).values())
            arguments = [sys.executable, "-m", "benchmarks.hostile", scratch, command, str(first), str(folders)]
            worker = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            started.append(worker)
            for number, line in enumerate(worker.stdout or (), start=first):
                case = json.loads(line)
                with lock:
                    counts = results["commands"].setdefault(command, {})
                    counts[case["outcome"]] = counts.get(case["outcome"], 0) + 1
                    if case["outcome"] not in ("ok", "refused"):
                        results["findings"].append({"command": command, "folder": number, **case})
                    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                    bar.update()
            if worker.wait():
                raise RuntimeError(f"The process of {command} stopped; its error stands above.")

        try:
            list(pool.map(fill, commands))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in started:
                worker.terminate()
            bar.close()
    _print(results["commands"])


def _print(commands: dict[str, dict[str, int]]) -> None:
    totals: Counter[str] = Counter()
    for counts in commands.values():
        totals.update(counts)
    outcomes = [name for name, _ in totals.most_common()]
    for command, counts in {**commands, "all": totals}.items():
        print(f"{command:16}" + "".join(f"{counts.get(name, 0):>8} {name}" for name in outcomes))


def _work(work: Path, command: str, first: int, last: int) -> None:
    """Print a line of JSON for each folder."""
    import minibert

    for module in pkgutil.walk_packages(minibert.__path__, "minibert."):
        if not module.name.startswith(("minibert.tests", "minibert.benchmarks", "minibert.docs", "minibert.__main__")):
            with suppress(ImportError):
                importlib.import_module(module.name)
    with HubServer() as server:
        for number in range(first, last):
            case = mutations.run_case(command, number, work, random.Random(number), server)
            print(json.dumps(case), flush=True)


if __name__ == "__main__":
    os.nice(5)
    _work(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
