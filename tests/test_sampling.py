"""The epoch sampler: every row once an epoch, all rows equally often, all orders possible, inside scan and vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl

epochs = odl.sampling.epochs


def draws(sampler, key, num_epochs):
    """Batches as (epoch, draw, ...), drawn inside a scan."""
    body = lambda state, _: sampler.draw(state)[::-1]
    _, batches = jax.lax.scan(body, sampler.init(key), length=num_epochs * sampler.num_batches)
    return batches.reshape(num_epochs, sampler.num_batches, *batches.shape[1:])


@pytest.mark.parametrize(("n", "b"), [(12, 4), (12, 12), (7, 1), (1, 1), (16, 2)])
def test_an_epoch_has_every_row_exactly_once(n, b):
    sampler = epochs(n, b)
    assert (sampler.num_batches, sampler.batch_size) == (n // b, b)
    drawn = np.asarray(jax.jit(lambda key: draws(sampler, key, 30))(jax.random.key(0))).reshape(30, n)
    np.testing.assert_array_equal(np.sort(drawn), np.broadcast_to(np.arange(n), (30, n)))
    if n > 1:
        assert len({tuple(order) for order in drawn}) > (1 if n < 3 else 20)  # a new order each epoch


def test_rows_that_an_epoch_leaves_out_come_equally_often():
    n, b, num_epochs = 11, 4, 6000
    drawn = np.asarray(jax.jit(lambda key: draws(epochs(n, b), key, num_epochs))(jax.random.key(3)))
    drawn = drawn.reshape(num_epochs, -1)
    assert all(len(set(rows)) == 8 for rows in drawn)  # none twice
    share = np.bincount(drawn.ravel(), minlength=n) / num_epochs
    np.testing.assert_allclose(share, 8 / 11, atol=5 * np.sqrt(8 / 11 * 3 / 11 / num_epochs))


def test_all_orders_are_equally_likely():
    n, num_epochs = 4, 24_000
    drawn = np.asarray(jax.jit(lambda key: draws(epochs(n, 1), key, num_epochs))(jax.random.key(1)))
    code = drawn.reshape(num_epochs, n) @ (n ** np.arange(n))
    _, counts = np.unique(code, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-squared of 23 degrees of freedom: 49.7 once in a thousand


def test_neighbours_in_the_data_are_no_neighbours_in_the_batches():
    """Of 60 rows in batches of 6, two given rows share a batch with probability 5/59."""
    drawn = np.asarray(jax.jit(lambda key: draws(epochs(60, 6), key, 4000))(jax.random.key(2)))
    where = np.argsort(drawn.reshape(4000, -1), axis=1) // 6
    for other in (1, 8, 30, 59):
        share = np.mean(where[:, 0] == where[:, other])
        assert abs(share - 5 / 59) < 5 * np.sqrt(5 / 59 / 4000)


def test_fixed_batches_are_contiguous_and_each_comes_once():
    sampler = epochs(12, 3, fixed_batches=True)
    drawn = np.asarray(draws(sampler, jax.random.key(0), 20))
    np.testing.assert_array_equal(np.sort(drawn), np.broadcast_to(np.arange(4), (20, 4)))
    data = {"a": jnp.arange(12.0), "b": jnp.arange(24).reshape(12, 2)}
    taken = sampler.take(data, jnp.asarray(2))
    np.testing.assert_array_equal(taken["a"], [6, 7, 8])
    np.testing.assert_array_equal(taken["b"], np.arange(12, 18).reshape(3, 2))


def test_drawing_in_a_loop_in_scan_and_under_vmap_is_the_same():
    sampler = epochs(10, 3)
    state, rows = sampler.init(jax.random.key(5)), []
    start = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for _ in range(7):
        batch, state = jax.jit(sampler.draw)(state)
        rows.append(batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == start
    run = lambda key: jax.lax.scan(lambda s, _: sampler.draw(s)[::-1], sampler.init(key), length=7)[1]
    np.testing.assert_array_equal(run(jax.random.key(5)), jnp.stack(rows))
    both = jax.vmap(run)(jnp.stack([jax.random.key(4), jax.random.key(5)]))
    np.testing.assert_array_equal(both[1], jnp.stack(rows))
    assert np.any(np.asarray(both[0] != both[1]))
    np.testing.assert_array_equal(sampler.take(jnp.arange(10) * 2, rows[0]), rows[0] * 2)


def test_no_key_is_drawn_from_twice():
    """What an epoch draws is not what the keys before and after it give."""
    sampler = epochs(6, 6)
    draw, state = jax.jit(sampler.draw), sampler.init(jax.random.key(7))
    for _ in range(3):
        _, drawn = draw(state)
        for key in (state.key, drawn.key):
            bits = np.asarray(jax.random.bits(key, drawn.rounds.shape, np.uint32))
            assert not np.isin(np.asarray(drawn.rounds), bits).any()
        state = drawn


def test_without_float64(float32_only):
    drawn = draws(epochs(12, 4), jax.random.key(0), 2)
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(np.asarray(drawn).reshape(2, 12)), np.tile(np.arange(12), (2, 1)))


def test_messages():
    with pytest.raises(ValueError, match="batch_size is 5, but there are 4 samples"):
        epochs(4, 5)
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1"):
        epochs(0, 1)
    with pytest.raises(ValueError, match="5 does not divide 12"):
        epochs(12, 5, fixed_batches=True)
    with pytest.raises(ValueError, match="needs one common leading axis"):
        odl.sampling.num_samples("fit", "data", {"a": jnp.ones(3), "b": jnp.ones(4)})
    with pytest.raises(ValueError, match="no leaf at all"):
        odl.sampling.num_samples("fit", "data", ())
    with pytest.raises(ValueError, match=r"\['b'\] float64\[\]"):
        odl.sampling.num_samples("fit", "data", {"b": jnp.ones(())})
