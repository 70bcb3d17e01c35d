"""Programs for a process in which this package cannot be imported."""

import subprocess
import sys
from pathlib import Path

CHECK = """
torch.testing.assert_close(run(torch.load('x.pt')), torch.load('y.pt'), rtol=1e-4, atol=1e-4)
print('agrees')
"""


def elsewhere(code: str, folder: Path) -> str:
    """What a program prints that runs in `folder`, with json and torch imported."""
    code = "import sys; sys.modules['involution'] = None\nimport json, torch\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
