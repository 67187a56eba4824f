"""``tap-export serve``: a predictor over HTTP, with a page. Needs the extra ``serve``."""
