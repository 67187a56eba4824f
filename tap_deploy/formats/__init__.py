"""What other programs read: COCO, polygons, GeoJSON, detections of supervision."""
