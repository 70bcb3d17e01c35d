"""The one-line message of a run that cannot start or ends early."""

import re
import tempfile
import traceback

from lightning.fabric.utilities.exceptions import MisconfigurationException

# Errors of data, checkpoints and options; torch raises RuntimeError for shapes, devices and memory.
EXPECTED = (OSError, ValueError, RuntimeError, MisconfigurationException)


def one_line(error: BaseException) -> str:
    """An error's message in one line; a RuntimeError's traceback is written to a file that the line names.

    For an error in a loader worker it is the worker's own message; for an option that jsonargparse refuses, the reason
    without the list of all arguments.
    """
    if str(error).startswith("Does not validate against any of the Union subtypes"):
        while error.__cause__ is not None:
            error = error.__cause__
    message = str(error)
    if "Original Traceback (most recent call last)" in message:
        message = re.sub(r"^[\w.]+: ", "", _last_paragraph(message))
    message = re.sub(r"\s*\n\s*", " ", message.strip()) or type(error).__name__
    if message.startswith("Expected more than 1 value per channel"):  # torch's, which names no option
        shape = message[message.find("[") : message.rfind("]") + 1]
        return f"batch_size must be at least 2, or images larger: a batch norm has one value per channel in {shape}"
    if not isinstance(error, RuntimeError):
        return message
    with tempfile.NamedTemporaryFile("w", prefix="involution-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    return f"{message[:600]} ({type(error).__name__}; its traceback is in {file.name})"


def _last_paragraph(text: str) -> str:
    """The text after the last indented line of a traceback."""
    lines = text.strip().split("\n")
    start = max(index for index, line in enumerate(lines) if line.startswith(" ")) + 1
    return "\n".join(lines[start:]) or lines[-1].strip()
