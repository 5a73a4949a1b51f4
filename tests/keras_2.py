"""What tf-keras of today does not write any more."""

from collections import Counter
from unittest import mock


def save_as_keras_2_13(model, path):
    """An archive as Keras 2.12 and 2.13 named its groups; later ones changed both."""
    from tf_keras.src.saving import saving_lib

    def members(container, *stores, inner_path, visited_trackables):
        counts = Counter()
        container = container.values() if isinstance(container, dict) else container
        for x in container:
            if saving_lib._is_keras_trackable(x):
                name = saving_lib.generic_utils.to_snake_case(type(x).__name__)
                number = f"_{counts[name]}" if counts[name] else ""
                counts[name] += 1
                place = f"{inner_path}/{name}{number}"
                saving_lib._save_state(x, *stores, place, visited_trackables)

    skipped = saving_lib.ATTR_SKIPLIST - {"_layer_checkpoint_dependencies"}
    walk = saving_lib._walk_trackable  # in reverse
    with (
        mock.patch.object(
            saving_lib, "_walk_trackable", lambda x: reversed(list(walk(x)))
        ),
        mock.patch.object(saving_lib, "ATTR_SKIPLIST", skipped),
        mock.patch.object(saving_lib, "_save_container_state", members),
        mock.patch.object(saving_lib.keras, "__version__", "2.13.1"),
    ):
        model.save(path)
