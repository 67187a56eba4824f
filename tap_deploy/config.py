"""Model sizes (``TapConfig``) and the preprocessing contract (``Preprocessing``)."""

from __future__ import annotations

import dataclasses
import enum
import reprlib
from typing import Any

from tap_deploy.errors import InputError

# Constants of the architecture; TapConfig holds only what differs between models.
TEXT_HEAD_DIM = 64  # channels of one attention head of the text decoder
PROMPT_DECODER_HEAD_DIM = 32  # channels of a self-attention head; cross-attention uses half
PROMPT_DECODER_MLP_DIM = 2048
MASK_UPSCALE = 4  # side of a low-resolution mask over side of the image embeddings
NUM_POINT_LABELS = 5
NUM_FEATURE_LEVELS = 4  # bottleneck blocks, evenly spaced over the depth of the encoder
LAYER_NORM_EPS = 1e-5
ROTARY_BASE = 10000.0
BOS_ID = 1
EOS_ID = 2

# Largest sizes, several times those of the published models: a mistyped or hostile config must not
# take all memory.
MAX_SIZES = {
    "image_size": 8192,
    "patch_size": 256,
    "window_size": 512,
    "encoder_depth": 256,
    "encoder_dim": 16384,
    "encoder_heads": 256,
    "image_embed_dim": 4096,
    "sem_embed_dim": 16384,
    "num_mask_tokens": 64,
    "prompt_decoder_depth": 64,
    "text_depth": 256,
    "text_dim": 16384,
    "text_seq_len": 2048,
    "vocab_size": 1 << 20,
}


