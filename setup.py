"""The one thing pyproject.toml cannot say yet: the native library, built where there is a compiler, else left out."""

from setuptools import Extension, setup

# Plain C functions, loaded with ctypes: no headers of Python are needed. The flags are a part of what is computed:
# one rounding per operation, never a fused or reordered one (csrc/common.h says more).
NATIVE = Extension(
    "bitfloor.ops._native",
    sources=["csrc/rounding.cpp", "csrc/sweeps.cpp"],
    depends=["csrc/common.h"],
    language="c++",
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fno-fast-math",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-exceptions",
        "-fno-rtti",
    ],
    optional=True,
)

setup(ext_modules=[NATIVE])
