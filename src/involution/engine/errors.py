"""What a person reads when a run cannot begin or ends early: one line."""

import re
import tempfile
import traceback

from lightning.fabric.utilities.exceptions import MisconfigurationException

# What data, checkpoints and options provoke; torch has RuntimeError for shapes, devices and memory.
EXPECTED = (OSError, ValueError, RuntimeError, MisconfigurationException)


def one_line(error: BaseException) -> str:
    """An error's message in a line; a RuntimeError's traceback goes to a file, which the line names.

    An error of a loading process is shown as the one that it raised, and an option that jsonargparse refuses by the
    reason, without its list of everything that was given.
    """
    if str(error).startswith("Does not validate against any of the Union subtypes"):
        while error.__cause__ is not None:
            error = error.__cause__
    message = str(error)
    if "Original Traceback (most recent call last)" in message:
        message = re.sub(r"^[\w.]+: ", "", _last_paragraph(message))
    message = re.sub(r"\s*\n\s*", " ", message.strip()) or type(error).__name__
    if not isinstance(error, RuntimeError):
        return message
    with tempfile.NamedTemporaryFile("w", prefix="involution-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    return f"{message[:600]} ({type(error).__name__}; its traceback is in {file.name})"


def _last_paragraph(text: str) -> str:
    """What follows the last indented line of a traceback."""
    lines = text.strip().split("\n")
    start = max(index for index, line in enumerate(lines) if line.startswith(" ")) + 1
    return "\n".join(lines[start:]) or lines[-1].strip()
