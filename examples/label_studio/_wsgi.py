"""The server: ``gunicorn _wsgi:app``."""

from label_studio_ml.api import init_app
from model import TapBackend

app = init_app(model_class=TapBackend)
