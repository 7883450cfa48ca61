"""Download one commit of a model from the Hub, without running the model's code."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from minibert.files.model_folder import PICKLES, check_model
from minibert.hub import folders, verify
from minibert.hub.remote import fetch, split_name


@dataclass
class Pulled:
    """Store the result of :func:`pull`.

    Attributes:
        files: path -> size in bytes.
        code: path -> SHA-256 of every Python file that opening the model could run.
        code_is: ``"installed"`` if the code equals the installed version, ``"changed"`` if it
            differs, and ``"none"`` if the model has no code.
        left_out: files that were not downloaded: pickles, and files a model does not need.
    """

    repo_id: str
    commit: str
    output: str
    files: dict[str, int]
    code: dict[str, str]
    code_is: str
    left_out: list[str]


def pull(name: str, output_dir: str | Path, *, token: str | None = None) -> Pulled:
    """Download the current commit of the model ``USER/NAME[@REVISION]`` into a new folder.

    The model is not opened. With ``HF_HUB_OFFLINE=1`` the files come from the Hub's cache.

    Raises:
        ValueError: if the name is invalid, the folder is not empty, or the model is damaged,
            pickled or refers to files outside of its folder.
        HubError: if the Hub refuses the request or cannot be reached.
    """
    repo_id, revision = split_name(name)
    output_dir = Path(output_dir)
    folders.check_output(output_dir)
    commit, fetched, remote = fetch(repo_id, revision, token)
    with folders.new_folder(output_dir) as temporary:
        # The cache contains links, and may contain pickles that other programs downloaded.
        shutil.copytree(fetched, temporary, ignore=shutil.ignore_patterns(*PICKLES), dirs_exist_ok=True)
        check_model(temporary, trust_remote_code=True)  # nothing is opened
        sizes = {path: (temporary / path).stat().st_size for path in folders.paths_in(temporary)}
        code = verify.code_of(temporary)
    return Pulled(repo_id, commit, str(output_dir), sizes, code.files, code.state, sorted(set(remote) - set(sizes)))
