.PHONY: test slow check format

test:  ## the laws and the programs, a few minutes
	pytest -n auto --dist worksteal

slow:  ## the README's own commands, on the images that ship with the package
	pytest -m slow

check:  ## style and types
	ruff check .
	ruff format --check .
	pyright

format:
	ruff check --fix .
	ruff format .
