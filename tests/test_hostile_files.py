"""Files made to hurt: one error each, quickly, and nothing touched.

Links, external datasets and names of members lead into the process's folder of secrets.
"""

import sys
import warnings

import hostile
import hostile_configs  # noqa: F401
import hostile_hdf5  # noqa: F401
import hostile_published  # noqa: F401
import pytest
from hostile_folders import CASES, SOUND


def functional(k):
    inputs = k.Input((8,), name="x")
    x = k.layers.Dense(8, name="first")(inputs)
    x = k.layers.BatchNormalization(name="bn")(x)
    return k.Model(inputs, k.layers.Dense(3, name="last")(x), name="net")


def sequential(k):
    layers = [k.layers.Dense(3), k.layers.Activation("relu")]
    return k.Sequential([k.Input((4,)), *layers], name="net")


def with_code(k):
    return k.Sequential([k.Input((4,)), k.layers.Lambda(lambda x: x)], name="net")


def write_sound(folder):
    """Sound models to make the cases of; those of tf_keras if it is installed."""
    import keras

    def save(model, *names, **options):
        model.compile("adam", "mse", metrics=["mae"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras's own, of .h5 files
            for name in names:
                model.save(str(folder / name), **options)

    save(functional(keras), "k3.h5", "k3.keras")
    save(functional(keras), "folder", zipped=False)
    save(sequential(keras), "sequential.h5", "sequential.keras")
    (folder / "folder" / "assets").mkdir(exist_ok=True)
    try:
        import tf_keras
    except ImportError:
        return
    save(functional(tf_keras), "k2.h5")
    save(functional(tf_keras), "saved", save_format="tf")
    save(with_code(tf_keras), "lambda.h5", "lambda.keras")
    save(with_code(tf_keras), "lambda", save_format="tf")


def prepare(folder, process, groups):
    """Yields (group, name of the case, path of its file)."""
    sound = folder / "sound"
    sound.mkdir()
    write_sound(sound)
    (process.secrets / "words.txt").write_text("secret\n")
    for group in groups:
        for i, make in enumerate(CASES[group]):
            own = folder / f"{group}{i}"
            own.mkdir()
            try:
                path = make(own, sound, process.secrets)
            except FileNotFoundError:  # tf_keras is not installed
                continue
            yield group, make.__name__, path


@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="watched by Linux's inotify")
@pytest.mark.parametrize("group", CASES)
def test_each_is_one_error_and_touches_nothing(tmp_path, group):
    bad = {}
    with hostile.Process(tmp_path / "process") as process:
        for _, name, path in prepare(tmp_path, process, [group]):
            answer = process.load(path)
            problems = answer.against("sound" if name in SOUND else "refused")
            if answer.kind == "refused" and str(path) not in answer.text:
                problems.append("names no file")
            if problems:
                bad[name] = problems, answer.text
    assert not bad, bad
