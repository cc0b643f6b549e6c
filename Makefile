# `make demo` and `make test` work from nothing on Debian 12, as root or with sudo; `make help` lists the rest.
# Steps that are done cost nothing the second time: packages are looked up, models are files, ninja does the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL: # the order is the point; ninja uses the cores
.PHONY: help deps build cuda program install model model-qwen demo test asan tsan clients llama-suite arm64 lint clean

smollm2 := models/SmolLM2-135M-Instruct.Q4_1.gguf
qwen := models/Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf

PREFIX ?= /usr/local

# No folder of tests yet: nothing that ctest could run.
have_tests := $(wildcard tests/*/CMakeLists.txt)
# TSan places its shadow memory at fixed addresses, which address randomisation may take first. A container may
# forbid switching that off; then the kernel's default has to do.
fixed_addresses := $(shell setarch --addr-no-randomize true 2>/dev/null && echo setarch --addr-no-randomize)

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## (.*)/make \1\t\2/' | expand -t 18

deps: ## install the Debian packages that are missing (tools/packages.txt)
	@tools/install_packages.sh

build: deps build/build.ninja ## build/narrows and the tests (the first time llama.cpp too)
	@cmake --build --preset cpu

build/build.ninja: CMakePresets.json | deps
	@cmake --preset cpu
	@touch $@

build/asan/build.ninja: CMakePresets.json | deps
	@cmake --preset debug-asan
	@touch $@

build/tsan/build.ninja: CMakePresets.json | deps
	@cmake --preset debug-tsan
	@touch $@

cuda: ## build/cuda/libnarrows_cuda.so: the operators for CUDA devices; needs nvcc 13, cmake and ninja, no driver
	@cmake --preset cuda
	@cmake --build --preset cuda

model: deps $(smollm2) ## the default model, SmolLM2 135M (98 MB)
model-qwen: deps $(qwen) ## Qwen2.5-Coder 0.5B, for contexts up to 32K (491 MB)

$(smollm2): | deps
	@tools/fetch_model.sh smollm2

$(qwen): | deps
	@tools/fetch_model.sh qwen

program: deps build/build.ninja ## build/narrows alone
	@cmake --build --preset cpu --target narrows

install: program ## the program, libnarrows.so, headers, CMake and pkg-config files, under PREFIX (/usr/local) and DESTDIR
	@cmake --build --preset cpu --target narrows_shared
	@DESTDIR="$(DESTDIR)" cmake --install build --prefix "$(PREFIX)"

demo: program model ## answer a question about a long text, with memory and speed beside an f16 cache
	@tools/demo.sh

test: build model asan tsan ## everything; ctest's summary of the release build comes last
ifneq ($(have_tests),)
	@ctest --preset cpu
else
	@echo "no tests yet: tests/ has no folder with a CMakeLists.txt"
endif

asan: deps build/asan/build.ninja ## unit tests and a brief fuzz under AddressSanitizer and UBSan
	@cmake --build --preset debug-asan --target narrows_tests_unit narrows_tests_fuzz
ifneq ($(have_tests),)
	@ctest --preset debug-asan
endif

tsan: model build/tsan/build.ninja ## the concurrent tests under ThreadSanitizer
	@cmake --build --preset debug-tsan --target narrows_tests_concurrent
ifneq ($(have_tests),)
	@$(fixed_addresses) ctest --preset debug-tsan
endif

clients: program model model-qwen ## a session with each of nine Python clients (openai, anthropic, ollama, litellm, ...)
	@tools/client_tests.sh build/narrows $(smollm2)

llama-suite: program model model-qwen ## llama.cpp's own server tests against `narrows serve` (docs/llama_suite.md)
	@tools/llama_suite.sh build/narrows $(smollm2)

arm64: deps ## src/kernels and its tests for 64-bit ARM, cross-compiled, under qemu-user
	@tools/arm64_kernels.sh

# Optional tools, so not among the packages. clang reads GCC's command lines, so it may not know every -W flag; it also
# counts the warnings in other people's headers, which it does not show.
sources = $(shell find include src tests bench examples -name '*.h' -o -name '*.cpp' -o -name '*.c' 2>/dev/null)
lint: build/build.ninja ## clang-format and clang-tidy on our own code, where installed
	@if ! command -v clang-format >/dev/null; then echo "lint: clang-format is not installed, so formatting was not checked"; \
	  else clang-format --dry-run -Werror $(sources); fi
	@if ! command -v clang-tidy >/dev/null; then echo "lint: clang-tidy is not installed, so its checks did not run"; \
	  else printf '%s\n' $(filter %.cpp,$(sources)) | \
	    xargs -P "$$(nproc)" -n 1 clang-tidy -quiet -p build --extra-arg=-Wno-unknown-warning-option 2>&1 | \
	    { grep -v ' warnings\? generated' || true; }; fi

clean: ## remove build/ (models/ and the cache folder stay)
	rm -rf build
