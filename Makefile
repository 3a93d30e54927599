# make mix      sets up .venv and mixes an example picture with a prompt
# make test     sets up .venv and runs the whole test suite
# make page     builds an example page that looks inside a mix, and says where it is
# make notebook runs the walk-through notebook and stores its output in it
# make check    the tests of the algorithm and of parity with diffusers alone
# make mutants  puts single mistakes into the code and counts how many of them make check finds
# make lint     the style checks

PYTHON ?= python3
CHECK = $(addprefix tests/test_, attention.py modules.py parity.py scheduler.py pictures.py magicmix.py)

.PHONY: mix page notebook test check mutants lint

mix: .venv/ready
	.venv/bin/python magicmix.py "a tiger" --layout docs/layouts/trophy.png -o mix.png

page: .venv/ready
	.venv/bin/python -m lab.explain "a strawberry" --layout docs/layouts/castle.png -o page.png --page page.html

notebook: .venv/ready-dev
	.venv/bin/python -m lab.explain.notebook

test: .venv/ready-dev
	.venv/bin/python -m pytest -n 2

check: .venv/ready-dev
	.venv/bin/python -m pytest -n 2 $(CHECK)

mutants: .venv/ready-dev
	.venv/bin/python -m tests.mutants $(CHECK)

lint: .venv/ready-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
