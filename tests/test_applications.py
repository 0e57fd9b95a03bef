"""The denoising application, made small; the whole size is what `make demo` runs."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from odljax import cli, training
from odljax.applications import _photographs as photographs
from odljax.applications import _report, denoise
from odljax.applications import _sparse_coding as sparse

pytestmark = pytest.mark.xdist_group("denoise")  # one worker makes the run that most tests look at

TINY = denoise.Settings(
    steps=30,
    side=8,
    atoms=80,
    patches=256,
    batch=8,
    photographs=("camera.png",),
    crop=40,
    chunk=64,
    curve_patches=16,
    experiment_steps=4,
    untrained=(3,),
)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(denoise, "SETTINGS", TINY)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield lambda *words: cli.main(["train", "denoise", "--out", str(tmp_path), *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of one run of every method, and its exit status."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(denoise, "SETTINGS", TINY)
        return out, cli.main(["train", "denoise", "--out", str(out)])


def numbers(out):
    return json.loads((out / "denoise.json").read_text())


# The command --------------------------------------------------------------------------------------------------------


def test_every_method_trains_is_compared_and_drawn(whole):
    out, status = whole
    assert status == 0
    results = numbers(out)
    rows = {row["method"]: row for row in results["rows"]}
    classical = ["noisy", "median", "variation", "switching", "biharmonic", "untrained-3"]
    assert list(rows) == [*classical, "dladmm", "dladmm-weighted", "hodl-simple", "hodl"]
    assert all(np.isfinite(row["psnr"]["camera"]) and 0 < row["ssim"]["camera"] <= 1 for row in rows.values())
    assert rows["dladmm"]["parameters"] > 5 * rows["hodl"]["parameters"] > 0
    assert {key: len(curve["psnr"]) for key, curve in results["curves"].items()} == {
        "untrained": 61,
        "dladmm": 16,
        "dladmm-weighted": 16,
        "hodl-simple": 61,
        "hodl": 61,
    }
    assert (out / "denoise.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("key", ["dladmm-weighted", "hodl-simple", "hodl"])
def test_training_lowers_the_loss(whole, key):
    loss = numbers(whole[0])["training"][key]["loss"]
    assert len(loss) == TINY.steps
    assert np.mean(loss[-10:]) < 0.7 * np.mean(loss[:5])


@pytest.mark.parametrize("key", ["hodl-simple", "hodl"])
def test_the_run_records_joint_convergence_and_probes_the_operator(whole, key):
    results = numbers(whole[0])
    record, probe = results["training"][key], results["probe"][key]
    assert len(record["change"]) == TINY.steps
    cosine = 0.51 + 0.49 * np.cos(np.pi * np.arange(27) / 27)  # after the three steps of warming up
    np.testing.assert_allclose(record["rate"][3:], TINY.rate * cosine, rtol=1e-4)
    assert record["marks"] == [0, 1, 3, 10, 29]
    assert np.shape(record["curves"]) == (5, 15)
    assert np.all(np.array(record["curves"]) > 0)
    assert 0 < probe["stretch"] <= 1.0001
    assert probe["norm_A"] <= 1.0001
    assert probe["smallest_metric_eigenvalue"] > 0


def test_only_the_projection_bounds_the_norm_in_training(whole):
    experiment = numbers(whole[0])["experiment"]
    assert max(experiment["projected"]["norm_A"]) <= 1.0001
    assert experiment["free"]["norm_A"][-1] > 1.1


def test_the_report_is_a_table_and_a_story(whole, capsys):
    _report.tell(numbers(whole[0]), whole[0])
    out = capsys.readouterr().out
    for words in ("D-LADMM + weight network", "HODL, aggregated", "lambda_min(G)", "not projected: |A| up to"):
        assert words in out


def test_the_outer_panel_shows_changes_per_unit_of_rate():
    ax = Figure().subplots()
    _report._outer(ax, {"training": {"hodl": {"change": [2e-3, 3e-4, None], "rate": [1e-3, 1e-4, 1e-5]}}})
    (line,) = ax.lines
    np.testing.assert_allclose(line.get_ydata(), [2, 3, np.nan], rtol=1e-12)


def test_an_interrupted_run_that_is_resumed_ends_as_an_unbroken_one(whole, tiny, tmp_path, monkeypatch, capsys):
    def interrupted(update, *arguments, **options):
        def batches(step):
            if step == 12:
                signal.raise_signal(signal.SIGINT)
            return ()

        return fit(lambda *inputs: update(*inputs[:-1]), *arguments, **options, batches=batches)

    fit = training.fit
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", interrupted)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not
        assert tiny("--method", "dladmm") == 130
    assert 0 < training.latest_step(tmp_path / "dladmm") < TINY.steps
    assert "--resume" in capsys.readouterr().err
    assert tiny("--method", "dladmm", "--resume") == 0
    came, wanted = numbers(tmp_path), numbers(whole[0])
    for part in ("curves", "training"):
        assert came[part]["dladmm"] == wanted[part]["dladmm"]
    (came,), (wanted,) = ([row for row in n["rows"] if row["method"] == "dladmm"] for n in (came, wanted))
    for name in ("psnr", "ssim", "parameters", "status"):
        assert came[name] == wanted[name]


def test_what_an_earlier_run_left_is_moved_and_nothing_else(tmp_path, capsys):
    for name in ("notes", "run.json", "denoise.json", "denoise.png", "hodl/30/theta", "unconstrained/free/4/theta"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    denoise._set_aside(tmp_path)
    assert f"The earlier run in {tmp_path} is now in {tmp_path / 'earlier-1'}." in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "earlier-1"}
    for name in ("run.json", "denoise.json", "denoise.png", "hodl/30/theta", "unconstrained/free/4/theta"):
        assert (tmp_path / "earlier-1" / name).read_text() == name
    denoise._set_aside(tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "run.json").write_text("again")
    denoise._set_aside(tmp_path)
    assert (tmp_path / "earlier-2" / "run.json").read_text() == "again"


def test_resume_needs_the_run_that_is_there(tiny, tmp_path, capsys):
    assert tiny("--resume") == 2
    assert f"{tmp_path} holds no run of denoise. Leave out --resume to begin one." in capsys.readouterr().err
    assert tiny("--method", "untrained", "--steps", "9", "--seed", "5") == 0
    assert not (tmp_path / "earlier-1").exists()
    assert tiny("--method", "untrained", "--seed", "6", "--resume") == 2
    words = f"The run in {tmp_path} has seed 5 and not 6. Resume it as it was, or choose another --out."
    assert words in capsys.readouterr().err
    assert tiny("--method", "untrained", "--seed", "5", "--resume") == 0
    assert numbers(tmp_path)["settings"]["steps"] == 9


# The model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_the_projection_is_the_nearest_matrix_of_norm_one(dtype, size):
    A = (size * np.random.default_rng(0).normal(size=(20, 33))).astype(dtype)
    left, values, right = np.linalg.svd(A, full_matrices=False)
    nearest = (left * np.minimum(values, 1)) @ right
    came = sparse.clip_singular_values(jnp.asarray(A))
    tolerance = 200 * np.finfo(dtype).eps
    np.testing.assert_allclose(came, nearest, rtol=0, atol=tolerance * max(1, size))
    assert np.linalg.norm(came, 2) <= 1 + tolerance * max(1, size)


EXTREMES = [(0.0, 0.0, 1.0), (-10.0, -20.0, 1e-3), (10.0, 5.0, 1e3), (3.0, -3.0, 30.0), (-3.0, 20.0, 1e6)]


@pytest.mark.parametrize(("log_penalty", "log_kappa", "size"), EXTREMES)
def test_the_operator_is_non_expansive_in_its_metric_for_any_theta(log_penalty, log_kappa, size):
    rng = np.random.default_rng(3)
    side, atoms, count = 6, 50, 64
    noisy = photographs.salt_and_pepper(jax.random.key(2), jnp.asarray(rng.random((count, side**2))))
    patches = sparse.observe(noisy)
    theta = sparse.Tied().init(jax.random.key(0), side, atoms)
    theta = jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape)), theta)
    theta |= {"log_penalty": jnp.asarray(log_penalty), "log_kappa": log_kappa + jnp.asarray(rng.normal(size=atoms))}
    theta = sparse.Tied().project(theta)
    parameters, operator = sparse.coding(theta, patches), sparse.operator(patches)
    T = jax.jit(operator.apply)
    assert sparse.smallest_metric_eigenvalue(theta) > 0

    @jax.jit
    def squares(v):
        return sum(jnp.sum(a * b, axis=-1) for a, b in zip(v, operator.metric(v, parameters), strict=True))

    def random_point(scale):
        return sparse.start(parameters, patches)._make(
            jnp.asarray(scale * rng.normal(size=(count, n))) for n in (atoms, side**2, side**2)
        )

    for scale in (1e-3, 1.0, 1e3):
        u, v = random_point(scale), random_point(scale)
        rounding = 0.0
        for _ in range(5):
            Tu, Tv = T(u, parameters), T(v, parameters)
            before = jnp.sqrt(squares(jax.tree.map(jnp.subtract, u, v)))
            after = jnp.sqrt(squares(jax.tree.map(jnp.subtract, Tu, Tv)))
            assert jnp.all(after <= (1 + 1e-12) * before + rounding)
            # Along the trajectories differences turn to the slow directions, and may fall to rounding.
            u, v = Tu, Tv
            rounding = 1e-14 * jnp.sqrt(squares(u) + squares(v))


@pytest.mark.parametrize("log_penalty", [-9.0, -1.0, 2.0, 9.0])
def test_the_step_of_aggregation_stays_below_its_bound(log_penalty, monkeypatch):
    """In the e-block, where the outer gradient lives, G = beta I: there s_k < beta / L for every theta and k."""
    model, rng = sparse.Tied(weight=0.5), np.random.default_rng(4)
    theta = jax.tree.map(lambda leaf: leaf.astype(float), model.init(jax.random.key(0), 6, 50))
    theta |= {"log_penalty": jnp.asarray(log_penalty)}
    noisy, clean = jnp.asarray(rng.random((2, 3, 36)))
    given = {}

    def hodl(operator, outer, **options):
        given.update(options, outer=outer)
        raise StopIteration

    monkeypatch.setattr(sparse.odl.hypergradients, "hodl", hodl)
    with pytest.raises(StopIteration):
        model.estimate(theta, noisy, clean)
    patches = sparse.observe(noisy)
    parameters = sparse.coding(theta, patches)
    u, v = (
        sparse.start(parameters, patches)._make(jnp.asarray(rng.normal(size=(3, n))) for n in (50, 36, 36))
        for _ in range(2)
    )

    def loss(t):
        return float(given["outer"](jax.tree.map(lambda a, b: a + t * b, u, v), parameters))

    curvature = (loss(1) - 2 * loss(0) + loss(-1)) / np.sum(np.square(v.e))
    beta = np.exp(np.clip(log_penalty, -3, 3))
    for k in range(model.num_steps):
        assert 0 < given["step_size"](parameters, jnp.asarray(k)) * curvature < beta
    slope = jax.grad(given["outer"])(u, parameters)
    assert not jnp.any(slope.z)
    assert not jnp.any(slope.y)
    np.testing.assert_allclose(given["metric_inverse"](slope, parameters).e * beta, slope.e, rtol=1e-12)


def shrunk(v, t):
    return np.sign(v) * np.maximum(np.abs(v) - t, 0)


def test_restoring_the_tied_model_is_relaxed_linearised_admm_alone():
    model = sparse.Tied(weight=0.5, num_steps=3)
    noisy = photographs.salt_and_pepper(jax.random.key(0), jnp.full((4, 36), 0.4))
    theta = jax.tree.map(lambda leaf: leaf.astype(float), model.init(jax.random.key(0), 6, 50))
    theta |= {"log_penalty": jnp.asarray(-0.3)}
    weights = np.asarray(sparse.pixel_weights(theta, sparse.observe(noisy)))
    A, kappa, beta = np.asarray(theta["dictionary"]), np.exp(theta["log_kappa"]), np.exp(-0.3)
    x, r = np.asarray(noisy) - 0.4, 1.02 * beta
    z, e, y = np.zeros((4, 50)), np.zeros((4, 36)), np.zeros((4, 36))
    for _ in range(3):
        new_z = shrunk(z - (y + beta * (z @ A.T + e - x)) @ A / r, kappa / r)
        new_e = shrunk(x - new_z @ A.T - y / beta, weights / beta)
        new_y = y + beta * (new_z @ A.T + new_e - x)
        z, e, y = z + 0.95 * (new_z - z), e + 0.95 * (new_e - e), y + 0.95 * (new_y - y)
    came, _ = model.restore(theta, noisy)
    np.testing.assert_allclose(came, x - e + 0.4, rtol=0, atol=1e-6)  # weights and mean are those of float32 data


def test_an_untied_model_refuses_to_go_on():
    model = sparse.Untied(num_steps=2)
    theta = model.init(jax.random.key(0), 6, 50)
    with pytest.raises(ValueError, match="An untied network cannot go on past its last layer"):
        model.restore(theta, jnp.zeros((1, 36), jnp.float32), 3)


def test_the_dictionary_has_orthonormal_rows():
    A = sparse.dct_dictionary(8, 80)
    assert A.shape == (64, 80)
    np.testing.assert_allclose(A @ A.T, np.eye(64), rtol=0, atol=1e-5)


# The photographs ----------------------------------------------------------------------------------------------------


def test_photographs_are_installed_and_none_is_trained_and_tested_on():
    assert not {*photographs.TRAINING} & {*photographs.TEST}
    assert "camera.png" in photographs.TEST
    for name in (*photographs.TRAINING, *photographs.TEST):
        assert photographs.file_of(name).is_file()
    for name in photographs.TEST:
        image = photographs.photograph(name)
        assert image.ndim == 2
        assert image.dtype == np.float32
        assert 0 <= image.min() < image.max() <= 1


def test_training_patches_are_drawn_by_the_seed():
    first, again, other = (photographs.training_patches(100, 8, seed) for seed in (0, 0, 1))
    assert first.shape == (100, 64)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize(("shape", "stride"), [((20, 31), 4), ((16, 16), 3), ((17, 40), 8)])
def test_restoring_a_clean_image_by_the_identity_returns_it(shape, stride):
    image = np.random.default_rng(0).random(shape)
    came = photographs.restored(image, lambda x: x, size=8, stride=stride, chunk=7)
    np.testing.assert_allclose(came, image, rtol=0, atol=1e-14)


def test_salt_and_pepper_replaces_a_tenth_half_of_it_white():
    x = jnp.full((1000, 100), 0.4, jnp.float32)
    noisy = np.asarray(photographs.salt_and_pepper(jax.random.key(0), x))
    assert noisy.dtype == np.float32
    assert set(np.unique(noisy)) == {np.float32(0.0), np.float32(0.4), np.float32(1.0)}
    for value in (0, 1):
        assert abs((noisy == value).mean() - 0.05) < 0.003
