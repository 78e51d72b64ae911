# Makes the records of dit_x8: bash benchmarks/results/dit_x8/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/dit_x8.yaml --output-dir runs/compare/dit_x8 --seeds 0 1 2 --arms \
  "full lr*4=--optim.lr 1.6e-2" \
  "muon-importance@0.35 lr 6e-3=--optim.name muon --optim.lr 6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.35" \
  "muon-importance@0.5 lr 6e-3=--optim.name muon --optim.lr 6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.5" \
  "shortened@0.5 lr*4.00=--epochs 5 --optim.lr 1.6e-2" \
  "shortened@0.7 lr*4.00=--epochs 7 --optim.lr 1.6e-2"

python benchmarks/compare.py --config benchmarks/recipes/dit_x8.yaml --output-dir runs/compare/dit_x8 --seeds 0 --arms \
  "b32@1 lr 1.1e-2=--epochs 10 --batch-size 32 --optim.lr 1.1e-2" \
  "full lr*0.5=--optim.lr 2e-3" \
  "full lr*2=--optim.lr 8e-3" \
  "full lr*8=--optim.lr 3.2e-2" \
  full \
  "importance-b32@0.65 lr^0.5=--batch-size 32 --optim.lr 1.1e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.65" \
  "muon-importance-b32@0.5 lr 6e-3=--batch-size 32 --optim.name muon --optim.lr 6e-3 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.5" \
  "muon-importance@0.35 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.35" \
  "muon-importance@0.5 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.5" \
  "muon@0.5 lr 1.2e-2=--epochs 5 --optim.name muon --optim.lr 1.2e-2" \
  "muon@0.7 lr 1.2e-2=--epochs 7 --optim.name muon --optim.lr 1.2e-2" \
  "shortened@0.5 lr*2.00=--epochs 5 --optim.lr 8e-3" \
  "shortened@0.5 lr*8.00=--epochs 5 --optim.lr 3.2e-2" \
  "shortened@0.7 lr*2.00=--epochs 7 --optim.lr 8e-3"