class PointLabel(enum.IntEnum):
    """Label of a prompt point."""

    BACKGROUND = 0
    FOREGROUND = 1
    BOX_LEFT_TOP = 2
    BOX_RIGHT_BOTTOM = 3
    PADDING = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapConfig:
    """Sizes of a TAP model.

    The published variants share the defaults and differ only in ``encoder_*``.

    Attributes:
        image_size: side of the square model input, pixels.
        patch_size: side of a patch, pixels.
        window_size: side of an attention window, tokens.
        encoder_depth: blocks of the image encoder.
        encoder_dim: channels of the image encoder.
        encoder_heads: attention heads of the image encoder.
        image_embed_dim: channels of the image embeddings and of the prompt decoder.
        sem_embed_dim: channels of a semantic embedding.
        num_mask_tokens: masks predicted per prompt.
        prompt_decoder_depth: layers of the prompt decoder.
        text_depth: layers of the text decoder.
        text_dim: channels of the text decoder.
        text_seq_len: positions of the text decoder, visual prefix and BOS included, tokens.
        vocab_size: pieces of the tokenizer.

    Raises:
        InputError: a size is not a positive integer or exceeds ``MAX_SIZES``, or the sizes are
            inconsistent.
    """

    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 16
    encoder_depth: int = 12
    encoder_dim: int = 768
    encoder_heads: int = 12
    image_embed_dim: int = 256
    sem_embed_dim: int = 1024
    num_mask_tokens: int = 4
    prompt_decoder_depth: int = 2
    text_depth: int = 12
    text_dim: int = 512
    text_seq_len: int = 40
    vocab_size: int = 32000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(
                    f"config field {field.name} is {reprlib.repr(value)}; expected a positive "
                    "integer"
                )
            if value > MAX_SIZES[field.name]:
                bits = value.bit_length()
                found = value if bits < 64 else f"a number of {bits} bits"
                raise InputError(
                    f"config field {field.name} is {found}; expected at most "
                    f"{MAX_SIZES[field.name]}"
                )
        self._require_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        self._require_multiple("the token grid", self.grid_size, "window_size", self.window_size)
        self._require_multiple("encoder_depth", self.encoder_depth, "", NUM_FEATURE_LEVELS)
        self._require_multiple("encoder_dim", self.encoder_dim, "encoder_heads", self.encoder_heads)
        self._require_multiple("encoder_dim", self.encoder_dim, "", 2)
        self._require_multiple("image_embed_dim", self.image_embed_dim, "", PROMPT_DECODER_HEAD_DIM)
        self._require_multiple("text_dim", self.text_dim, "", TEXT_HEAD_DIM)
        if self.num_mask_tokens < 2:
            raise InputError(
                f"config field num_mask_tokens is {self.num_mask_tokens}; expected at least 2: "
                "token 0 answers boxes, the others answer points"
            )
        if self.text_seq_len < 3:
            raise InputError(
                f"config field text_seq_len is {self.text_seq_len}; expected at least 3: "
                "the visual prefix, BOS and one generated token"
            )
        if self.vocab_size < 4:
            raise InputError(
                f"config field vocab_size is {self.vocab_size}; expected at least 4: "
                "unknown, BOS, EOS and padding"
            )

    @staticmethod
    def _require_multiple(name: str, value: int, of_name: str, of: int) -> None:
        if value % of:
            of_text = f"{of_name} ({of})" if of_name else str(of)
            raise InputError(f"config: {name} is {value}; expected a multiple of {of_text}")

    @property
    def grid_size(self) -> int:
        """Image tokens along one side."""
        return self.image_size // self.patch_size

    @property
    def low_res_mask_size(self) -> int:
        """Side of the low-resolution mask logits, in pixels."""
        return self.grid_size * MASK_UPSCALE

    @property
    def prompt_decoder_heads(self) -> int:
        """Attention heads of the prompt decoder, the same in self- and cross-attention."""
        return self.image_embed_dim // PROMPT_DECODER_HEAD_DIM

    @property
    def text_heads(self) -> int:
        """Attention heads of the text decoder."""
        return self.text_dim // TEXT_HEAD_DIM

    @property
    def max_new_tokens(self) -> int:
        """Largest number of generated tokens: all positions except the prefix and BOS."""
        return self.text_seq_len - 2

    @property
    def pad_id(self) -> int:
        """Padding id of caption rows."""
        return self.vocab_size - 1

    def at_image_size(self, image_size: int) -> TapConfig:
        """Return the config of the same model on pictures of another size.

        Raises:
            InputError: the size is not a positive multiple of ``patch_size * window_size``.
        """
        step = self.patch_size * self.window_size
        if image_size < step or image_size % step:
            raise InputError(
                f"image size is {image_size}; expected a multiple of {step} pixels, one attention "
                f"window of {self.window_size} tokens with {self.patch_size} pixels each"
            )
        return dataclasses.replace(self, image_size=image_size)

    def to_dict(self) -> dict[str, int]:
        """Return the fields as a plain dict, in order."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> TapConfig:
        """Build a config from parsed JSON; unknown and missing fields are errors.

        Raises:
            InputError: not an object, a field is unknown or missing, or sizes are inconsistent.
        """
        if not isinstance(values, dict):
            raise InputError(f"config is a {type(values).__name__}; expected a JSON object")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        missing = sorted(names - set(values))
        if unknown or missing:
            raise InputError(
                f"config fields: unknown {unknown or 'none'}, missing {missing or 'none'}; "
                f"expected exactly {sorted(names)}"
            )
        return cls(**values)

    @classmethod
    def from_name(cls, name: str) -> TapConfig:
        """Return the config of ``tap_vit_b``, ``tap_vit_l``, ``tap_vit_h`` or ``tap_demo``.

        Raises:
            InputError: unknown name.
        """
        if name not in VARIANTS:
            raise InputError(f"unknown model {name!r}; expected one of {', '.join(VARIANTS)}")
        return VARIANTS[name]


DEMO = "tap_demo"
VARIANTS: dict[str, TapConfig] = {
    "tap_vit_b": TapConfig(encoder_depth=12, encoder_dim=768, encoder_heads=12),
    "tap_vit_l": TapConfig(encoder_depth=24, encoder_dim=1024, encoder_heads=16),
    "tap_vit_h": TapConfig(encoder_depth=32, encoder_dim=1280, encoder_heads=16),
    # The small model shipped with this package: a 16 x 16 token grid in four windows, so that
    # windowed attention is exercised. 5.9 M parameters, 12 MB in fp16.
    DEMO: TapConfig(
        image_size=256,
        window_size=8,
        encoder_depth=8,
        encoder_dim=160,
        encoder_heads=5,
        image_embed_dim=128,
        sem_embed_dim=128,
        text_depth=2,
        text_dim=192,
        vocab_size=576,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preprocessing of pictures and prompts, and postprocessing of masks.

    Every bundle carries it in its manifest, so that another runtime can be written from the
    manifest alone.

    Attributes:
        version: version of the rules; raised when the meaning of a rule changes.
        color_order: channel order of the model input.
        layout: layout and dtype of the model input.
        mean: per channel in ``color_order``, 0-255.
        std: standard deviation per channel in ``color_order``, 0-255.
        normalization_in_graph: whether ``image_encoder.onnx`` applies ``mean`` and ``std``.
        pad_value: colour of the padding per channel in ``color_order``, 0-255.
        pad_side: sides of the scaled picture that are padded.
        resize: resampling filter, prose.
        scale_rule: scale of a picture to the model frame, prose.
        point_rule: mapping of prompt points to the model frame, prose.
        point_labels: names and codes of ``PointLabel``.
        prompt_padding: padding of prompts, prose.
        mask_token_rule: choice of the mask token, prose.
        mask_rule: mapping of mask logits back to the picture, prose.
    """

    version: int = 1
    color_order: str = "BGR"
    layout: str = "HWC uint8"
    mean: tuple[float, float, float] = (103.53, 116.28, 123.675)
    std: tuple[float, float, float] = (57.375, 57.12, 58.395)
    normalization_in_graph: bool = True
    pad_value: tuple[int, int, int] = (103, 116, 123)
    pad_side: str = "bottom and right"
    resize: str = "bilinear on uint8, antialiased when shrinking (Pillow Image.resize BILINEAR)"
    scale_rule: str = (
        "s = image_size / min(H, W) if int(max(H, W) * s + 0.5) <= image_size, "
        "else s = image_size / max(H, W); new size = int(side * s + 0.5)"
    )
    point_rule: str = "x and y times s, pixels of the model frame"
    point_labels: tuple[tuple[str, int], ...] = tuple(
        (label.name.lower(), int(label)) for label in PointLabel
    )
    prompt_padding: str = (
        "a prompt without box corners carries at least one point (0, 0, padding); "
        "all prompts of a batch are padded to one length"
    )
    mask_token_rule: str = (
        "argmax over tokens of iou_prediction, token 0 raised by 500 if the first point is "
        "box_left_top, else lowered by 500"
    )
    mask_rule: str = (
        "bilinear (half-pixel centres, no antialiasing) to image_size, crop to the scaled "
        "size, bilinear to H x W, foreground where > 0"
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        values = dataclasses.asdict(self)
        values["point_labels"] = dict(self.point_labels)
        for name in ("mean", "std", "pad_value"):
            values[name] = list(values[name])
        return values

    def agrees_with(self, values: Any) -> bool:
        """Whether a contract parsed from JSON means the same; the prose of rules may differ."""
        names = ("version", "color_order", "layout", "mean", "std", "normalization_in_graph")
        expected = self.to_dict()
        return isinstance(values, dict) and all(
            values.get(name) == expected[name] for name in (*names, "pad_value", "point_labels")
        )
