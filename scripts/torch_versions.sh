#!/usr/bin/env bash
# Builds what is committed against other versions of torch and Python and runs the CPU tests of the operators, the layers
# and the model tools there: one virtual environment and one copy of the source for each pair, nothing in the checkout.
#
#   scripts/torch_versions.sh [VERSION ...]    torch versions; without one, the newest release of each minor from 2.10 on
#
# CPU builds of torch only. A pair for which pip finds a CUDA build is named in the table and not installed; point pip at
# an index of CPU builds (PIP_INDEX_URL, PIP_FIND_LINKS) to run it. PYTHONS="3.11 3.13" chooses interpreters, WORK the folder
# (build/torch_versions). A pair that was tested at this commit is not run again; FRESH=1 runs it again. The table goes to
# docs/works-with.md.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=$(realpath -m "${WORK:-build/torch_versions}")
COMMIT=$(git rev-parse --short HEAD)
REPORT=$PWD/scripts/torch_versions.py
PAGE=$PWD/docs/works-with.md
TESTS="tests/ops tests/test_layers.py tests/model_tools"
# What these tests import, at the versions of constraints.txt; Triton is left out, since each release belongs to one torch.
NEEDED="setuptools wheel numpy ninja packaging pytest pytest-timeout pytest-xdist pytest-benchmark hypothesis expecttest \
onnx onnxscript onnxruntime transformers rich"
PIP="-m pip -qq --disable-pip-version-check"  # errors alone
mkdir -p "$WORK"
grep -v '^torch==' constraints.txt >"$WORK/constraints.txt"

find_python() { # an interpreter of minor version $1 that runs
    local candidate
    for candidate in "$(command -v "python$1" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        if [ -x "$candidate" ] && "$candidate" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

row() { # one line for the table and one for whoever waits; "done" rows are not made again at this commit
    local folder=$1
    shift
    printf '%s\t' "$COMMIT" "$@" >"$folder/row"
    printf '%s ' "$@" && echo
}

run_tests() { # in the folder $1 with its environment's interpreter $2; the log says what failed
    cd "$1/source"
    # shellcheck disable=SC2086  # a list of words
    nice -n 10 "$2" -m pytest -n 1 -m 'not slow' --junitxml="$1/results.xml" $TESTS >"$1/tests.log" 2>&1 || true
}

test_pair() { # torch $1 on the interpreter $2 of Python $3
    local folder=$WORK/torch-$1-python-$3 date
    local bin=$folder/venv/bin/python
    date=$(date +%F)
    mkdir -p "$folder"
    if [ -z "${FRESH:-}" ] && grep -q "^$COMMIT"$'\t' "$folder/row" 2>/dev/null; then
        cut -f 2- "$folder/row" | tr '\t' ' ' && echo
        return
    fi
    rm -f "$folder/results.xml"
    [ -x "$bin" ] || "$2" -m venv "$folder/venv"
    # shellcheck disable=SC2086  # lists of words, here and below; an old pip would download a wheel to read about it
    "$bin" $PIP install --constraint "$WORK/constraints.txt" --upgrade pip packaging
    local asked="$folder/asked.json"
    # shellcheck disable=SC2086
    if ! "$bin" $PIP install --dry-run --ignore-installed --no-deps --only-binary :all: --report "$asked" "torch==$1" \
        >"$folder/asked.log" 2>&1; then
        row "$folder" "$1" "$3" "$date" "not run" "pip finds no wheel for this Python, or its configuration excludes it"
        return
    fi
    if [ -n "$("$bin" "$REPORT" cuda "$asked")" ]; then
        row "$folder" "$1" "$3" "$date" "not run" "pip's index has a CUDA build alone"
        return
    fi
    # shellcheck disable=SC2086
    nice -n 10 "$bin" $PIP install --constraint "$WORK/constraints.txt" "torch==$1" $NEEDED
    rm -rf "$folder/source"
    mkdir "$folder/source"
    git archive HEAD | tar -x -C "$folder/source"
    # shellcheck disable=SC2086
    nice -n 10 "$bin" $PIP install --no-build-isolation --no-deps --editable "$folder/source" >"$folder/build.log" 2>&1
    (run_tests "$folder" "$bin")
    row "$folder" "$1" "$3" "$date" "$("$bin" "$REPORT" results "$folder/results.xml")" "$("$bin" "$REPORT" built)"
}

for python in ${PYTHONS:-3.11 3.12 3.13 3.14}; do
    interpreter=$(find_python "$python")
    if [ -z "$interpreter" ]; then
        mkdir -p "$WORK/torch-any-python-$python"
        row "$WORK/torch-any-python-$python" any "$python" "$(date +%F)" "not run" "no interpreter on this machine"
        continue
    fi
    # shellcheck disable=SC2086
    listed=${*:-$("$interpreter" -m pip index versions torch 2>/dev/null | python3 "$REPORT" newest 2.10)}
    for version in $listed; do
        test_pair "$version" "$interpreter" "$python"
    done
done
python3 "$REPORT" table "$WORK" "$PAGE"
