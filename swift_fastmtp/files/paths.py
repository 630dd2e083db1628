"""Names that stand in files of a folder stay inside that folder.

A checkpoint comes from somewhere else. Its index, its list of token maps and its links say which files are read, and an
export copies what it reads into a folder that people publish. So a path that leads out of the folder is refused.
"""

from pathlib import Path

from ..errors import FastMTPError


def inside(folder: Path, name: str, where: str | Path) -> Path:
    """The file of `folder` that `name` means, whether it is there or not.

    Args:
        where: what the name was read from, for the message.

    Raises `FastMTPError` if the name is a path that leads elsewhere (absolute, `..`), or a link does (`check_link`).
    """
    parts = Path(name).parts
    if not parts or "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in parts:
        raise FastMTPError(f"{where}: names {name[:100]!r}, which is no file below {folder}; put it there")
    path = folder / name
    check_link(path, folder)
    return path


def check_link(path: Path, folder: Path) -> None:
    """Raises `FastMTPError` if a file of a folder is, or lies behind, a link to something outside of it.

    The caches of Hugging Face's hub are made of links to their own `blobs`; those are followed.
    """
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise FastMTPError(f"{path}: cannot be followed ({error}); put the file itself there") from None
    if not target.is_relative_to(home) and not _is_blob(target, home):
        raise FastMTPError(
            f"{path}: is a link to {target}, outside of the folder, and engines and exports would read that; put the "
            "file itself, or a hard link, in its place"
        )


def _is_blob(target: Path, folder: Path) -> bool:
    """Whether a link leads to a hub cache's store: `snapshots/REVISION/NAME` → `blobs/HASH` of the same repository, or,
    from a folder of the user's, `models--OWNER--NAME/blobs/HASH`."""
    repository = target.parent.parent
    own = folder.parent.name == "snapshots" and folder.parent.parent == repository
    return target.parent.name == "blobs" and (own or repository.name.startswith("models--"))


def files_of(folder: Path) -> list[Path]:
    """The files that belong to a checkpoint folder, sorted: no folders, nothing hidden, no pipes and the like.

    Raises `FastMTPError` as `check_link`.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    for path in files:
        check_link(path, folder)
    return files
