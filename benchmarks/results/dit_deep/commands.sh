# Makes the records of dit_deep: bash benchmarks/results/dit_deep/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/dit_deep.yaml --output-dir runs/compare/dit_deep --seeds 0 1 2 --arms \
  "full lr*4=--optim.lr 1.6e-2" \
  "shortened@0.67 lr*4.00=--epochs 8 --optim.lr 1.6e-2" \
  "tread@1 lr*4=--model.route 0.5 --optim.lr 1.6e-2"

python benchmarks/compare.py --config benchmarks/recipes/dit_deep.yaml --output-dir runs/compare/dit_deep --images 0 --seeds 0 --arms \
  "shortened@0.67 lr*2.00=--epochs 8 --optim.lr 8e-3" \
  "shortened@0.67 lr*8.00=--epochs 8 --optim.lr 3.2e-2" \
  "tread@1 lr*2=--model.route 0.5 --optim.lr 8e-3" \
  "tread@1 lr*8=--model.route 0.5 --optim.lr 3.2e-2"
