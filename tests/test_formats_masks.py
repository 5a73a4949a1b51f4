"""Masks in Keras 2 files, which Keras 3 passes from layer to layer otherwise."""

import keras
import numpy as np
import pytest
from conftest import mostly_ci

from rewriters.formats import load


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning"),
]


def initial_states(k):
    made, x = k.layers, k.Input((6,))
    e = made.Embedding(9, 4, mask_zero=True)(x)
    _, h = made.SimpleRNN(3, return_state=True)(e)
    y = made.SimpleRNN(3, return_sequences=True)(e, initial_state=[h])
    both = made.Bidirectional(made.SimpleRNN(3))
    return k.Model(x, [made.Dense(2)(y), both(e, initial_state=[h, h])])


def one_mask_of_two(k):
    made, x, p = k.layers, k.Input((6,)), k.Input((6,))
    tokens, places = made.Embedding(9, 4, mask_zero=True)(x), made.Embedding(9, 4)(p)
    y = made.SimpleRNN(3)(made.Dropout(0.1)(made.Add()([tokens, places])))
    z = made.SimpleRNN(3)(made.Concatenate()([tokens, places]))
    return k.Model([x, p], [y, z])


def two_masks(k):
    made, x, p = k.layers, k.Input((6,)), k.Input((6,))
    e = [made.Embedding(9, 4, mask_zero=True)(t) for t in (x, p)]
    merges = [made.Multiply(), made.Average(), made.Maximum(), made.Subtract()]
    # Named by themselves, as the operations that compute masks are.
    merges += [made.Concatenate(name="concatenate"), made.Minimum(name="logical_and")]
    found = [made.SimpleRNN(3)(m(e)) for m in merges]
    inner = k.Model([x, p], made.Concatenate(name="all")(found))
    a, b = k.Input((6,)), k.Input((6,))
    return k.Model([a, b], made.Dense(2)(inner([a, b])))


def repeated_embedding(k):
    made, x = k.layers, k.Input((3, 6))
    e = made.TimeDistributed(made.Embedding(9, 4, mask_zero=True))(x)
    return k.Model(x, made.TimeDistributed(made.SimpleRNN(3))(e))


@pytest.mark.parametrize("suffix", mostly_ci([".h5", ".keras"], always=[".keras"]))
@pytest.mark.parametrize(
    "make", [initial_states, one_mask_of_two, two_masks, repeated_embedding]
)
def test_masks_reach_what_they_reached(make, suffix, tmp_path, rng):
    k = pytest.importorskip("tf_keras")
    k.backend.clear_session()
    model = make(k)
    for w in model.weights:
        w.assign(rng.normal(size=w.shape))
    x = [rng.integers(0, 3, (5, *t.shape[1:])) for t in model.inputs]
    if keras.backend.backend() == "jax":  # puts out the states before a first step
        for tokens in x:
            tokens[..., 0] = 1
    x = x if len(x) > 1 else x[0]
    wanted = model.predict(x, verbose=0)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    model.save(tmp_path / f"model{suffix}")
    new = load(tmp_path / f"model{suffix}")
    new.save(tmp_path / "new.keras")
    again = keras.saving.load_model(tmp_path / "new.keras")
    for found in (new, again):
        outputs = keras.tree.flatten(found.predict(x, verbose=0))
        for y, golden in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(y, golden, 1e-4, 1e-5)
