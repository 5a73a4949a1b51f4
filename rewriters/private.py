"""Keras's private parts, behind one door: what the project needs of Keras and Keras
gives no public name. Nothing else imports `keras.src` or reads an attribute of Keras
that begins with an underscore; a test holds the whole project to that, and another that
every name here exists in the Keras that is installed.

The readers of attributes take a default, as `getattr` does: what has no graph, such as
a subclassed model, lacks some of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import keras
from keras.src import backend as _backend
from keras.src.api_export import get_symbol_from_name
from keras.src.backend import compute_output_spec as compute_output_spec
from keras.src.backend.common import dtypes as _dtypes
from keras.src.backend.common import global_state as _global_state
from keras.src.backend.common import stateless_scope as _stateless_scope
from keras.src.backend.common.masking import get_keras_mask as get_keras_mask
from keras.src.backend.common.masking import set_keras_mask as set_keras_mask
from keras.src.models.functional import Functional as Functional
from keras.src.models.functional import (
    functional_like_constructor as functional_like_constructor,
)
from keras.src.optimizers import LegacyOptimizerWarning
from keras.src.quantizers.quantization_config import QuantizationConfig
from keras.src.saving import saving_lib as _saving_lib
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.saving.serialization_lib import SafeModeScope
from keras.src.utils.dtype_utils import dtype_size as dtype_size
from keras.src.utils.io_utils import print_msg as print_msg
from keras.src.utils.naming import to_snake_case as to_snake_case
from keras.src.utils.python_utils import func_load as func_load


# Where Keras's own functions are when one of them is asked about.
OPERATIONS = "keras.src.ops."
EXPORT = "keras.src.export"

# Hooks of `Optimizer.apply` that an optimizer around another one replaces.
APPLY_WEIGHT_DECAY = "_apply_weight_decay"
BACKEND_UPDATE_STEP = "_backend_update_step"
UPDATE_AVERAGES = "_update_model_variables_moving_average"

_PENDING = "uninitialized_variables"
_AUTOCAST = "autocast_scope"


# Files.


def load_archive(stream: IO[bytes], **how: Any) -> Any:
    """The model in a stream of a `.keras` file; Keras's public function takes paths
    alone. `how` as there."""
    return _saving_lib.load_model(stream, **how)


# Layers and graphs.


def flatten_layers(layer: Any, **which: bool) -> Iterator[Any]:
    """The layer and all that it holds; `recursive` and `include_self` as in Keras."""
    return layer._flatten_layers(**which)


def held_layers(layer: Any) -> list[Any]:
    """Layers that the layer holds directly, the list that Keras keeps."""
    return layer._layers


def tracker(layer: Any) -> Any:
    """What notes the layers and variables that are set as attributes."""
    return layer._tracker


def inbound_nodes(operation: Any, *default: Any) -> Any:
    """The calls of an operation on symbolic tensors."""
    return getattr(operation, "_inbound_nodes", *default)


def outbound_nodes(operation: Any, *default: Any) -> Any:
    """The calls that read what an operation made."""
    return getattr(operation, "_outbound_nodes", *default)


def nodes_by_depth(model: Any, *default: Any) -> Any:
    """The calls of a functional model by their distance from the outputs."""
    return getattr(model, "_nodes_by_depth", *default)


def functional(model: Any, *default: Any) -> Any:
    """The functional model inside a Sequential."""
    return getattr(model, "_functional", *default)


def inputs_struct(model: Any, *default: Any) -> Any:
    """The inputs of a functional model in their structure."""
    return getattr(model, "_inputs_struct", *default)


def outputs_struct(model: Any, *default: Any) -> Any:
    """The outputs of a functional model in their structure."""
    return getattr(model, "_outputs_struct", *default)


def keras_history(tensor: Any, *default: Any) -> Any:
    """Which call made a symbolic tensor."""
    return getattr(tensor, "_keras_history", *default)


def auto_config(operation: Any, *default: Any) -> Any:
    """The arguments that an operation was made with, where Keras noted them."""
    return getattr(operation, "_auto_config", *default)


def call_has_training_arg(layer: Any, *default: Any) -> Any:
    """Whether the layer's `call` takes `training`."""
    return getattr(layer, "_call_has_training_arg", *default)


