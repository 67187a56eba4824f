"""Loads a state dict into the model, and checks names, shapes, dtypes and values."""

from __future__ import annotations

import torch

from tap_deploy.config import VARIANTS, Preprocessing, TapConfig
from tap_deploy.errors import CheckpointError, InputError
from tap_deploy.reference.image_encoder import relative_index
from tap_deploy.reference.model import TapModel
from tap_deploy.storage.unpickle import printable

StateDict = dict[str, torch.Tensor]

INDEX_SUFFIX = "rel_pos_embed.index"
COUNTER_SUFFIX = "num_batches_tracked"
MAX_LISTED = 5  # entries named in a message
# The largest published model has 0.8 billion parameters. Above this limit, the system kills the
# process.
MAX_NUMBERS = 2**31
PIXEL_TOLERANCE = 1e-3  # relative; twice the rounding error of float16
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the NumPy name of a dtype, such as ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def meta_model(config: TapConfig) -> TapModel:
    """Return a model on the meta device, which has names and shapes but no memory.

    Raises:
        InputError: it has more than ``MAX_NUMBERS`` parameters.
    """
    with torch.device("meta"):
        model = TapModel(config)
    numbers = sum(entry.numel() for entry in model.state_dict().values())
    if numbers > MAX_NUMBERS:
        raise InputError(
            f"config describes a model with {numbers} parameters; expected at most {MAX_NUMBERS}; "
            "check its sizes"
        )
    return model


def model_from_state_dict(state: StateDict, config: TapConfig, *, source: str) -> TapModel:
    """Return a float32 model that uses the tensors of a state dict, without copying them.

    Missing relative position indices and batch counters are added. Entries of another float dtype
    are converted one at a time and removed from ``state``, so that peak memory is little more than
    one set of weights.

    Args:
        state: tensors by name, on the CPU; empty afterwards.
        config: configuration of the model.
        source: name of the checkpoint in messages.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        CheckpointError: entries are missing or unexpected, have a wrong shape or dtype, contain
            NaN or infinity, or normalise pixels differently from ``Preprocessing``.
        InputError: see ``meta_model``.
    """
    model = meta_model(config)
    expected = model.state_dict()
    for name, value in _derivable_entries(expected, config).items():
        state.setdefault(name, value)
    _check_names_and_shapes(state, expected, config, source)
    _check_indices(state, config, source)
    stored = {name: entry.dtype for name, entry in state.items()}
    ready = {name: _ready(name, state.pop(name), expected[name], source) for name in expected}
    _check_pixels(ready, stored, source)
    model.load_state_dict(ready, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _derivable_entries(expected: StateDict, config: TapConfig) -> StateDict:
    index = relative_index(config.window_size)
    entries = {name: index.clone() for name in expected if name.endswith(INDEX_SUFFIX)}
    counter = torch.zeros((), dtype=torch.int64)
    entries |= {name: counter.clone() for name in expected if name.endswith(COUNTER_SUFFIX)}
    return entries


def _check_names_and_shapes(
    state: StateDict, expected: StateDict, config: TapConfig, source: str
) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [printable(name) for name in state if name not in expected]
    misshapen = [
        f"{name} is {list(state[name].shape)}, expected {list(entry.shape)}"
        for name, entry in expected.items()
        if name in state and state[name].shape != entry.shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(faults.values()):
        listed = "; ".join(_listed(kind, found) for kind, found in faults.items() if found)
        raise CheckpointError(
            f"{source} does not fit the model, {listed}; {_advice(state, config)}"
        )


def _listed(kind: str, found: list[str]) -> str:
    more = ", ..." if len(found) > MAX_LISTED else ""
    return f"{len(found)} {kind} ({', '.join(found[:MAX_LISTED])}{more})"


def _advice(state: StateDict, config: TapConfig) -> str:
    """Return what to do about a checkpoint that does not fit; detect published variants."""
    table = state.get("image_encoder.pos_embed.weight")
    blocks = {name.split(".")[2] for name in state if name.startswith("image_encoder.blocks.")}
    for name, variant in VARIANTS.items():
        shape = (variant.grid_size**2, variant.encoder_dim)
        fits = table is not None and table.shape == shape and len(blocks) == variant.encoder_depth
        if fits and variant != config:
            return f"this looks like {name}: pass --model {name}"
    return "expected the entries of this config; check --model or --config"


def _check_indices(state: StateDict, config: TapConfig, source: str) -> None:
    index = relative_index(config.window_size)
    for name, value in state.items():
        if name.endswith(INDEX_SUFFIX) and not torch.equal(value.to(index.dtype), index):
            raise CheckpointError(
                f"{source}: entry {name} is wrong; expected the relative position index of a "
                f"{config.window_size} x {config.window_size} window; download the file again"
            )


def _ready(name: str, value: torch.Tensor, expected: torch.Tensor, source: str) -> torch.Tensor:
    """Return an entry in the dtype of the model, sharing memory unless it is converted."""
    is_float = expected.is_floating_point()
    if value.dtype not in (FLOAT_DTYPES if is_float else INTEGER_DTYPES):
        raise CheckpointError(
            f"{source}: entry {name} is stored as {dtype_name(value)}; expected "
            f"{'float16, bfloat16, float32 or float64' if is_float else 'an integer dtype'}"
        )
    value = value.to(expected.dtype).contiguous()
    if is_float and not torch.isfinite(value).all():
        raise CheckpointError(
            f"{source}: entry {name} contains NaN or infinity; expected finite weights; "
            "download the file again, or train with a lower learning rate"
        )
    return value


def _check_pixels(state: StateDict, stored: dict[str, torch.dtype], source: str) -> None:
    """Raise CheckpointError if mean or deviation differ from ``Preprocessing``, as in manifests."""
    contract = Preprocessing()
    expected = {
        "pixel_mean": torch.tensor(contract.mean),
        "pixel_rsig": 1.0 / torch.tensor(contract.std),
    }
    for name, values in expected.items():
        tolerance = max(PIXEL_TOLERANCE, torch.finfo(stored[name]).eps / 2)  # for bfloat16
        if not torch.allclose(state[name], values, rtol=tolerance, atol=0):
            found, wanted = (
                [round(value, 6) for value in tensor.tolist()] for tensor in (state[name], values)
            )
            raise CheckpointError(
                f"{source}: entry {name} is {found}; expected {wanted}, in BGR order; "
                "use weights trained with this preprocessing"
            )
