#!/bin/sh
# For a repository of your own with a LoRA adapter in it: builds its artifacts, proves them and compares them with the
# release before; exit 1 on a red gate.
# Results: on-device/build/ci (summary.md, junit.xml, records.jsonl, gate.md) and on-device/build/NAME_RECIPE_TARGET.
set -eu
: "${PIPELINE:?URL or folder of the repository that does the work}"
: "${VERSION:?a tag, branch or commit of it}"
: "${ADAPTER:?folder of the adapter, from the root of your repository}"
: "${NAME:?of the artifacts}"
: "${MODEL:=llama32-1b-instruct}" "${RECIPES:=int4-g32-gptq}" "${TARGETS:=executorch-xnnpack coreml onnx-cpu}"
: "${SOURCE:=}" # of the base: a folder from the root, a GGUF file or a hub id; empty: what the adapter names
: "${AGAINST:=}" # the release before: what an earlier run left in on-device/build, or its records.jsonl; empty: the first

git init --quiet on-device # not a clone: a cache of build/cache may lie there already
git -C on-device fetch --quiet --depth 1 "$PIPELINE" "$VERSION"
git -C on-device checkout --quiet --force FETCH_HEAD
if [ -n "$SOURCE" ] && [ -e "$SOURCE" ]; then SOURCE=$(realpath "$SOURCE"); fi
make --no-print-directory -C on-device locked
set -- MODEL="$MODEL" RECIPES="$RECIPES" TARGETS="$TARGETS" SOURCE="$SOURCE" ADAPTER="$(realpath "$ADAPTER")" NAME="$NAME"
make --no-print-directory -C on-device ci-artifacts "$@"
if [ -n "$AGAINST" ]; then make --no-print-directory -C on-device gate "$@" AGAINST="$(realpath "$AGAINST")"; fi
