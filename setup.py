"""What setup.cfg cannot say: the packages in ``export/`` and ``engines/`` are found, too."""

from setuptools import find_packages, setup

mapped = [f"tap_deploy.{name}" for name in find_packages(include=["export*", "engines*"])]
setup(packages=[*find_packages(include=["tap_deploy*"]), *mapped])
