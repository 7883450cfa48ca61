"""Download one commit of a model from the Hub, without opening or running any of it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from minibert.files.model_folder import PICKLES, check_paths, check_weights
from minibert.hub import folders, verify
from minibert.hub.remote import fetch, same, split_name


@dataclass
class Pulled:
    """The result of :func:`pull`.

    Attributes:
        files: sizes in bytes by path.
        code: SHA-256 of every Python file, which opening the model could run, by path.
        code_is: ``"installed"`` for the code of the installed version, ``"changed"``, or
            ``"none"``.
        left_out: files of the commit that a model does not need, or that are pickles.
    """

    repo_id: str
    commit: str
    output: str
    files: dict[str, int]
    code: dict[str, str]
    code_is: str
    left_out: list[str]


def pull(name: str, output_dir: str | Path, *, token: str | None = None) -> Pulled:
    """Download the model ``USER/NAME[@REVISION]`` into a new folder, as the one commit that its revision means now.

    Nothing of it is opened or run. With ``HF_HUB_OFFLINE=1`` it comes from the cache.

    Raises:
        ValueError: the name is invalid, the folder is not empty, or the model is damaged,
            pickled or leads out of its folder.
        HubError: the Hub refused, or could not be reached.
    """
    repo_id, revision = split_name(name)
    output_dir = Path(output_dir)
    folders.check_output(output_dir)
    commit, fetched, remote = fetch(repo_id, revision, token)
    with folders.new_folder(output_dir) as temporary:
        # In the cache, every file is a link, and other programs may have put pickles there.
        shutil.copytree(fetched, temporary, ignore=shutil.ignore_patterns(*PICKLES), dirs_exist_ok=True)
        files = {path: temporary / path for path in folders.paths_in(temporary)}
        if damaged := [path for path, file in files.items() if path in remote and not same(file, remote[path])]:
            raise ValueError(f"{', '.join(damaged)} of {repo_id} arrived damaged; delete {fetched} and pull again.")
        check_paths(temporary)
        check_weights(folders.encoder_folder(temporary))
        sizes = {path: file.stat().st_size for path, file in files.items()}
        code = verify.code_of(temporary)
    return Pulled(repo_id, commit, str(output_dir), sizes, code.files, code.state, sorted(set(remote) - set(sizes)))
