"""The encoded pictures that the server keeps: an LRU under a bound of memory."""

from __future__ import annotations

import collections
import secrets
import threading

from tap_deploy.config import TapConfig
from tap_deploy.prediction.inputs import EncodedImage

FLOAT_BYTES = 4
ID_BYTES = 16  # random: who does not know an id cannot guess it


def embedding_bytes(config: TapConfig) -> int:
    """Return the size of the embeddings of one picture in fp32, bytes; in fp16 it is half."""
    return FLOAT_BYTES * config.image_embed_dim * config.grid_size**2


class ImageStore:
    """Pictures by id, as embeddings; the least recently used are dropped. Thread-safe.

    Args:
        bytes_each: size of a picture's embeddings, bytes.
        max_bytes: bound on all pictures; at least one is kept.
    """

    def __init__(self, bytes_each: int, max_bytes: int) -> None:
        self.bytes_each = bytes_each
        self.capacity = max(1, max_bytes // bytes_each)
        self._images: collections.OrderedDict[str, EncodedImage] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def put(self, image: EncodedImage) -> str:
        """Keep a picture, and return its id."""
        image_id = secrets.token_urlsafe(ID_BYTES)
        with self._lock:
            self._images[image_id] = image
            while len(self._images) > self.capacity:
                self._images.popitem(last=False)
        return image_id

    def get(self, image_id: str) -> EncodedImage | None:
        """Return a picture; None if it was never there or is no longer kept."""
        with self._lock:
            if image_id in self._images:
                self._images.move_to_end(image_id)
            return self._images.get(image_id)

    def drop(self, image_id: str) -> bool:
        """Forget a picture; return whether it was there."""
        with self._lock:
            return self._images.pop(image_id, None) is not None
