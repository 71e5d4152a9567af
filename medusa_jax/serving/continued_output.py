"""An output of many hours that a later run continues, with the same settings and data.

What the records depend on is kept beside them, in `OUTPUT.settings.json`.
"""

import hashlib
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.data.text_files import numbered_lines
from medusa_jax.errors import InputError
from medusa_jax.files import writing
from medusa_jax.serving.distill_options import DistillOptions

# What may differ between a run and the run that resumes it.
_FREE = ("output", "batch_size", "mesh", "on_bad", "minutes", "debug")


def settings(options: DistillOptions) -> dict[str, Any]:
    """What records depend on: the options, and the contents of the data's files."""
    chosen = {name: value for name, value in vars(options).items() if name not in _FREE}
    files = [path for path in map(Path, options.data) if path.is_file()]
    contents = {str(path): fingerprint(path) for path in files}
    return chosen | {"dtype": options.precision, "contents": contents}


def fingerprint(path: Path) -> str:
    """A name for the content of a file, such as "sha256:2cf24dba5fb0a30e"; reads 1 GB a second."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def resume(output: Path, now: dict[str, Any]) -> int:
    """Prepares the output: the number of the first input that it lacks.

    A half-written last line is cut off.

    Raises:
      InputError: the output is no such file, or was made with other settings.
    """
    beside = output.with_name(output.name + ".settings.json")
    if not output.exists() or not output.stat().st_size:
        json_files.write(beside, now)
        return 0
    try:
        before = json_files.read_object(beside)
    except InputError as error:
        raise InputError(f"{output} is there, but {error}: not continued") from None
    # What an earlier release did not write was as it is by default, or is taken on trust.
    defaults = vars(DistillOptions(data=["-"], output=""))
    before = defaults | {"contents": now["contents"]} | before
    other = [
        f"--{name} was {json_files.short(before.get(name))}, is {json_files.short(now[name])}"
        for name in sorted(now.keys() - {"contents"})
        if before.get(name) != now[name]
    ]
    if other:
        raise InputError(f"{output} was made with other settings: {'; '.join(other)}")
    if before["contents"] != now["contents"]:
        files = ", ".join(now["contents"])
        raise InputError(f"{output} was made with other contents of {files}: not continued")
    return _last_input(output) + 1


def _last_input(output: Path) -> int:
    """The number of the last input that was answered, or -1; cuts off half a line after it."""
    whole, last = 0, b'{"input": -1}'
    with writing(output), open(output, "rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                whole, last = whole + len(line), line
        file.truncate(whole)
    try:
        record = json_files.parse(last.decode("utf-8"), str(output))
        return json_files.Fields(record, str(output)).integer("input", least=-1)
    except (ValueError, AttributeError):
        raise InputError(f"{output}: its last line is no record of distillation") from None


def written_prompts(output: Path) -> set[str]:
    """The prompts of an output that `resume` has checked."""
    lines = [line for _, line in numbered_lines(output)] if output.exists() else []
    return {str(json_files.parse(line, str(output)).get("prompt")) for line in lines}
