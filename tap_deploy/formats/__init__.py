"""Exports regions to other formats: COCO, polygons, GeoJSON, supervision detections."""
