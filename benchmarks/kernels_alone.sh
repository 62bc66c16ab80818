#!/bin/sh
# Builds the CPU kernels without torch and times each alone; the arguments are in kernels_alone.cpp.
set -eu
cd "$(dirname "$0")/.."
out=build/kernels_alone
mkdir -p "$out"
for source in src/batchnorm/csrc/*.cpp; do
    case $source in */register.cpp | */arguments.cpp | */tensor.cpp) continue ;; esac
    object=$out/$(basename "$source" .cpp).o
    newer=$(find src/batchnorm/csrc -newer "$object" -type f 2>/dev/null | head -1 || true)
    [ -f "$object" ] && [ -z "$newer" ] || "${CXX:-g++}" -std=c++17 -O2 -ffp-contract=fast -Wno-psabi -c "$source" -o "$object"
done
"${CXX:-g++}" -std=c++17 -O2 -Isrc/batchnorm/csrc benchmarks/kernels_alone.cpp "$out"/*.o -o "$out/kernels_alone" -pthread
"$out/kernels_alone" "$@"
