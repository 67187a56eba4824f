"""Made scenes: pictures, regions, captions."""
