"""Files made to hurt, below the config: one error each, quickly, and nothing touched.

Links, external datasets and names of members lead into the process's folder of secrets.
"""

import sys
import warnings

import hostile
import hostile_hdf5  # noqa: F401
import pytest
from hostile_folders import CASES, SOUND


def write_sound(folder):
    import keras

    def net(k):
        inputs = k.Input((8,), name="x")
        x = k.layers.Dense(8, name="first")(inputs)
        x = k.layers.BatchNormalization(name="bn")(x)
        model = k.Model(inputs, k.layers.Dense(3, name="last")(x), name="net")
        model.compile("adam", "mse")
        return model

    model = net(keras)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's own, of .h5 files
        model.save(folder / "k3.h5")
    model.save(folder / "k3.keras")
    model.save(folder / "folder", zipped=False)
    (folder / "folder" / "assets").mkdir(exist_ok=True)
    try:
        import tf_keras
    except ImportError:
        return
    model = net(tf_keras)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(str(folder / "k2.h5"))
    model.save(str(folder / "saved"), save_format="tf")


@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="watched by Linux's inotify")
@pytest.mark.parametrize("group", CASES)
def test_each_is_one_error_and_touches_nothing(tmp_path, group):
    sound = tmp_path / "sound"
    sound.mkdir()
    write_sound(sound)
    bad = {}
    with hostile.Process(tmp_path / "process") as process:
        for i, make in enumerate(CASES[group]):
            own = tmp_path / str(i)
            own.mkdir()
            try:
                path = make(own, sound, process.secrets)
            except FileNotFoundError:  # tf_keras is not installed
                continue
            answer = process.load(path)
            name = make.__name__
            problems = answer.against("sound" if name in SOUND else "refused")
            if answer.kind == "refused":
                problems += [] if str(path) in answer.text else ["names no file"]
                problems += ["odd"] if "custom_objects" in answer.text else []
            if problems:
                bad[name] = problems, answer.text
    assert not bad, bad