def call_context() -> Any:
    """What the layers inside the call that runs now inherit, such as `training`."""
    return _global_state.get_global_attribute("current_call_ctx")


class GraphWithHook(Functional):
    """A functional model that has a say in how its graph's operations are called."""

    def call_of(self, operation: Any, wrap: Callable[[Any], Any]) -> Any:
        """What is called for an operation; `wrap` is how Keras makes it."""
        return wrap(operation)

    def _run_through_graph(
        self, inputs: Any, operation_fn: Any = lambda operation: operation, **more: Any
    ) -> Any:
        def call_of(operation: Any) -> Any:
            return self.call_of(operation, operation_fn)

        return super()._run_through_graph(inputs, call_of, **more)


def build_shapes_dict(layer: Any, *default: Any) -> Any:
    """The shapes that a layer was built for, by argument."""
    return getattr(layer, "_build_shapes_dict", *default)


def set_build_shapes(layer: Any, shapes: Any) -> None:
    """Notes the shapes that a layer was built for."""
    layer._build_shapes_dict = shapes


def output_shape(layer: keras.layers.Lambda) -> Any:
    """The `output_shape` that a Lambda was given."""
    return layer._output_shape


def lookup_layer(layer: Any, *default: Any) -> Any:
    """The lookup inside a text or hashing layer."""
    return getattr(layer, "_lookup_layer", *default)


# Variables.


def trainable_variables(owner: Any) -> list[Any]:
    """Variables that a layer holds itself, or that an optimizer trains."""
    return owner._trainable_variables


def own_variables(layer: Any) -> list[Any]:
    """Variables that a layer holds itself, the trained ones first."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def seed_generators(layer: Any) -> list[Any]:
    """Generators of random numbers that a layer holds itself."""
    return layer._seed_generators


def value(variable: Any) -> Any:
    """The backend's own variable."""
    return variable._value


def set_initializer(variable: Any, initializer: Callable) -> None:
    """What a variable that has no value yet will be filled by."""
    variable._initializer = initializer


def pending_variables() -> list[Any]:
    """Variables made in a scope that gives no values, which wait for theirs."""
    return list(_global_state.get_global_attribute(_PENDING, None) or [])


def set_pending_variables(variables: Iterable[Any]) -> None:
    """Puts other variables in place of those that wait for a value."""
    _global_state.set_global_attribute(_PENDING, list(variables))


def autocast_scope() -> Any:
    """The dtype that variables are read in now."""
    return _global_state.get_global_attribute(_AUTOCAST)


def set_autocast_scope(scope: Any) -> None:
    """Sets the dtype that variables are read in."""
    _global_state.set_global_attribute(_AUTOCAST, scope)


# Scopes and dtypes.


def in_stateless_scope() -> bool:
    """Whether variables are read from and written to a `StatelessScope` now."""
    return _stateless_scope.in_stateless_scope()


def get_stateless_scope() -> Any:
    """The `StatelessScope` that is open, or None."""
    return _stateless_scope.get_stateless_scope()


def narrowed_dtypes() -> dict[str, str]:
    """Keras's table of the dtypes that it makes narrower on JAX."""
    return _dtypes.BIT64_TO_BIT32_DTYPE


def rnn(*args: Any, **kwargs: Any) -> Any:
    """The backend's loop over time steps."""
    return _backend.rnn(*args, **kwargs)


# Optimizers and training.


def get_variable_index(optimizer: Any, variable: Any) -> int:
    """The place of a variable in the optimizer's lists."""
    return optimizer._get_variable_index(variable)


def moving_averages(optimizer: Any, *default: Any) -> Any:
    """Averages of the weights (`use_ema`), in the order of the trained variables."""
    return getattr(optimizer, "_model_variables_moving_average", *default)


def momentums(optimizer: Any) -> list[Any]:
    """The first moments of Adam and its kin."""
    return optimizer._momentums


def product_of_rates(optimizer: keras.optimizers.Nadam) -> Any:
    """Nadam's product of its momentum schedule."""
    return optimizer._u_product


