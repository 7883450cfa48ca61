"""Records the sha256 of the two files that travel with a checkpoint, for ``minibert hub verify`` to know every release of them.

python .ci/record_release.py           of the version in setup.cfg, whose code never changes from then on
python .ci/record_release.py --check   refuses to release a version whose code is not on record
"""

import configparser
import datetime
import hashlib
import json
import sys
from pathlib import Path

CODE = ("configuration_minibert.py", "modeling_minibert.py")


def record(root: Path, today: str) -> str:
    """Write the code of this version into the record; refused where it was released with other code."""
    file, version, digests, known = _read(root)
    if "dev" in version:
        raise ValueError(
            f"{version} is in development; give setup.cfg, CHANGELOG.md and CITATION.cff the version of the release."
        )
    entry = known.setdefault(version, {"released": today, **digests})
    if any(entry.get(name) != digest for name, digest in digests.items()):
        raise ValueError(
            f"minibert {version} was released on {entry['released']} with other code; give setup.cfg, CHANGELOG.md and "
            "CITATION.cff the next version first."
        )
    ordered = dict(sorted(known.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
    file.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    return version


def check(root: Path) -> str:
    """Refuse a version whose code is not on record as it is now."""
    _, version, digests, known = _read(root)
    if wrong := [name for name, digest in digests.items() if known.get(version, {}).get(name) != digest]:
        raise ValueError(
            f"The record of minibert {version} lacks {' and '.join(wrong)} as it stands; run python .ci/record_release.py."
        )
    return version


def _read(root: Path) -> tuple[Path, str, dict[str, str], dict[str, dict[str, str]]]:
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    digests = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in CODE}
    file = root / "hub" / "releases.json"
    return file, setup["metadata"]["version"], digests, json.loads(file.read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    try:
        if arguments == ["--check"]:
            print(f"The code of minibert {check(root)} is on record.")
        elif not arguments:
            print(f"Recorded minibert {record(root, str(datetime.date.today()))}.")
        else:
            raise ValueError(f"{' '.join(arguments)} is unknown; use --check or nothing.")
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
