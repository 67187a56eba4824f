"""The model hub: published weights, and bundles. Uses huggingface_hub, in functions only."""
