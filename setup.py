"""Everything static is in pyproject.toml; this file is here for what is compiled.

Without a compiler, or with BATCHNORM_NO_EXTENSION=1, the package installs all the same: the operators then run in
plain PyTorch, and `import batchnorm` says once that this is slower.
"""

import os
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import CompileError

SOURCES = Path("src/batchnorm/csrc")
FLAGS = ["-O2", "-g0"]
KERNEL_FLAGS = [
    *FLAGS,
    "-std=c++17",
    "-ffp-contract=fast",  # one multiply-add where there is one; clang keeps to single statements otherwise
    "-fvisibility=hidden",
    "-Wno-psabi",  # vectors wider than the baseline's are only ever passed inside one translation unit
]


def sources(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in (SOURCES / folder).glob("*.cpp"))


def extensions() -> dict[str, object]:
    """The keywords that add the extensions, or none where torch cannot build one."""
    if os.environ.get("BATCHNORM_NO_EXTENSION") == "1":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}

    class BuildOptional(BuildExtension):
        """An optional extension that does not compile is left out, with ninja as without."""

        def build_extension(self, ext: Extension) -> None:
            try:
                super().build_extension(ext)
            except RuntimeError as error:  # ninja's: setuptools lets what is optional fail by its own error alone
                raise CompileError(str(error)) from error

    kernels = CppExtension(
        "batchnorm._C",
        sources("kernels", "simd", "torch"),
        # the oldest torch whose stable ABI is used: one build serves it and all later ones
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args={"cxx": KERNEL_FLAGS},
        py_limited_api=True,
        optional=True,
    )
    autograd = CppExtension(
        # torch's own ABI: ops/extension.py looks for this name with the running torch's version, and for no other
        "batchnorm._autograd_" + re.sub(r"\W", "_", torch.__version__),
        sources("autograd"),
        extra_compile_args={"cxx": FLAGS},
        optional=True,
    )
    return {
        "ext_modules": [kernels, autograd],
        "cmdclass": {"build_ext": BuildOptional},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extensions())
