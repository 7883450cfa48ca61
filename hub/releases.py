"""Which release of ours the code in a model is of: ``releases.json`` holds the sha256 of the two files of every release.

``.ci/record_release.py`` writes it, as a step of a release; a version in development is not in it.
"""

import json
from functools import cache
from importlib import resources

from minibert.files.installation import version

RECORD = "releases.json"


@cache
def known() -> dict[str, dict[str, str]]:
    """For every release, the oldest first, the sha256 of its files by name and, as ``released``, its date."""
    return dict(json.loads((resources.files("minibert.hub") / RECORD).read_text(encoding="utf-8")))


def releases_of(name: str, digest: str) -> list[str]:
    """The releases whose file ``name`` has this sha256, the newest last."""
    return [release for release, files in known().items() if files.get(name) == digest]


def release_of(files: list[tuple[str, str]]) -> str | None:
    """The newest release that all ``files``, each a name and a sha256, belong to; None where there is none."""
    shared = [set(releases_of(name, digest)) for name, digest in files]
    common = set.intersection(*shared) if shared else set()
    return next((release for release in reversed(known()) if release in common), None)


def words(release: str | None) -> str:
    """A release for people; None is the installed code, where that is of none."""
    return f"minibert {release}" if release else f"the installed minibert {version()}, which is no release yet"


__all__ = ["known", "release_of", "releases_of", "words"]
