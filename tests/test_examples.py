"""The examples against plain loops and SciPy."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_image
from torch import Tensor

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))  # as Python does for a script
    return importlib.import_module(name)


def test_varying_blur_is_the_definition() -> None:
    torch.manual_seed(0)
    image, sigma = torch.rand(2, 3, 6, 7, dtype=torch.float64), 0.5 + 2 * torch.rand(2, 6, 7, dtype=torch.float64)
    got = example("varying_blur").blur(image, sigma, 5)
    want = torch.zeros_like(image)
    for n, i, j in np.ndindex(2, 6, 7):
        total = 0.0
        for a, b in np.ndindex(6, 7):
            if max(abs(a - i), abs(b - j)) <= 2:
                weight = np.exp(-((a - i) ** 2 + (b - j) ** 2) / (2 * float(sigma[n, i, j]) ** 2))
                want[n, :, i, j] += weight * image[n, :, a, b]
                total += weight
        want[n, :, i, j] /= total
    torch.testing.assert_close(got, want)


def test_constant_blur_is_scipys() -> None:
    """In the interior; at the border SciPy mirrors the image."""
    image = torch.rand(1, 1, 40, 44, dtype=torch.float64)
    got = example("varying_blur").blur(image, torch.full((1, 40, 44), 1.5, dtype=torch.float64), 13)
    want = gaussian_filter(image[0, 0].numpy(), 1.5, radius=6)
    np.testing.assert_allclose(got[0, 0, 6:-6, 6:-6].numpy(), want[6:-6, 6:-6], rtol=1e-10)


@pytest.mark.parametrize("scale", [2, 3])
def test_content_aware_reassembly_is_the_definition(scale: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    kernels = torch.randn(2, 2, 3, 3, 5 * scale, 4 * scale, dtype=torch.float64)
    got = example("content_aware_upsampling").reassemble(x, kernels)
    want = torch.zeros(2, 4, 5 * scale, 4 * scale, dtype=torch.float64)
    for n, c, i, j, u, v in np.ndindex(2, 4, 5 * scale, 4 * scale, 3, 3):
        a, b = i // scale + u - 1, j // scale + v - 1
        if 0 <= a < 5 and 0 <= b < 4:
            want[n, c, i, j] += kernels[n, c // 2, u, v, i, j] * x[n, c, a, b]
    torch.testing.assert_close(got, want)


def plain_joint_bilateral(coarse: Tensor, guide: Tensor, kernel_size: int, space: float, range_: float) -> Tensor:
    scale, reach = guide.shape[-1] // coarse.shape[-1], kernel_size // 2
    low = guide.unflatten(2, (-1, scale)).unflatten(4, (-1, scale)).mean((3, 5))
    result = torch.zeros(*coarse.shape[:2], *guide.shape[2:], dtype=coarse.dtype)
    for n, i, j in np.ndindex(len(coarse), *guide.shape[2:]):
        total = 0.0
        for a, b in np.ndindex(*coarse.shape[2:]):
            if max(abs(a - i // scale), abs(b - j // scale)) <= reach:
                away = ((i + 0.5) / scale - a - 0.5) ** 2 + ((j + 0.5) / scale - b - 0.5) ** 2
                unlike = float((guide[n, :, i, j] - low[n, :, a, b]).square().sum())
                weight = np.exp(-away / (2 * space**2) - unlike / (2 * range_**2))
                result[n, :, i, j] += weight * coarse[n, :, a, b]
                total += weight
        result[n, :, i, j] /= total
    return result


@pytest.mark.parametrize(("scale", "kernel_size"), [(2, 3), (4, 5)])
def test_joint_bilateral_upsampling_is_the_definition(scale: int, kernel_size: int) -> None:
    torch.manual_seed(0)
    coarse = torch.rand(2, 3, 4, 3, dtype=torch.float64)
    guide = torch.rand(2, 2, 4 * scale, 3 * scale, dtype=torch.float64)
    got = example("joint_bilateral").joint_bilateral_upsample(coarse, guide, kernel_size, 0.8, 0.3)
    torch.testing.assert_close(got, plain_joint_bilateral(coarse, guide, kernel_size, 0.8, 0.3))


def test_joint_bilateral_upsampling_without_similar_pixels() -> None:
    """A white pixel on black: every unnormalised weight underflows in float32."""
    guide, coarse = torch.zeros(1, 3, 32, 32), torch.rand(1, 2, 4, 4)
    guide[..., 13, 17] = 1
    found = example("joint_bilateral").joint_bilateral_upsample(coarse, guide)
    assert found.min() >= coarse.min() - 1e-6
    assert found.max() <= coarse.max() + 1e-6


def test_joint_bilateral_upsampling_keeps_an_edge_that_bilinear_blurs() -> None:
    guide = torch.zeros(1, 1, 32, 32)
    guide[..., 13:] = 1
    coarse = torch.nn.functional.avg_pool2d(guide, 4)
    found = example("joint_bilateral").joint_bilateral_upsample(coarse, guide)
    bilinear = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    assert (found - guide).abs().mean() < 0.3 * (bilinear - guide).abs().mean()


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A crop of scikit-learn's "china", in the working directory of the examples."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "photo.png"
    Image.fromarray(load_sample_image("china.jpg")[160:256, 200:344]).save(file)
    return file


def picture(photo: Path, name: str) -> np.ndarray:
    """The picture that an example wrote, split into images of the photo's size."""
    row = np.asarray(Image.open(photo.parent / "runs" / "examples" / f"{name}.png")).astype(float)
    assert len(row) == 96
    return np.stack(np.split(row, row.shape[1] // 144, axis=1))


def test_the_blurs_picture(photo: Path) -> None:
    """The centre stays sharp, the corners lose their detail."""
    example("varying_blur").main([str(photo)])
    before, after = picture(photo, "varying_blur")
    assert np.array_equal(before, np.asarray(Image.open(photo)))
    assert np.abs(after - before)[40:56, 60:84].mean() < 1
    assert after[:16, :16].std() < 0.5 * before[:16, :16].std()


def test_the_joint_bilaterals_picture(photo: Path) -> None:
    """It is closer to the photo than the coarse map."""
    example("joint_bilateral").main([str(photo)])
    coarse, fine, whole = picture(photo, "joint_bilateral")
    assert np.abs(fine - whole).mean() < 0.8 * np.abs(coarse - whole).mean()


@pytest.mark.parametrize("name", ["varying_blur", "joint_bilateral", "content_aware_upsampling", "denoising"])
def test_a_missing_photo(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example(name).main(["nowhere.jpg"])
    assert "photo must be a file, got nowhere.jpg, which does not exist" in capsys.readouterr().err


def test_content_aware_upsampling_learns(photo: Path) -> None:
    """From nearest-neighbour upsampling to better than bicubic."""
    page = example("content_aware_upsampling")
    found = page.main([str(photo)], steps=0)
    assert found["content-aware"] == pytest.approx(found["nearest"], abs=1e-3)
    found = page.main([str(photo)], steps=60)
    assert found["content-aware"] > found["bicubic"] + 0.2
    *_, upsampled, whole = picture(photo, "content_aware_upsampling")
    off = np.square((upsampled - whole) / 255).mean()
    assert -10 * np.log10(off) == pytest.approx(found["content-aware"], abs=0.1)


def test_denoising_averages_with_the_predicted_kernels() -> None:
    """Against plain loops; weights sum to one, so a constant does not change."""
    torch.manual_seed(0)
    model = example("denoising").Denoiser(kernel_size=5).double()
    image = torch.rand(1, 3, 9, 8, dtype=torch.float64)
    kernels = model.average.generator(image)
    want = torch.zeros_like(image)
    for i, j, u, v in np.ndindex(9, 8, 5, 5):
        if 0 <= i + u - 2 < 9 and 0 <= j + v - 2 < 8:
            want[..., i, j] += kernels[0, 0, u, v, i, j] * image[..., i + u - 2, j + v - 2]
    torch.testing.assert_close(model(image), want)
    assert (kernels >= 0).all()
    constant = torch.full_like(image, 0.3)
    torch.testing.assert_close(model(constant), constant)


def test_denoising_learns(photo: Path) -> None:
    page = example("denoising")
    found = page.main([str(photo)], steps=60)
    assert 20 < found["noisy"] < 21.5  # the range is ten times the noise, minus a little by clipping
    assert found["best Gaussian blur"] > found["noisy"]
    assert found["kernel prediction"] > page.main([str(photo)], steps=0)["kernel prediction"] + 0.5
    assert page.decibels(*(torch.from_numpy(one / 255) for one in picture(photo, "denoising")[[0, 2]])) < 21.5


def test_audio_equals_scipys_filter_for_a_constant_cutoff() -> None:
    from scipy.signal import firwin

    sound = torch.randn(1, 2, 400, dtype=torch.float64)
    got = example("audio").low_pass(sound, torch.full((1, 400), 0.1, dtype=torch.float64), 31)
    taps = firwin(31, 0.2)  # of the Nyquist frequency, half the rate
    for channel in range(2):
        want = np.convolve(sound[0, channel].numpy(), taps, mode="same")
        np.testing.assert_allclose(got[0, channel].numpy(), want, rtol=1e-9, atol=1e-12)


def test_audio_equals_scipys_filter_at_every_sample() -> None:
    from scipy.signal import firwin

    sound, cutoff = torch.randn(1, 1, 60, dtype=torch.float64), torch.linspace(0.02, 0.4, 60, dtype=torch.float64)
    got = example("audio").low_pass(sound, cutoff[None], 15)
    filled = np.pad(sound[0, 0].numpy(), 7)
    want = [firwin(15, 2 * float(cutoff[sample])) @ filled[sample : sample + 15] for sample in range(60)]
    np.testing.assert_allclose(got[0, 0].numpy(), want, rtol=1e-9, atol=1e-12)


def test_volume_bilateral_filter_is_the_definition() -> None:
    torch.manual_seed(0)
    volume = torch.rand(1, 2, 4, 3, 5, dtype=torch.float64)
    got = example("volume").bilateral(volume, 3, 1.2, 0.3)
    want = torch.zeros_like(volume)
    places = list(np.ndindex(4, 3, 5))
    for place in places:
        total = 0.0
        for other in places:
            away = np.subtract(place, other)
            if np.abs(away).max() <= 1:
                unlike = float((volume[(0, slice(None), *place)] - volume[(0, slice(None), *other)]).square().sum())
                weight = np.exp(-(away**2).sum() / (2 * 1.2**2) - unlike / (2 * 0.3**2))
                want[(0, slice(None), *place)] += weight * volume[(0, slice(None), *other)]
                total += weight
        want[(0, slice(None), *place)] /= total
    torch.testing.assert_close(got, want)


def test_the_other_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wave

    monkeypatch.chdir(tmp_path)
    example("audio").main([])
    with wave.open(str(tmp_path / "runs" / "examples" / "audio.wav")) as sound:
        assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (2, 22_050, 4 * 22_050)
        left = np.frombuffer(sound.readframes(sound.getnframes()), np.int16)[::2].astype(float)
    start, end = (np.abs(np.fft.rfft(part)) ** 2 for part in (left[:8192], left[-8192:]))
    middles = [float((np.arange(len(one)) * one).sum() / one.sum() / 8192 * 22_050) for one in (start, end)]
    assert middles[0] < 300  # hertz: the cutoff is 200 to 280 there
    assert 3000 < middles[1] < 4500  # half of what a cutoff of 6600 to 8000 leaves
    example("volume").main([])
    noisy, smooth = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "off by" in line)
    assert smooth < noisy / 4
