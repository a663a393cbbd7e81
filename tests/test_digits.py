"""The quickstart's own parts: data, VAE and report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_ds import digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "images"
    assert digits.write_images(out) == 1797
    return out


@pytest.fixture(scope="module")
def data(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    return digits.read_images(folder)


def test_files_hold_every_digit_under_its_class(data: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.datasets import load_digits

    images, labels = data
    real = load_digits()
    order = np.argsort(real.target, kind="stable")  # name order is class by class
    assert (labels == real.target[order]).all()
    assert images.shape == (1797, 8, 8, 3) and images.dtype == np.uint8
    assert np.abs(images[..., 0] / 255 * 16 - real.images[order]).max() < 0.05  # 1/2 of 16/255
    assert (images[..., 0] == images[..., 2]).all()


def test_a_folder_without_images_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dit_ds.digits images --out"):
        digits.read_images(tmp_path)


def test_a_broken_attempt_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), digits.aside(out) as partial:
        (partial / "half").touch()
        raise RuntimeError
    assert not out.exists()
    with digits.aside(out) as partial:
        (partial / "whole").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "whole"]


def test_pixels_survive_the_way_to_the_model_and_back(
    data: tuple[np.ndarray, np.ndarray],
) -> None:
    images = data[0][:16]
    x = digits.to_tensor(images)
    assert x.shape == (16, 3, 8, 8) and x.min() == -1 and x.max() == 1
    assert (digits.to_images(x) == images).all()


def test_halves_are_disjoint_equal_and_of_the_same_mix(
    data: tuple[np.ndarray, np.ndarray],
) -> None:
    labels = data[1]
    first, second = digits.halves(labels)
    assert len(first) == len(second) > 890
    assert not set(first) & set(second)
    assert (np.bincount(labels[first]) == np.bincount(labels[second])).all()


def test_frechet_distance_of_known_gaussians() -> None:
    rng = np.random.default_rng(1)
    white = rng.standard_normal((500, 6))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T  # covariance exactly 1
    assert digits.frechet_distance(white, white) == pytest.approx(0, abs=1e-9)
    # |shift|^2, and for commuting covariances the squared distance of standard deviations.
    assert digits.frechet_distance(white, white + 0.5) == pytest.approx(6 * 0.25)
    scale = np.array([1.0, 2.0, 3.0, 0.0, 0.5, 1.0])  # one dimension is constant
    assert digits.frechet_distance(white * scale, white) == pytest.approx(((scale - 1) ** 2).sum())
    assert digits.frechet_distance(white, white * scale) == pytest.approx(((scale - 1) ** 2).sum())


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((300, 5)) @ rng.standard_normal((5, 5)) for _ in range(2))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b)).real.sum()  # the textbook form
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = mean + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert digits.frechet_distance(a, b) == pytest.approx(expected)


@pytest.fixture(scope="module")
def vae(data: tuple[np.ndarray, np.ndarray]):
    return digits.train_vae(data[0], steps=40, log=lambda line: None)


def test_scaling_factor_gives_latents_of_unit_deviation(
    vae, data: tuple[np.ndarray, np.ndarray]
) -> None:
    latents = digits.encode(vae, data[0]) * vae.config.scaling_factor
    assert latents.shape == (1797, 4, 4, 4)
    assert latents.std().item() == pytest.approx(1, abs=1e-4)


def test_training_brings_the_reconstructions_closer(
    vae, data: tuple[np.ndarray, np.ndarray]
) -> None:
    images = data[0].astype(float)
    of_mean_image = np.square(images - images.mean(0)).mean()
    assert np.square(digits.reconstruct(vae, data[0]) - images).mean() < of_mean_image / 2


def test_report_tells_good_from_bad(vae, data: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = data
    real = digits.make_report(images, labels, images, labels, vae)
    assert real["class_accuracy"] > 0.98
    assert real["class_accuracy_of_real"] > 0.98
    assert real["frechet_num_images"] == len(labels) // 2 - 2  # classes of odd size lose one image
    # A random half of the same images is as near to one half as the other half is.
    assert real["frechet_distance"] < 1.5 * real["frechet_distance_real_halves"]

    wrong = digits.make_report(images, labels, images, (labels + 1) % 10, vae)
    assert wrong["class_accuracy"] < 0.02
    noise = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    bad = digits.make_report(images, labels, noise, labels[:600], vae)
    assert bad["frechet_num_images"] == 600  # on both sides of both distances
    assert bad["frechet_distance"] > 20 * bad["frechet_distance_real_halves"]


@pytest.mark.parametrize("fault", ["missing", "torn", "shape"])
def test_unusable_generated_images_are_named(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "generated.npz"
    if fault == "torn":
        path.write_bytes(b"PK\x03\x04 cut short")
    elif fault == "shape":
        np.savez(path, arr_0=np.zeros((4, 16, 16, 3), np.uint8), labels=np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=str(path)):
        digits.read_generated(path)


def test_commands_chain_and_keep_what_is_there(
    vae, folder: Path, data: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    vae.save_pretrained(tmp_path / "vae")
    np.savez(tmp_path / "g.npz", arr_0=data[0][::2], labels=data[1][::2])
    digits.main(["images", "--out", str(folder)])
    common = ["--images", str(folder)]
    digits.main(["vae", *common, "--out", str(tmp_path / "vae")])
    digits.main(
        ["report", *common, "--vae", str(tmp_path / "vae"), "--seconds", "100"]
        + ["--generated", str(tmp_path / "g.npz"), "--out", str(tmp_path / "report.json")]
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["class_accuracy"] > 0.98
    assert report["seconds"] > 100
    assert (digits.read_images(folder)[0] == data[0]).all()


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dit_ds.digits", "vae"]
    command += ["--images", str(tmp_path), "--out", str(tmp_path / "vae")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --images") and done.stderr.count("\n") == 1
