#!/bin/sh
# Builds the CPU kernels without torch and times each alone; the arguments are in kernels_alone.cpp.
set -eu
cd "$(dirname "$0")/.."
out=build/kernels_alone
mkdir -p "$out"
objects=
for source in src/batchnorm/csrc/kernels/*.cpp src/batchnorm/csrc/simd/*.cpp; do
    object=$out/$(basename "$source" .cpp).o
    objects="$objects $object"
    newer=$(find src/batchnorm/csrc -newer "$object" -type f 2>/dev/null | head -1 || true)
    [ -f "$object" ] && [ -z "$newer" ] || "${CXX:-g++}" -std=c++17 -O2 -ffp-contract=fast -Wno-psabi -c "$source" -o "$object"
done
# shellcheck disable=SC2086  # a list of words on purpose
"${CXX:-g++}" -std=c++17 -O2 -Isrc/batchnorm/csrc benchmarks/kernels_alone.cpp $objects -o "$out/kernels_alone" -pthread
"$out/kernels_alone" "$@"
