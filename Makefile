.PHONY: test slow check format docs

test:  ## the laws and the programs, a few minutes
	pytest -n auto --dist worksteal

slow:  ## the README's own commands, on the images that ship with the package
	pytest -m slow

check:  ## style and types
	ruff check .
	ruff format --check .
	pyright

docs:  ## the site, in build/site; a warning is an error
	mkdocs build --strict

format:
	ruff check --fix .
	ruff format .
