"""The one thing pyproject.toml cannot say yet: the native libraries, built where there is a compiler, else left out."""

from glob import glob

from setuptools import Extension, setup

# Plain C functions, loaded with ctypes: no headers of Python are needed. The flags are a part of what is computed:
# one rounding per operation, never a fused or reordered one (csrc/common.h says more).
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-fast-math",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
]
NATIVE = Extension(
    "bitfloor.ops._native",
    sources=["csrc/rounding.cpp", "csrc/sweeps.cpp"],
    depends=["csrc/common.h"],
    language="c++",
    extra_compile_args=FLAGS,
    optional=True,
)
# Running packed weights. A library of its own: what quantizes must not change with it.
PACKED = Extension(
    "bitfloor.ops._packed",
    sources=sorted(glob("csrc/packed/*.cpp")),
    depends=sorted(glob("csrc/packed/*.h")),
    language="c++",
    # -Wno: GCC's own intrinsics read what they call undefined.
    extra_compile_args=[*FLAGS, "-fvisibility=hidden", "-pthread", "-Wno-maybe-uninitialized", "-Wno-uninitialized"],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(ext_modules=[NATIVE, PACKED])
