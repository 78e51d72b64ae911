.PHONY: test slow check format docs notebooks

test:  ## the laws and the programs, a few minutes
	pytest -n auto --dist worksteal

slow:  ## the README's own commands, on the images that ship with the package; the notebooks at full length
	pytest -m slow

check:  ## style and types
	ruff check .
	ruff format --check .
	pyright

notebooks:  ## execute them, and store their outputs
	for name in own_images masked_autoencoder own_loop; do folder=$$(mktemp -d) && cp docs/notebooks/$$name.ipynb $$folder && \
	(cd $$folder && PYTHONPATH=$(CURDIR) jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $$name.ipynb) && \
	mv $$folder/$$name.ipynb docs/notebooks && rm -r $$folder || exit 1; done

docs:  ## the site, in build/site; a warning is an error
	mkdocs build --strict

format:
	ruff check --fix .
	ruff format .
