# make mix    sets up .venv and mixes an example picture with a prompt
# make test   sets up .venv and runs the whole test suite
# make lint   the style checks

PYTHON ?= python3

.PHONY: mix test lint

mix: .venv/ready
	.venv/bin/python magicmix.py "a tiger" --layout docs/layouts/trophy.png -o mix.png

test: .venv/ready-dev
	.venv/bin/python -m pytest

lint: .venv/ready-dev
	.venv/bin/ruff check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
