# Makes the records of dit_x64: bash benchmarks/results/dit_x64/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/dit_x64.yaml --output-dir runs/compare/dit_x64 --data path/to/cifar10 --seeds 0 1 --arms \
  "muon-importance@0.5 lr 6e-3=--optim.name muon --optim.lr 6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.5" \
  "shortened@0.5 lr*4.00=--epochs 2 --optim.lr 8e-3"

python benchmarks/compare.py --config benchmarks/recipes/dit_x64.yaml --output-dir runs/compare/dit_x64 --data path/to/cifar10 --seeds 0 --arms \
  "b64@0.5 lr 5.6e-3=--epochs 2 --batch-size 64 --optim.lr 5.6e-3" \
  "full lr*4=--optim.lr 8e-3"
