"""Download one commit of a model from the Hub, without opening or running any of it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minibert.files.model_folder import check_paths, check_weights
from minibert.hub import folders, remote, verify
from minibert.hub.push import paths_in
from minibert.hub.remote import copy_plain, split_name


@dataclass
class Pulled:
    """What :func:`pull` fetched.

    Attributes:
        code: sha256 of every file of Python code, which opening the model could run, by path.
        code_is: ``"ours"`` where that is the code of a release of ours or the installed one, ``"changed"``, or ``"none"``.
        release: the version that the code is of; None where it is of no release.
        left_out: files of the commit that no model needs, or that are pickles.
    """

    repo_id: str
    commit: str
    output: str
    files: dict[str, int]
    code: dict[str, str]
    code_is: str
    release: str | None
    left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pull(name: str, output_dir: str | Path, *, token: str | None = None) -> Pulled:
    """Download the model ``USER/NAME[@REVISION]`` into a new folder, as the one commit that its revision means now.

    Nothing of it is opened or run. Without the network (``HF_HUB_OFFLINE=1``) it comes from the cache.

    Raises:
        ValueError: the name is none, the folder is not empty, or what the Hub holds is damaged, pickled or leads elsewhere.
        HubError: the Hub refused, or could not be reached.
    """
    repo_id, revision = split_name(name)
    output_dir = Path(output_dir)
    folders.check_output(output_dir)
    commit, fetched, files = remote.fetch(repo_id, revision, token)
    with folders.new_folder(output_dir) as temporary:
        copy_plain(fetched, temporary, link=False)
        for path in paths_in(temporary):
            if path in files and not remote.same(temporary / path, files[path]):
                raise ValueError(f"{path} of {repo_id} arrived damaged; delete {fetched} and pull again.")
        check_paths(temporary)
        check_weights(folders.encoder_folder(temporary))
        sizes = {path: (temporary / path).stat().st_size for path in paths_in(temporary)}
        code = verify.code_of(temporary)
    return Pulled(
        repo_id=repo_id,
        commit=commit,
        output=str(output_dir),
        files=sizes,
        code=code.files,
        code_is=code.state,
        release=code.release,
        left_out=sorted(set(files) - set(sizes)),
    )
