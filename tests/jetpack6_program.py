"""Run by tests/test_jetpack6.py in two environments: predict, and write the results.

python jetpack6_program.py BUNDLE PICTURE OUTPUT
"""

import importlib.metadata
import importlib.util
import json
import sys

import numpy as np

from tap_deploy import TapPredictor

bundle, picture, output = sys.argv[1:]
with TapPredictor.from_bundle(bundle, threads=1) as predictor:
    regions = predictor.predict(
        picture,
        points=[[[285, 160, 1]], [[100, 100, 1]]],
        boxes=[[172, 17, 412, 308], [20, 30, 200, 250]],
        top_k=3,
    )
np.savez(
    output,
    masks=regions.masks,
    iou_predictions=regions.iou_predictions,
    semantic_embeddings=regions.semantic_embeddings,
    caption_ids=regions.caption_ids,
)
heavy = ("torch", "onnx", "onnx_ir", "onnxscript", "tensorrt", "tensorrt_rtx", "safetensors")
names = ("numpy", "pillow", "click", "sentencepiece", "onnxruntime")
print(
    json.dumps(
        {
            "python": list(sys.version_info[:2]),
            "versions": {name: importlib.metadata.version(name) for name in names},
            "installed": [name for name in heavy if importlib.util.find_spec(name)],
            "captions": regions.captions,
            "concepts": [[name for name, _ in row] for row in regions.concepts],
        }
    )
)
