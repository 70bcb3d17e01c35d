# Every target works on a fresh machine with Python 3.11+, a C++ compiler and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: install demo test test-gpu-interpreted lint bench docs wheel check-aarch64 check-windows sanitize sanitize-tests valgrind trust clean

install: $(INSTALLED)

# Editable, with all extras; repeated when the kernels or the project's settings change.
# PINS= installs the newest versions that pyproject.toml admits.
PINS ?= -c constraints.txt
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]' $(PINS)
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py

# Waiting threads sleep: spinning ones slow small tests down where another job uses a core. Two processes, each with whole
# test files, because much of a test runs on one thread.
test: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"
	TRITON_INTERPRET=1 INVOLUTION_EXAMPLES=0.012 $(BIN)/pytest -n 2 $(INTERPRETED) -k "random or interpreted or taps_outside"

# The GPU kernels without a GPU: interpreted on the CPU, where the tests of every backend run over them, and compiled
# ahead of time for four targets. About ten minutes each.
INTERPRETED := $(addprefix tests/ops/test_,gpu_interpreted.py backends_agree.py registration.py fused.py)
INTERPRETED += tests/bench/test_selftest.py
test-gpu-interpreted: $(INSTALLED)
	TRITON_INTERPRET=1 INVOLUTION_EXAMPLES=0.2 $(BIN)/pytest $(INTERPRETED) -k "triton or random or interpreted"
	$(BIN)/pytest tests/ops/test_gpu_compiled.py -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/involution bench

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/explorer/build.py docs/_build/html/explorer

# The sources, and from them the wheel for this platform, repaired. torch brings libgomp: a wheel must not have its own.
wheel: $(INSTALLED)
	$(BIN)/python -m build --outdir build/dist
	mkdir -p dist && cp build/dist/*.tar.gz dist
	PATH=$(CURDIR)/$(BIN):$$PATH auditwheel repair --exclude libgomp.so.1 -w dist build/dist/*.whl

# Random calls of the C ABI against plain loops, CASES for each instruction set that this CPU runs (tests/csrc).
CASES ?= 2000
DRIVER := -std=gnu11 -O2 -I csrc tests/csrc/random_calls.c
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -g1 -fno-omit-frame-pointer

# The kernels and the driver under AddressSanitizer and UndefinedBehaviorSanitizer; compiling takes a few minutes.
sanitize:
	cmake -G Ninja -S . -B build/sanitize -DOPTIMIZE=-O1 -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="$(SANITIZE)"
	cmake --build build/sanitize
	$(CC) $(SANITIZE) $(DRIVER) -o build/sanitize/random_calls build/sanitize/libinvolution.so -lm
	LD_LIBRARY_PATH=build/sanitize ASAN_OPTIONS=abort_on_error=1 UBSAN_OPTIONS=abort_on_error=1:print_stacktrace=1 \
	  build/sanitize/random_calls --heap $(CASES)
	LD_LIBRARY_PATH=build/sanitize ASAN_OPTIONS=abort_on_error=1 UBSAN_OPTIONS=abort_on_error=1 \
	  build/sanitize/random_calls --heap --replay tests/csrc/corpus.txt

# The property tests in Python over the sanitized kernels, which a copy of the package loads.
sanitize-tests: sanitize $(INSTALLED)
	rm -rf build/sanitize/python && mkdir -p build/sanitize/python
	cp -r src/involution build/sanitize/python && cp build/sanitize/libinvolution.so build/sanitize/python/involution/ops/backends
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=abort_on_error=1 PYTHONPATH=build/sanitize/python \
	  OMP_WAIT_POLICY=passive $(BIN)/pytest tests/ops/test_backends_agree.py tests/ops/test_fused.py -k "random or every_loop"

# Reads of uninitialised memory. valgrind 3.19 does not know AVX-512.
valgrind: $(INSTALLED)
	mkdir -p build/valgrind
	cp $$($(BIN)/python -c "from involution.ops.backends import cpu_library; print(cpu_library.path())") build/valgrind
	$(CC) -DWIDE=double $(DRIVER) -g1 -o build/valgrind/random_calls build/valgrind/libinvolution.so -lm
	for isa in avx2 baseline; do LD_LIBRARY_PATH=build/valgrind OMP_NUM_THREADS=1 valgrind -q --error-exitcode=1 \
	  build/valgrind/random_calls --isa $$isa --heap $(CASES) || exit 1; done

# Every promise of docs/trust.md, with more cases than make test has.
TRUST := $(addprefix tests/engine/test_,hostile_checkpoints.py hostile_data.py faults.py) tests/ops/test_threads.py \
  tests/ops/test_numerics.py tests/ops/backends/test_c_abi.py tests/bench/test_selftest.py tests/test_supply_chain.py
trust: $(INSTALLED) sanitize-tests
	INVOLUTION_EXAMPLES=34 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 $(TRUST) -m "not slow"
	$(BIN)/pytest tests/ops/test_long_run.py -s
	$(MAKE) valgrind
	$(BIN)/involution doctor --selftest

# The kernels for another processor, in an emulator (Debian: g++-aarch64-linux-gnu, qemu-user).
ARM := aarch64-linux-gnu
check-aarch64:
	cmake -G Ninja -S . -B build/$(ARM) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(ARM)-g++
	cmake --build build/$(ARM)
	$(ARM)-gcc $(DRIVER) -o build/$(ARM)/random_calls build/$(ARM)/libinvolution.so -lm
	qemu-aarch64 -L /usr/$(ARM) -E LD_LIBRARY_PATH=build/$(ARM):/usr/$(ARM)/lib build/$(ARM)/random_calls $(CASES)

# The same for Windows: Clang's kernels in Wine (Debian: clang, lld, g++-mingw-w64-x86-64-posix, wine). GCC is only the
# source of headers and start-up code: on Windows it does not align 32-byte vectors on the stack.
WINDOWS := x86_64-w64-mingw32
MINGW := $(wildcard /usr/lib/gcc/$(WINDOWS)/*-posix)
check-windows:
	cmake -G Ninja -S . -B build/windows -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=AMD64 \
	  -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_CXX_COMPILER_TARGET=$(WINDOWS) -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON \
	  -DCMAKE_CXX_FLAGS="-isystem $(MINGW)/include/c++ -isystem $(MINGW)/include/c++/$(WINDOWS)" \
	  -DCMAKE_EXE_LINKER_FLAGS="$(LINKED)" -DCMAKE_SHARED_LINKER_FLAGS="$(LINKED)" -DCMAKE_CXX_STANDARD_LIBRARIES=-lpthread
	cmake --build build/windows
	$(WINDOWS)-gcc-posix $(DRIVER) -o build/windows/random_calls.exe build/windows/libinvolution.so -lm
	for set in baseline avx2; do WINEDEBUG=-all wine build/windows/random_calls.exe --isa $$set $(CASES) || exit 1; done
LINKED := -fuse-ld=lld -static -B$(MINGW) -L$(MINGW)

clean:
	rm -rf .venv build dist runs docs/_build
