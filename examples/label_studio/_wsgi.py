"""The server: ``gunicorn _wsgi:app``."""

from answers import predictor
from label_studio_ml.api import init_app
from model import TapBackend

predictor()  # before the threads that answer: each would load the model if it found none
app = init_app(model_class=TapBackend)
