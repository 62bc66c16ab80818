"""Everything static is in pyproject.toml; this file is here for the compiled CPU kernels.

Without a compiler, or with BATCHNORM_NO_EXTENSION=1, the package installs all the same: the operators then run in
plain PyTorch, and `import batchnorm` says once that this is slower.
"""

import os
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("src/batchnorm/csrc").glob("*.cpp"))
FLAGS = [
    "-std=c++17",
    "-O2",
    "-g0",
    "-ffp-contract=fast",  # one multiply-add where there is one; clang keeps to single statements otherwise
    "-fvisibility=hidden",
    "-Wno-psabi",  # vectors wider than the baseline's are only ever passed inside one translation unit
]


def extension() -> dict[str, object]:
    """The keywords that add the extension, or none where torch cannot build one."""
    if os.environ.get("BATCHNORM_NO_EXTENSION") == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    module = CppExtension(
        "batchnorm._C",
        SOURCES,
        # the oldest torch whose stable ABI is used: one build serves it and all later ones
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args={"cxx": FLAGS},
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
