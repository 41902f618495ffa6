"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name and rename it when it is complete.

        with atomic_path(path) as part:
            part.write_text(text)

    Yields the temporary path, beside `path` and ending in .part: name the format where a library
    would read it off the suffix. The folder is created. If the block raises, `path` is unchanged
    and the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
