# make table1                       train, attack and tabulate on the digits; with a GPU: make table1 ARGS='-p preset fast'
# make numbers PRESET=small MINUTES=9   the plan of a preset, as far as nine minutes go; the same command goes on
#                                       (PACK=folder: puts what it made into a few files, to take along)
# make test                         everything that must hold; make kill: what a hundred kills must not change
# make lab                          JupyterLab on the notebooks
# make docs                         the site: build/site/index.html, for any static host
PYTHON ?= python3
# Small networks: more threads would cost more than they give, and outputs should not depend on their number.
ONE_THREAD = OMP_NUM_THREADS=1
README = README.md
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: table1 numbers benchmark test kill export notebooks readme lab docs clean
table1: .venv/installed
	@mkdir -p data/results
	.venv/bin/papermill nbs/table1.ipynb data/results/table1.ipynb --no-progress-bar --stdout-file - -p preset quick $(ARGS)
	@echo data/results/table1.ipynb

numbers: .venv/installed
	.venv/bin/python -m advdpnp numbers $(or $(PRESET),quick) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(PACK),--pack $(PACK))

benchmark: .venv/installed
	.venv/bin/jupyter nbconvert --to notebook --inplace --execute nbs/benchmark.ipynb
	.venv/bin/nbdev_clean

test: .venv/installed
	MPLBACKEND=agg $(ONE_THREAD) .venv/bin/nbdev_test --n_workers 2 --timing --skip_file_re '^[_.]|^(table|figure|benchmark)'
	$(ONE_THREAD) .venv/bin/python -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder

# A hundred kills at random moments, a minute or ten: the suite does with eight what this does.
kill: .venv/installed
	ADVDPNP_KILLS=$(or $(KILLS),100) $(ONE_THREAD) .venv/bin/python -m pytest -q tests/test_kills.py

# The package, and the stubs in which type checkers see methods that are added with @patch.
export: .venv/installed
	.venv/bin/nbdev_export
	.venv/bin/python nbs/_stubs.py

# Run pages and keep their outputs (tables, figures 2 to 6 and benchmark: name them with NB=), without what only scrolled by and of cells tagged no-output.
notebooks: export
	for nb in $(or $(NB),nbs/[0-9]*.ipynb nbs/figure1.ipynb nbs/cluster.ipynb nbs/evaluate_your_model.ipynb nbs/results.ipynb nbs/promises.ipynb nbs/index.ipynb); do \
	  $(ONE_THREAD) .venv/bin/jupyter nbconvert --to notebook --inplace --execute $$nb || exit 1; \
	  .venv/bin/python -c "import nbformat, sys; nb = nbformat.read(sys.argv[1], 4); [c.update(outputs=[o for o in c.outputs if o.get('name') != 'stderr' and 'no-output' not in c.metadata.get('tags', [])]) for c in nb.cells if c.cell_type == 'code']; nbformat.write(nb, sys.argv[1])" $$nb; \
	done
	.venv/bin/nbdev_clean
	$(MAKE) readme

readme: .venv/installed
	.venv/bin/jupyter nbconvert --to markdown --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags output-only --stdout nbs/index.ipynb | .venv/bin/python -c 'import re, sys; s = sys.stdin.read().replace("../data/", "data/"); s = re.sub(r"\(([0-9a-z_]*\.ipynb)\)", r"(nbs/\1)", s); s = re.sub(r"(?m)^```\n(?=(?:from|import) )", "```python\n", s); sys.stdout.write(re.sub(r"\n{3,}", "\n\n", s))' > $(README).new
	test -s $(README).new
	mv $(README).new $(README)

lab: .venv/installed
	.venv/bin/jupyter lab --notebook-dir nbs $(ARGS)

docs: .venv/installed
	.venv/bin/python nbs/_site/build.py

.venv/installed: requirements.txt pyproject.toml tests/torchvision_first.py Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "advdpnp needs Python 3.10 or newer, this is " + sys.version)'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	.venv/bin/python -m pip install --quiet --no-deps torchattacks==3.5.1 imagecorruptions-imaug==1.1.5  # the one asks for a version of requests that JupyterLab cannot have, the other for an OpenCV with windows
	.venv/bin/python -m pip install --quiet --no-deps --editable .
	.venv/bin/python -c "import shutil, sysconfig; p = sysconfig.get_path('purelib'); shutil.copy('tests/torchvision_first.py', p); open(p + '/torchvision_first.pth', 'w').write('import torchvision_first\n')"  # imports may then stand in any order
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
