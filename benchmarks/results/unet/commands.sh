# Makes the records of unet: bash benchmarks/results/unet/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/unet.yaml --output-dir runs/compare/unet --seeds 0 1 2 --arms \
  full \
  "importance@0.65 lr^0.5=--pruning.policy importance --pruning.budget 0.65 --optim.compensation 0.5" \
  "muon-importance@0.45 lr 6e-3=--pruning.policy importance --pruning.budget 0.45 --optim.name muon --optim.lr 6e-3 --optim.compensation 0.5" \
  "muon-importance@0.65 lr 6e-3=--pruning.policy importance --pruning.budget 0.65 --optim.name muon --optim.lr 6e-3 --optim.compensation 0.5" \
  "muon@0.714 lr 6e-3=--epochs 5 --optim.name muon --optim.lr 6e-3" \
  "shortened@0.571 lr*1.32=--epochs 4 --optim.lr 0.003968626966596886" \
  "shortened@0.714 lr*1.18=--epochs 5 --optim.lr 0.0035496478698597697"

python benchmarks/compare.py --config benchmarks/recipes/unet.yaml --output-dir runs/compare/unet --seeds 0 --arms \
  "full lr*0.5=--optim.lr 1.5e-3" \
  "full lr*2=--optim.lr 6e-3" \
  "muon-importance@0.65 lr 1.2e-2=--pruning.policy importance --pruning.budget 0.65 --optim.name muon --optim.lr 1.2e-2 --optim.compensation 0.5" \
  "muon-importance@0.65 lr 3e-3=--pruning.policy importance --pruning.budget 0.65 --optim.name muon --optim.lr 3e-3 --optim.compensation 0.5" \
  "muon@0.714 lr 1.2e-2=--epochs 5 --optim.name muon --optim.lr 1.2e-2"