def learning_rate(optimizer: Any, *default: Any) -> Any:
    """The learning rate as it was given: a variable, a schedule or a function."""
    return getattr(optimizer, "_learning_rate", *default)


def optimizer_of(multi: Any, variable: Any) -> Any:
    """The optimizer that a MultiOptimizer trains a variable with."""
    if not multi.built:
        return multi._optimizer_map(variable)
    # One that is not trained has no place.
    place = multi._var_to_optimizer_idx.get(multi._var_key(variable), 0)
    return multi.optimizers[place]


def decay_exclusions(optimizer: Any) -> tuple[set[Any], Any] | None:
    """What `exclude_from_weight_decay` told an optimizer: keys of variables, and the
    pattern of names; None where it was never called."""
    excluded = getattr(optimizer, "_exclude_from_weight_decay", None)
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    return None if excluded is None else (excluded, pattern)


def set_decay_exclusions(optimizer: Any, excluded: set[Any], pattern: Any) -> None:
    """Tells an optimizer what it is to exclude from weight decay."""
    optimizer._exclude_from_weight_decay = excluded
    optimizer._exclude_from_weight_decay_pattern = pattern
    optimizer._exclude_from_weight_decay_cache = {}


def variable_key(optimizer: Any, variable: Any) -> Any:
    """The key that an optimizer knows a variable by."""
    return optimizer._var_key(variable)


def compile_config(model: Any, *default: Any) -> Any:
    """The arguments that the model was compiled with."""
    return getattr(model, "_compile_config", *default)


def loss_weights(model: Any) -> Any:
    """The loss weights that the model was compiled with, or None."""
    return getattr(getattr(model, "_compile_loss", None), "_user_loss_weights", None)


def compute_loss(model: Any, **batch: Any) -> Any:
    """The loss of a batch, whichever arguments the model's own `compute_loss` has."""
    return model._compute_loss(**batch)


def loss_tracker(model: Any) -> Any:
    """The metric that averages the loss over an epoch."""
    return model._loss_tracker


def update_metrics_variables(model: Any, *batch: Any) -> Any:
    """Logs and the variables of the metrics after a batch, on JAX."""
    return model._update_metrics_variables(*batch)


def maybe_symbolic_build(model: Any) -> Callable:
    """What `fit` calls to build a model from its first batch."""
    return model._maybe_symbolic_build


def set_symbolic_build(model: Any, build: Callable) -> None:
    """Replaces what `fit` calls to build a model from its first batch."""
    model._maybe_symbolic_build = build


# Classes.


def public_symbol(name: str) -> Any:
    """What Keras exports under a name such as `"keras.layers.Dense"`, or None."""
    return get_symbol_from_name(name)


def building_blocks() -> tuple[type, ...]:
    """Classes of Keras that it saves and that have no public base."""
    return (
        KerasSaveable,
        LegacyOptimizerWarning,  # the names of Keras 2's, which raises when made
        QuantizationConfig,
        keras.dtype_policies.DTypePolicyMap,
        keras.quantizers.Quantizer,
        keras.random.SeedGenerator,
    )


def named_functions() -> list[Callable]:
    """Functions that a config may name alone: activations, losses, metrics."""
    modules = (keras.src.activations, keras.src.losses, keras.src.metrics)
    found = [f for m in modules for f in m.ALL_OBJECTS]
    return [f for f in found if not isinstance(f, type)]


def safe_mode_scope(safe_mode: bool) -> Any:
    """The context in which Keras's layers refuse what is unsafe in a file."""
    return SafeModeScope(safe_mode)


def operation_module(name: str) -> Any:
    """A module of Keras's operations, such as `"numpy"`."""
    return importlib.import_module(f"{OPERATIONS}{name}")


def is_operation_of_keras(operation: Any) -> bool:
    """Whether an operation's class is one of `keras.ops`."""
    return type(operation).__module__.startswith(OPERATIONS)


def convnext_class(name: str) -> type:
    """A layer that only `keras.applications.convnext` has."""
    module = importlib.import_module("keras.src.applications.convnext")
    return getattr(module, name)
