# Every target works on a fresh machine with Python 3.11+, a C++ compiler and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: install demo test test-gpu-interpreted lint bench docs wheel check-aarch64 check-windows clean

install: $(INSTALLED)

# Editable, with all extras; repeated when the kernels or the project's settings change.
$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]'
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

# The kernels for another processor, held against plain loops in an emulator (Debian: g++-aarch64-linux-gnu, qemu-user).
ARM := aarch64-linux-gnu
check-aarch64:
	cmake -G Ninja -S . -B build/$(ARM) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(ARM)-g++
	cmake --build build/$(ARM)
	$(ARM)-gcc -std=gnu11 -O2 -I csrc tests/csrc/maps_against_loops.c -o build/$(ARM)/check \
	  build/$(ARM)/libinvolution.so -lm
	qemu-aarch64 -L /usr/$(ARM) -E LD_LIBRARY_PATH=build/$(ARM):/usr/$(ARM)/lib build/$(ARM)/check

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
	$(WINDOWS)-gcc-posix -std=gnu11 -O2 -I csrc tests/csrc/maps_against_loops.c -o build/windows/check.exe \
	  build/windows/libinvolution.so -lm
	for set in baseline avx2; do WINEDEBUG=-all wine build/windows/check.exe $$set || exit 1; done
LINKED := -fuse-ld=lld -static -B$(MINGW) -L$(MINGW)

clean:
	rm -rf .venv build dist runs docs/_build
