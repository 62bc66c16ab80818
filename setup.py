"""Everything static is in pyproject.toml; this file is here for the compiled extension."""

from setuptools import setup

setup()
