"""Environment of the ranks on all hosts, out of one file: `launch/cluster.env`.

Lines `NAME=VALUE` and comments. A value is what stands behind the first `=`, to the end of the
line; no shell reads it, so there are no quotes and no `$NAME`. Standard library only.
"""

from __future__ import annotations

import re
from pathlib import Path

# Each rank has its own, from the launcher.
_OF_THE_LAUNCHER = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES"),
    *("MASTER_ADDR", "MASTER_PORT"),
}


def environment_of(path: Path) -> dict[str, str]:
    """The variables that a file sets.

    Raises:
        ValueError: names the file, the line and the remedy: it cannot be read, a line is not
            NAME=VALUE, a value is in quotes, a name stands there twice or is the launcher's own.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "not a text file"
        raise ValueError(
            f"--env-file {path} cannot be read ({reason}); write lines NAME=VALUE as in "
            "launch/cluster.env, or leave the option out"
        ) from e
    if "\0" in text:
        raise ValueError(f"--env-file {path} is not a text file; see launch/cluster.env")
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"--env-file {path}, line {number}: {line!r}"
        name, equals, value = line.partition("=")
        if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{where} is not NAME=VALUE, without `export` and spaces around the =")
        if value[:1] in ('"', "'"):
            raise ValueError(f"{where}: no shell reads this file; write the value without quotes")
        if " #" in value:
            raise ValueError(
                f"{where}: the comment would be part of the value; give it its own line"
            )
        if name in _OF_THE_LAUNCHER:
            raise ValueError(
                f"{where}: each rank gets its own {name} from the launcher; remove the line, and "
                "choose machines and devices by --hostfile, --include and --master_port"
            )
        if name in found:
            raise ValueError(f"{where}: {name} is set before; keep one of the two lines")
        found[name] = value
    return found
