"""What setup.cfg cannot say: the packages in ``export/`` and ``engines/`` are found, too."""

import pathlib
import shutil

from setuptools import find_packages, setup

# setuptools packs whatever an earlier build left there, also modules that have moved since.
shutil.rmtree(pathlib.Path(__file__).with_name("build") / "lib", ignore_errors=True)

mapped = [f"tap_deploy.{name}" for name in find_packages(include=["export*", "engines*"])]
setup(packages=[*find_packages(include=["tap_deploy*"]), *mapped])
