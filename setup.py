"""Finds the packages; everything else about the project is in pyproject.toml.

Two folders have another name when they are imported (`models` and `plugins` would be too general for a name that
everybody shares), which a search declared in pyproject.toml cannot express.
"""

from setuptools import find_packages, setup

FOLDERS = {"gqa_models": "models", "gqa_plugins": "plugins"}

packages = find_packages(include=["gqa_export", "gqa_export.*"])
for name, folder in FOLDERS.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=FOLDERS)
