"""A predictor on the PyTorch model, with the results of ``TapPredictor``."""

from __future__ import annotations

import typing

import numpy as np
import numpy.typing as npt
import torch

from tap_deploy.concepts import Vocabulary
from tap_deploy.image import Frame, frame_image
from tap_deploy.masks import masks_from_logits, rles_from_logits, select_mask_token
from tap_deploy.pictures.source import ImageSource
from tap_deploy.prompts import Prompts
from tap_deploy.reference.model import TapModel
from tap_deploy.regions import Regions
from tap_deploy.tokenizer import Tokenizer


class EncodedPicture(typing.NamedTuple):
    """A picture after the image encoder.

    Attributes:
        embeddings: float ``[1, C, grid, grid]``, on the device of the model.
        frame: placement of the picture in the model frame.
    """

    embeddings: torch.Tensor
    frame: Frame


class _Answers(typing.NamedTuple):
    """Outputs of the mask token that answers each of P prompts.

    Attributes:
        ious: predicted IoU, float32 ``[P]``.
        mask_index: selected mask token, int64 ``[P]``.
        tokens: semantic tokens, float ``[P, C]``.
        masks: logits, float ``[P, S, S]``.
        embeddings: semantic embeddings, float ``[P, E]``.
    """

    ious: npt.NDArray[np.float32]
    mask_index: npt.NDArray[np.int64]
    tokens: torch.Tensor
    masks: torch.Tensor
    embeddings: torch.Tensor


class ReferencePredictor:
    """Predicts regions with a PyTorch model, on the device of the model.

    Args:
        model: the model, in evaluation mode.
        vocabulary: the concepts; None for no names.
        tokenizer: decodes caption ids; None for no texts.
        prompts_per_call: largest number of prompts that are decoded at once; None for all.
    """

    def __init__(
        self,
        model: TapModel,
        vocabulary: Vocabulary | None,
        tokenizer: Tokenizer | None,
        *,
        prompts_per_call: int | None = None,
    ) -> None:
        self._model, self._vocabulary, self._tokenizer = model, vocabulary, tokenizer
        self._prompts_per_call = prompts_per_call

    @torch.no_grad()
    def encode(self, image: ImageSource) -> EncodedPicture:
        """Run the image encoder; see ``TapPredictor.encode``."""
        pixels, frame = frame_image(image, self._model.config.image_size)
        images = torch.from_numpy(pixels).to(self._model.pixel_mean.device)
        return EncodedPicture(embeddings=self._model.encode_image(images), frame=frame)

    @torch.no_grad()
    def predict(
        self,
        image: ImageSource | EncodedPicture,
        *,
        prompts: Prompts,
        top_k: int = 5,
        masks: bool | typing.Literal["rle"] = True,
        captions: bool = True,
        max_new_tokens: int | None = None,
    ) -> Regions:
        """Predict P prompts on a picture; see ``TapPredictor.predict``."""
        encoded = image if isinstance(image, EncodedPicture) else self.encode(image)
        device, frame = encoded.embeddings.device, encoded.frame
        answers = self._decode(
            encoded.embeddings,
            torch.from_numpy(prompts.model_coords(frame.scale)).to(device),
            torch.from_numpy(prompts.labels.astype(np.int64)).to(device),
        )
        count = max_new_tokens if captions else 0
        ids = self._model.generate(answers.tokens, max_new_tokens=count).cpu().numpy()
        logits, embeddings = _numpy(answers.masks), _numpy(answers.embeddings)
        named, texts = self._vocabulary, self._tokenizer if captions else None
        return Regions(
            masks=masks_from_logits(logits, frame) if masks is True else None,
            rles=rles_from_logits(logits, frame) if masks == "rle" else None,
            iou_predictions=answers.ious,
            mask_index=answers.mask_index,
            concepts=None if named is None else named.top_k(embeddings, top_k),
            captions=None if texts is None else texts.decode(ids),
            caption_ids=ids,
            semantic_tokens=_numpy(answers.tokens),
            semantic_embeddings=embeddings,
            low_res_masks=logits,
            prompts=prompts,
            image_height=frame.height,
            image_width=frame.width,
        )

    def _decode(
        self, image_embeddings: torch.Tensor, coords: torch.Tensor, labels: torch.Tensor
    ) -> _Answers:
        """Decode the prompts in chunks, and keep the answer of each."""
        size = self._prompts_per_call or max(1, len(labels))
        parts = []
        for coords_part, labels_part in zip(coords.split(size), labels.split(size), strict=True):
            outputs = self._model.decode_prompts(image_embeddings, coords_part, labels_part)
            ious = _numpy(outputs.iou_predictions)
            rows, index = np.arange(len(ious)), select_mask_token(ious, labels_part.cpu().numpy())
            parts.append(
                _Answers(
                    ious=ious[rows, index],
                    mask_index=index,
                    tokens=outputs.semantic_tokens[rows, index],
                    masks=outputs.low_res_masks[rows, index],
                    embeddings=outputs.semantic_embeddings[rows, index],
                )
            )
        if len(parts) == 1:
            return parts[0]
        return _Answers(
            ious=np.concatenate([part.ious for part in parts]),
            mask_index=np.concatenate([part.mask_index for part in parts]),
            tokens=torch.cat([part.tokens for part in parts]),
            masks=torch.cat([part.masks for part in parts]),
            embeddings=torch.cat([part.embeddings for part in parts]),
        )


def _numpy(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """Return a tensor in host memory; NumPy has no bfloat16."""
    array: npt.NDArray[np.float32] = tensor.float().cpu().numpy()
    return array
