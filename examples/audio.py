"""Time-varying filtering in 1d: a low-pass whose cutoff changes with every sample.

    python examples/audio.py                         writes runs/examples/audio.wav

White noise through a low-pass whose cutoff sweeps from 200 Hz to 8 kHz: every sample has its own windowed sinc of 255
taps, which a time-invariant filter cannot do. Four seconds at 22,050 Hz, in stereo.
"""

import sys
import wave
from pathlib import Path

import torch
from photo import options, say_time
from torch import Tensor

from involution import involution1d

RATE = 22_050  # samples a second


def low_pass(sound: Tensor, cutoff: Tensor, taps: int = 255) -> Tensor:
    """Filters every sample with its own low-pass.

    Args:
        sound: [N, C, L].
        cutoff: of every sample, as a fraction of the sampling rate (at most a half): [N, L].
        taps: length of the filter, odd; a Hamming window is applied.

    Returns:
        [N, C, L], zero-padded.
    """
    offsets = torch.arange(taps, dtype=sound.dtype) - taps // 2
    window = torch.hamming_window(taps, periodic=False, dtype=sound.dtype)
    kernels = torch.sinc(2 * cutoff[:, None] * offsets[:, None]) * window[:, None]
    kernels = kernels / kernels.sum(1, keepdim=True)
    return involution1d(sound, kernels[:, None], padding="same")


def main(arguments: list[str]) -> None:
    """Writes the sweep."""
    options(__doc__, arguments)
    torch.manual_seed(0)
    noise = 0.3 * torch.randn(1, 2, 4 * RATE)
    cutoff = torch.logspace(torch.log10(torch.tensor(200.0)), torch.log10(torch.tensor(8000.0)), 4 * RATE) / RATE
    sound = low_pass(noise, cutoff[None])[0]
    file = Path("runs/examples/audio.wav")
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as out:
        out.setnchannels(2)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((32_767 * (sound / sound.abs().max())).short().T.contiguous().numpy().tobytes())
    print(f"wrote {file}")
    say_time(lambda: low_pass(noise, cutoff[None]))


if __name__ == "__main__":
    main(sys.argv[1:])
