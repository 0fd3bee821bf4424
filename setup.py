"""Builds the Cython kernels, the same source once per instruction set, and what keeps their results' memory.

Each extension is optional: where there is no compiler, fastbn installs without it and the Numba or the NumPy
kernels serve. Where the compiler knows no OpenMP, the kernels are built single-threaded.
"""

import os
import platform
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "fastbn/_kernels/cython_cpu"

# Module name → the flag that allows its instruction set. Never -march=native: a wheel travels.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS = {
        "baseline": ["-march=x86-64"],  # said aloud, so that a -march=native in CFLAGS does not travel
        "x86_64_v3": ["-march=x86-64-v3"],
        "x86_64_v4": ["-march=x86-64-v4"],
    }

# -ffp-contract=off and no fast-math: the same bits from every instruction set. The vector types that
# the block primitives pass around stay inside one file, so gcc's note on their calling convention does not apply.
COMPILE = [
    "-std=gnu11",
    "-fno-fast-math",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-g0",  # the debug information would be four times the code
    "-Wno-psabi",
]


# The loops that matter are written with vectors and unrolled by name: -O3 would only add 40 % to the code and the wait.
OPTIMIZE = [["-O2", "-ftree-loop-vectorize", "-fvect-cost-model=dynamic"], ["-O3"]]
OPENMP = [["-fopenmp"], ["-Xpreprocessor", "-fopenmp", "-lomp"]]


class BuildExt(build_ext):
    def build_extensions(self):
        self.parallel = self.parallel or os.cpu_count()
        if self.compiler.compiler_type == "msvc":
            print("fastbn: the kernels need gcc or clang; installing without them", file=sys.stderr)
            self.extensions = []
            return
        optimize = self.first_accepted(OPTIMIZE, "int main(void) { return 0; }") or []
        openmp = self.first_accepted(OPENMP, "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }")
        if openmp is None:
            print("fastbn: no OpenMP here; the kernels will use one thread", file=sys.stderr)
            openmp = []
        for extension in self.extensions:
            extension.optional = True  # said here: cythonize makes the extensions anew and forgets it
            name = extension.name.rsplit(".", 1)[1]
            threads = openmp if name in INSTRUCTION_SETS else []
            extension.extra_compile_args = (
                optimize + COMPILE + INSTRUCTION_SETS.get(name, INSTRUCTION_SETS["baseline"]) + threads
            )
            extension.extra_link_args = threads
        super().build_extensions()

    def first_accepted(self, choices, program):
        """The first of several lists of flags with which this compiler and linker make the program, or None."""
        for flags in choices:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "probe.c")
                source.write_text(program + "\n")
                try:
                    objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                    self.compiler.link_executable(objects, str(Path(folder, "probe")), extra_postargs=flags)
                except Exception:  # distutils raises many kinds; each means "not this way"
                    continue
                return flags
        return None


def extensions():
    if os.environ.get("FASTBN_NO_EXTENSIONS"):  # a plain Python install, on purpose
        return []
    import numpy
    from Cython.Build import cythonize

    headers = [str(path) for path in sorted(Path(FOLDER).glob("*.h"))] + [f"{FOLDER}/drivers.pxi"]
    modules = {f"fastbn._kernels.cython_cpu.{name}": headers for name in INSTRUCTION_SETS}
    modules["fastbn._kernels.memory"] = []
    return cythonize(
        [
            Extension(
                name,
                [f"{name.replace('.', '/')}.pyx"],
                include_dirs=[numpy.get_include(), FOLDER],
                define_macros=[
                    ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
                    ("NPY_TARGET_VERSION", "NPY_1_22_API_VERSION"),  # the first with memory handlers (NEP 49)
                ],
                depends=depends,
            )
            for name, depends in modules.items()
        ],
        compiler_directives={"language_level": 3, "cdivision": True, "boundscheck": False, "wraparound": False},
    )


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
