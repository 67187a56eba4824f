"""Reports as self-contained HTML pages: the templates, and what they show."""
