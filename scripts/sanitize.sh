#!/bin/sh
# Builds the CPU kernels without torch under the sanitizers (address + undefined behavior, then threads) and runs
# their driver on every instruction set that the processor has. Any finding fails.
set -eu
cd "$(dirname "$0")/.."
compiler=${CXX:-g++}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

sources=$(ls src/batchnorm/csrc/kernels/*.cpp src/batchnorm/csrc/simd/*.cpp)
flags="-std=c++17 -O1 -g -ffp-contract=fast -fno-omit-frame-pointer -Wall -Wextra -Wno-psabi"
case $("$compiler" --version) in
*clang*) ;;
# GCC's own AVX-512 header reads a variable that is deliberately undefined
*) flags="$flags -Wno-uninitialized -Wno-maybe-uninitialized" ;;
esac

for sanitizer in address,undefined thread; do
    echo "== -fsanitize=$sanitizer"
    # shellcheck disable=SC2086  # lists of words on purpose
    "$compiler" $flags -fsanitize=$sanitizer -fno-sanitize-recover=all -pthread \
        tests/csrc/driver.cpp $sources -Isrc/batchnorm/csrc -o "$out/driver"
    for capability in default avx2 avx512; do
        BATCHNORM_CPU_CAPABILITY=$capability "$out/driver"
    done
done
