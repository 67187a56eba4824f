"""A predictor on the PyTorch model, with the results of ``TapPredictor``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tap_deploy.concepts import Vocabulary
from tap_deploy.image import model_image
from tap_deploy.masks import masks_from_logits, select_mask_token
from tap_deploy.prompts import Prompts
from tap_deploy.reference.model import TapModel
from tap_deploy.regions import Regions
from tap_deploy.tokenizer import Tokenizer


class ReferencePredictor:
    """Predicts regions with a PyTorch model, on the device of the model.

    Args:
        model: the model, float32, in evaluation mode.
        vocabulary: the concepts.
        tokenizer: decodes caption ids.
    """

    def __init__(self, model: TapModel, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
        self._model, self._vocabulary, self._tokenizer = model, vocabulary, tokenizer

    @torch.no_grad()
    def predict(self, image: npt.NDArray[np.uint8], *, prompts: Prompts, top_k: int = 5) -> Regions:
        """Predict P prompts on uint8 [H, W, 3] RGB; see ``TapPredictor.predict``."""
        device = self._model.pixel_mean.device
        pixels, frame = model_image(image, self._model.config.image_size)
        outputs = self._model.decode_prompts(
            self._model.encode_image(torch.from_numpy(pixels).to(device)),
            torch.from_numpy(prompts.model_coords(frame.scale)).to(device),
            torch.from_numpy(prompts.labels.astype(np.int64)).to(device),
        )
        ious = outputs.iou_predictions.cpu().numpy()
        rows, index = np.arange(len(prompts)), select_mask_token(ious, prompts.labels)
        tokens = outputs.semantic_tokens[rows, index]
        logits = outputs.low_res_masks[rows, index].cpu().numpy()
        embeddings = outputs.semantic_embeddings[rows, index].cpu().numpy()
        ids = self._model.generate(tokens).cpu().numpy()
        return Regions(
            masks=masks_from_logits(logits, frame),
            iou_predictions=ious[rows, index],
            mask_index=index,
            concepts=self._vocabulary.top_k(embeddings, top_k),
            captions=self._tokenizer.decode(ids),
            caption_ids=ids,
            semantic_tokens=tokens.cpu().numpy(),
            semantic_embeddings=embeddings,
            low_res_masks=logits,
            prompts=prompts,
            image_height=frame.height,
            image_width=frame.width,
        )
