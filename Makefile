# Two commands do all the set-up on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test faults fuzz dft lint types docs viewers wheel-test clean

# Predict the shipped example (an aluminium vacancy) with the shipped model; print the totals, write a picture.
run: $(STAMP)
	$(BIN)/gpurho predict gpurho/data/al_vacancy.xyz --out out/al_vacancy.h5 --no-resume --plot out/al_vacancy.png

test: $(STAMP)
	$(BIN)/python -m pytest

# The DFT engines and LAMMPS: Debian's packages where this is Debian and root runs it, then gpurho[dft] (GPAW compiles).
dft: $(STAMP)
	.ci/dft.sh $(BIN)/python

# Kills, full disks, damaged files, signals, clocks, clusters that die: an hour of labelling with faults, and as long for
# all the rest. FAULTS="--todo --minutes 10" does what the file of results has not, with less labelling.
faults: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m faults $(FAULTS)

# A hundred thousand bad inputs; goes on where an earlier run stopped, and adds to the file of results.
fuzz: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m fuzz --cases 100000 --out benchmarks/results/fuzz.json

lint: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ruff mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy gpurho kernels pipelines

# What pyright sees of the package as it is installed: `pipelines` in it. Kernels get their types from Numba. The extra
# is Node as a wheel: a bare machine has none.
types: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "pyright[nodejs]"
	rm -rf build/types && mkdir -p build/types
	cp -r gpurho build/types/ && cp -r kernels pipelines build/types/gpurho/
	cp pyrightconfig.types.json build/types/pyrightconfig.json
	cd build/types && $(abspath $(BIN))/pyright --pythonpath $(abspath $(BIN))/python

# The site, into site/.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

# What some tests read files and pages with: VTK, PyVista, OVITO and, from Debian, Chromium. Without them these tests skip.
viewers: $(STAMP)
	.ci/debian.sh chromium libegl1 libgl1 libopengl0 libxkbcommon0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[viewers]"

# A wheel built from the checkout, installed into a new environment and tried from elsewhere.
wheel-test: $(STAMP)
	.ci/wheel.sh $(BIN)/python

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and pinned: a newer one would pull gigabytes of CUDA onto machines without a GPU.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,dask]"
	# CUDA builds of torch bring the Triton that fits them; without a GPU its interpreter and compiler serve the tests.
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet triton==3.7.1 \
		|| echo "Triton is not there: the tests of the fused network skip"
	touch $(STAMP)

clean:
	rm -rf $(VENV) out build site *.egg-info
