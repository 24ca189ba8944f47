"""Finds the packages: `hf_moe` where it lies, `trainers/` and `model_cards/` as its sub-packages."""

from setuptools import find_packages, setup


MAPPED_FOLDERS = ("trainers", "model_cards")

packages = find_packages(include=["hf_moe", "hf_moe.*"])
package_dir = {}
for folder in MAPPED_FOLDERS:
    package_dir[f"hf_moe.{folder}"] = folder
    packages += [f"hf_moe.{folder}", *(f"hf_moe.{folder}.{name}" for name in find_packages(folder))]

setup(packages=packages, package_dir=package_dir)
