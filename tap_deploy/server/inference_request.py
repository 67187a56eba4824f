"""One inference of the Open Inference Protocol: its request, its prompts, its outputs."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError
from tap_deploy.prompts import Prompts
from tap_deploy.server.batches import CaptionOptions
from tap_deploy.server.inference_outputs import OUTPUTS, WantedOutput
from tap_deploy.server.options import MAX_REGIONS, MAX_TOP_K, MIB
from tap_deploy.server.requests import MAX_SEED, Number, Whole
from tap_deploy.server.tensors import (
    BINARY_SIZE,
    BYTES,
    InputTensor,
    Loose,
    TensorSpec,
    array_of,
    bytes_array,
)

HEADER_LENGTH = "inference-header-content-length"
MAX_JSON_BYTES = 4 * MIB  # lists of small values take 30 times as much memory
MAX_TIMEOUT_US = 10**12
_MAX_DIGITS = 12

IMAGE, POINTS, BOXES = "image", "points", "boxes"
INPUTS = (
    TensorSpec(name=IMAGE, datatype=BYTES, shape=(1,)),
    TensorSpec(name=POINTS, datatype="FP32", shape=(-1, -1, 3)),
    TensorSpec(name=BOXES, datatype="FP32", shape=(-1, 4)),
)


class Parameters(Loose):
    """Parameters of a request."""

    binary_data_output: bool = Field(default=False, description="For all outputs.")
    timeout: Whole | None = Field(
        default=None, ge=1, le=MAX_TIMEOUT_US, description="Microseconds."
    )
    top_k: Whole = Field(default=1, ge=1, le=MAX_TOP_K)
    max_new_tokens: Whole | None = Field(default=None, ge=0)
    temperature: Annotated[Number, Field(ge=0, le=1000)] = 0.0
    seed: Whole | None = Field(default=None, ge=0, le=MAX_SEED)
    clip: bool = False


class OutputTensor(Loose):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferRequest(Loose):
    """A request of the Open Inference Protocol.

    ``image`` is the file of a picture (BYTES [1]: binary, or base64 in JSON), or its pixels (UINT8
    [H, W, 3] RGB). ``points`` are FP32 [P, N, 3] (x, y, label; label 4 pads shorter rows), and
    ``boxes`` FP32 [P, 4]; with both, row i of each prompt region i together.
    """

    id: str = ""
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=len(INPUTS))]
    outputs: Annotated[list[OutputTensor], Field(max_length=len(OUTPUTS))] | None = None
    parameters: Parameters = Field(default_factory=Parameters)

    def wanted(self, available: list[TensorSpec]) -> list[WantedOutput]:
        """Return the outputs to answer with; all if none is named.

        Raises:
            InputError: an output is not available.
        """
        known = {spec.name: spec for spec in available}
        asked = self.outputs or [OutputTensor(name=name) for name in known]
        wanted = []
        for output in asked:
            if output.name not in known:
                raise InputError(f"output {output.name!r}: expected some of {', '.join(known)}")
            default = self.parameters.binary_data_output
            binary = bool(output.parameters.get("binary_data", default))
            wanted.append(WantedOutput(spec=known[output.name], binary=binary))
        return wanted

    @property
    def caption_options(self) -> CaptionOptions:
        """How captions are written."""
        own = self.parameters
        return CaptionOptions(
            max_new_tokens=own.max_new_tokens, temperature=own.temperature, seed=own.seed
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Inference:
    """A parsed request.

    Attributes:
        request: its JSON.
        picture: bytes of a file, or uint8 [H, W, 3] RGB.
        prompts: on the picture.
    """

    request: InferRequest
    picture: bytes | npt.NDArray[np.uint8]
    prompts: Prompts

    @classmethod
    def from_body(cls, body: bytes, header_length: str | None) -> Inference:
        """Parse the body of a request.

        Args:
            body: JSON, and the binary data after it if there is any.
            header_length: length of the JSON, bytes, as the client gave it; None for all.

        Raises:
            RequestValidationError: the JSON is no request.
            InputError: a tensor is missing or invalid.
        """
        length = len(body) if header_length is None else _length(header_length, len(body))
        if length > MAX_JSON_BYTES:
            raise InputError(
                f"{length} bytes of JSON; expected at most {MAX_JSON_BYTES}; send large inputs as "
                "binary data"
            )
        try:
            request = InferRequest.model_validate_json(body[:length])
        except ValidationError as exc:
            raise RequestValidationError(exc.errors()) from exc
        arrays = _inputs(request, memoryview(body)[length:])
        if IMAGE not in arrays:
            raise InputError(f"input {IMAGE}: missing; expected {BYTES} [1] or UINT8 [H, W, 3]")
        return cls(request=request, picture=_picture(arrays[IMAGE]), prompts=_prompts(arrays))


def _length(text: str, most: int) -> int:
    is_number = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
    if not is_number or int(text) > most:
        raise InputError(f"{HEADER_LENGTH} is {text!r}; expected a number up to {most}")
    return int(text)


def _inputs(request: InferRequest, content: memoryview) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs by name."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    known = [spec.name for spec in INPUTS]
    for tensor in request.inputs:
        if tensor.name not in known or tensor.name in arrays:
            raise InputError(f"input {tensor.name!r}: expected each of {', '.join(known)} once")
        own, size = None, tensor.parameters.get(BINARY_SIZE)
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(content):
                raise InputError(
                    f"input {tensor.name}: {BINARY_SIZE} is {size!r}; expected up to {len(content)}"
                )
            own, content = content[:size], content[size:]
        arrays[tensor.name] = array_of(tensor, own)
        if tensor.name == IMAGE and own is None and tensor.datatype == BYTES:
            arrays[IMAGE] = _from_base64(arrays[IMAGE])
    if len(content):
        raise InputError(f"{len(content)} bytes of binary data belong to no input")
    return arrays


def _from_base64(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    try:
        decoded = [base64.b64decode(item, validate=True) for item in array.ravel()]
    except binascii.Error as exc:
        raise InputError(f"input {IMAGE}: expected base64 in JSON: {exc}") from exc
    return bytes_array(decoded, array.shape)


def _picture(array: npt.NDArray[Any]) -> bytes | npt.NDArray[np.uint8]:
    if array.dtype == object and array.size == 1:
        content: bytes = array.ravel()[0]
        return content
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
        return array
    raise InputError(
        f"input {IMAGE}: shape {list(array.shape)}; expected {BYTES} [1] or UINT8 [H, W, 3]"
    )


def _prompts(arrays: Mapping[str, npt.NDArray[Any]]) -> Prompts:
    points, boxes = arrays.get(POINTS), arrays.get(BOXES)
    for array in (points, boxes):
        if array is not None and len(array) > MAX_REGIONS:
            raise InputError(f"{len(array)} regions; expected at most {MAX_REGIONS}")
    rows = None
    if points is not None:
        if points.dtype == object or points.ndim != 3 or points.shape[2] != 3:
            raise InputError(f"input {POINTS}: expected FP32 [P, N, 3], x, y and label")
        rows = [row[row[:, 2] != PointLabel.PADDING] for row in points]
    if boxes is not None and rows is not None:
        return Prompts.from_points_and_boxes(rows, boxes)
    if boxes is not None:
        return Prompts.from_boxes(boxes)
    if rows is None:
        raise InputError(f"no prompt: expected the input {POINTS}, {BOXES}, or both")
    return Prompts.from_points(rows)
